"""unCLIP: checkers of Karlo's networks that can fail, files that load or are refused by name, and faults of the whole

The official outputs of the prior lie in tests/golden; the decoder's and the upsampler's are too large for the repository and are checked by
`python -m tests.parity FOLDER`. For the mutations of the decoder a golden is written by the package as it stands.
"""
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffcourse import dalle2, layers, priors, unclip
from diffcourse.core import CourseError, generator
from diffcourse.openai_unet import SuperResModel, randomise
from diffcourse.weights import layout
from tests import parity
from tests.helpers.golden import write_golden

GOLDEN = Path(__file__).parent / 'golden'
PRIOR = dict(text_ctx=4, xf_width=32, xf_layers=1, xf_heads=4, xf_final_ln=True, clip_dim=16)
DECODER = dict(text_ctx=4, xf_width=24, in_channels=3, model_channels=32, out_channels=6, num_res_blocks=1, attention_resolutions=[2],
               dropout=.1, channel_mult=[1, 1], num_heads=-1, num_head_channels=16, num_heads_upsample=-1, use_scale_shift_norm=True,
               resblock_updown=True, clip_dim=16, clip_emb_mult=4, clip_emb_type='image', clip_emb_drop=.1)
SR = dict(in_channels=3, model_channels=32, out_channels=3, num_res_blocks=1, attention_resolutions=[], dropout=0., channel_mult=[1],
          resblock_updown=True, use_middle_attention=False)


def test_the_official_prior_and_its_guided_loop():
    v = parity.check(parity.Golden(GOLDEN / 'karlo_prior.json'))
    assert v.word == 'passed', v


def no_mask(original):
    def forward(self, x, mask=None, causal=False, memory=None): return original(self, x, None, causal, memory)
    return forward


def not_causal(original):
    def forward(self, x, mask=None, causal=False, memory=None): return original(self, x, mask, False, memory)
    return forward


def other_order(original): return lambda t, dim, *a, **k: original(t, dim, *a, **k).roll(dim // 2, 1)


@pytest.mark.parametrize('owner, name, change', [(priors.Block, 'forward', no_mask), (priors.Block, 'forward', not_causal),
                                                 (unclip, 'timestep_embedding', other_order)], ids=lambda v: getattr(v, '__name__', str(v)))
def test_a_changed_prior_is_noticed(owner, name, change, monkeypatch):
    monkeypatch.setattr(owner, name, change(getattr(owner, name)))
    assert parity.check(parity.Golden(GOLDEN / 'karlo_prior.json')).word == 'FAILED'


def test_a_loop_without_its_clamp_or_with_another_variance_is_noticed(monkeypatch):
    plain = unclip.prior_denoiser
    monkeypatch.setattr(unclip, 'prior_denoiser', lambda *a: plain(*a).guided(x0=lambda x: x.clamp(-.1, .1)))
    assert parity.check(parity.Golden(GOLDEN / 'karlo_prior.json')).word == 'FAILED'


# ------------------------------------------------------------------------------------------------------------- the decoder

@pytest.fixture(scope='module')
def decoder_golden(tmp_path_factory):
    folder, g = tmp_path_factory.mktemp('karlo'), generator(0)
    net = unclip._build(DECODER)
    weights = parity.procedural(layout(net), 'salt/')
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    given = dict(x=torch.randn(2, 3, 16, 16, generator=g), timesteps=torch.tensor([7, 700]), y=torch.randn(2, 16, generator=g),
                 txt_feat=torch.randn(2, 16, generator=g), txt_feat_seq=torch.randn(2, 4, 16, generator=g), mask=mask)
    return write_golden(folder, 'karlo_decoder', DECODER, given, weights)[0]


def test_unchanged_decoder_passes(decoder_golden): assert parity.check(parity.Golden(decoder_golden)).word == 'passed'


def token_by_token(self, x, timesteps, y, txt_feat, txt_feat_seq, mask):
    tokens = self.clip_tok_proj(y).unflatten(1, (self.tokens, -1))
    context = torch.cat([tokens, self.text_seq_proj(txt_feat_seq)], 1), torch.nn.functional.pad(mask, (self.tokens, 0), value=True)
    return unclip.UNetModel.forward(self, x, timesteps, context=context, extra=self.clip_emb(y) + self.text_feat_proj(txt_feat))


def text_is_seen_in_full(self, x, timesteps, y, txt_feat, txt_feat_seq, mask):
    return unclip.UnCLIPDecoder.whole(self, x, timesteps, y, txt_feat, txt_feat_seq, torch.ones_like(mask))


def deaf_time(self, x, timesteps, y, txt_feat, txt_feat_seq, mask):
    return unclip.UnCLIPDecoder.whole(self, x, timesteps, y, 0 * txt_feat, txt_feat_seq, mask)


@pytest.mark.parametrize('wrong', [token_by_token, text_is_seen_in_full, deaf_time], ids=lambda f: f.__name__)
def test_a_changed_decoder_is_noticed(decoder_golden, wrong, monkeypatch):
    monkeypatch.setattr(unclip.UnCLIPDecoder, 'whole', unclip.UnCLIPDecoder.forward, raising=False)
    monkeypatch.setattr(unclip.UnCLIPDecoder, 'forward', wrong)
    assert parity.check(parity.Golden(decoder_golden)).word == 'FAILED'


# ------------------------------------------------------------------------------------------------------------------- files

@pytest.fixture
def tiny_karlo(monkeypatch):
    "Karlo's three layouts at a size that a test can load"
    configs = {'karlo__prior': PRIOR, 'karlo__decoder': DECODER, 'karlo__sr_each_of_two': SR}
    fake = {k: dict(config=c, state_dict={n: list(s) for n, s in layout(unclip._build(c)).items()}) for k, c in configs.items()}
    monkeypatch.setattr(layers, '_schemas', lambda: fake)
    return {k.split('__')[1]: randomise(unclip._build(c), generator(1)) for k, c in configs.items()}


def test_real_layouts_have_the_published_sizes():
    sizes = {n: sum(p.numel() for p in unclip.from_official(n, 'meta').parameters()) for n in unclip.released()}
    assert sizes == {'karlo/decoder': 893_318_086, 'karlo/prior': 1_022_028_544, 'karlo/sr_each_of_two': 691_579_523}


@pytest.mark.parametrize('part', ['prior', 'decoder', 'sr_each_of_two'])
@pytest.mark.parametrize('form', ['plain', 'prefix', 'checkpoint'])
def test_a_released_file_loads(tiny_karlo, part, form, tmp_path):
    state = tiny_karlo[part].state_dict()
    if form != 'plain': state = {f'model.{k}': v for k, v in state.items()}
    path = tmp_path / ('a.ckpt' if form == 'checkpoint' else 'a.safetensors')
    if form == 'checkpoint': torch.save(dict(state_dict=state, epoch=3), path)
    else: save_file({k: v.contiguous() for k, v in state.items()}, path)
    net = unclip.load_official(path)
    assert net.official == f'karlo/{part}' and not net.training
    assert all(v.equal(tiny_karlo[part].state_dict()[k]) for k, v in net.state_dict().items())


def test_the_upsamplers_file_gives_both_networks(tiny_karlo, tmp_path):
    a, b = (randomise(SuperResModel(**{k: tuple(v) if isinstance(v, list) else v for k, v in SR.items()}), generator(s)) for s in (0, 1))
    both = unclip.TwoStage(a, b)
    save_file({k: v.contiguous() for k, v in both.state_dict().items()}, tmp_path / 'sr.safetensors')
    net = unclip.load_official(tmp_path / 'sr.safetensors')
    assert isinstance(net, unclip.TwoStage)
    x, small, last = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8), torch.zeros(1)
    with torch.no_grad():
        assert net(x, last, small).equal(b.eval()(x, last, small)) and net(x, last + 5, small).equal(a.eval()(x, last + 5, small))


def test_a_wrong_file_is_named_by_its_first_keys(tiny_karlo, tmp_path):
    state = tiny_karlo['prior'].state_dict()
    state['prd_embedding'] = state.pop('prd_emb')
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / 'x.safetensors')
    with pytest.raises(CourseError, match=r'no released model of karlo. Nearest is karlo/prior; missing: prd_emb; unknown: prd_embedding'):
        unclip.load_official(tmp_path / 'x.safetensors')
    with pytest.raises(CourseError, match="no released network of Karlo"): unclip.from_official('karlo/everything')


# ------------------------------------------------------------------------------------------------------- vectors and pictures

def test_bad_input_is_named():
    net = unclip.PriorTransformer(**PRIOR)
    with pytest.raises(CourseError, match='4 positions, got 3 words'):
        net(torch.randn(2, 16), torch.zeros(2), torch.randn(2, 16), torch.randn(2, 3, 16), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(CourseError, match=r'axes must lie in \[1, 8\]'): unclip.Buckets(8, 9, 4)
    with pytest.raises(CourseError, match='3 embeddings do not fill 4 buckets'): unclip.Buckets(8, 2, 4).fit(torch.randn(3, 8))
    with pytest.raises(CourseError, match='no world'): dalle2.world('paintings')


def test_buckets_do_not_depend_on_the_direction_of_eigenvectors(monkeypatch):
    z = torch.randn(500, 6, generator=generator(0)) * torch.arange(1., 7.)
    eigh = torch.linalg.eigh
    one = unclip.Buckets(6, 3, 8).fit(z)
    monkeypatch.setattr(torch.linalg, 'eigh', lambda m: (eigh(m)[0], -eigh(m)[1]))
    other = unclip.Buckets(6, 3, 8).fit(z)
    assert one.encode(z).equal(other.encode(z)) and one.decode(one.encode(z)).allclose(other.decode(other.encode(z)))


@pytest.fixture(scope='module')
def whole():
    w = dalle2.world('shapes')
    parts = [randomise(f('shapes'), generator(k)).eval() for k, f in enumerate((dalle2.small_decoder, dalle2.small_prior))]
    return dalle2.DallE2(w, *parts)


def test_zero_noise_gives_the_picture_back_and_more_steps_do_it_better():
    from diffcourse import data
    from diffcourse.core import to_float
    from diffcourse.weights import shipped
    if not shipped('unclip_decoder_shapes'): pytest.skip('needs a trained decoder')
    trained = dalle2.dalle2('shapes')
    x = data.shapes(2, seed=3, things=(1,)).images
    error = {}
    for steps in (10, 40):
        z, x_T = trained.invert(x, steps)
        error[steps] = float((trained.decode(z, x_T=x_T, scale=1., steps=steps) - to_float(x)).square().mean())
    other = trained.decode(z, seed=1, scale=1., steps=40)
    assert error[40] < error[10] < .1 * float((other - to_float(x)).square().mean()) + .03


def test_the_parts_agree_about_shapes_and_seeds(whole):
    captions = ['a large red circle', '']
    a, b = (whole.imagine(captions, seed=5, steps=2) for _ in range(2))
    assert a.equal(b) and a.shape == (2, 3, 32, 32) and a.abs().max() <= 1
    assert not a.equal(whole.imagine(captions, seed=6, steps=2))
    with pytest.raises(CourseError, match='ar prior of shapes is not trained: diffcourse train unclip_ar_prior_shapes'): whole.embed(captions, prior='ar')
    with pytest.raises(CourseError, match='none of diffusion, ar, none'): whole.embed(captions, prior='best')
    with pytest.raises(CourseError, match='1 captions for 2 vectors'): whole.decode(torch.randn(2, 64), ['one'])
    with pytest.raises(CourseError, match='n must be at least 2'): whole.interpolate(a[0], a[1], 1)


def test_edits_start_at_the_picture_and_move_towards_the_difference(whole):
    text = whole.world.read(['a large red circle', 'a large blue circle'])['text_emb']
    seen = []
    whole_decode = dalle2.DallE2.decode
    try:
        dalle2.DallE2.decode = lambda self, z, *a, **k: seen.append(z)
        image = torch.zeros(3, 32, 32)
        whole.rewrite(image, 'a large red circle', 'a large blue circle', (0., .3, .6))
    finally: dalle2.DallE2.decode = whole_decode
    z, way = seen[0], torch.nn.functional.normalize(text[1] - text[0], dim=0)
    assert torch.allclose(z[0], whole.world.look(image[None])[0], atol=1e-5) and torch.allclose(z.norm(dim=1), torch.ones(3), atol=1e-5)
    assert (z @ way).diff().min() > 0
