"Samplers on a path against independent sources: exact data, quantiles, diffusers, each other, and their own mutations"
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from diffcourse import ddim as module
from diffcourse.core import CourseError, generator
from diffcourse.ddim import (ddim, dpm_2m, encode, exponential_sigmas, fast_sampler, heun, karras_sigmas, noise_source,
                             path_through, quadratic_timesteps, sigma, slerp, uniform_timesteps)
from diffcourse.ddpm import (PARAMETERIZATIONS, VARIANCES, Denoiser, Path, Schedule, Step, ancestral, clip_x0,
                             q_posterior_mean_variance, sample)
from diffcourse.exact import Mixture, exact_denoiser

double = dict(dtype=torch.float64)
LINEAR, SHORT = Schedule.linear(), Schedule.linear(40)
TWO = Mixture(torch.tensor([[-.6], [.5]], **double), .1, torch.tensor([.3, .7], **double))
SAMPLERS = dict(ancestral=ancestral, ddim=ddim, ddim_half=partial(ddim, eta=.5), ddim_one=partial(ddim, eta=1.), dpm_2m=dpm_2m,
                heun=heun)


def last(states):
    "The end of a walk"
    for x in states: pass
    return x


def exact(parameterization, variance, data=TWO, schedule=SHORT):
    "The exact denoiser in one language, with variance channels that say what `fixed_small` would"
    d = exact_denoiser(data, schedule, parameterization)
    if not variance.startswith('learned'): return replace(d, variance=variance)
    path = schedule.steps()
    def net(x, t):
        says = -torch.ones_like(x) if variance == 'learned_range' else path.at(t).log_variance[:, None].expand_as(x)
        return torch.cat([d.net(x, t), says], 1)
    return Denoiser(net, schedule, parameterization, variance)


# ------------------------------------------------------------------------------------------------------------ composition

@pytest.mark.parametrize('name', SAMPLERS)
@pytest.mark.parametrize('variance', VARIANCES)
def test_every_sampler_speaks_every_language(name, variance):
    "Sampler × variance × parameterisation: the same walk in all four languages, and the data's moments at its end"
    x_T, n = torch.randn(1500, 1, generator=generator(0), **double), 1500
    noises = torch.randn(40, n, 1, generator=generator(1), **double)
    ends = [last(SAMPLERS[name](exact(p, variance), SHORT.steps(), x_T, noises=list(noises))) for p in PARAMETERIZATIONS]
    for x in ends[1:]: assert (x - ends[0]).abs().max() < 1e-6
    mean, var, slack = .17, .1 ** 2 + .3 * .7 * 1.1 ** 2, .02 if variance != 'fixed_large' or name != 'ancestral' else .05
    assert abs(ends[0].mean() - mean) < 4 * (var / n) ** .5 + slack and abs(ends[0].var() - var) < 4 * var * (2 / n) ** .5 + slack


@pytest.mark.parametrize('name', SAMPLERS)
@pytest.mark.parametrize('parameterization', ['eps', 'x0', 'v'])
def test_every_sampler_takes_short_paths_and_every_guidance(name, parameterization):
    "Twelve steps, with all three places of guidance in use: raw doubled and halved, x0 clipped, prediction shifted by score"
    d = exact(parameterization, 'fixed_small')
    def raw(d, x, step, cond): return 2 * d(x, step.t) / 2
    def shift(p, x, step, cond):
        eps = p.eps - .1 * (1 - step.ᾱ).sqrt()
        return replace(p, eps=eps, x0=(x - (1 - step.ᾱ).sqrt() * eps) / step.ᾱ.sqrt())
    x_T = torch.randn(400, 1, generator=generator(3), **double)
    run = lambda d: last(SAMPLERS[name](d, SHORT.steps(12), x_T, generator(4)))
    plain, guided = run(d), run(d.guided(raw=raw, x0=clip_x0, prediction=shift))
    assert guided.isfinite().all() and guided.abs().max() < 1.6
    if name != 'ancestral': assert guided.mean() > plain.mean()           # ancestral would need the mean shifted too


def test_mean_shift_is_refused_by_name_where_there_is_no_mean():
    def hook(p, x, step, cond): return replace(p, mean=p.mean + 1)
    hook.moves = 'mean'
    d, x = exact('eps', 'fixed_small').guided(prediction=hook), torch.zeros(2, 1, **double)
    for name, sampler in SAMPLERS.items():
        if name == 'ancestral': assert next(sampler(d, SHORT.steps(), x)).isfinite().all()
        else:
            with pytest.raises(CourseError, match='score-shift'): next(sampler(d, SHORT.steps(), x))
    with pytest.raises(CourseError, match='encode'): next(encode(d, SHORT.steps(), x))


@pytest.mark.parametrize('shape', [(2, 5), (2, 3, 4), (2, 3, 4, 4), (2, 1, 2, 3, 2)])
@pytest.mark.parametrize('name', SAMPLERS)
def test_any_number_of_dimensions_and_conditions(name, shape):
    seen = []
    def net(x, t, y):
        seen.append(y)
        return .1 * x
    x = last(SAMPLERS[name](Denoiser(net, SHORT), SHORT.steps(5), torch.randn(shape, generator=generator(0)), generator(1), y=7))
    assert x.shape == shape and x.dtype == torch.float32 and x.isfinite().all() and set(seen) == {7}


@pytest.mark.parametrize('name', [n for n in SAMPLERS])
def test_a_sampler_is_a_conversation_and_sample_drives_it(name):
    d, x = exact('eps', 'fixed_small'), torch.randn(3, 1, generator=generator(5), **double)
    plain = list(SAMPLERS[name](d, SHORT.steps(8), x, generator(6)))
    walk = SAMPLERS[name](d, SHORT.steps(8), x, generator(6))
    next(walk)
    assert len(plain) == 8 and torch.equal(walk.send(plain[0].clone()), plain[1])
    assert not torch.equal(walk.send(plain[1] + 1), plain[2])
    a, b = (sample(d, (5, 1), SHORT.steps(8), s, SAMPLERS[name], **double) for s in (1, 1))
    assert torch.equal(a, b) and not torch.equal(a, sample(d, (5, 1), SHORT.steps(8), 2, SAMPLERS[name], **double))


@pytest.mark.parametrize('name', SAMPLERS)
def test_the_last_step_ends_at_x0(name):
    d, x = exact('eps', 'fixed_small'), torch.randn(4, 1, generator=generator(5), **double)
    step = SHORT.steps()[-1]
    assert (last(SAMPLERS[name](d, [step], x, generator(6))) - d.denoise(x, step).x0).abs().max() < 1e-12


# ------------------------------------------------------------------------------------------------------------ the family

@pytest.mark.parametrize('path', [LINEAR.steps(), LINEAR.steps(9), LINEAR.steps([4, 300, 950])], ids=len)
def test_eta_one_is_the_posterior_and_the_marginals_stay(path):
    g = generator(0)
    for step in path[:-1][::max(1, len(path) // 40)]:
        x0, x = (torch.randn(50, generator=g, **double) for _ in range(2))
        σ = sigma(step.ᾱ, step.ᾱ_next, 1.)
        mean, variance, _ = q_posterior_mean_variance(x0, x, step)
        ours = step.ᾱ_next.sqrt() * x0 + (1 - step.ᾱ_next - σ ** 2).sqrt() * (x - step.ᾱ.sqrt() * x0) / (1 - step.ᾱ).sqrt()
        assert (mean - ours).abs().max() < 1e-9 and (variance / σ ** 2 - 1).abs().max() < 1e-9
        assert abs(sigma(step.ᾱ, step.ᾱ_next, .4) - .4 * step.variance.sqrt()) < 1e-12


def test_no_noise_is_drawn_without_eta():
    gen = generator(0)
    before = gen.get_state()
    for sampler in (ddim, dpm_2m, heun): last(sampler(exact('eps', 'fixed_small'), SHORT.steps(3), torch.zeros(1, 1, **double), gen))
    assert torch.equal(gen.get_state(), before)


POWERS = torch.tensor([.3, .6])

@pytest.mark.parametrize('bad, word', [
    (lambda: sigma(*POWERS, 1.1), r'eta must lie in \[0, 1\]'), (lambda: sigma(*POWERS, math.nan), 'eta'),
    (lambda: sigma(*POWERS, -.1), 'eta'), (lambda: uniform_timesteps(1000, 0), r'\[1, 1000\]'),
    (lambda: quadratic_timesteps(1000, 1001), r'\[1, 1000\]'), (lambda: noise_source(torch.zeros(0, 2)), 'empty'),
    (lambda: last(ddim(exact('eps', 'fixed_small'), SHORT.steps(3), torch.zeros(1, 1), noises=[torch.zeros(1, 1)], eta=1.)), 'ran out'),
    (lambda: next(encode(exact('eps', 'fixed_small'), SHORT.steps(1), torch.zeros(1, 1))), 'two steps'),
    (lambda: karras_sigmas(5, 0., 1.), 'sigma_min'), (lambda: exponential_sigmas(0, .1, 1.), 'n ≥ 1'),
    (lambda: path_through(LINEAR, [1., 2.]), 'fall'), (lambda: path_through(LINEAR, [1e4, 1.]), r'lie in \[0.01'),
])
def test_bad_input_names_the_legal_range(bad, word):
    with pytest.raises(CourseError, match=word): bad()


def test_sequences_are_those_of_the_paper_s_code():
    assert uniform_timesteps(1000, 10) == list(range(0, 1000, 100)) and len(uniform_timesteps(1000, 30)) == 31
    assert quadratic_timesteps(1000, 10) == [0, 9, 39, 88, 158, 246, 355, 483, 632, 800]
    assert quadratic_timesteps(1000, 1) == [0] and len(quadratic_timesteps(1000, 100)) == len(set(quadratic_timesteps(1000, 100)))


def test_steps_of_length_zero_change_nothing():
    "The paper's code takes them where squares round to the same integer; `quadratic_timesteps` leaves them out"
    ᾱ, x = LINEAR.alphas_cumprod[3], torch.randn(4, 1, generator=generator(0), **double)
    still = Step(torch.tensor(3), ᾱ, ᾱ, torch.tensor(0., **double), torch.tensor(0., **double))
    d = exact_denoiser(TWO, LINEAR)
    for η in (0., 1.): assert (next(ddim(d, [still], x, generator(1), eta=η)) - x).abs().max() < 1e-12


# ------------------------------------------------------------------------------------------------------------ exactness

def ᾱ_of(s): return 1 / (1 + torch.as_tensor(s, **double) ** 2)


def gauss_error(sampler, n, s_data=.5, top=8., bottom=.02):
    "Error of n steps against the closed-form flow of data N(0, s²): every x̄ is scaled by √((s²+s'²)/(s²+s_T²))"
    s = torch.logspace(math.log10(bottom), math.log10(top), n + 1, **double)
    path = Path(ᾱ_of(s[1:]), told=ᾱ_of(s[1:]), final=float(ᾱ_of(bottom)))
    data = Mixture(torch.zeros(1, 1, **double), s_data)
    d = Denoiser(lambda x, ᾱ: data.x0(x, ᾱ), LINEAR, 'x0')
    start = torch.linspace(-9, 9, 7, **double)[:, None]
    x = last(sampler(d, path, start * ᾱ_of(top).sqrt())) / ᾱ_of(bottom).sqrt()
    true = start * math.sqrt((s_data ** 2 + bottom ** 2) / (s_data ** 2 + top ** 2))
    return float((x - true).abs().max())


def slope(sampler): return math.log2(gauss_error(sampler, 100) / gauss_error(sampler, 400)) / 2


@pytest.mark.parametrize('sampler, order', [(ddim, 1), (dpm_2m, 2), (heun, 2)])
def test_order_of_convergence(sampler, order): assert abs(slope(sampler) - order) < .1


def test_order_is_lost_by_mutations(monkeypatch):
    "A second-order method with a wrong coefficient is first-order: the measurement sees it"
    original = module._stride
    def wrong(step):
        keep, h = original(step)
        return keep * (1 + .5 * h ** 2), h
    monkeypatch.setattr(module, '_stride', wrong)
    assert slope(dpm_2m) < 1.6
    monkeypatch.undo()
    original = module._shrinkage
    monkeypatch.setattr(module, '_shrinkage', lambda step: 1.002 * original(step))
    assert slope(heun) < 1.6


def test_round_trips_close_and_codes_are_noise():
    x0, d = TWO.sample(2000, generator(0)), exact_denoiser(TWO, LINEAR)
    def trip(n):
        code = last(encode(d, LINEAR.steps(n), x0))
        return code, float((last(ddim(d, LINEAR.steps(n), code)) - x0).abs().median())
    (code, fine), (_, coarse) = trip(250), trip(50)
    assert abs(code.mean()) < .1 and abs(code.std() - 1) < .06 and fine < .01 and coarse > 3 * fine


def test_slerp():
    a, b = torch.randn(2, 6, 3, 40, generator=generator(0))
    for w in (0., .3, 1.):
        c = slerp(a, b, w).flatten(1).double()
        u, v = (t.flatten(1).double() / t.flatten(1).double().norm(dim=1, keepdim=True) for t in (a, b))
        θ = (u * v).sum(1).acos()
        inside = ((c * u).sum(1) / c.norm(dim=1)).clamp(-1, 1).acos()
        if w in (0., 1.): assert (inside - w * θ).abs().max() < 1e-3
        assert (inside <= θ + 1e-3).all()
    assert torch.equal(slerp(a, b, torch.tensor([0., 1.] * 3)), torch.stack([(a, b)[i % 2][i] for i in range(6)]))
    ones = slerp(torch.eye(2)[:1], torch.eye(2)[1:], .5)
    assert ones.allclose(torch.full((1, 2), .5 ** .5)) and slerp(a, a, .4).allclose(a, atol=1e-5)


def test_paths_through_sizes_are_told_the_right_times():
    sizes = (1 / LINEAR.alphas_cumprod - 1).sqrt()
    back = path_through(LINEAR, sizes.flip(0))
    assert (back.table.ᾱ - LINEAR.alphas_cumprod).abs().max() < 1e-12 and (back.table.t - torch.arange(1000)).abs().max() < 1e-6
    k = karras_sigmas(8, .03, 14.6)
    assert k[[0, -1]].allclose(torch.tensor([14.6, .03], **double)) and (k.diff() < 0).all()
    e = exponential_sigmas(8, .03, 14.6)
    assert (e.log().diff() - e.log().diff()[0]).abs().max() < 1e-12


def test_the_recipe_shares_everything_but_the_sampler():
    a, b = module.ddim_fashion, module.ddpm_fashion
    assert a.name == 'ddim_fashion' and all(getattr(a, k) is getattr(b, k) for k in ('data', 'model', 'loss', 'settings', 'evaluate'))
    for steps in (0, 1001):
        with pytest.raises(CourseError, match=r'\[1, 1000\], got'): a.sample(lambda x, t: x, 1, steps=steps)


def test_recipe_sampler_draws_pictures():
    net = lambda x, t: torch.zeros_like(x)
    for sampler in (ddim, dpm_2m, heun):
        a = fast_sampler(1, 8, 8, sampler=sampler, steps=4)(net, 3, seed=1)
        assert a.shape == (3, 1, 8, 8) and a.abs().max() <= 1


# ------------------------------------------------------------------------------------------------------------ diffusers

KINDS = dict(eps='epsilon', x0='sample', v='v_prediction')


def same_tables(theirs, schedule):
    "Their schedule with our float64 tables, so that only the step is compared"
    theirs.betas, theirs.alphas, theirs.alphas_cumprod = schedule.betas, 1 - schedule.betas, schedule.alphas_cumprod
    theirs.final_alpha_cumprod = torch.tensor(1., **double)
    return theirs


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('clip', [True, False])
@pytest.mark.parametrize('eta', [0., .3, 1.])
def test_ddim_steps_equal_those_of_diffusers(kind, clip, eta):
    diffusers = pytest.importorskip('diffusers')
    theirs = same_tables(diffusers.DDIMScheduler(1000, beta_start=1e-4, beta_end=.02, prediction_type=KINDS[kind], clip_sample=clip,
                                                 set_alpha_to_one=True, steps_offset=0, timestep_spacing='leading'), LINEAR)
    theirs.set_timesteps(25)
    path, g = LINEAR.steps(range(0, 1000, 40)), generator(0)
    assert theirs.timesteps.tolist() == [int(s.t) for s in path]
    d = Denoiser(lambda x, t: raw, LINEAR, kind).guided(x0=clip_x0 if clip else None)
    for step in path:
        x, raw, noise = (torch.randn(2, 3, 4, 4, generator=g, **double) for _ in range(3))
        ours = next(ddim(d, [step], x, noises=[noise], eta=eta))
        want = theirs.step(raw, int(step.t), x, eta=eta, use_clipped_model_output=True, variance_noise=noise).prev_sample
        assert (ours - want).abs().max() <= 1e-5 * (1 + want.abs().max()), int(step.t)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('n', [10, 25])
def test_2m_walks_as_diffusers_does(kind, n):
    "Whole walks, state for state, with a network that answers"
    diffusers = pytest.importorskip('diffusers')
    theirs = diffusers.DPMSolverMultistepScheduler(1000, trained_betas=LINEAR.betas.tolist(), prediction_type=KINDS[kind], solver_order=2,
                                                   algorithm_type='dpmsolver++', solver_type='midpoint', lower_order_final=True,
                                                   final_sigmas_type='zero', timestep_spacing='linspace')
    theirs.set_timesteps(n)
    told = theirs.timesteps.tolist()
    net = lambda x, t: .6 * x + .2 * torch.sin(torch.as_tensor(t).double().reshape(-1, 1) / 100)
    x = torch.randn(4, 6, generator=generator(0), **double)
    walk = dpm_2m(Denoiser(net, LINEAR, kind), LINEAR.steps(sorted(told)), x)
    for t, ours in zip(told, walk):
        x = theirs.step(net(x, torch.tensor([t])), t, x).prev_sample
        assert (ours - x).abs().max() <= 1e-5 * (1 + x.abs().max()), t


def test_the_comparison_with_diffusers_can_fail():
    diffusers = pytest.importorskip('diffusers')
    theirs = same_tables(diffusers.DDIMScheduler(1000, beta_start=1e-4, beta_end=.02, clip_sample=False), LINEAR)
    theirs.set_timesteps(25)
    x, raw = torch.randn(2, 2, 3, generator=generator(0), **double)
    want = theirs.step(raw, 480, x, eta=0.).prev_sample
    path = LINEAR.steps(range(0, 1000, 40))
    difference = lambda step: (next(ddim(Denoiser(lambda x, t: raw, LINEAR), [step], x)) - want).abs().max()
    assert difference(path[12]) < 1e-5 < difference(replace(path[12], ᾱ_next=path[13].ᾱ_next))
