"The parity tool on other configurations of the same names: goldens made here by plain numpy and functional code that shares nothing with the package"
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from diffcourse import metrics, scores, unet
from tests import parity


def golden(folder, name, config=None, *, rtol=1e-5, atol=1e-5, **tensors):
    "Write a golden as the official ones are written; tensor names have '/' for '__'"
    info = {'name': name, 'official': 'a plain reimplementation', 'rtol': rtol, 'atol': atol}
    (folder / f'{name}.json').write_text(json.dumps(info | ({'config': config} if config else {})))
    save_file({k: torch.as_tensor(v).clone().contiguous() for k, v in tensors.items()}, folder / f'{name}.safetensors')
    verdict, = parity.run(folder)
    return verdict


# --- the time embedding ---------------------------------------------------------------------------------------

def embedding(t, dim, period, ddpm):
    "In float64: [sin | cos] with 1/(half-1) for DDPM, [cos | sin] with 1/half elsewhere, a zero column for odd widths"
    half = dim // 2
    ω = period ** (-np.arange(half) / (half - 1 if ddpm else half))
    a = t[:, None].astype(np.float64) * ω
    parts = [np.sin(a), np.cos(a)] if ddpm else [np.cos(a), np.sin(a)]
    return torch.from_numpy(np.concatenate(parts + [np.zeros((len(t), dim % 2))], 1).astype(np.float32))


@pytest.mark.parametrize('names', [('int_dim48', 'ddpm_int_dim48'), ('float_dim20_maxperiod50', 'ddpm_float_dim7'), ('int_dim256_maxperiod500.5',)])
def test_timestep_embedding(tmp_path, names):
    ints, floats = np.array([0, 1, 17, 250, 499]), np.array([.25, 33.3, 400.7], dtype=np.float32)
    outs = {}
    for name in names:
        kind, *rest = name.removeprefix('ddpm_').split('_')
        period = float(rest[1][9:]) if len(rest) > 1 else 1e4
        outs[f'out/{name}'] = embedding(ints if kind == 'int' else floats, int(rest[0][3:]), period, name.startswith('ddpm_'))
    v = golden(tmp_path, 'timestep_embedding', atol=4e-5, **{'in/t_int': ints, 'in/t_float': floats}, **outs)
    assert v.word == 'passed' and v.note == f'{len(names)} of {len(names)} outputs', parity.line(v)
    first = next(iter(outs))
    v = golden(tmp_path, 'timestep_embedding', **{'in/t_int': ints, 'in/t_float': floats}, **outs | {first: outs[first].roll(1, 1)})
    assert v.word == 'FAILED'


# --- the process ----------------------------------------------------------------------------------------------

def linear_levels(T, start=1e-4, end=.02):
    β = np.linspace(start, end, T) * 1000 / T
    ᾱ = np.cumprod(1 - β)
    before = np.append(1., ᾱ[:-1])
    return β, ᾱ, before, β * (1 - before) / (1 - ᾱ)


def at(v, t): return v[t].reshape(-1, 1, 1, 1)


@pytest.mark.parametrize('T, shape, config', [
    (200, (4, 1, 5, 5), {'T': 200, 'schedule': 'linear'}), (1000, (3, 3, 4, 4), {'T': 1000, 'schedules': ['linear', 'cosine']}),
    (50, (2, 2, 3, 7), {'T': 50, 'schedules': ['linear'], 'beta_start': 1e-3, 'beta_end': .01})])
def test_diffusion_q(tmp_path, T, shape, config):
    rng = np.random.RandomState(T)
    x0, x, noise = rng.uniform(-1, 1, shape), rng.randn(*shape), rng.randn(*shape)
    t = rng.randint(0, T, shape[0])
    t[0] = 0
    β, ᾱ, before, variance = linear_levels(T, config.get('beta_start', 1e-4), config.get('beta_end', .02))
    floored = np.append(np.log(variance[1]), np.log(variance[1:]))
    full = lambda v: np.broadcast_to(at(v, t), shape)
    mean_T, var_T = math.sqrt(ᾱ[-1]) * x0, 1 - ᾱ[-1]
    results = {
        'q_sample': at(np.sqrt(ᾱ), t) * x0 + at(np.sqrt(1 - ᾱ), t) * noise,
        'q_mean_variance.mean': at(np.sqrt(ᾱ), t) * x0, 'q_mean_variance.variance': full(1 - ᾱ), 'q_mean_variance.log_variance': full(np.log(1 - ᾱ)),
        'q_posterior.mean': at(np.sqrt(before) * β / (1 - ᾱ), t) * x0 + at(np.sqrt(1 - β) * (1 - before) / (1 - ᾱ), t) * x,
        'q_posterior.variance': full(variance), 'q_posterior.log_variance_clipped': full(floored),
        '_predict_xstart_from_eps': at(1 / np.sqrt(ᾱ), t) * x - at(np.sqrt(1 / ᾱ - 1), t) * noise,
        '_predict_eps_from_xstart': (at(1 / np.sqrt(ᾱ), t) * x - x0) / at(np.sqrt(1 / ᾱ - 1), t),
        '_prior_bpd': (.5 * (-1 - np.log(var_T) + var_T + mean_T ** 2)).reshape(len(x0), -1).mean(1) / math.log(2)}
    inputs = {'in/x_start': x0, 'in/x_t': x, 'in/noise': noise, 'in/t': t}
    outs = {f'out/linear/{k}': v.astype(np.float64) for k, v in results.items()}
    v = golden(tmp_path, 'diffusion_q', config, rtol=1e-6, atol=1e-7, **inputs, **{k: v.copy() for k, v in outs.items()})
    assert v.word == 'passed' and v.note == '10 of 10 outputs', parity.line(v)
    wrong = golden(tmp_path, 'diffusion_q', config | {'T': T + 1}, **inputs, **{k: v.copy() for k, v in outs.items()})
    assert wrong.word == 'FAILED'


@pytest.mark.parametrize('T, channels', [(100, 1), (400, 4)])
def test_p_mean_variance(tmp_path, T, channels):
    "Every way to predict, both fixed variances, clipped or not"
    rng = np.random.RandomState(T)
    shape, t = (5, channels, 3, 4), np.array([0, 1, T // 2, T - 2, T - 1])
    x, raw = rng.randn(*shape), rng.randn(*shape)
    β, ᾱ, before, variance = linear_levels(T)
    c0, c1 = np.sqrt(before) * β / (1 - ᾱ), np.sqrt(1 - β) * (1 - before) / (1 - ᾱ)
    floored = np.append(np.log(variance[1]), np.log(variance[1:]))
    large = np.log(np.append(variance[1], β[1:]))
    outs = {}
    for mean_type in ('EPSILON', 'START_X', 'PREVIOUS_X'):
        for clip in (0, 1):
            guess = {'EPSILON': at(1 / np.sqrt(ᾱ), t) * x - at(np.sqrt(1 / ᾱ - 1), t) * raw, 'START_X': raw,
                     'PREVIOUS_X': raw / at(c0, t) - at(c1 / c0, t) * x}[mean_type]
            guess = guess.clip(-1, 1) if clip else guess
            mean = raw if mean_type == 'PREVIOUS_X' else at(c0, t) * guess + at(c1, t) * x
            for kind, log_v in (('FIXED_SMALL', floored), ('FIXED_LARGE', large)):
                v = variance if kind == 'FIXED_SMALL' else np.exp(large)
                case = f'out/{mean_type}.{kind}.clip{clip}/'
                outs |= {case + 'mean': mean, case + 'pred_xstart': guess, case + 'log_variance': np.broadcast_to(at(log_v, t), shape),
                         case + 'variance': np.broadcast_to(at(v, t), shape)}
    inputs = {'in/x': x, 'in/t': t, f'in/model_output_{channels}': raw}
    v = golden(tmp_path, 'p_mean_variance', {'T': T, 'schedule': 'linear'}, rtol=1e-6, atol=1e-7, **inputs, **{k: np.array(v) for k, v in outs.items()})
    assert v.word == 'passed' and v.note == '48 of 48 outputs', parity.line(v)
    outs['out/EPSILON.FIXED_LARGE.clip1/variance'] = np.broadcast_to(at(variance, t), shape)
    v = golden(tmp_path, 'p_mean_variance', {'T': T, 'schedule': 'linear'}, rtol=1e-6, atol=1e-7, **inputs, **{k: np.array(v) for k, v in outs.items()})
    assert v.word == 'FAILED' and 'EPSILON.FIXED_LARGE.clip1' in v.note


# --- the network ----------------------------------------------------------------------------------------------

class Plain:
    "DDPM's U-Net as a function of its weights, with no module in sight"
    def __init__(self, w, m, size): self.w, self.m, self.size = w, m, size

    def conv(self, x, k, **how): return F.conv2d(x, self.w[f'{k}.weight'], self.w[f'{k}.bias'], **how)
    def dense(self, x, k): return x @ self.w[f'{k}.weight'].T + self.w[f'{k}.bias']

    def norm(self, x, k):
        g = x.reshape(len(x), 32, -1)
        g = (g - g.mean(2, keepdim=True)) / (g.var(2, keepdim=True, correction=0) + 1e-6).sqrt()
        return g.reshape(x.shape) * self.w[f'{k}.weight'][:, None, None] + self.w[f'{k}.bias'][:, None, None]

    def block(self, x, τ, k):
        silu = lambda v: v * torch.sigmoid(v)
        h = self.conv(silu(self.norm(x, f'{k}.norm1')), f'{k}.conv1', padding=1) + self.dense(silu(τ), f'{k}.temb_proj')[:, :, None, None]
        h = self.conv(silu(self.norm(h, f'{k}.norm2')), f'{k}.conv2', padding=1)
        return h + (self.conv(x, f'{k}.nin_shortcut') if f'{k}.nin_shortcut.weight' in self.w else x)

    def attend(self, x, k):
        q, key, v = (self.conv(self.norm(x, f'{k}.norm'), f'{k}.{name}').flatten(2) for name in 'qkv')
        share = torch.softmax(q.transpose(1, 2) @ key * x.shape[1] ** -.5, 2)             # (B, query, key)
        return x + self.conv((v @ share.transpose(1, 2)).reshape(x.shape), f'{k}.proj_out')

    def __call__(self, x, t):
        m, levels, resample = self.m, len(self.m['ch_mult']), self.m['resamp_with_conv']
        τ = embedding(t.numpy(), m['ch'], 1e4, True)
        τ = self.dense(τ, 'temb.dense.0')
        τ = self.dense(τ * torch.sigmoid(τ), 'temb.dense.1')
        skips = [self.conv(x, 'conv_in', padding=1)]
        for i in range(levels):
            for j in range(m['num_res_blocks']):
                h = self.block(skips[-1], τ, f'down.{i}.block.{j}')
                if self.size // 2 ** i in m['attn_resolutions']: h = self.attend(h, f'down.{i}.attn.{j}')
                skips.append(h)
            if i < levels - 1: skips.append(self.conv(F.pad(skips[-1], (0, 1, 0, 1)), f'down.{i}.downsample.conv', stride=2) if resample
                                            else F.avg_pool2d(skips[-1], 2))
        h = self.block(self.attend(self.block(skips[-1], τ, 'mid.block_1'), 'mid.attn_1'), τ, 'mid.block_2')
        for i in reversed(range(levels)):
            for j in range(m['num_res_blocks'] + 1):
                h = self.block(torch.cat([h, skips.pop()], 1), τ, f'up.{i}.block.{j}')
                if self.size // 2 ** i in m['attn_resolutions']: h = self.attend(h, f'up.{i}.attn.{j}')
            if i > 0:
                h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
                if resample: h = self.conv(h, f'up.{i}.upsample.conv', padding=1)
        h = self.norm(h, 'norm_out')
        return self.conv(h * torch.sigmoid(h), 'conv_out', padding=1)


NETS = [dict(size=8, in_channels=1, out_ch=2, ch=64, ch_mult=[1, 1], num_res_blocks=2, attn_resolutions=[4], resamp_with_conv=True),
        dict(size=16, in_channels=3, out_ch=3, ch=32, ch_mult=[2, 1, 3], num_res_blocks=1, attn_resolutions=[16, 8, 4], resamp_with_conv=False),
        dict(size=12, in_channels=4, out_ch=4, ch=96, ch_mult=[1], num_res_blocks=1, attn_resolutions=[], resamp_with_conv=True)]


@pytest.mark.parametrize('form', ['image_size', 'data'])
@pytest.mark.parametrize('net', NETS, ids=lambda n: f'{n["ch"]}x{n["ch_mult"]}')
def test_ddpm_unet(tmp_path, net, form):
    "Levels, widths, blocks, attention, resampling, channels and size come from the json, in either of its forms"
    m = {k: v for k, v in net.items() if k != 'size'} | dict(type='simple', dropout=.1, var_type='fixedlarge', ema_rate=.999, ema=True)
    config = {'model': m} | ({'image_size': net['size']} if form == 'image_size' else {'data': {'image_size': net['size']}})
    built = unet.UNet.from_config(config).state_dict()
    g = torch.Generator().manual_seed(net['ch'])
    weights = {k: (torch.randn(v.shape, generator=g) * .3 / max(1, v[0].numel()) ** .5 + k.endswith('norm.weight')).half().float()
               for k, v in built.items()}
    x, t = torch.randn(2, net['in_channels'], net['size'], net['size'], generator=g), torch.tensor([3, 851])
    y = Plain(weights, m, net['size'])(x, t)
    stored = {f'weights/{k}': v.half() for k, v in weights.items()}
    v = golden(tmp_path, 'ddpm_unet_ermongroup', config, atol=2e-5, **stored, **{'in/x': x, 'in/timesteps': t, 'out/y': y})
    assert v.word == 'passed', parity.line(v)
    wrong = Plain(weights, m, net['size'])(x, t + 1)
    v = golden(tmp_path, 'ddpm_unet_ermongroup', config, atol=2e-5, **stored, **{'in/x': x, 'in/timesteps': t, 'out/y': wrong})
    assert v.word == 'FAILED', 'the golden does not see the time'


# --- scores ---------------------------------------------------------------------------------------------------

def numpy_fid(a, b):
    "Mean, covariance, and the square root of a symmetric matrix by its eigenvectors"
    (m1, S1), (m2, S2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a.astype(np.float64), b.astype(np.float64)))
    λ, Q = np.linalg.eigh(S1)
    root = Q * np.sqrt(λ.clip(0)) @ Q.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ S2 @ root).clip(0)).sum()
    return ((m1 - m2) ** 2).sum() + np.trace(S1) + np.trace(S2) - 2 * cross


def numpy_is(p, groups):
    "Exponential of the mean KL of each group's rows from their mean"
    return np.array([np.exp((p[g] * np.log(p[g] / p[g].mean(0))).sum(1).mean()) for g in groups])


def numpy_mmd2(x, y, degree, gamma, coef0):
    "Off-diagonal means of the kernel matrices"
    k = lambda a, b: (gamma * a @ b.T + coef0) ** degree
    off = lambda K: (K.sum() - np.trace(K)) / (len(K) * (len(K) - 1))
    return off(k(x, x)) + off(k(y, y)) - 2 * k(x, y).mean()


def numpy_manifold(x, y, k, power):
    "(share of y in x's balls, radii of x, distances from y to x), with distances to a power"
    apart = lambda a, b: np.sqrt(((a[:, None].astype(np.float64) - b[None]) ** 2).sum(-1)) ** power
    radii = np.sort(apart(x, x), 1)[:, k]
    return (apart(y, x) <= radii * (1 + 1e-12)).any(1).mean(), radii, apart(y, x)


def features_golden(folder, seed=0, D=9, n=(70, 80)):
    "metrics_features of another size and another kernel"
    rng = np.random.RandomState(seed)
    f1, f2 = ((rng.randn(m, D) * np.linspace(.5, 2, D) + s).astype(np.float32) for m, s in zip(n, (0, .3)))
    logits = 2 * rng.randn(60, 5).astype(np.float32)
    kernel = dict(degree=2, gamma=.3, coef0=.5)
    c = {'D': D, 'kid': kernel | {'subsets': 6, 'subset_size': 30, 'rng_seed': 7}, 'isc_rng_seed': 11, 'k': 5}
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    a, b = f1.astype(np.float64), f2.astype(np.float64)
    draw = np.random.RandomState(7)
    pairs = [[draw.choice(m, 30, replace=False) for m in n] for _ in range(6)]
    values = np.array([numpy_mmd2(a[i], b[j], **kernel) for i, j in pairs])
    shuffled, whole = numpy_is(p, np.array_split(np.random.RandomState(11).permutation(60), 4)), numpy_is(p, [np.arange(60)])
    outs = {'fid': numpy_fid(a, b), 'fid_self': 0., 'mu1': a.mean(0), 'sigma1': np.cov(a, rowvar=False), 'kid_mean': values.mean(),
            'kid_std': values.std(), 'kid_subsets_idx': np.array(pairs), 'mmd2_first20': numpy_mmd2(a[:20], b[:20], **kernel),
            'isc_splits4_shuffle1': np.array([shuffled.mean(), shuffled.std()]), 'isc_splits1_shuffle0': np.array([whole[0], 0.]),
            'prc_precision': numpy_manifold(f1, f2, 5, 1)[0], 'prc_recall': numpy_manifold(f2, f1, 5, 1)[0]}
    ins = {'f1': f1, 'f2': f2, 'logits': logits, 'singular_f1': f1[:5], 'singular_f2': f2[:6], 'degenerate_f1': f1 * 0, 'degenerate_f2': f2 * 0}
    return golden(folder, 'metrics_features', c, atol=1e-6, **{f'in/{k}': v for k, v in ins.items()},
                  **{f'out/{k}': np.asarray(v) for k, v in outs.items()})


def adm_golden(folder, seed=0, D=24, k=4):
    "adm_evaluator of another size; exact distances stand for those in float16, which the tolerance allows"
    rng = np.random.RandomState(seed)
    ref, sample = rng.randn(60, D).astype(np.float32), (rng.randn(50, D) * .9 + .1).astype(np.float32)
    p = rng.dirichlet(np.ones(6), 130).astype(np.float32)
    parts = [np.arange(i, min(i + 40, 130)) for i in range(0, 130, 40)]
    (precision, radii_ref, apart), (recall, radii_sample, _) = (numpy_manifold(*pair, k, 2) for pair in ((ref, sample), (sample, ref)))
    outs = {'fid': [numpy_fid(ref, sample)], 'inception_score_split40': [numpy_is(p.astype(np.float64), parts).mean()],
            'precision': [precision], 'recall': [recall], 'radii_ref': radii_ref[:, None], 'radii_sample': radii_sample[:, None],
            'realism': (radii_ref / (apart + 1e-5)).max(1), 'pairwise_sq_dist_7x9': apart[:9, :7].T}
    return golden(folder, 'adm_evaluator', {'k': k, 'D': D, 'split_size': 40}, rtol=4e-3, atol=4e-3,
                  **{'in/ref': ref, 'in/sample': sample, 'in/probs': p}, **{f'out/{n}': np.asarray(v) for n, v in outs.items()})


@pytest.mark.parametrize('make', [features_golden, adm_golden])
@pytest.mark.parametrize('seed', range(3))
def test_scores_of_other_sizes(tmp_path, make, seed):
    v = make(tmp_path, seed)
    assert v.word == 'passed', parity.line(v)


@pytest.mark.parametrize('make, where, attribute, change', [
    (features_golden, scores, 'polynomial_kernel', lambda f: lambda x, y, degree=3, gamma=None, coef0=1.: f(x, y, degree, None, coef0)),
    (features_golden, scores, 'groups_shuffled', lambda f: lambda n, splits=10, seed=2020: f(n, splits, seed and 2020)),
    (features_golden, metrics, 'frechet_distance', lambda f: lambda a, b: f(a, b) * (1 + 1e-4)),
    (adm_golden, scores, 'groups_in_order', lambda f: lambda n, size: [torch.arange(n)]),
    (adm_golden, scores, 'manifold_radii', lambda f: lambda x, k=3, kind='euclid': f(x, k + 1, kind)),
    (adm_golden, scores, '_half', lambda f: lambda x: x.bfloat16().float()),
    (adm_golden, scores, 'distances', lambda f: lambda a, b, kind='euclid': f(a, b, 'euclid')),
    (adm_golden, scores, 'precision_recall', lambda f: lambda a, b, *how: f(b, a, *how))],
    ids=lambda v: v if isinstance(v, str) else getattr(v, '__name__', ''))
def test_scores_are_noticed_when_wrong(tmp_path, monkeypatch, make, where, attribute, change):
    monkeypatch.setattr(where, attribute, change(vars(where)[attribute]))
    assert make(tmp_path).word == 'FAILED'


def test_what_is_not_supported_is_listed_and_no_failure(tmp_path, capsys):
    golden(tmp_path, 'a_paper_of_next_year', {'T': 3}, **{'out/y': torch.zeros(1)})
    (tmp_path / 'full__a_giant.json').write_text(json.dumps({'name': 'full__a_giant', 'keys_file': 'schemas/x.json', 'salt': 's', 'rtol': 1, 'atol': 1}))
    save_file({'out/y': torch.zeros(1)}, tmp_path / 'full__a_giant.safetensors')
    assert parity.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.count('unsupported') == 3 and 'a_paper_of_next_year' in out and out.splitlines()[-1] == '2 unsupported'


def test_full_size_goldens_run_one_model_a_process(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(parity, 'in_own_process', lambda g, s: seen.append(g.name) or parity.Verdict(g.name, '', 'passed'))
    for name in ('full__ddpm_a', 'full__ddpm_b'):
        (tmp_path / f'{name}.json').write_text(json.dumps({'name': name}))
        save_file({'out/y': torch.zeros(1)}, tmp_path / f'{name}.safetensors')
    assert [v.word for v in parity.run(tmp_path)] == ['skipped'] * 2 and not seen
    assert [v.word for v in parity.run(tmp_path, full=True)] == ['passed'] * 2 and seen == ['full__ddpm_a', 'full__ddpm_b']
