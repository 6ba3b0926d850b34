"Losses, respacing and samplers on other configurations than the stored ones: goldens made here by plain numpy in float64"
import math

import numpy as np
import pytest

from diffcourse import ddim
from tests import parity
from tests.test_parity import variance_for_deviation
from tests.test_parity_elsewhere import at, golden, linear_levels

f32 = lambda v: np.asarray(v, dtype=np.float32)


def cosine_levels(T):
    "β, ᾱ, ᾱ before, β̃ of Improved DDPM's schedule"
    f = np.cos((np.arange(T + 1) / T + .008) / 1.008 * np.pi / 2) ** 2
    return levels(np.minimum(1 - f[1:] / f[:-1], .999))


def levels(β):
    "The same four from any β"
    ᾱ = np.cumprod(1 - β)
    before = np.append(1., ᾱ[:-1])
    return β, ᾱ, before, β * (1 - before) / (1 - ᾱ)


def floored(variance): return np.log(np.append(variance[1:2], variance[1:]))


LEVELS = dict(linear=linear_levels, cosine=cosine_levels)


def spaced(T, spec):
    "The released code's respacing, section by section"
    if spec.startswith('ddim'):
        return next(list(range(0, T, k)) for k in range(1, T) if len(range(0, T, k)) == int(spec[4:]))
    counts, start, kept = [int(n) for n in spec.split(',')], 0, []
    for i, n in enumerate(counts):
        size, at_ = T // len(counts) + (1 if i < T % len(counts) else 0), 0.
        for _ in range(n):
            kept.append(start + round(at_))
            at_ += (size - 1) / (n - 1) if n > 1 else 1
        start += size
    return kept


@pytest.mark.parametrize('T, spec, kind', [(500, '7', 'linear'), (500, 'ddim20', 'linear'), (300, '5,1,9,2', 'cosine'), (4000, '17', 'cosine')])
def test_respacing(tmp_path, T, spec, kind):
    kept = spaced(T, spec)
    ᾱ = LEVELS[kind](T)[1][kept]
    β = 1 - ᾱ / np.append(1., ᾱ[:-1])
    outs = dict(alphas_cumprod=ᾱ, betas=β, posterior_log_variance_clipped=floored(levels(β)[3]), timestep_map=np.array(kept))
    outs = {f'out/{T}_{spec}/{k}': v for k, v in outs.items()}
    v = golden(tmp_path, 'respacing', dict(schedule=kind), rtol=1e-9, atol=1e-14, **outs)
    assert v.word == 'passed' and v.note == '4 of 4 outputs', parity.line(v)
    v = golden(tmp_path, 'respacing', dict(schedule=dict(linear='cosine', cosine='linear')[kind]), rtol=1e-9, atol=1e-14, **outs)
    assert v.word == 'FAILED'


# --- losses ---------------------------------------------------------------------------------------------------

def guess(mean, raw, x, t, L):
    "x0 as the network means it"
    β, ᾱ, before, _ = L
    if mean == 'START_X': return raw
    if mean == 'PREVIOUS_X':
        c0, c1 = np.sqrt(before) * β / (1 - ᾱ), np.sqrt(1 - β) * (1 - before) / (1 - ᾱ)
        return raw / at(c0, t) - at(c1 / c0, t) * x
    return x / at(np.sqrt(ᾱ), t) - at(np.sqrt(1 / ᾱ - 1), t) * raw


def posterior(x0, x, t, L):
    β, ᾱ, before, _ = L
    return at(np.sqrt(before) * β / (1 - ᾱ), t) * x0 + at(np.sqrt(1 - β) * (1 - before) / (1 - ᾱ), t) * x


def log_variance(kind, raw, t, L, C):
    "Of the model's step"
    low, high = at(floored(L[3]), t), at(np.log(np.append(L[3][1], L[0][1:])), t)
    if kind == 'LEARNED': return raw[:, C:]
    if kind == 'LEARNED_RANGE': return (raw[:, C:] + 1) / 2 * at(np.log(L[0]), t) + (1 - raw[:, C:]) / 2 * low
    return np.broadcast_to(low if kind == 'FIXED_SMALL' else high, raw[:, :C].shape)


def term(x0, x, mean, logv, t, L):
    "One term of the bound in bits per dimension: KL, or the discretised decoder at t = 0"
    low = at(floored(L[3]), t)
    kl = .5 * (logv - low - 1 + np.exp(low - logv) + (posterior(x0, x, t, L) - mean) ** 2 * np.exp(-logv))
    cdf = lambda v: .5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + .044715 * v ** 3)))
    up, down = (cdf((x0 - mean + d) * np.exp(-.5 * logv)) for d in (1 / 255, -1 / 255))
    mass = np.where(x0 < -.999, up, np.where(x0 > .999, 1 - down, up - down))
    nll = -np.log(np.maximum(mass, 1e-12))
    flat = lambda v: v.reshape(len(v), -1).mean(1) / math.log(2)
    return np.where(t == 0, flat(nll), flat(kl))


@pytest.mark.parametrize('means', ['EPSILON', 'START_X PREVIOUS_X'])
@pytest.mark.parametrize('kind, T, C', [('linear', 60, 1), ('cosine', 250, 2)])
def test_training_losses(tmp_path, kind, T, C, means):
    """Four losses × three targets × four variances

    The decoder (t = 0) is asked of the noise only: a random picture is so far off that single precision sees no mass in any bin.
    """
    rng, shape, L = np.random.RandomState(T), (5, C, 4, 3), LEVELS[kind](T)
    t = np.array([0 if means == 'EPSILON' else 2, 1, T // 3, T // 2, T - 2])
    x0 = f32(rng.randint(0, 256, shape) / 127.5 - 1).astype(np.float64)
    noise, raws = f32(rng.randn(*shape)).astype(np.float64), {n: f32(.5 * rng.randn(5, n, 4, 3)).astype(np.float64) for n in (C, 2 * C)}
    x = at(np.sqrt(L[1]), t) * x0 + at(np.sqrt(1 - L[1]), t) * noise
    flat, outs = lambda v: v.reshape(len(v), -1).mean(1), {}
    for variance in ('FIXED_SMALL', 'FIXED_LARGE', 'LEARNED', 'LEARNED_RANGE'):
        raw = raws[C * (2 if variance.startswith('LEARNED') else 1)]
        for mean_type in means.split():
            target, said = dict(EPSILON=noise, START_X=x0, PREVIOUS_X=posterior(x0, x, t, L))[mean_type], raw[:, :C]
            mean = said if mean_type == 'PREVIOUS_X' else posterior(guess(mean_type, said, x, t, L), x, t, L)
            vb, mse = term(x0, x, mean, log_variance(variance, raw, t, L, C), t, L), flat((target - said) ** 2)
            for name, parts in dict(KL=dict(loss=vb), RESCALED_KL=dict(loss=T * vb),
                                    MSE=dict(mse=mse, vb=vb, loss=mse + vb), RESCALED_MSE=dict(mse=mse, vb=T / 1000 * vb, loss=mse + T / 1000 * vb)).items():
                if not variance.startswith('LEARNED') and 'mse' in parts: parts = dict(mse=mse, loss=mse)
                outs |= {f'out/{name}.{mean_type}.{variance}/{k}': v for k, v in parts.items()}
    put = {'in/x_start': f32(x0), 'in/noise': f32(noise), 'in/t': t, **{f'in/model_output_{n}': f32(v) for n, v in raws.items()}}
    v = golden(tmp_path, 'training_losses', dict(T=T, schedule=kind), rtol=2e-3, atol=2e-3, **put, **outs)
    assert v.word == 'passed' and v.note.split()[0] == str(len(outs)), parity.line(v)
    key = f'out/MSE.{means.split()[0]}.LEARNED_RANGE/loss'
    v = golden(tmp_path, 'training_losses', dict(T=T, schedule=kind), rtol=2e-3, atol=2e-3, **put, **outs | {key: outs[key] + .01})
    assert v.word == 'FAILED' and v.note.startswith('1 of')


@pytest.mark.parametrize('T, history, mixed', [(5, 2, .1), (30, 7, 0.)])
def test_loss_second_moment_resampler(tmp_path, T, history, mixed):
    rng = np.random.RandomState(T)
    t, loss = np.append(rng.randint(0, T, 50), np.repeat(np.arange(T), history)), f32(rng.rand(50 + T * history) + .1)
    kept = np.array([loss[t == i][-history:] for i in range(T)], dtype=np.float64)
    w = np.sqrt((kept ** 2).mean(1))
    w = w / w.sum() * (1 - mixed) + mixed / T
    outs = dict(weights_before=np.ones(T), weights_after=w, probabilities=w / w.sum(), importance_weights=w.sum() / (T * w),
                loss_counts=np.full(T, history), loss_history=kept)
    put = {'in/t_seq': t, 'in/loss_seq': loss, **{f'out/{k}': v for k, v in outs.items()}}
    config = dict(T=T, history_per_term=history, uniform_prob=mixed)
    v = golden(tmp_path, 'loss_second_moment_resampler', config, rtol=1e-6, atol=1e-9, **put)
    assert v.word == 'passed' and v.note == '6 of 6 outputs', parity.line(v)
    assert golden(tmp_path, 'loss_second_moment_resampler', config | dict(uniform_prob=.3), rtol=1e-6, atol=1e-9, **put).word == 'FAILED'


# --- samplers -------------------------------------------------------------------------------------------------

def noise_left(t): return (t > 0).reshape(-1, *[1] * 3)


def ddim_step(x0, eps, t, L, η, noise):
    "The released code's DDIM step from a guess at the picture and at the noise"
    _, ᾱ, before, _ = L
    σ = η * np.sqrt((1 - before) / (1 - ᾱ)) * np.sqrt(1 - ᾱ / before)
    return at(np.sqrt(before), t) * x0 + at(np.sqrt(1 - before - σ ** 2), t) * eps + noise_left(t) * at(σ, t) * noise


def noise_of(x, x0, t, L): return (x / at(np.sqrt(L[1]), t) - x0) / at(np.sqrt(1 / L[1] - 1), t)


@pytest.mark.parametrize('kind, T, mean, var', [('cosine', 100, 'START_X', 'FIXED_LARGE'), ('linear', 300, 'EPSILON', 'FIXED_SMALL'),
                                                ('cosine', 1000, 'EPSILON', 'LEARNED_RANGE')])
def test_sampling_steps(tmp_path, monkeypatch, kind, T, mean, var):
    rng, C, L = np.random.RandomState(T), 2, LEVELS[kind](T)
    x, grad, noise = (f32(rng.randn(4, C, 3, 3)).astype(np.float64) for _ in range(3))
    n = C * (2 if var.startswith('LEARNED') else 1)
    raw, t, outs = f32(rng.randn(4, n, 3, 3)).astype(np.float64), np.array([0, 1, T // 2, T - 2]), {}
    after = np.append(L[1][1:], 0.)
    for clip in (0, 1):
        x0 = guess(mean, raw[:, :C], x, t, L)
        x0 = x0.clip(-1, 1) if clip else x0
        eps, logv = noise_of(x, x0, t, L), log_variance(var, raw, t, L, C)
        mu = posterior(x0, x, t, L)
        variance = at(L[3], t) if var == 'FIXED_SMALL' else np.exp(logv)              # the published table has 0 at t = 0
        shifted = mu + variance * grad
        moved = eps - at(np.sqrt(1 - L[1]), t) * grad
        moved_x0 = x / at(np.sqrt(L[1]), t) - at(np.sqrt(1 / L[1] - 1), t) * moved
        out = {'p_sample': mu + noise_left(t) * np.exp(.5 * logv) * noise, 'condition_score.pred_xstart': moved_x0,
               'condition_score.mean': posterior(moved_x0, x, t, L), 'ddim_reverse': at(np.sqrt(after), t) * x0 + at(np.sqrt(1 - after), t) * eps}
        if var != 'FIXED_SMALL': out |= {'condition_mean': shifted, 'p_sample_cond': shifted + noise_left(t) * np.exp(.5 * logv) * noise}
        for η in (0., .7):
            out |= {f'ddim_eta{η}': ddim_step(x0, eps, t, L, η, noise), f'ddim_cond_eta{η}': ddim_step(moved_x0, moved, t, L, η, noise)}
        outs |= {f'out/clip{clip}/{k}': v for k, v in out.items()}
    put = {'in/x': f32(x), 'in/t': t, 'in/noise': f32(noise), 'in/cond_grad': f32(grad), f'in/model_output_{n}': f32(raw)}
    config = dict(T=T, schedule=kind, mean=mean, var=var, etas=[0., .7])
    v = golden(tmp_path, 'sampling_steps', config, rtol=2e-4, atol=2e-4, **put, **outs)
    assert v.word == 'passed' and v.note.split()[0] == str(len(outs)), parity.line(v)
    monkeypatch.setattr(ddim, 'sigma', variance_for_deviation(ddim.sigma))
    assert golden(tmp_path, 'sampling_steps', config, rtol=2e-4, atol=2e-4, **put, **outs).word == 'FAILED'


@pytest.mark.parametrize('spec, T, kind, rescale, clip', [('6', 100, 'cosine', True, False), ('ddim10', 200, 'linear', False, True),
                                                          ('4,2,3', 4000, 'cosine', True, True)])
def test_sampling_loops(tmp_path, spec, T, kind, rescale, clip):
    rng, kept, seen = np.random.RandomState(T), spaced(T, spec), []
    ᾱ = LEVELS[kind](T)[1][kept]
    L = levels(1 - ᾱ / np.append(1., ᾱ[:-1]))
    x_T, noises = f32(rng.randn(3, 2, 4, 4)).astype(np.float64), f32(rng.randn(len(kept), 3, 2, 4, 4)).astype(np.float64)
    def walk(step):
        x = x_T
        for noise, i in zip(noises, reversed(range(len(kept)))):
            t, told = np.full(3, i), kept[i] * (1000 / T if rescale else 1)
            seen.append(np.full(3, told))
            said = .6 * x + .2 * np.sin(told / 100)
            x0 = guess('EPSILON', said, x, t, L)
            x0 = x0.clip(-1, 1) if clip else x0
            x = step(x0, x, .5 * np.cos(x), t, noise)
        return x
    ancestral = lambda x0, x, raw, t, noise: (posterior(x0, x, t, L) + noise_left(t) * noise
                                              * np.exp(.5 * log_variance('LEARNED_RANGE', np.concatenate([x, raw], 1), t, L, 2)))
    outs = {'out/p_sample_loop': walk(ancestral)}
    outs |= {'out/timesteps_seen_by_model': f32(np.stack(seen)) if rescale else np.stack(seen).astype(np.int64)}
    for η in (0, 1): outs[f'out/ddim_eta{η}'] = walk(lambda x0, x, raw, t, noise: ddim_step(x0, noise_of(x, x0, t, L), t, L, η, noise))
    config = dict(T=T, schedule=kind, respacing=spec, rescale_timesteps=rescale, clip_denoised=clip, mean='EPSILON', var='LEARNED_RANGE',
                  model='cat([0.6*x + 0.2*sin(t/100), 0.5*cos(x)], dim=1)')
    put = {'in/x_T': f32(x_T), 'in/noises': f32(noises)}
    v = golden(tmp_path, 'sampling_loops', config, rtol=1e-3, atol=1e-3, **put, **outs)
    assert v.word == 'passed' and v.note == '4 of 4 outputs', parity.line(v)
    other = config | dict(model='cat([0.6*x + 0.2*sin(t/90), 0.5*cos(x)], dim=1)')
    assert golden(tmp_path, 'sampling_loops', other, rtol=1e-3, atol=1e-3, **put, **outs).word == 'FAILED'


@pytest.mark.parametrize('seq', [[0, 5, 9, 30, 49], [3, 20, 41]])
def test_ddim_generalized_steps(tmp_path, seq):
    rng, β = np.random.RandomState(len(seq)), np.linspace(1e-3, .1, 50)
    L_all = levels(f32(β).astype(np.float64))
    x_T, noises, outs = f32(rng.randn(2, 1, 4, 4)).astype(np.float64), f32(rng.randn(len(seq), 2, 1, 4, 4)).astype(np.float64), {}
    ᾱ = L_all[1][seq]
    before = np.append(1., ᾱ[:-1])
    for η in (0., .4):
        x, x0s = x_T, []
        for noise, i in zip(noises, reversed(range(len(seq)))):
            eps = .5 * x + .3 * np.cos(seq[i] / 20)
            x0 = (x - np.sqrt(1 - ᾱ[i]) * eps) / np.sqrt(ᾱ[i])
            σ = η * np.sqrt((1 - ᾱ[i] / before[i]) * (1 - before[i]) / (1 - ᾱ[i]))
            x = np.sqrt(before[i]) * x0 + σ * noise + np.sqrt(1 - before[i] - σ ** 2) * eps
            x0s.append(x0)
        outs |= {f'out/generalized_eta{η}': x, f'out/generalized_eta{η}_x0': np.stack(x0s)}
    put = {'in/betas': f32(β), 'in/x_T': f32(x_T), 'in/noises': f32(noises), 'in/seq': np.array(seq)}
    config = dict(seq=seq, model='eps(x,t) = 0.5*x + 0.3*cos(t/20)')
    v = golden(tmp_path, 'ddim_generalized_steps', config, rtol=1e-4, atol=1e-4, **put, **outs)
    assert v.word == 'passed' and v.note == '4 of 4 outputs', parity.line(v)
    assert golden(tmp_path, 'ddim_generalized_steps', config | dict(seq=[s + 1 for s in seq[:-1]] + seq[-1:]), rtol=1e-4, atol=1e-4, **put,
                  **outs).word == 'FAILED'


@pytest.mark.parametrize('n, low, high, rho', [(5, .1, 6., 5.), (13, .02, 30., 7.)])
def test_k_diffusion(tmp_path, n, low, high, rho):
    "Euler, Euler ancestral, Heun and DPM-Solver++(2M) in units where the picture keeps its size, down to noise of size 0"
    rng = np.random.RandomState(n)
    x0, noises = f32(high * rng.randn(2, 3, 4, 4)).astype(np.float64), f32(rng.randn(n, 2, 3, 4, 4)).astype(np.float64)
    sizes = np.append(np.linspace(high ** (1 / rho), low ** (1 / rho), n) ** rho, 0.)
    D = lambda x, s: .7 * x / (1 + s ** 2) + .1 * np.sin(s)
    euler, ancestral, heun, multi, old, old_h = x0, x0, x0, x0, None, None
    for i, (s, e) in enumerate(zip(sizes, sizes[1:])):
        euler = euler + (euler - D(euler, s)) / s * (e - s)
        up = min(e, np.sqrt(e ** 2 * (s ** 2 - e ** 2) / s ** 2))
        ancestral = ancestral + (ancestral - D(ancestral, s)) / s * (np.sqrt(e ** 2 - up ** 2) - s) + up * noises[i]
        slope = (heun - D(heun, s)) / s
        there = heun + slope * (e - s)
        heun = there if e == 0 else heun + (slope + (there - D(there, e)) / e) / 2 * (e - s)
        now, h = D(multi, s), np.log(s / e) if e else np.inf
        look = now if old is None or e == 0 else (1 + h / (2 * old_h)) * now - h / (2 * old_h) * old
        multi, old, old_h = e / s * multi - (e / s - 1) * look, now, h
    outs = {'out/karras_sigmas': sizes, 'out/exponential_sigmas': np.append(np.exp(np.linspace(np.log(high), np.log(low), n)), 0.),
            'out/euler': euler, 'out/euler_ancestral': ancestral, 'out/heun': heun, 'out/dpmpp_2m': multi}
    config = dict(n=n, sigma_min=low, sigma_max=high, rho=rho, denoiser='D(x,sigma) = 0.7*x/(1+sigma^2) + 0.1*sin(sigma)')
    put = {'in/x': f32(x0), 'in/noises': f32(noises)}
    v = golden(tmp_path, 'k_diffusion', config, rtol=1e-4, atol=1e-4, **put, **outs)
    assert v.word == 'passed' and v.note == '6 of 6 outputs', parity.line(v)
    assert golden(tmp_path, 'k_diffusion', config | dict(rho=rho + 1), rtol=1e-4, atol=1e-4, **put, **outs).word == 'FAILED'
