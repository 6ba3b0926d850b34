"The parity tool on other configurations of the same names: goldens made here by plain numpy and functional code that shares nothing with the package"
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from diffcourse import unet
from tests import parity


def golden(folder, name, config=None, *, rtol=1e-5, atol=1e-5, **tensors):
    "Write a golden as the official ones are written; tensor names have '/' for '__'"
    info = {'name': name, 'official': 'a plain reimplementation', 'rtol': rtol, 'atol': atol}
    (folder / f'{name}.json').write_text(json.dumps(info | ({'config': config} if config else {})))
    save_file({k: torch.as_tensor(v).contiguous() for k, v in tensors.items()}, folder / f'{name}.safetensors')
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
