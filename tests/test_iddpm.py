"Improved DDPM against independent sources: Bayes' rule, autograd, diffusers, exact data, and its own mutations"
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from diffcourse import iddpm as module
from diffcourse.core import CourseError, Draws, generator
from diffcourse.ddpm import (PARAMETERIZATIONS, Denoiser, Schedule, ancestral, bits_per_dim, clip_x0, loss_simple, q_sample, sample,
                             vlb_term)
from diffcourse.exact import Mixture, exact_denoiser
from diffcourse.iddpm import (LOSSES, SecondMoment, forward_flops, gradient_noise, iddpm_denoiser, iddpm_fashion, iddpm_sampler,
                              loss_hybrid, loss_terms, loss_vlb_importance, space_timesteps)
from diffcourse.train import fixed_loss

double = dict(dtype=torch.float64)
COSINE, LINEAR = Schedule.cosine(), Schedule.linear()


# ------------------------------------------------------------------------------------------------------------ schedule, respacing

def test_cosine_is_the_paper_s_curve():
    f = lambda t, T: math.cos((t / T + .008) / 1.008 * math.pi / 2) ** 2
    for T in (4, 1000, 4000):
        s = Schedule.cosine(T)
        assert s.T == T and s.betas.max() == .999 and (s.betas[:-1] < .999).all()
        for t in (1, T // 2, T - 1): assert float(s.alphas_cumprod[t - 1]) == pytest.approx(f(t, T) / f(0, T), rel=1e-9)
    assert Schedule.cosine(1).betas.tolist() == [.999]
    with pytest.raises(CourseError, match='T must'): Schedule.cosine(0)


@pytest.mark.parametrize('T, spec, head, last, n', [
    (1000, '25', [0, 42, 83, 125], 999, 25), (1000, 'ddim25', [0, 40, 80], 960, 25), (1000, '10,10,5', [0, 37, 74], 999, 25),
    (1000, '250', [0, 4, 8, 12], 999, 250), (4000, 'ddim250', [0, 16, 32], 3984, 250), (1000, '', [0, 1, 2], 999, 1000),
    (1000, 27, [0, 38, 77], 999, 27), (1000, (3, 2), [0, 250, 499, 500], 999, 5), (1000, '1', [0], 0, 1), (1000, 'ddim1000', [0, 1], 999, 1000)])
def test_respacing(T, spec, head, last, n):
    kept = space_timesteps(T, spec)
    assert kept[:len(head)] == head and kept[-1] == last and len(kept) == n == len(set(kept)) and kept == sorted(kept)


def test_rounding_adds_up_as_the_official_code_does():
    "At 27 of 1000 the sum of strides rounds otherwise than the product does"
    product = [round(i * 999 / 26) for i in range(27)]
    assert space_timesteps(1000, '27') != product
    at, added = 0., []
    for _ in range(27): added, at = added + [round(at)], at + 999 / 26
    assert space_timesteps(1000, '27') == added


@pytest.mark.parametrize('spec, word', [('fast', 'not understood'), ('ddim', 'not understood'), ('10;5', 'not understood'), (2.5, 'not understood'),
                                        ('1001', '1 to 1000'), (0, '1 to 1000'), ('501,1', 'holds 500'),
                                        ('ddim60', 'ddim59'), ('ddim0', 'ddim'), ('ddim1', 'ddim2'), ('-5', '1 to 1000')])
def test_bad_respacing_names_what_is_legal(spec, word):
    with pytest.raises(CourseError, match=word): LINEAR.respaced(spec)


def test_respaced_paths_describe_the_same_process_and_may_tell_floats():
    path = Schedule.cosine(4000).respaced('ddim250', rescale=True)
    assert path[-2].t.dtype == torch.float32 and float(path[-2].t) == 4. and float(path[0].t) == 996.
    for p in (path, COSINE.respaced('10,10,5'), COSINE.respaced('')):
        assert float(torch.stack([1 - s.β for s in p]).prod()) == pytest.approx(float(p[0].ᾱ), rel=1e-9)
    assert COSINE.respaced('7').table.t.dtype == torch.int64


# ------------------------------------------------------------------------------------------------------------ learned variance

def truth(s2, step):
    "Variance of q(x_{t−1} | x_t) for data N(0, s²), by Bayes' rule"
    prior = step.ᾱ_next * s2 + 1 - step.ᾱ_next
    return 1 / (1 / prior + (1 - step.β) / step.β)


def knowing(s2, schedule):
    "Perfect mean and perfect share for data N(0, s²), any levels"
    path = schedule.steps()
    def net(x, t):
        step = path.at(t)
        share = (truth(s2, step).log() - step.log_variance) / (step.β.log() - step.log_variance)
        share = torch.where(step.noisy, share, 0.)
        gain = step.ᾱ.sqrt() * s2 / (step.ᾱ * s2 + 1 - step.ᾱ)
        return torch.cat([gain[:, None, None] * x, (2 * share - 1)[:, None, None].expand_as(x)], 1)
    return net


@pytest.mark.parametrize('s2', [1e-4, .01, .25, 1.])
@pytest.mark.parametrize('schedule', [LINEAR, COSINE], ids=['linear', 'cosine'])
def test_the_truth_lies_in_the_range(s2, schedule):
    step = schedule.steps().at(torch.arange(1, schedule.T))
    low, high, true = step.log_variance, step.β.log(), truth(s2, step).log()
    assert (low <= true + 1e-9).all() and (true <= high + 1e-9).all()


def test_with_the_true_variance_the_bound_is_the_entropy():
    s, quick = .3, Schedule.linear(100)
    pixels = ((s * torch.randn(24, 1, 64, generator=generator(0), **double)).clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1
    entropy = math.log2(s * math.sqrt(2 * math.pi * math.e) * 127.5)
    net = knowing(s ** 2, quick)
    bound = {v: float(bits_per_dim(Denoiser(net if v == 'learned_range' else lambda x, t: net(x, t)[:, :1], quick, 'x0', v), pixels)['total'].mean())
             for v in ('learned_range', 'fixed_small', 'fixed_large')}
    assert entropy - .06 < bound['learned_range'] < entropy + .04 < min(bound['fixed_small'], bound['fixed_large'])


def test_few_steps_keep_the_width_with_the_true_variance_only():
    "Ten steps on data N(0, 0.3²): the learned share keeps the standard deviation, both fixed variances miss it"
    s, n, quick = .3, 20_000, Schedule.linear(100)
    path = quick.respaced('10')
    def net(x, t):                                                      # the share that is right on *this* path
        step = path.at(torch.searchsorted(path.table.t, t.contiguous()))
        share = torch.where(step.noisy, (truth(s ** 2, step).log() - step.log_variance) / (step.β.log() - step.log_variance), 0.)
        return torch.cat([knowing(s ** 2, quick)(x, t)[:, :1], (2 * share - 1)[:, None, None].expand_as(x)], 1)
    widths = {v: float(sample(Denoiser(net if v == 'learned_range' else lambda x, t: net(x, t)[:, :1], quick, 'x0', v), (n, 1, 1), path, 1,
                              batch_size=n, **double).std()) for v in ('learned_range', 'fixed_small', 'fixed_large')}
    assert abs(widths['learned_range'] - s) < .01 and all(abs(widths[v] - s) > .02 for v in ('fixed_small', 'fixed_large'))


@pytest.mark.parametrize('clip', [True, False])
def test_steps_equal_those_of_diffusers(clip):
    "DDPMScheduler with learned_range: every tenth step and the last, to 1e-5"
    diffusers = pytest.importorskip('diffusers')
    theirs = diffusers.DDPMScheduler(trained_betas=COSINE.betas.tolist(), variance_type='learned_range', clip_sample=clip)
    theirs.betas, theirs.alphas, theirs.alphas_cumprod = COSINE.betas, 1 - COSINE.betas, COSINE.alphas_cumprod
    theirs.one = torch.tensor(1., **double)
    d, path, g = Denoiser(lambda x, t: raw, COSINE, 'eps', 'learned_range').guided(x0=clip_x0 if clip else None), COSINE.steps(), generator(0)
    for t in (*range(0, 1000, 10), 1, 999):
        x, raw = torch.randn(2, 3, 4, 4, generator=g, **double), torch.randn(2, 6, 4, 4, generator=g, **double)
        noise = torch.randn(x.shape, generator=generator(t), **double)
        ours = next(ancestral(d, [path[999 - t]], x, noises=[noise]))
        want = theirs.step(raw, t, x, generator=generator(t)).prev_sample
        assert (ours - want).abs().max() <= 1e-5 * (1 + want.abs().max()), t


# ------------------------------------------------------------------------------------------------------------ losses

def case(parameterization='eps', variance='learned_range', T=1000):
    "Raw output that wants a gradient, and what it was made from"
    g, s = generator(0), Schedule.cosine(T)
    x0, noise = torch.rand(4, 3, 4, 4, generator=g) * 2 - 1, torch.randn(4, 3, 4, 4, generator=g)
    step = s.steps().at(torch.tensor([0, 1, T // 2, T - 1]))
    raw = torch.randn(4, 6 if variance.startswith('learned') else 3, 4, 4, generator=g).requires_grad_()
    return Denoiser(None, s, parameterization, variance), raw, x0, noise, q_sample(x0, step.ᾱ, noise), step


@pytest.mark.parametrize('parameterization', PARAMETERIZATIONS)
@pytest.mark.parametrize('variance', ['learned', 'learned_range'])
def test_the_bound_teaches_the_variance_and_the_squared_error_the_mean(parameterization, variance):
    args = case(parameterization, variance)
    d, raw, x0, noise, x, step = args
    grad = lambda v: torch.autograd.grad(v.sum(), raw)[0]
    hybrid, bound = (grad(loss_terms(*args, kind)['loss']) for kind in ('mse', 'kl'))
    simple = grad((raw[:, :3] - d.target(x0, noise, x, step)).square().flatten(1).mean(1))
    assert torch.equal(hybrid[:, :3], simple[:, :3]) and hybrid[:, 3:].allclose(bound[:, 3:]) and bound[:, :3].abs().max() > 0


def test_the_stop_is_seen_missing(monkeypatch):
    monkeypatch.setattr(torch.Tensor, 'detach', lambda self: self)
    args = case()
    raw = args[1]
    hybrid = torch.autograd.grad(loss_terms(*args, 'mse')['loss'].sum(), raw)[0]
    simple = torch.autograd.grad((raw[:, :3] - args[3]).square().flatten(1).mean(1).sum(), raw)[0]
    assert not hybrid[:, :3].allclose(simple[:, :3], rtol=1e-2)


@pytest.mark.parametrize('T', [100, 1000])
def test_the_four_official_spellings(T):
    args = case(T=T)
    terms = {k: loss_terms(*args, k) for k in LOSSES}
    assert terms['rescaled_kl']['loss'].allclose(T * terms['kl']['loss'])
    assert terms['rescaled_mse']['vb'].allclose(terms['mse']['vb'] * T / 1000) and terms['mse']['vb'].allclose(terms['kl']['loss'])
    assert terms['mse']['loss'].allclose(terms['mse']['mse'] + terms['mse']['vb'])
    fixed = loss_terms(*case(variance='fixed_small'), 'mse')
    assert set(fixed) == {'loss', 'mse'} and torch.equal(fixed['loss'], fixed['mse'])
    with pytest.raises(CourseError, match='rescaled_mse'): loss_terms(*args, 'huber')


def test_hybrid_loss_tells_rescaled_times_and_takes_conditions():
    seen = []
    def net(x, t, y):
        seen.append((t.dtype, float(t.max()), y.tolist()))
        return torch.zeros(len(x), 2, *x.shape[2:])
    s = Schedule.cosine(4000)
    d = Denoiser(None, s, 'eps', 'learned_range')
    batch = {'x': torch.zeros(64, 1, 2, 2), 'y': torch.arange(64)}
    value, parts = loss_hybrid(d, ('y',), s.respaced('', rescale=True))(net, batch, Draws(0, 0))
    assert seen[0][0] == torch.float32 and 900 < seen[0][1] <= 999.75 and seen[0][2] == list(range(64)) and set(parts) == {'mse', 'vb'}
    assert float(value) == pytest.approx(float(parts['mse'] + parts['vb']))
    plain = loss_simple(Denoiser(None, s))(lambda x, t: torch.zeros_like(x), batch, Draws(0, 0))
    assert float(parts['mse']) == pytest.approx(float(plain))


# ------------------------------------------------------------------------------------------------------------ importance sampling

def test_histories_forget_the_oldest_and_weights_wait_until_all_are_full():
    s = SecondMoment(2, history=3, uniform=.1)
    s.update(torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([9., 1., 2., 2., 3., 4.]))
    assert s.losses[0].tolist() == [1, 2, 2] and s.counts.tolist() == [3, 2] and not s.warm and s.weights().tolist() == [1, 1]
    s.update(torch.tensor([1]), torch.tensor([5.]))
    rms = torch.tensor([3., 50 / 3], **double)
    rms[0] = 9 / 3
    want = rms.sqrt() / rms.sqrt().sum() * .9 + .05
    assert s.weights().allclose(want)


def test_weighted_draws_keep_the_mean_and_cut_the_spread():
    T, s = 30, SecondMoment(30, history=2)
    size = torch.logspace(1, -2, T, **double)
    s.update(torch.arange(T).repeat(2), size.repeat(2))
    t, factor = s.draw(Draws(0, 0), 40_000)
    weighted = size[t] * factor * T
    assert float(weighted.mean()) == pytest.approx(float(size.sum()), rel=.01)
    uniform = size[Draws(0, 1).integers(T, 40_000)] * T
    assert weighted.std() < .1 * uniform.std()
    assert t.bincount(minlength=T).min() > 0                       # 0.1 % of uniform draws reach every term


def test_importance_sampled_bound_estimates_the_bound():
    quick = Schedule.linear(40)
    d = Denoiser(lambda x, t: torch.cat([.2 * x, .1 * torch.ones_like(x)], 1), quick, 'eps', 'learned_range')
    x0 = torch.randint(0, 256, (64, 1, 4, 4), generator=generator(0)) / 127.5 - 1
    times = SecondMoment(40, history=2)
    loss = loss_vlb_importance(d, times)
    values = torch.stack([loss(d.net, {'x': x0}, Draws(0, i)) for i in range(150)])
    whole = bits_per_dim(d, x0)
    assert times.warm
    true, late = float((whole['total'] - whole['prior']).mean()), values[50:]
    assert abs(float(late.mean()) - true) < 4 * float(late.std()) / 10 + .01 * true
    assert late.std() < .6 * values[:5].std()
    with pytest.raises(CourseError, match='40 timesteps'): loss_vlb_importance(Denoiser(None, COSINE, 'eps', 'learned_range'), times)


def test_bad_importance_settings():
    for bad in (dict(T=0), dict(T=3, history=0), dict(T=3, uniform=2.)):
        with pytest.raises(CourseError): SecondMoment(**bad)


class Ruler(nn.Module):
    "Parameters whose gradient is known"
    def __init__(self, n=500):
        super().__init__()
        self.w = nn.Parameter(torch.full((n,), 2 / n ** .5))


@pytest.mark.parametrize('noise', [.05, .5])
def test_gradient_noise_of_a_known_gradient(noise):
    loss = lambda m, batch, draws: ((.5 * m.w.square() + noise * draws.normal(500) * m.w).sum(), {})
    ratio, losses, _ = gradient_noise(Ruler(), loss, [{}] * 80)
    assert ratio == pytest.approx(noise ** 2 * 500 / 4, rel=.15) and len(losses) == 80
    with pytest.raises(CourseError, match='at least 2'): gradient_noise(Ruler(), loss, [{}])


# ------------------------------------------------------------------------------------------------------------ compute, recipe

def test_flops_are_counted():
    conv, linear = nn.Conv2d(2, 5, 3, stride=2, padding=1), nn.Linear(20, 3)
    assert forward_flops(lambda x, t: linear(conv(x).flatten(1)[:, :20]), (2, 8, 8)) == 2 * 9 * 2 * 5 * 16 + 2 * 20 * 3
    with torch.random.fork_rng(): net = iddpm_fashion.model()
    assert forward_flops(net, (1, 28, 28)) > 50e6 and net.training


def test_recipe():
    assert set(iddpm_fashion.settings) == {'smoke', 'laptop', 'gpu'}
    with torch.device('meta'): assert 7e5 < sum(p.numel() for p in iddpm_fashion.model().parameters()) < 1e6
    net = lambda x, t: torch.cat([.1 * x, torch.zeros_like(x)], 1)
    a = iddpm_sampler(1, 8, 8)(net, 3, seed=1, steps=4)
    assert a.shape == (3, 1, 8, 8) and a.abs().max() <= 1 and torch.equal(a, iddpm_sampler(1, 8, 8)(net, 3, seed=1, steps=4))
    fixed = iddpm_sampler(1, 8, 8)(net, 3, seed=1, steps=4, variance='fixed_large')
    assert not torch.equal(a, fixed) and iddpm_denoiser(net).guidance.x0 is clip_x0


def test_fixed_variance_ignores_the_second_channels():
    x, step = torch.randn(2, 1, 4, 4, generator=generator(0)), COSINE.steps()[500]
    net = lambda x, t: torch.cat([.1 * x, x], 1)
    a = iddpm_denoiser(net, 'fixed_small').denoise(x, step)
    b = Denoiser(lambda x, t: .1 * x, COSINE, 'eps', 'fixed_small').guided(x0=clip_x0).denoise(x, step)
    assert torch.equal(a.mean, b.mean) and torch.equal(a.log_variance, b.log_variance)
