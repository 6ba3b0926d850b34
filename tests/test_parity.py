"The golden outputs of the official code are met, and each check fails when the code it checks is changed"
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffcourse import ddim, ddpm, dvae, iddpm, layers, metrics, priors, scores, train, unet
from diffcourse.core import CourseError
from tests import parity

HERE = ['dalle_dvae', 'calc_bpd_loop', 'ddim_generalized_steps', 'full__ddpm_cifar10', 'diffusion_q', 'lit_ema',
        'loss_second_moment_resampler', 'metrics_features', 'mingpt', 'p_mean_variance', 'respacing', 'schedules', 'timestep_embedding', 'training_losses',
        'vlb_terms']


def one(name):
    "The verdict on one golden of the default folder"
    return parity.check(parity.Golden(parity.HERE / 'golden' / f'{name}.json'))


@pytest.mark.parametrize('name', HERE)
def test_meets_official(name):
    v = one(name)
    assert v.word in ('passed', 'partial'), parity.line(v)


def test_parts_that_must_be_complete():
    done = {name: one(name).note for name in HERE}
    assert done['timestep_embedding'].startswith('10 of 10') and done['p_mean_variance'].startswith('96 of 96')
    for name in ('ddim_generalized_steps', 'diffusion_q', 'loss_second_moment_resampler', 'mingpt', 'respacing', 'schedules', 'training_losses',
                 'vlb_terms'):
        got, _, wanted, *_ = done[name].split()
        assert got == wanted, (name, done[name])


def test_released_size():
    "35.7 million procedural weights, in a process of its own"
    v, = parity.run(only='full__ddpm_cifar10')
    assert v.word == 'passed', parity.line(v)


# Each entry: the golden that must notice, and a change (module or class, attribute, replacement given the original).

def swap_halves(original):
    return lambda t, dim, max_period=10000, order='cos_sin': original(t, dim, max_period, order).roll(dim // 2, 1)


def other_frequencies(original):
    other = {'cos_sin': 'sin_cos', 'sin_cos': 'cos_sin'}
    return lambda t, dim, max_period=10000, order='cos_sin': original(t, dim, max_period, other[order]).roll(dim // 2,
        1)


def integer_time(original):
    return lambda t, dim, max_period=10000, order='cos_sin': original(t.long(), dim, max_period, order)


def symmetric(original):
    def forward(self, x): return F.conv2d(x, self.conv.weight, self.conv.bias, 2, 1)
    return forward


def bilinear(original):
    return lambda self, x: self.conv(F.interpolate(x, scale_factor=2., mode='bilinear'))


def unscaled(original):
    return lambda q, k, v, heads=1: original(q * math.sqrt(q.shape[-1] // heads), k, v, heads)


def two_heads(original):
    return lambda q, k, v, heads=1: original(q, k, v, 2)


def time_without_silu(original):
    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x))) + self.temb_proj(time)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, 'nin_shortcut') else x) + h
    return forward


def relu(original): return lambda x: F.relu(x)


def skips_in_order(original):
    def way_up(self, h, skips, time): return original(self, h, skips[:1] + skips[1:][::-1], time)
    return way_up


def beta_off_by_one(original):
    def linear(T=1000, start=1e-4, end=.02): return ddpm.Schedule(torch.linspace(start, end, T + 1,
            dtype=torch.float64)[1:] * (1000 / T))
    return staticmethod(linear)


def float32_betas(original):
    def linear(T=1000, start=1e-4, end=.02): return ddpm.Schedule((torch.linspace(start, end, T) * (1000 / T)).double())
    return staticmethod(linear)


def variance_not_deviation(original):
    return lambda x0, ᾱ, noise: ddpm.spread(ᾱ.sqrt(), x0) * x0 + ddpm.spread(1 - ᾱ, x0) * noise


def coefficients_swapped(original): return property(lambda self: original.fget(self).flip(0)
                                                    if self.ᾱ.ndim else original.fget(self) * 1.001)


def no_floor(original): return property(lambda self: self.β.log())


def not_clipped(original): return lambda x0: x0


def half_noise(original):
    return lambda x, eps, ᾱ: original(x, .999 * eps, ᾱ)


def warmup_from_zero(original): return lambda self, n: original(self, n - 1)


def no_warmup(original): return lambda self, n: self.decay


def decay_of_the_new(original): return lambda self, n: 1 - original(self, n)


def clipped_lower(original):
    return classmethod(lambda cls, T=1000: ddpm.Schedule(original.__func__(cls, T).betas.clamp(max=.99)))


def last_one_missed(original): return lambda T, spec='': original(T, spec)[:-1] + [T - 2]


def in_nats(original): return lambda *a: math.log(2) * original(*a)


def mean_not_stopped(original):
    def loss_terms(d, raw, x0, noise, x, step, kind):
        terms = original(d, raw, x0, noise, x, step, kind)
        if 'vb' in terms: terms['loss'] = terms['mse'] + original(d, raw, x0, noise, x, step, 'kl')['loss'] * (
            d.schedule.T / 1000 if kind == 'rescaled_mse' else 1)
        return terms
    return loss_terms


def wider_bins(original): return lambda x, means, log_scales: original(x, 1.01 * means, log_scales)


def mean_of_losses(original):
    return lambda self: self.losses.mean(1) / self.losses.mean(1).sum() if self.warm else original(self)


def variance_for_deviation(original): return lambda ᾱ, ᾱ_next, eta=0.: original(ᾱ, ᾱ_next, eta) ** 2


def half_stride(original): return lambda step: (original(step)[0], 2 * original(step)[1].exp())


def short_stride(original): return lambda step: .99 * original(step)


def other_rho(original): return lambda n, low, high, rho=7.: original(n, low, high, rho - .1)


def sees_everything(original): return lambda q, k, v, heads=1, mask=None, causal=False: original(q, k, v, heads)


def other_heads(original): return lambda q, k, v, heads=1, mask=None, causal=False: original(q, k, v, heads // 2, mask, causal)


def keys_for_queries(original):
    def qkv(self, x):
        q, k, v = original(self, x)
        return k, q, v
    return qkv


def norm_after(original):
    def forward(self, x, mask=None, causal=False, memory=None):
        x = self.ln1(x + self.attn.proj(priors.attention(*self._qkv(x), self.heads, mask, causal)))
        return self.ln2(x + self.mlp.get_submodule('2')(self.act(self.mlp.get_submodule('0')(x))))
    return forward


def next_row(original):
    def forward(self, tokens, embeddings=None, **how):
        self.pos_emb.data = self.pos_emb.data.roll(-1, 1)
        return original(self, tokens, embeddings, **how)
    return forward


def not_shifted(original): return lambda logits, targets: original(logits[:, :-1], targets[:, 1:])


def gain_of_one(original):
    def forward(self, x): return self.id_path(x) + self.res_path(x)
    return forward


MUTATIONS = [
    ('dalle_dvae', dvae.Block, 'forward', gain_of_one),
    ('dalle_dvae', dvae, 'map_pixels', lambda original: lambda x: x),
    ('dalle_dvae', dvae, 'unmap_pixels', lambda original: lambda x: (x - .1) / .8),
    ('dalle_dvae', dvae.Conv2d, 'forward', lambda original: lambda self, x: F.conv2d(x, self.w, None, padding=self.w.shape[-1] // 2)),
    ('mingpt', priors, 'attention', sees_everything),
    ('mingpt', priors, 'attention', other_heads),
    ('mingpt', priors.Block, '_qkv', keys_for_queries),
    ('mingpt', priors.Block, 'forward', norm_after),
    ('mingpt', priors.GPT, 'forward', next_row),
    ('mingpt', priors, 'ACTIVATIONS', lambda original: dict(original, gelu=lambda x: F.gelu(x, approximate='tanh'))),
    ('mingpt', priors, 'token_loss', not_shifted),
    ('timestep_embedding', layers, 'timestep_embedding', swap_halves),
    ('timestep_embedding', layers, 'timestep_embedding', other_frequencies),
    ('timestep_embedding', layers, 'timestep_embedding', integer_time),
    ('full__ddpm_cifar10', unet, 'timestep_embedding', swap_halves),
    ('full__ddpm_cifar10', unet, 'timestep_embedding', other_frequencies),
    ('full__ddpm_cifar10', layers.Downsample, 'forward', symmetric),
    ('full__ddpm_cifar10', layers.Upsample, 'forward', bilinear),
    ('full__ddpm_cifar10', unet, 'attention', unscaled),
    ('full__ddpm_cifar10', unet, 'attention', two_heads),
    ('full__ddpm_cifar10', unet.ResBlock, 'forward', time_without_silu),
    ('full__ddpm_cifar10', unet.F, 'silu', relu),
    ('full__ddpm_cifar10', unet.UNet, '_way_up', skips_in_order),
    ('schedules', ddpm.Schedule, 'linear', beta_off_by_one),
    ('schedules', ddpm.Schedule, 'linear', float32_betas),
    ('schedules', ddpm.Step, 'log_variance', no_floor),
    ('diffusion_q', ddpm.Schedule, 'linear', beta_off_by_one),
    ('diffusion_q', ddpm, 'q_sample', variance_not_deviation),
    ('diffusion_q', ddpm.Step, 'coef_x', coefficients_swapped),
    ('diffusion_q', ddpm, 'x0_from_eps', half_noise),
    ('p_mean_variance', ddpm.Schedule, 'linear', beta_off_by_one),
    ('p_mean_variance', ddpm, 'clip_x0', not_clipped),
    ('p_mean_variance', ddpm.Step, 'log_β', no_floor),
    ('p_mean_variance', ddpm, 'x0_from_eps', half_noise),
    ('calc_bpd_loop', ddpm, 'clip_x0', not_clipped),
    ('calc_bpd_loop', ddpm.Schedule, 'linear', beta_off_by_one),
    ('ddim_generalized_steps', ddpm, 'clip_x0', not_clipped),
    ('ddim_generalized_steps', ddim, 'sigma', variance_for_deviation),
    ('schedules', ddpm.Schedule, 'cosine', clipped_lower),
    ('respacing', iddpm, 'space_timesteps', last_one_missed),
    ('respacing', ddpm.Step, 'log_variance', no_floor),
    ('training_losses', iddpm, 'vlb_term', in_nats),
    ('training_losses', iddpm, 'loss_terms', mean_not_stopped),
    ('vlb_terms', ddpm, 'clip_x0', not_clipped),
    ('vlb_terms', ddpm, 'discretized_gaussian_log_likelihood', wider_bins),
    ('loss_second_moment_resampler', iddpm.SecondMoment, 'weights', mean_of_losses),
    ('lit_ema', train.EMA, 'decay_at', warmup_from_zero),
    ('lit_ema', train.EMA, 'decay_at', no_warmup),
    ('lit_ema', train.EMA, 'decay_at', decay_of_the_new),
    ('metrics_features', metrics, 'trace_sqrt_product', lambda original: lambda a, b: original(a, b) * 1.00001),
    ('metrics_features', metrics.Statistics, '_read', lambda original: lambda self: (original(self)[0],
                                                                                     original(self)[1] * (1 - 1 / self.n))),
    ('metrics_features', scores, 'information', lambda original: lambda x: original(x) / math.log(2)),
    ('metrics_features', scores, 'groups_shuffled', lambda original: lambda n, splits=10, seed=2020: original(n, splits)),
    ('metrics_features', scores, 'mmd2', lambda original: lambda x, y, **how: original(x, y, unbiased=False, **how)),
    ('metrics_features', scores, 'kid_subsets',
     lambda original: lambda n, m, **how: ((j, i) for i, j in original(m, n, **how))),
    ('metrics_features', scores, 'polynomial_kernel', lambda original: lambda x, y, **how: original(x, y, **how | dict(coef0=0.))),
    ('metrics_features', scores, 'manifold_radii', lambda original: lambda x, k=3, kind='euclid': original(x, k - 1, kind)),
]


@pytest.mark.parametrize('name, where, attribute, change', MUTATIONS,
                         ids=lambda v: v if isinstance(v, str) else getattr(v, '__name__', ''))
def test_notices(monkeypatch, name, where, attribute, change):
    "Every check can fail"
    monkeypatch.setattr(where, attribute, change(vars(where)[attribute]))
    assert one(name).word == 'FAILED'


def test_every_checker_was_seen_failing():
    from tests.test_parity_codes import MUTATIONS as CODES
    from tests.test_parity_openai import MUTATIONS as OPENAI
    named = {f.__name__ for name, *_ in [*MUTATIONS, *OPENAI, *CODES] for f in [parity.checker(name)]}
    elsewhere = {'full_ddpm', 'adm_evaluator', 'full_openai_unet', 'gd_train_step', 'fid_block', 'full_inception',
                 'ldm_samplers', 'sd2_v_prediction', 'latent_unet', 'ldm_schedules', 'ldm_p_losses', 'sdunclip_noise_aug', 'ldm_bert',
                 'clip_text', 'clip_tokenizer', 'clip_towers', 'glide_denoiser', 'glide_levels', 'glide_noised_clip', 'full_glide',
                 'karlo_prior', 'karlo_unet', 'kl_stage', 'vq_stage', 'patch_critic', 'diagonal_gaussian', 'ddpm_unet'}
    assert named | elsewhere | set(HOMEMADE) == {f.__name__ for f in parity.FAMILIES.values()}


# Goldens too large for this folder: a small one is made with this package (so passing proves nothing), and must be failed by mutations

HOMEMADE = dict(
    sampling_steps=[(ddim, 'sigma', variance_for_deviation), (ddpm, 'clip_x0', not_clipped), (ddpm, 'x0_from_eps', half_noise)],
    sampling_loops=[(ddim, 'sigma', variance_for_deviation), (iddpm, 'space_timesteps', last_one_missed)],
    k_diffusion=[(ddim, '_stride', half_stride), (ddim, '_shrinkage', short_stride), (ddim, 'karras_sigmas', other_rho)])
OUTPUTS = dict(
    sampling_steps=[f'clip{c}/{k}' for c in (0, 1) for k in ('p_sample', 'p_sample_cond', 'ddim_eta0.3', 'ddim_cond_eta0.3', 'ddim_reverse',
                                                            'condition_mean', 'condition_score.pred_xstart')],
    sampling_loops=['p_sample_loop', 'ddim_eta0', 'ddim_eta1', 'timesteps_seen_by_model'],
    k_diffusion=['karras_sigmas', 'euler', 'euler_ancestral', 'heun', 'dpmpp_2m'])


def homemade(name, folder):
    "A golden of this family, written by this package"
    from safetensors.torch import save_file
    g, shape = torch.Generator().manual_seed(0), (4, 3, 4, 4)
    draw = lambda *size: torch.randn(*size, generator=g)
    common = dict(T=1000, schedule='linear', mean='EPSILON', var='LEARNED_RANGE')
    config = dict(sampling_steps=dict(common, etas=[.3]), sampling_loops=dict(
        common, respacing='3,3,2', rescale_timesteps=True, clip_denoised=True, model='cat([0.6*x + 0.2*sin(t/100), 0.5*cos(x)], dim=1)'),
        k_diffusion=dict(n=5, sigma_min=.05, sigma_max=9., rho=7, denoiser='0.8*x/(1+sigma^2) + 0.1*cos(sigma)'))[name]
    inputs = dict(sampling_steps=dict(x=draw(*shape), cond_grad=draw(*shape), noise=draw(*shape), model_output_6=draw(4, 6, 4, 4),
                                      t=torch.tensor([0, 1, 400, 999])),
                  sampling_loops=dict(x_T=draw(*shape), noises=draw(8, *shape)), k_diffusion=dict(x=draw(*shape), noises=draw(5, *shape)))[name]
    tensors = {f'in/{k}': v for k, v in inputs.items()} | {f'out/{k}': torch.zeros(1) for k in OUTPUTS[name]}
    info = dict(name=name, config=config, rtol=1e-5, atol=1e-5)
    for _ in range(2):                                             # first with placeholders, to learn what the checker answers
        (folder / f'{name}.json').write_text(json.dumps(info))
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f'{name}.safetensors')
        golden = parity.Golden(folder / f'{name}.json')
        with torch.no_grad(): found = parity.checker(name)(golden)
        tensors |= {f'out/{k}': found[k].float() for k in OUTPUTS[name]}
    return golden


@pytest.mark.parametrize('name, i', [(n, i) for n, many in HOMEMADE.items() for i in range(len(many))])
def test_homemade_goldens_notice(monkeypatch, tmp_path, name, i):
    golden, (where, attribute, change) = homemade(name, tmp_path), HOMEMADE[name][i]
    assert parity.check(golden).word == 'passed'
    monkeypatch.setattr(where, attribute, change(vars(where)[attribute]))
    assert parity.check(golden).word == 'FAILED'


def test_full_size_checker_fails_too(monkeypatch, tmp_path):
    "The released-size check, on a small layout made for it: passes, and fails with other weights"
    from safetensors.torch import save_file
    config = dict(model=dict(in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[4],
                             dropout=0.), image_size=8)
    net = unet.UNet.from_config(config).eval()
    shapes = {k: list(v.shape) for k, v in net.state_dict().items()}
    (tmp_path / 'ddpm-ermongroup__toy.json').write_text(json.dumps(dict(config=config, state_dict=shapes)))
    layers.load_strict(net, parity.procedural(shapes, 'salt/', .9))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    with torch.no_grad(): y = net(x, t)
    save_file({'in/x': x, 'in/timesteps': t, 'out/y::flat_stride7': y.flatten()[::7].contiguous(),
               'out/y::mean_std': torch.stack([y.mean(), y.std()])}, tmp_path / 'full__ddpm_toy.safetensors')
    info = dict(name='full__ddpm_toy', keys_file='schemas/ddpm-ermongroup__toy.json', salt='salt/', gain=.9,
                rtol=1e-4, atol=1e-4)
    (tmp_path / 'full__ddpm_toy.json').write_text(json.dumps(info))
    g = parity.Golden(tmp_path / 'full__ddpm_toy.json', tmp_path)
    assert parity.check(g).word == 'passed'
    monkeypatch.setattr(unet, 'timestep_embedding', swap_halves(unet.timestep_embedding))
    assert parity.check(g).word == 'FAILED'
    monkeypatch.undo()
    g.info['salt'] = 'pepper/'
    assert parity.check(g).word == 'FAILED'


def test_epsilon_of_the_norms():
    "Ordinary goldens cannot see ε (the change is about 1e-5 of the output), so it is read, and seen on small activations"
    net = unet.UNet.from_official('ddpm-ermongroup/cifar10', device='meta')
    assert {m.eps for m in net.modules() if isinstance(m, nn.GroupNorm)} == {1e-6}
    block = unet.AttentionBlock(64)
    with torch.no_grad():
        small = torch.randn(1, 64, 4, 4, generator=torch.Generator().manual_seed(0)) * 1e-3
        want = F.group_norm(small.double(), 32, eps=1e-6)
        assert (block.norm(small) - want).abs().max() < 1e-4
        assert (F.group_norm(small, 32, eps=1e-5) - want).abs().max() > .5


def test_time_is_invisible_with_one_channel_a_group(monkeypatch):
    "Why the goldens have levels of 64 channels: with 32 groups on 32 channels no check of the time embedding can fail"
    def build(): return unet.UNet(3, channels=32, multipliers=(1,), blocks=1, attention_resolutions=(),
                                  image_size=8).eval()
    torch.manual_seed(0)
    net = build()
    for p in net.parameters(): nn.init.normal_(p, std=.2)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad(): a, b = net(x, torch.tensor([0, 0])), net(x, torch.tensor([999, 5]))
    assert (a - b).abs().max() < 1e-4 * a.abs().max()


@pytest.mark.parametrize('text, want', [
    ('eps(x,t) = 0.6*x + 0.2*sin(t/100)', lambda x, t, c: .6 * x + .2 * torch.sin(t / 100)),
    ('f(x,t) = cat([0.6*x + 0.2*sin(t/100), 0.5*cos(x)], dim=1) with t as given to the model (mapped, and a float)',
     lambda x, t, c: torch.cat([.6 * x + .2 * torch.sin(t / 100), .5 * torch.cos(x)], 1)),
    ('as elsewhere: cat([-0.3*x, x*cos(t/7)], 1)', lambda x, t, c: torch.cat([-.3 * x, x * torch.cos(t / 7)], 1)),
    ('v(x,t,c) = 0.3*x + 0.05*mean(c over tokens and channels)', lambda x, t,
     c: .3 * x + .05 * c.mean((1, 2)).reshape(-1, 1, 1, 1)),
    ('0.8*x/(1+t^2) + 0.1*cos(t)', lambda x, t, c: .8 * x / (1 + t ** 2) + .1 * torch.cos(t)),
])
def test_formulas(text, want):
    x, t, c = torch.randn(2, 3, 4, 4), torch.tensor([3, 950]), torch.randn(2, 5, 7)
    torch.testing.assert_close(parity.formula(text)(x, t, c=c), want(x, t.float().reshape(-1, 1, 1, 1), c))


@pytest.mark.parametrize('text', ['__import__("os").getcwd() + x', 'open(x)', 'x.__class__', '(lambda: x)()'])
def test_formulas_run_nothing_else(text):
    try: value = parity.formula(text)(torch.ones(1, 1))
    except CourseError: return
    assert isinstance(value,
                      torch.Tensor) and value.equal(torch.ones(1, 1))   # the part in front of the dot: the bare x


def test_command(tmp_path, capsys):
    assert parity.main(['--only', 'lit_ema', '--json', str(tmp_path / 'r.json')]) == 0
    record, = json.loads((tmp_path / 'r.json').read_text())
    assert record['word'] == 'passed' and record['official'].startswith('ldm') and record['error'] < 1e-6
    assert parity.main(['--only', 'no_such_golden']) == 1
    assert 'no golden' in capsys.readouterr().out
    with pytest.raises(SystemExit): parity.main([str(tmp_path / 'nowhere')])


def test_broken_golden_fails_and_does_not_crash(tmp_path):
    "A wrong shape, a missing weight, a truncated file: each is a failure with a reason"
    from safetensors.torch import save_file
    info = json.loads((parity.HERE / 'golden' / 'mingpt.json').read_text())
    (tmp_path / 'mingpt.json').write_text(json.dumps(info))
    tensors = parity.Golden(parity.HERE / 'golden' / 'mingpt.json').tensors
    save_file({k: v for k, v in tensors.items() if k != 'weights/blocks.0.attn.key.bias'},
              tmp_path / 'mingpt.safetensors')
    v, = parity.run(tmp_path)
    assert v.word == 'FAILED' and 'blocks.0.attn.key.bias' in v.note
    path = tmp_path / 'mingpt.safetensors'
    path.write_bytes(path.read_bytes()[:1000])
    v, = parity.run(tmp_path)
    assert v.word == 'FAILED'
    assert parity.main([str(tmp_path)]) == 1


