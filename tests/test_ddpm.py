"""The diffusion process against independent sources: numbers of the official code, diffusers, Bayes' rule and exact data"""
import dataclasses
import math

import pytest
import torch

from diffcourse.core import CourseError, Draws, generator
from diffcourse.ddpm import (PARAMETERIZATIONS, VARIANCES, Denoiser, Schedule, ancestral, bits_per_dim, clip_x0,
                             ddpm_emoji, ddpm_fashion, ddpm_fashion_small, loss_simple, loss_vlb, picture_denoiser,
                             picture_sampler, q_posterior_mean_variance, q_sample, sample)
from diffcourse.exact import Mixture, exact_denoiser

LINEAR = Schedule.linear()
double = dict(dtype=torch.float64)


def test_known_numbers():
    assert LINEAR.betas[[0, -1]].tolist() == pytest.approx([1e-4, .02], rel=1e-12)
    assert float(LINEAR.alphas_cumprod[-1]) == pytest.approx(4.0358e-5, rel=1e-4)
    assert LINEAR.posterior_variance[0] == 0
    assert LINEAR.posterior_log_variance_clipped[0] == LINEAR.posterior_variance[1].log()
    assert LINEAR.alphas_cumprod_prev[0] == 1 and LINEAR.alphas_cumprod_next[-1] == 0
    assert Schedule.linear(100).betas[0] == pytest.approx(1e-3)
    p = Denoiser(None, LINEAR, variance='fixed_large').predict(torch.zeros(1, 3), torch.zeros(1, 3), LINEAR.steps()[-1])
    assert p.log_variance[0, 0] == LINEAR.posterior_variance[1].log().float()


def test_even_steps_are_the_official_ones():
    kept = LINEAR.steps(25).table.t.tolist()
    assert kept[:3] == [0, 42, 83] and kept[-1] == 999 and len(kept) == 25
    assert LINEAR.steps(1).table.t.tolist() == [999]
    assert len(LINEAR.steps()) == len(LINEAR.steps(1000)) == 1000


@pytest.mark.parametrize('path', [LINEAR.steps(), LINEAR.steps(7), LINEAR.steps([5, 500, 998])])
def test_a_path_goes_from_noise_to_data(path):
    steps = list(path)
    assert len(steps) == len(path) and all(a.ᾱ_next == b.ᾱ for a, b in zip(steps, steps[1:]))
    assert steps[-1].ᾱ_next == 1 and [int(s.t) for s in steps] == sorted((int(s.t) for s in steps), reverse=True)
    assert torch.stack([1 - s.β for s in steps]).prod() == pytest.approx(float(steps[0].ᾱ), rel=1e-10)
    at = path.at(torch.tensor([0, len(path) - 1]))
    assert at.ᾱ.tolist() == [steps[-1].ᾱ, steps[0].ᾱ] and path[-1].t == steps[-1].t and len(path[1:3]) == 2
    with pytest.raises(IndexError): path[len(path)]


def test_a_path_can_tell_other_times_and_end_elsewhere():
    told = LINEAR.steps([0, 10], told=lambda t: t * 1.5)
    assert [float(s.t) for s in told] == [15., 0.]
    ends = LINEAR.steps([1, 500], final=float(LINEAR.alphas_cumprod[0]))[-1]
    assert ends.noisy and ends.variance > 0 and ends.log_variance == ends.variance.log()


@pytest.mark.parametrize('bad, word', [
    (lambda: Schedule([]), 'betas'), (lambda: Schedule([.1, 0.]), r'\(0, 1\]'), (lambda: Schedule.linear(0), 'T'),
    (lambda: LINEAR.steps(0), r'\[1, 1000\]'), (lambda: LINEAR.steps(1001), r'\[1, 1000\]'),
    (lambda: LINEAR.steps([3, 2]), 'ascending'), (lambda: LINEAR.steps([]), 'ascending'), (lambda: LINEAR.steps([0, 1000]), r'\[0, 1000\)'),
    (lambda: LINEAR.steps().at(torch.tensor([-1])), r'\[0, 1000\)'), (lambda: LINEAR.steps().at(torch.tensor([1000])), r'\[0, 1000\)'),
    (lambda: LINEAR.steps().at(torch.tensor([1.5])), 'integers'), (lambda: LINEAR.steps().at(torch.tensor([], dtype=torch.long)), 'empty'),
    (lambda: LINEAR.log_snr(999.5), r'\[0, 999\]'),
    (lambda: Denoiser(None, LINEAR, 'epsilon'), 'previous_x'), (lambda: Denoiser(None, LINEAR, variance='big'), 'fixed_small'),
    (lambda: q_sample(torch.zeros(3, 2), torch.ones(2), torch.zeros(3, 2)), 'batch of 3'),
    (lambda: sample(Denoiser(lambda x, t: x, LINEAR), (0, 2)), 'at least 1'),
    (lambda: next(ancestral(Denoiser(lambda x, t: x, LINEAR), LINEAR.steps(), torch.zeros(0, 2))), 'empty'),
    (lambda: Denoiser(None, LINEAR, variance='learned').predict(torch.zeros(1, 2), torch.zeros(1, 2), LINEAR.steps()[0]), '4 output'),
    (lambda: Denoiser(None, LINEAR).predict(torch.zeros(1, 4), torch.zeros(1, 2), LINEAR.steps()[0]), '2 output'),
])
def test_bad_input_names_the_legal_range(bad, word):
    with pytest.raises(CourseError, match=word): bad()


@pytest.mark.parametrize('shape', [(4, 7), (4, 3, 6), (4, 2, 4, 4), (4, 1, 2, 3, 2)])
@pytest.mark.parametrize('parameterization', PARAMETERIZATIONS)
@pytest.mark.parametrize('variance', VARIANCES)
def test_prediction_recovers_what_was_mixed_in_any_number_of_dimensions(shape, parameterization, variance):
    g = generator(0)
    x0, noise = (torch.randn(shape, generator=g, **double) for _ in range(2))
    step = LINEAR.steps().at(torch.tensor([0, 1, 400, 999]))
    x = q_sample(x0, step.ᾱ, noise)
    d = Denoiser(None, LINEAR, parameterization, variance)
    raw = d.target(x0, noise, x, step)
    if variance.startswith('learned'): raw = torch.cat([raw, torch.full_like(raw, -1.)], 1)
    p = d.predict(raw, x, step)
    mean, true_variance, log_variance = q_posterior_mean_variance(x0, x, step)
    for got, want in ((p.x0, x0), (p.eps, noise), (p.mean, mean)): assert torch.allclose(got, want, atol=1e-7)
    if variance in ('fixed_small', 'learned_range'): assert torch.allclose(p.log_variance, log_variance)
    if variance == 'fixed_small': assert torch.equal(p.variance, true_variance) and (p.variance[0] == 0).all()
    assert p.log_variance.isfinite().all() and p.log_variance.shape == p.variance.shape == x.shape


def test_learned_range_spans_the_two_fixed_choices():
    x, step = torch.zeros(1, 2), LINEAR.steps()[-10]
    value = lambda v: Denoiser(None, LINEAR, variance='learned_range').predict(
        torch.cat([torch.zeros(1, 2), torch.full((1, 2), v)], 1), x, step).log_variance[0, 0]
    assert value(1.) == pytest.approx(float(step.β.log()), rel=1e-6)
    assert value(-1.) == pytest.approx(float(step.log_variance), rel=1e-6)
    assert value(0.) == pytest.approx(float(step.β.log() + step.log_variance) / 2, rel=1e-6)


def test_previous_x_keeps_its_mean_when_x0_is_clipped():
    x, raw, step = torch.ones(1, 2), torch.full((1, 2), 1.4), LINEAR.steps()[-50]
    p = Denoiser(None, LINEAR, 'previous_x').predict(raw, x, step, clip_x0)
    assert torch.equal(p.mean, raw) and p.x0.abs().max() <= 1
    e = Denoiser(None, LINEAR, 'eps').predict(-5 * x, x, step, clip_x0)
    assert torch.allclose(q_posterior_mean_variance(e.x0, x, step)[0], e.mean)
    assert torch.allclose(q_sample(e.x0, step.ᾱ, e.eps), x, atol=1e-6)        # ε follows the clipped x0


def test_guidance_acts_in_its_order_and_leaves_the_original_alone():
    seen = []
    def raw(denoiser, x, step, cond):
        seen.append(('raw', cond['y']))
        return 2 * denoiser(x, step.t, **cond)
    def x0(v):
        seen.append('x0')
        return v.clamp(-1, 1)
    def prediction(p, x, step, cond):
        seen.append('prediction')
        return dataclasses.replace(p, mean=p.mean + 1)
    plain = Denoiser(lambda x, t, y: x * y, LINEAR)
    guided, step, x = plain.guided(raw=raw, x0=x0).guided(prediction=prediction), LINEAR.steps()[500], torch.ones(2, 3)
    p = guided.denoise(x, step, y=.1)
    want = plain.predict(.2 * x, x, step, clip_x0)
    assert seen == [('raw', .1), 'x0', 'prediction'] and torch.allclose(p.mean, want.mean + 1)
    assert plain.guidance.raw is None


def test_sampler_is_a_conversation():
    d = Denoiser(lambda x, t: torch.zeros_like(x), Schedule([.1, .2, .3, .4]))
    noises, x = torch.randn(4, 2, 3, generator=generator(1)), torch.randn(2, 3, generator=generator(2))
    plain = list(ancestral(d, d.schedule.steps(), x, noises=noises))
    assert len(plain) == 4 and all(torch.equal(a, b) for a, b in zip(plain, ancestral(d, d.schedule.steps(), x, noises=noises)))
    walk = ancestral(d, d.schedule.steps(), x, noises=noises)
    next(walk)
    assert torch.equal(walk.send(plain[0]), plain[1])
    walk = ancestral(d, d.schedule.steps(), x, noises=noises)
    next(walk)
    assert not torch.equal(walk.send(plain[0] + 1), plain[1])
    changed = noises.clone()
    changed[-1] = 7.
    assert torch.equal(list(ancestral(d, d.schedule.steps(), x, noises=changed))[-1], plain[-1])  # no noise in the last step


def test_sample_is_seeded_and_slices_conditions():
    told = []
    def net(x, t, y):
        told.append((len(x), y.tolist(), int(t[0])))
        return torch.zeros_like(x)
    d = Denoiser(net, Schedule([.3, .6]))
    a = sample(d, (3, 1, 2, 2), seed=5, batch_size=2, y=torch.arange(3))
    assert told == [(2, [0, 1], 1), (2, [0, 1], 0), (1, [2], 1), (1, [2], 0)]
    assert torch.equal(a, sample(d, (3, 1, 2, 2), seed=5, batch_size=2, y=torch.arange(3)))
    assert not torch.equal(a, sample(d, (3, 1, 2, 2), seed=6, batch_size=2, y=torch.arange(3)))


@pytest.mark.parametrize('variance', ['fixed_small', 'fixed_large'])
def test_exact_data_comes_back(variance):
    world = Mixture(torch.tensor([[-.7, .2], [.5, -.4], [.1, .8]], **double), .15, torch.tensor([.2, .3, .5], **double))
    short, n = Schedule.linear(250), 3000
    x = sample(exact_denoiser(world, short, variance=variance), (n, 2), seed=3, batch_size=n, **double)
    truth = world.sample(200_000, generator(4))
    assert ((x.mean(0) - truth.mean(0)).abs() < 4 * truth.std(0) / n ** .5 + .01).all()
    assert ((x.T.cov() - truth.T.cov()).abs() < .03).all()


def test_a_finite_set_is_drawn_in_proportion():
    points = torch.tensor([[-1., -1.], [-1., 1.], [1., 0.]])
    x = sample(exact_denoiser(Mixture(points, weights=torch.tensor([.5, .3, .2])), Schedule.linear(100)), (2000, 2), seed=1, batch_size=2000)
    distance, which = torch.cdist(x, points).min(1)
    share = torch.bincount(which, minlength=3) / 2000
    assert distance.max() < .05 and (share - torch.tensor([.5, .3, .2])).abs().max() < 4 * .5 / 2000 ** .5


@pytest.mark.parametrize('wrong', ['shift', 'sign', 'variance'])
def test_the_laboratory_notices_mutations(wrong):
    world, short = Mixture(torch.tensor([[-.6], [.6]], **double), .1), Schedule.linear(250)
    good = exact_denoiser(world, short)
    nets = {'shift': lambda x, t: good.net(x, (t + 25).clamp(max=249)), 'sign': lambda x, t: -good.net(x, t), 'variance': good.net}
    d = Denoiser(nets[wrong], short)
    if wrong == 'variance':
        d = d.guided(prediction=lambda p, x, step, cond: dataclasses.replace(p, log_variance=p.log_variance + 1))
    x = sample(d, (2000, 1), seed=0, batch_size=2000, **double)[:, 0]
    width = (x - .6 * x.sign()).std()
    assert not (.09 < width < .11 and abs(x.mean()) < .06)


def test_simple_loss_and_bound_agree_with_their_definitions():
    x0, silent = torch.zeros(4096, 1, 2, 2), lambda x, t: torch.zeros_like(x)
    assert float(loss_simple(Denoiser(None, LINEAR))(silent, {'x': x0}, Draws(0, 0))) == pytest.approx(1., abs=.03)
    d = Denoiser(lambda x, t: .2 * x, Schedule.linear(50), variance='fixed_large')
    batch = {'x': (torch.randint(0, 256, (256, 1, 4, 4), generator=generator(0)) / 127.5 - 1)}
    estimate = torch.stack([loss_vlb(d)(d.net, batch, Draws(1, i)) for i in range(60)])
    whole = bits_per_dim(d, batch['x'])
    assert torch.allclose(whole['vb'].sum(1) + whole['prior'], whole['total'])
    assert float(estimate.mean()) == pytest.approx(float((whole['total'] - whole['prior']).mean()),
                                                   abs=4 * float(estimate.std()) / 60 ** .5)


def test_loss_takes_named_conditions_and_learned_channels():
    def net(x, t, y): return torch.cat([x * y[:, None], x], 1)
    d = Denoiser(None, LINEAR, variance='learned_range')
    assert loss_simple(d, cond=('y',))(net, {'x': torch.ones(4, 2), 'y': torch.arange(4.), 'index': 0}, Draws(0, 0)).isfinite()


def test_bound_of_gaussian_pixels_is_near_their_entropy():
    s, quick = .3, Schedule.linear(100)
    pixels = ((s * torch.randn(32, 32, generator=generator(0), **double)).clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1
    bound = bits_per_dim(exact_denoiser(Mixture(torch.zeros(1, 32, **double), s), quick, variance='fixed_large'), pixels)
    entropy = math.log2(s * math.sqrt(2 * math.pi * math.e) * 127.5)
    assert entropy - .06 < float(bound['total'].mean()) < entropy + .4


@pytest.mark.parametrize('prediction', ['epsilon', 'sample', 'v_prediction'])
@pytest.mark.parametrize('variance', ['fixed_small', 'fixed_large'])
@pytest.mark.parametrize('clip', [False, True])
def test_steps_equal_those_of_diffusers(prediction, variance, clip):
    diffusers = pytest.importorskip('diffusers')
    ours = {'epsilon': 'eps', 'sample': 'x0', 'v_prediction': 'v'}[prediction]
    theirs = diffusers.DDPMScheduler(1000, beta_start=1e-4, beta_end=.02, variance_type=variance, prediction_type=prediction, clip_sample=clip)
    # their tables are float32, whose 1 − ᾱ has lost digits at small t: give them ours
    theirs.betas, theirs.alphas, theirs.alphas_cumprod = LINEAR.betas, 1 - LINEAR.betas, LINEAR.alphas_cumprod
    theirs.one = torch.tensor(1., **double)
    g = generator(0)
    x, raw = (torch.randn(2, 1, 4, 4, generator=g) for _ in range(2))
    d = Denoiser(lambda x, t: raw, LINEAR, ours, variance).guided(x0=clip_x0 if clip else None)
    for t in (999, 640, 20, 1):
        mine = next(ancestral(d, [LINEAR.steps()[999 - t]], x, generator(t)))
        other = theirs.step(raw, t, x, generator=generator(t))
        assert torch.allclose(mine, other.prev_sample, atol=1e-6 * max(1, float(mine.abs().max())), rtol=1e-6)


@pytest.mark.parametrize('recipe, limit', [(ddpm_fashion, 3e6), (ddpm_fashion_small, .3e6), (ddpm_emoji, 3e6)])
def test_recipes_fit_their_budget(recipe, limit):
    with torch.device('meta'): model = recipe.model()
    assert sum(p.numel() for p in model.parameters()) <= limit and set(recipe.settings) == {'smoke', 'laptop', 'gpu'}


def test_recipe_sampler_draws_pictures():
    net = lambda x, t: torch.zeros_like(x)
    a = picture_sampler(1, 8, 8)(net, 3, seed=1, steps=4)
    assert a.shape == (3, 1, 8, 8) and a.abs().max() <= 1 and torch.equal(a, picture_sampler(1, 8, 8)(net, 3, seed=1, steps=4))
    assert picture_denoiser(net).guidance.x0 is clip_x0
