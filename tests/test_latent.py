"""Latent diffusion: checkers that can fail, every released layout, files that are recognised or refused, and the small recipes

Official outputs of the U-Nets are too large for the repository and are checked by `python -m tests.parity FOLDER`; for their mutations a
golden is written by the package as it stands.
"""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from diffcourse import latent, layers
from diffcourse.core import CourseError, Draws, generator
from diffcourse.ddpm import Denoiser, Schedule
from diffcourse.openai_unet import randomise
from diffcourse.weights import layout
from tests import parity
from tests.helpers.golden import write_golden

GOLDEN = Path(__file__).parent / 'golden'
HERE = ['ldm_samplers', 'ldm_p_losses', 'sd2_v_prediction', 'sdunclip_noise_aug']
SIZES = dict(image_size=32, in_channels=4, out_channels=4, model_channels=64, attention_resolutions=[2], num_res_blocks=1,
             channel_mult=[1, 1], use_spatial_transformer=True, transformer_depth=1, context_dim=12, legacy=False)
KINDS = dict(sd1_unet=dict(SIZES, num_heads=4, use_checkpoint=False),
             sd2_unet=dict(SIZES, num_head_channels=16, use_linear_in_transformer=True),
             sd1_unet_upscaler=dict(SIZES, num_heads=2, num_classes=9, disable_self_attentions=[False, True]),
             sd2_unet_unclip=dict(SIZES, num_head_channels=32, num_classes='sequential', adm_in_channels=10))


@pytest.mark.parametrize('name', HERE)
def test_meets_official(name):
    v = parity.check(parity.Golden(GOLDEN / f'{name}.json'))
    got, _, wanted, *_ = v.note.split()
    assert v.word == 'passed' and got == wanted, parity.line(v)


def other_adams(original): return (*original[:3], (55 / 24, -59 / 24, 37 / 24, -10 / 24))
def one_guess(original): return ((1,), (1., 0.), (1., 0., 0.), (1., 0., 0., 0.))
def to_clean_data(original): return lambda s, n: s.steps(range(1, s.T + 1, s.T // n))
def from_zero(original): return lambda s, n: s.steps(range(0, s.T, s.T // n)[1:], final=float(s.alphas_cumprod[0]))
def whole_numbers(original):
    def even_times(s, n):
        path = original(s, n)
        path.table.t = path.table.t.round()
        return path
    return even_times
def second_order_to_the_end(original): return lambda d, path, x, **k: latent.dpm_2m(d, path, x, **k)
def own_first_weight(original): return lambda d: torch.cat([original(d)[:1] * 1.01, original(d)[1:]])
def ones(original): return lambda d: torch.ones(d.schedule.T)
def cos_last(original): return lambda t, dim: original(t, dim).roll(dim // 2, 1)
def not_standardised(original):
    def forward(self, z, level, noise):
        self.data_mean, self.data_std = self.data_mean * 0, self.data_std * 0 + 1
        return original(self, z, level, noise)
    return forward


@pytest.mark.parametrize('golden, where, name, change', [
    ('ldm_samplers', latent, 'ADAMS', other_adams), ('ldm_samplers', latent, 'ADAMS', one_guess),
    ('ldm_samplers', latent, 'latent_path', to_clean_data), ('ldm_samplers', latent, 'latent_path', from_zero),
    ('ldm_samplers', latent, 'even_times', whole_numbers), ('ldm_samplers', latent, 'dpm_solver', second_order_to_the_end),
    ('ldm_p_losses', latent, 'lvlb_weights', ones), ('ldm_p_losses', latent, 'lvlb_weights', own_first_weight),
    ('sd2_v_prediction', latent, 'latent_path', to_clean_data), ('sd2_v_prediction', latent, 'lvlb_weights', own_first_weight),
    ('sdunclip_noise_aug', latent, 'timestep_embedding', cos_last),
    ('sdunclip_noise_aug', latent.NoiseAugmentation, 'forward', not_standardised)], ids=lambda v: getattr(v, '__name__', str(v)))
def test_notices(golden, where, name, change, monkeypatch):
    monkeypatch.setattr(where, name, change(getattr(where, name)))
    assert parity.check(parity.Golden(GOLDEN / f'{golden}.json')).word == 'FAILED'


def test_the_schedule_is_that_of_the_files(tmp_path, monkeypatch):
    "Against plain arithmetic, and the check on it fails where the betas are evenly spaced themselves"
    config = dict(sd=[.00085, .012])
    β = torch.linspace(.00085 ** .5, .012 ** .5, 1000).double() ** 2
    ᾱ = (1 - β).cumprod(0)
    tensors = {'out/sd/alphas_cumprod': ᾱ.float(), 'out/sd/ddim50/timesteps': torch.arange(1, 1000, 20), 'out/sd/ddim30/timesteps':
               torch.arange(1, 1001, 33), 'out/sd/ddim50/alphas_prev': torch.cat([ᾱ[:1], ᾱ[1:962:20]])}
    (tmp_path / 'ldm_schedules.json').write_text(json.dumps(dict(name='ldm_schedules', config=config, rtol=1e-5, atol=1e-7)))
    save_file(tensors, tmp_path / 'ldm_schedules.safetensors')
    check = lambda: parity.check(parity.Golden(tmp_path / 'ldm_schedules.json'))
    assert check().word == 'passed', parity.line(check())
    monkeypatch.setattr(Schedule, 'scaled_linear', Schedule.linear)
    assert check().word == 'FAILED'


# -------------------------------------------------------------------------------------------------------------- the U-Net

@pytest.fixture(scope='module', params=list(KINDS))
def unet_golden(request, tmp_path_factory):
    folder, g, config = tmp_path_factory.mktemp('latent'), generator(0), KINDS[request.param]
    given = dict(x=torch.randn(2, 4, 8, 8, generator=g), timesteps=torch.tensor([7, 700]), context=torch.randn(2, 5, 12, generator=g))
    if 'adm_in_channels' in config: given['y'] = torch.randn(2, 10, generator=g)
    elif 'num_classes' in config: given['y'] = torch.tensor([3, 8])
    weights = parity.procedural(layout(latent.LatentUNet(**config)), 'salt/')
    return write_golden(folder, request.param, config, given, weights)[0]


def gate_first(original):
    def forward(self, x):
        gate, value = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)
    return forward


def tanh_gelu(original):
    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate, approximate='tanh')
    return forward


def words_first(original):
    def forward(self, x, context=None):
        x = x + self.attn2(self.norm2(x), context)
        x = x + self.attn1(self.norm1(x), None if self.self_attention else context)
        return x + self.ff(self.norm3(x))
    return forward


def deaf(original):
    def forward(self, x, context=None): return original(self, x, None if context is None else 0 * context)
    return forward


def no_input(original):
    def forward(self, x, context=None): return original(self, x, context) - x
    return forward


def twice_the_heads(original): return lambda channels, *a: 2 * original(channels, *a)
def columns_first(original):
    def forward(self, x, context=None): return original(self, x.mT, context).mT
    return forward


CHANGES = [(latent.GEGLU, 'forward', gate_first), (latent.GEGLU, 'forward', tanh_gelu), (latent.SpatialTransformer, 'forward', deaf),
           (latent.BasicTransformerBlock, 'forward', words_first), (latent.SpatialTransformer, 'forward', no_input),
           (latent, 'count_heads', twice_the_heads)]


@pytest.mark.parametrize('where, name, change', CHANGES, ids=lambda v: getattr(v, '__name__', str(v)))
def test_a_changed_network_is_noticed(unet_golden, where, name, change, monkeypatch):
    assert parity.check(parity.Golden(unet_golden)).word == 'passed'
    monkeypatch.setattr(where, name, change(getattr(where, name)))
    assert parity.check(parity.Golden(unet_golden)).word == 'FAILED'


def test_order_of_the_pixels_does_not_matter_to_a_transformer(monkeypatch):
    "No positions are given: only the convolutions around it know where a pixel is"
    net = randomise(latent.SpatialTransformer(64, 4, 1, 12), generator(0)).eval()
    x, c = torch.randn(2, 64, 4, 6, generator=generator(1)), torch.randn(2, 5, 12, generator=generator(2))
    with torch.no_grad(): torch.testing.assert_close(columns_first(latent.SpatialTransformer.forward)(net, x, c), net(x, c))


def test_norms_of_the_transformer():
    t = latent.SpatialTransformer(64, 4, 2, 12, linear=True)
    assert t.norm.eps == 1e-6 and {n.eps for b in t.transformer_blocks for n in (b.norm1, b.norm2, b.norm3)} == {1e-5}
    assert isinstance(t.proj_in, torch.nn.Linear) and len(t.transformer_blocks) == 2
    x = torch.randn(1, 64, 2, 2)
    assert torch.equal(t(x, torch.randn(1, 3, 12)), x)             # fresh, it changes nothing


def test_both_head_conventions_and_both_projections_can_agree():
    "SD 1 counts heads, SD 2 their channels; SD 1 projects with 1×1 convolutions, SD 2 with linear layers"
    one = randomise(latent.LatentUNet(**KINDS['sd1_unet']), generator(0)).eval()
    two = latent.LatentUNet(**KINDS['sd2_unet']).eval()
    two.load_state_dict({k: v.reshape(two.state_dict()[k].shape) for k, v in one.state_dict().items()})
    x, t, c = torch.randn(2, 4, 8, 8), torch.tensor([1, 500]), torch.randn(2, 5, 12)
    with torch.no_grad(): torch.testing.assert_close(one(x, t, c), two(x, t, c), rtol=1e-4, atol=1e-4)
    eight = latent.LatentUNet(**KINDS['sd1_unet'] | dict(num_heads=8)).eval()
    eight.load_state_dict(one.state_dict())
    with torch.no_grad(): assert (eight(x, t, c) - one(x, t, c)).abs().max() > 1e-3


@pytest.mark.parametrize('given, word', [(dict(), 'context'), (dict(context=torch.zeros(2, 5, 11)), '12'),
                                         (dict(context=torch.zeros(3, 5, 12)), '2 pictures')])
def test_contexts_are_checked(given, word):
    net = latent.LatentUNet(**KINDS['sd1_unet'])
    with pytest.raises(CourseError, match=word): net(torch.zeros(2, 4, 8, 8), torch.tensor([1, 2]), **given)


def test_vectors_are_checked():
    net = latent.LatentUNet(**KINDS['sd2_unet_unclip'])
    with pytest.raises(CourseError, match='vectors y'):
        net(torch.zeros(2, 4, 8, 8), torch.tensor([1, 2]), torch.zeros(2, 5, 12), torch.zeros(2, 9))


def test_shares_of_words_add_up_and_make_the_answer():
    layer = randomise(latent.CrossAttention(16, 12, 4), generator(0)).eval()
    x, words = torch.randn(2, 9, 16, generator=generator(1)), torch.randn(2, 5, 12, generator=generator(2))
    with torch.no_grad():
        w, v = layer.weights(x, words), layer.to_v(words).unflatten(-1, (4, -1)).transpose(1, 2)
        torch.testing.assert_close(layer.to_out((w @ v).transpose(1, 2).flatten(2)), layer(x, words))
    assert w.shape == (2, 4, 9, 5) and torch.allclose(w.sum(-1), torch.ones(2, 4, 9))


def test_maps_are_noted_while_the_block_lasts():
    net, x, t, c = latent.LatentUNet(**KINDS['sd1_unet']).eval(), torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.randn(2, 5, 12)
    with torch.no_grad(), latent.attention_maps(net) as maps: net(x, t, c)
    net(x, t, c)
    assert len(maps) == 4 and {m.shape for m in maps} == {(2, 4, 16, 5)}
    found = latent.word_maps(maps, 8)
    assert found.shape == (2, 5, 8, 8) and torch.allclose(found.sum(1), torch.ones(2, 8, 8))


# ------------------------------------------------------------------------------------------------------------- the words

BERT = dict(num_tokens=30, max_seq_len=9, dim=32, depth=2, heads=2)


def test_layout_of_the_word_encoder():
    with torch.device('meta'): net = latent.BERTEncoder(30522, 77, 1280, 32)
    assert layout(net) == layout(layers.official_schema('ldm-txt2img-1p4B/bert_transformer')['state_dict'])


def tanh(original): return lambda x, **how: original(x, approximate='tanh')
def causal(original): return lambda q, k, v, heads: original(q, k, v, heads, causal=True)
def wider_heads(original): return lambda q, k, v, heads: original(q, k, v, 1)


@pytest.mark.parametrize('where, name, change', [(F, 'gelu', tanh), (latent, 'attention', causal), (latent, 'attention', wider_heads)],
                         ids=lambda v: getattr(v, '__name__', str(v)))
def test_a_changed_word_encoder_is_noticed(where, name, change, tmp_path, monkeypatch):
    tokens, weights = torch.randint(0, 30, (2, 9), generator=generator(0)), parity.procedural(layout(latent.BERTEncoder(**BERT)), 'salt/')
    path, _ = write_golden(tmp_path, 'ldm_bert_xtransformer', BERT, dict(tokens=tokens), weights)
    assert parity.check(parity.Golden(path)).word == 'passed'
    monkeypatch.setattr(where, name, change(getattr(where, name)))
    assert parity.check(parity.Golden(path)).word == 'FAILED'


# ------------------------------------------------------------------------------------------------------- released files

@pytest.mark.parametrize('name', latent.released())
def test_layout(name):
    "Every released denoiser, key for key, without its memory; `from_official` itself compares"
    model = latent.from_official(name.replace('/', '__'), 'meta')
    assert sum(p.numel() for p in model.parameters()) == layers.official_schema(name)['n_params']
    d = latent.official_denoiser(model)
    assert d.schedule.T == 1000 and d.parameterization == ('v' if name.split('/')[0] in V_MODELS else 'eps')


V_MODELS = {'sd-v2-v', 'sd-v21-unclip-h', 'sd-v21-unclip-l', 'sd-x4-upscaling'}


def test_there_are_twenty_one_of_them(): assert len(latent.released()) == 21 and 'ldm-cin256-v2/unet' in latent.released()


def test_unknown_name():
    with pytest.raises(CourseError, match='sd-v3/unet.*known: .*sd-v1/unet'): latent.from_official('sd-v3/unet')


def whole(name):
    "A released file of a whole model, without memory"
    state = {k: torch.empty(s, device='meta') for k, s in layers.official_schema(name)['state_dict'].items()}
    return {latent.PREFIX + k: v for k, v in state.items()} | {'first_stage_model.encoder.conv_in.weight': torch.empty(1),
                                                               'betas': torch.empty(1000), 'model_ema.decay': torch.empty(1)}


@pytest.mark.parametrize('file, holds, want', [('v1-5-pruned.ckpt', 'sd-v1/unet', 'sd-v1/unet'),
                                              ('v2-1_512-ema-pruned.ckpt', 'sd-v2-base/unet', 'sd-v2-base/unet'),
                                              ('v2-1_768-ema-pruned.ckpt', 'sd-v2-base/unet', 'sd-v2-v/unet'),
                                              ('sd21-unclip-l.ckpt', 'sd-v21-unclip-l/unet', 'sd-v21-unclip-l/unet')])
def test_files_are_recognised(file, holds, want, monkeypatch):
    build = latent.from_official
    monkeypatch.setattr(latent, 'from_official', lambda name: build(name, 'meta'))
    monkeypatch.setattr(latent, 'read_official', lambda path: whole(holds))
    monkeypatch.setattr(latent, 'load_strict', lambda model, state, where: model if layout(model) == layout(state) else None)
    model = latent.load_official(file)
    assert model.official == want and not model.training


def test_a_damaged_file_is_refused(monkeypatch):
    state = whole('sd-v1/unet')
    del state[latent.PREFIX + 'out.2.bias']
    monkeypatch.setattr(latent, 'read_official', lambda path: state)
    with pytest.raises(CourseError, match='(?s)no released model.*sd-v1/unet.*out.2.bias'): latent.load_official('x.ckpt')


# -------------------------------------------------------------------------------------------------------- the small recipes

CAPTIONS = ['a red circle on a white background', 'a blue square on a white background']


def small():
    "A network with random numbers everywhere"
    return randomise(latent.small_unet('shapes'), generator(0)).eval()


def test_sizes():
    n = {k: sum(p.numel() for p in latent.small_unet(k).parameters()) for k in latent.STAGES}
    assert n == dict(emoji=956_964, shapes=688_884)


def test_clouds_are_the_first_stage_s():
    stage, x = latent.stage_of('shapes'), torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    mean, std = latent.clouds(stage, x, size=2).chunk(2, 1)
    q = stage.encode(x / 127.5 - 1)
    torch.testing.assert_close(mean, q.mean * stage.scale, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(std, q.std * stage.scale, rtol=1e-3, atol=1e-4)


def test_words_are_those_of_clip():
    found = latent.read_words([*CAPTIONS, ''], 'shapes', size=2)
    want = latent.world('shapes').read([*CAPTIONS, ''])['text_enc']
    assert found.dtype == torch.float16 and found.shape == (3, 24, 96)
    torch.testing.assert_close(found.float(), want, rtol=1e-2, atol=5e-3)


def batch():
    x = torch.randn(6, 8, 8, 8, generator=generator(1))
    return dict(x=torch.cat([x[:, :4], x[:, 4:].exp()], 1), context=latent.read_words(CAPTIONS * 3, 'shapes'))


def test_the_loss_by_hand():
    "Drawn latents, v, and the weight min(1, 5 (1 − ᾱ)), in the order of the draws"
    net, d, b = small(), latent.latent_denoiser(None), batch()
    got = latent.loss_latent(d, 'shapes', p=0.)(net, b, Draws(0, 3))
    draws = Draws(0, 3)
    z = b['x'][:, :4] + b['x'][:, 4:] * draws.normal(6, 4, 8, 8)
    draws.uniform(6)
    t, noise = draws.integers(1000, 6), draws.normal(6, 4, 8, 8)
    a = d.schedule.alphas_cumprod[t].float()[:, None, None, None]
    v = a.sqrt() * noise - (1 - a).sqrt() * z
    wrong = (net(a.sqrt() * z + (1 - a).sqrt() * noise, t, b['context'].float()) - v) ** 2
    torch.testing.assert_close(got, (wrong * (5 * (1 - a)).clamp(max=1)).mean(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_dropped_caption_is_the_empty_one():
    net, b = small(), batch()
    b['context'] = 30 * b['context']
    loss = lambda p, b: float(latent.loss_latent(latent.latent_denoiser(None), 'shapes', p=p)(net, b, Draws(0, 0)))
    silent = dict(b, context=latent.read_words([''] * 6, 'shapes'))
    assert abs(loss(1., b) - loss(0., silent)) < 1e-4 < 1e-3 < abs(loss(0., b) - loss(1., b))


def test_only_v_is_trained():
    with pytest.raises(CourseError, match='trains v, not eps'): latent.loss_latent(Denoiser(None, Schedule.linear()), 'shapes')


def test_pictures_for_captions():
    draw = latent.ldm_shapes.sample
    x = draw(small(), 3, 5, steps=2, prompt=CAPTIONS)
    assert x.shape == (3, 3, 32, 32) and x.abs().max() <= 1
    assert torch.equal(x, draw(small(), 3, 5, steps=2, prompt=CAPTIONS))
    assert not torch.equal(x, draw(small(), 3, 6, steps=2, prompt=CAPTIONS))
    assert not torch.equal(x[0], draw(small(), 1, 5, steps=2, prompt=CAPTIONS[1])[0])


def test_a_negative_prompt_takes_the_place_of_the_empty_caption():
    z = lambda **how: latent.text_to_latents(small(), CAPTIONS[:1], 'shapes', 1, steps=2, **how)
    assert torch.equal(z(), z(avoid='')) and not torch.allclose(z(), z(avoid=CAPTIONS[1]), atol=1e-3)
    torch.testing.assert_close(z(avoid=CAPTIONS[0], scale=7.), z(scale=1.), rtol=1e-3, atol=1e-3)   # away from itself: no guidance


def test_training_on_untrained_latents_is_refused(monkeypatch):
    monkeypatch.setattr(latent, 'shipped', lambda name: False)
    with pytest.raises(CourseError, match='kl_shapes has no weights yet'): latent._told('shapes', 'laptop', None, None)


def test_unknown_first_stage():
    with pytest.raises(CourseError, match='emoji or shapes'): latent.stage_of('faces')


# --------------------------------------------------------------------------------------------- starting from a picture

def test_forgetting_nothing_and_everything():
    path, x0 = latent.latent_path(Schedule.scaled_linear(), 10), torch.randn(2, 4, 3, 3, generator=generator(0))
    noise = torch.randn(2, 4, 3, 3, generator=generator(1))
    little, much = (latent.stochastic_encode(path, x0, n, noise) for n in (0, 9))
    assert (little - x0).abs().max() < .2 and (much - noise).abs().max() < .6
    for n in (-1, 10):
        with pytest.raises(CourseError, match=r'n must lie in \[0, 10\)'): latent.stochastic_encode(path, x0, n, noise)


@pytest.mark.parametrize('n', [0, 501])
def test_steps_that_the_released_code_cannot_walk(n):
    with pytest.raises(CourseError, match='steps must lie in'): latent.latent_path(Schedule.scaled_linear(), n)


@torch.no_grad()
def test_a_walk_from_a_given_start():
    "From the noise that sampling would draw: the same picture; from the clean end of the path: nearly the start itself"
    net, how = small(), dict(captions=CAPTIONS, kind='shapes', scale=2.)
    z = latent.text_to_latents(net, seed=5, steps=4, **how)
    start = torch.randn(2, 4, 8, 8, generator=generator(5))
    torch.testing.assert_close(latent.text_to_latents(net, steps=4, start=start, **how), z)
    d = latent.latent_denoiser(None)
    x0, last = torch.randn(2, 4, 8, 8, generator=generator(6)), d.schedule.steps([0])
    assert (latent.text_to_latents(net, steps=last, start=x0, **how) - x0).abs().max() < .3


def test_samplers_take_the_place_of_ddim():
    net = small()
    a, b = (latent.text_to_latents(net, CAPTIONS, 'shapes', 1, steps=6, sampler=s) for s in (latent.plms, latent.dpm_solver))
    assert a.shape == b.shape == (2, 4, 8, 8) and not torch.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize('n', [1, 3, 9, 27, 37, 50, 500])
def test_every_number_of_steps_stays_on_the_table(n):
    "1000 // n divides 999 for some n; the released code would then step to timestep 1000, which there is not"
    t = latent.latent_path(Schedule.scaled_linear(), n).table.t
    assert t[0] == 1 and t[-1] < 1000 and len(t) >= min(n, 500)
