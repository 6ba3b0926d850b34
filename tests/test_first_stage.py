"""First stages: official numbers and layouts, scale factor, critic, files, bad input, what is shipped.

The official small goldens are too many megabytes for the repository; the released size lies in tests/golden and every one is checked by
`python -m tests.parity FOLDER`. Here each checker is seen failing when one thing in the code is changed, on goldens that the code itself wrote.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffcourse import extractors, first_stage, layers, unet, vae
from diffcourse.core import CourseError, Draws, generator
from diffcourse.first_stage import AutoencoderKL, Contested, PatchGAN, VQModel, contested_loss, small_stage, stage_loss
from diffcourse.train import RECIPES, Trainer
from diffcourse.weights import layout, layout_differences, load_card, load_weights, save_weights, shipped
from tests import parity
from tests.helpers.golden import one, write_golden

SMALL = dict(double_z=True, z_channels=4, resolution=16, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[8], dropout=0.)
CONFIGS = {
    'autoencoder_kl': dict(ddconfig=SMALL, embed_dim=3),
    'eps_autoencoder_kl': dict(ddconfig=SMALL | dict(ch_mult=[1], attn_resolutions=[]), embed_dim=4),
    'vqmodel': dict(ddconfig=SMALL | dict(double_z=False), n_embed=32, embed_dim=3, beta=.25),
    'vqgan_discriminator': dict(input_nc=3, ndf=16, n_layers=2)}
KINDS = {'vqmodel': VQModel, 'vqgan_discriminator': PatchGAN}


def draw(*shape, seed=0): return torch.randn(*shape, generator=generator(seed))


def given(name):
    "Inputs of a golden"
    if name == 'vqgan_discriminator':
        return {k: draw(*shape, seed=i) for i, (k, shape) in enumerate(dict(real=(2, 3, 32, 32), fake=(2, 3, 32, 32), grad_nll=(3, 8), grad_g=(3, 8)).items())}
    out = {'x': draw(2, 3, 16, 16).tanh()}
    if name != 'vqmodel': out |= {'z': draw(2, CONFIGS[name]['embed_dim'], 8, 8, seed=1)}
    if name == 'autoencoder_kl': out |= {'noise': draw(2, 3, 8, 8, seed=2)}
    return out


def write(folder, name):
    "A golden of this name made by the code as it is"
    inputs, net = given(name), KINDS.get(name, AutoencoderKL)(**CONFIGS[name])
    weights = parity.procedural(layout(net), 'salt/')
    weights |= {k: v for k, v in net.state_dict().items() if k not in weights}   # counters
    if name.startswith('eps'): weights = {k: v * (1e-3 if 'norm' not in k else 1) for k, v in weights.items()}
    write_golden(folder, name, CONFIGS[name], inputs, weights)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('golden')
    for name in CONFIGS: write(path, name)
    return path


@pytest.mark.parametrize('name', CONFIGS)
def test_unchanged_code_passes(folder, name): assert one(folder, name).word == 'passed'


def test_released_size():
    "83.7 million procedural weights under Stable Diffusion's names, in a process of its own"
    v, = parity.run(only='full__sd-v1_vae')
    assert v.word == 'passed', parity.line(v)


# Each entry: the golden that must notice, and a change (module or class, attribute, replacement given the original).

def symmetric(original): return lambda self, x: F.conv2d(x, self.conv.weight, self.conv.bias, 2, 1)


def other_epsilon(original):
    def norm(channels, eps=1e-5, groups=32): return original(channels, 1e-5, groups)
    return norm


def no_middle_attention(original):
    def through(mid, h): return mid.block_2(mid.block_1(h))
    return through


def no_level_attention(original):
    def through(level, h):
        for block in level.block: h = block(h)
        return h
    return through


def two_heads(original): return lambda q, k, v, heads=1, **more: original(q, k, v, 2, **more)


def halves_swapped(original):
    def init(self, parameters): original(self, parameters.roll(parameters.shape[1] // 2, 1))
    return init


def mean_kl(original): return lambda self, other=None: self.kl_terms(other).flatten(1).mean(1)


def smooth_upsampling(original): return lambda self, x: self.conv(F.interpolate(x, scale_factor=2., mode='bilinear'))


def no_codebook(original): return lambda self, z, quantise=True: original(self, z, False)


def exact_latents(original): return lambda self, x, noise=None: self.encode(x).z


def steeper(original): return lambda self, x: F.leaky_relu(x, .1)


def not_halved(original): return lambda *a: 2 * original(*a)


def without_share(original): return lambda error, critic, share=.8: original(error, critic, 1.)


MUTATIONS = {
    'symmetric padding': ('autoencoder_kl', layers.Downsample, 'forward', symmetric),
    'eps of the last norm': ('eps_autoencoder_kl', first_stage, 'group_norm', other_epsilon),
    'eps of the blocks': ('eps_autoencoder_kl', unet, 'group_norm', other_epsilon),
    'no attention in the middle': ('autoencoder_kl', first_stage, '_through_middle', no_middle_attention),
    'no attention in levels': ('autoencoder_kl', first_stage, '_pass', no_level_attention),
    'two heads': ('vqmodel', unet, 'attention', two_heads),
    'log-variances first': ('autoencoder_kl', vae.DiagonalGaussian, '__init__', halves_swapped),
    'mean instead of sum': ('autoencoder_kl', vae.DiagonalGaussian, 'kl', mean_kl),
    'bilinear upsampling': ('vqmodel', layers.Upsample, 'forward', smooth_upsampling),
    'decoding without codebook': ('vqmodel', VQModel, 'decode', no_codebook),
    'latents after the codebook': ('vqmodel', VQModel, 'latents', exact_latents),
    'slope of the leak': ('vqgan_discriminator', nn.LeakyReLU, 'forward', steeper),
    'losses not halved': ('vqgan_discriminator', first_stage, 'critic_loss', not_halved),
    'share left out': ('vqgan_discriminator', first_stage, 'adaptive_weight', without_share)}


@pytest.mark.parametrize('what', MUTATIONS)
def test_checkers_notice(folder, monkeypatch, what):
    name, where, attribute, change = MUTATIONS[what]
    monkeypatch.setattr(where, attribute, change(getattr(where, attribute)))
    assert one(folder, name).word == 'FAILED', what


# ------------------------------------------------------------------------------------------------------------ layouts, files

@pytest.mark.parametrize('name', first_stage.released())
def test_released_layouts(name):
    net = first_stage.from_official(name, 'meta')
    assert not layout_differences(net, layers.official_schema(name)['state_dict']) and net.official == name


def test_all_released_first_stages_are_known():
    assert len(first_stage.released()) == 20
    assert {first_stage.scale_of(n) for n in first_stage.released()} == {1., .18215, .08333}
    assert first_stage.scale_of('sd-v1__first_stage_AutoencoderKL') == .18215


@pytest.fixture
def tiny_release(monkeypatch):
    "A released model that is small enough to be written to disk"
    net = AutoencoderKL(**CONFIGS['autoencoder_kl'])
    monkeypatch.setattr(first_stage, 'released', lambda: ['sd-tiny/first_stage_AutoencoderKL'])
    monkeypatch.setattr(layers, 'official_schema', lambda name: dict(config=CONFIGS['autoencoder_kl'], state_dict=layout(net)))
    monkeypatch.setattr(first_stage, 'which_release', lambda state, where, names: names[0])
    return net


@pytest.mark.parametrize('prefix', ['', 'first_stage_model.'])
def test_files_of_both_kinds(tiny_release, tmp_path, prefix):
    more = {'loss.logvar': torch.zeros(()), 'model_ema.decay': torch.ones(())} if not prefix else {'model.diffusion_model.out.2.bias': torch.ones(3),
                                                                                                  'betas': torch.ones(5)}
    torch.save({'state_dict': {prefix + k: v for k, v in tiny_release.state_dict().items()} | more, 'epoch': 3}, tmp_path / 'a.ckpt')
    got = first_stage.load_official(tmp_path / 'a.ckpt')
    assert all(v.equal(tiny_release.state_dict()[k]) for k, v in got.state_dict().items())
    assert got.scale == .18215 and not got.training and got.official.startswith('sd-tiny')


def test_a_file_with_a_key_too_few_is_refused(tiny_release, tmp_path):
    state = tiny_release.state_dict()
    del state['quant_conv.bias']
    torch.save(state, tmp_path / 'a.pt')
    with pytest.raises(CourseError, match='quant_conv.bias'): first_stage.load_official(tmp_path / 'a.pt')


# ---------------------------------------------------------------------------------------------------------------- behaviour

def test_beta_sits_where_the_released_models_have_it():
    "Its place shows in gradients only, which the golden vqgan_vector_quantizer checks"
    assert VQModel(**CONFIGS['vqmodel']).quantize.legacy and not small_stage(8, (1, 2), 8).quantize.legacy


def test_scale_is_stored_only_where_it_is_measured(tmp_path):
    own, fixed = small_stage(8), AutoencoderKL(**CONFIGS['autoencoder_kl'], scale=.5)
    assert 'scale' in own.state_dict() and 'scale' not in fixed.state_dict()
    own.scale.fill_(1.75)
    save_weights(tmp_path / 'own', own, dtype='int8')
    assert float(load_weights(tmp_path / 'own.safetensors', small_stage(8)).scale) == 1.75


@pytest.mark.parametrize('codes', [None, 16])
def test_latents_and_pictures_are_each_others_scale(codes):
    net, x = small_stage(8, (2, 3), codes).eval(), draw(2, 3, 8, 12).tanh()
    before, z = net(x), net.latents(x)
    net.scale.fill_(3.)
    assert torch.allclose(net(x), before, atol=1e-5) and torch.allclose(net.latents(x), 3 * z, atol=1e-5)
    assert z.shape == (2, 4, 4, 6) and net(x).abs().max() <= 1


def test_scale_follows_the_codes():
    net = small_stage(8)
    for k in range(200): net.note_scale(4 * draw(8, 4, 2, 2, seed=k) + 1)
    assert abs(float(net.scale) * 4 - 1) < .05
    fixed = AutoencoderKL(**CONFIGS['autoencoder_kl'])
    fixed.note_scale(draw(2, 4))
    assert fixed.scale == 1.


def test_looking_changes_nothing():
    net, batch = small_stage(8), {'x': draw(2, 3, 16, 16).tanh()}
    loss = stage_loss(perceptual=0.)
    loss(net.eval(), batch, Draws(0, 0))
    assert float(net.scale) == 1.
    loss(net.train(), batch, Draws(0, 0))
    assert float(net.scale) != 1.


def test_noise_is_used():
    net, x = small_stage(8).eval(), draw(2, 3, 16, 16).tanh()
    ε = draw(2, 4, 4, 4, seed=3)
    assert torch.allclose(net.latents(x, ε) - net.latents(x), net.encode(x).std * ε, atol=1e-5)


def test_loss_is_the_papers_sum_per_pixel_value(monkeypatch):
    monkeypatch.setattr(first_stage, '_looks', lambda device: (lambda a, b: torch.full((len(a),), .25)))
    net, x = small_stage(8).eval(), draw(3, 3, 16, 16).tanh()
    value, told = stage_loss(kl=.5, perceptual=2.)(net, {'x': x}, Draws(0, 7))
    q = net.encode(x)
    copies = net.decode(q.sample(Draws(0, 7).normal(3, 4, 4, 4)))
    whole = (copies - x).abs().flatten(1).sum(1) + 2 * .25 * x[0].numel() + .5 * q.kl()
    assert torch.allclose(value, whole.mean() / x[0].numel(), rtol=1e-5)


def test_critic_and_stage_do_not_move_each_other():
    "The stage's gradient is that of error, KL and opinion; the critic's is that of its own loss"
    torch.manual_seed(0)
    both, x = Contested(small_stage(8, (1, 2)), PatchGAN(3, 8, 1)), draw(2, 3, 16, 16).tanh()
    contested_loss(perceptual=0.)(both.train(), {'x': x}, Draws(0, 0))[0].backward()
    found = {k: p.grad.clone() for k, p in both.named_parameters()}
    both.zero_grad()
    copies = both.stage.decode(both.stage.encode(x).sample(Draws(0, 0).normal(2, 4, 8, 8)))
    first_stage.critic_loss(both.critic(x), both.critic(copies.detach())).backward()
    for k, p in both.critic.named_parameters(): assert torch.allclose(p.grad, found[f'critic.{k}'], rtol=1e-3, atol=1e-6), k


def test_critic_waits():
    torch.manual_seed(0)
    both, batch = Contested(small_stage(8, (1, 2)), PatchGAN(3, 8, 1)).eval(), {'x': draw(2, 3, 16, 16).tanh()}
    early, late = (contested_loss(start=3, perceptual=0.)(both, batch, Draws(0, k)) for k in (2, 3))
    plain = [stage_loss(perceptual=0.)(both.stage, batch, Draws(0, k))[0] for k in (2, 3)]
    assert torch.allclose(early[0], plain[0]) and late[0] > plain[1] + .1
    early[0].backward()
    assert all(not p.grad.any() for p in both.critic.parameters())
    with torch.no_grad(): assert contested_loss(perceptual=0.)(both, batch, Draws(0, 3))[1]['weight'] == 0


def test_one_trainer_trains_and_resumes_both(tmp_path):
    def run(folder, steps):
        torch.manual_seed(0)
        both = Contested(small_stage(8, (1, 2)), PatchGAN(3, 8, 1))
        how = dict(steps=4, batch_size=2, warmup=0, schedule='constant', progress=False, save_every=2, folder=folder)
        trainer = Trainer(both, contested_loss(1, perceptual=0.), {'x': draw(6, 3, 16, 16).tanh()}, **how).resume(missing_ok=True)
        while trainer.step < steps: trainer.update()
        trainer._write()
        return both.state_dict()
    run(tmp_path / 'a', 2)
    again, whole = run(tmp_path / 'a', 4), run(tmp_path / 'b', 4)
    assert all(v.equal(whole[k]) for k, v in again.items())


def test_perceptual_distance_without_its_file(monkeypatch, tmp_path):
    monkeypatch.setenv('DIFFCOURSE_HOME', str(tmp_path))
    first_stage._looks.cache_clear()
    assert first_stage.perceptual_distance(draw(1, 3, 8, 8), draw(1, 3, 8, 8)) == 0
    first_stage._looks.cache_clear()


def test_lpips_has_a_gradient_where_it_sees_nothing():
    "A trunk without biases sees nothing in a picture that its scaling makes zero"
    net = extractors.LPIPS()
    for p in net.net.parameters():
        if p.ndim == 1: nn.init.zeros_(p)
    x = net.scaling_layer.shift.expand(1, 3, 64, 64).clone().requires_grad_()
    net(x, draw(1, 3, 64, 64)).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize('mistake, words', [
    (lambda: AutoencoderKL(SMALL | dict(double_z=False), 4), 'double_z'),
    (lambda: VQModel(SMALL, 8, 4), 'double_z'),
    (lambda: AutoencoderKL(SMALL | dict(attn_type='linear'), 4), 'attn_type'),
    (lambda: AutoencoderKL(SMALL | dict(groups=5), 4), 'groups'),
    (lambda: small_stage(8).encode(torch.zeros(1, 1, 16, 16)), '3, H, W'),
    (lambda: small_stage(8).encode(torch.zeros(1, 3, 18, 16)), 'divisible by 4'),
    (lambda: first_stage.from_official('sd-v1/unet'), 'no released first stage'),
    (lambda: first_stage.critic_loss(torch.zeros(1), torch.zeros(1), 'wgan'), 'hinge')])
def test_bad_input_is_named(mistake, words):
    with pytest.raises(CourseError, match=words): mistake()


@pytest.mark.parametrize('name', ['kl_emoji', 'kl_shapes', 'kl_grocery', 'vq_emoji'])
def test_what_is_shipped(name):
    if not shipped(name): pytest.skip(f'{name} is not shipped')
    m, net = load_card(name)['metrics'], load_weights(name, RECIPES[name].model())
    assert m['psnr'] > dict(kl_emoji=26, vq_emoji=22).get(name, 20) and .8 < m['latent_std'] < 1.25
    x = RECIPES[name].data('smoke').subset(torch.arange(8)).images / 127.5 - 1
    assert first_stage.evaluate_stage(net, x)['psnr'] > m['psnr'] - 4


def test_a_decoder_that_learns_on_alone_leaves_latents_and_scale():
    torch.manual_seed(0)
    net, x = small_stage(8, (1, 2)), draw(4, 3, 16, 16).tanh()
    net.scale.fill_(.5)
    before, decoder = net.latents(x), net.decoder.conv_in.weight.clone()
    trainer = Trainer(first_stage.decoder_only(net), stage_loss(perceptual=0.), {'x': x}, steps=3, batch_size=4, progress=False).fit()
    for after in (trainer.model, trainer.ema_model()): assert after.latents(x).equal(before) and after.scale == .5
    assert not net.decoder.conv_in.weight.equal(decoder)
