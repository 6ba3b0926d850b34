"Classifier-free guidance: exact on a mixture, the same in every language and with every sampler, one batch or two calls, refused in words"
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from diffcourse import adm, cfg, data, ddim, ddpm
from diffcourse.core import CourseError, Draws, generator, to_uint8
from diffcourse.ddpm import Denoiser, Schedule, ancestral, sample
from diffcourse.exact import Mixture, exact_denoiser
from diffcourse.openai_unet import UNetModel, randomise
from tests.test_parity_elsewhere import golden

ROOT = Path(__file__).resolve().parent.parent
POINTS = torch.tensor([[-.9, -.5], [-.3, .5], [.1, -.6], [.6, .3], [.9, -.4], [0., 1.]], dtype=torch.float64)
KINDS = torch.tensor([0, 1, 1, 2, 2, 0])
WORLD, T = Mixture(POINTS, .3, torch.tensor([.1, .2, .3, .1, .2, .1], dtype=torch.float64)), 100
LINE = Schedule.linear(T)
NET = cfg.exact_conditional(WORLD, KINDS, LINE)
SAMPLERS = [ancestral, ddim.ddim, ddim.dpm_2m, ddim.heun]


def points(n=50, seed=0): return 1.5 * torch.randn(n, 2, generator=generator(seed), dtype=torch.float64)


def language(parameterization, variance='fixed_small'):
    "The exact conditional denoiser in another language, perhaps with channels for a variance"
    def net(x, t, y):
        step, eps = LINE.steps().at(t), NET(x, t, y)
        raw = d.target(ddpm.x0_from_eps(x, eps, step.ᾱ), eps, x, step)
        if not variance.startswith('learned'): return raw
        v = y[:, None] / 10 + torch.zeros_like(x) if variance == 'learned_range' else ddpm.spread(step.log_variance, x).expand_as(x)
        return torch.cat([raw, v], 1)
    d = Denoiser(net, LINE, parameterization, variance)
    return d


def tiny(classes=11, out=2, **how):
    net = UNetModel(image_size=8, in_channels=1, model_channels=16, out_channels=out, num_res_blocks=1, channel_mult=(1, 2),
                    num_head_channels=16, num_classes=classes, groups=8, **how)
    return randomise(net, generator(3)).eval()


class TestRule:
    def test_by_hand(self):
        c, u = torch.tensor([.5]), torch.tensor([.2])
        assert [round(float(cfg.combine(c, u, s)), 6) for s in (0., 1., 3.)] == [.2, .5, 1.1]
        assert cfg.combine(torch.ones(2, 3), torch.zeros(2, 3), torch.tensor([1., 2.])).tolist() == [[1.] * 3, [2.] * 3]

    @pytest.mark.parametrize('w', [-1., 0., .3, 6.5])
    def test_the_two_conventions(self, w):
        c, u = torch.randn(2, 4, 5, generator=generator(1), dtype=torch.float64)
        torch.testing.assert_close(cfg.combine(c, u, cfg.scale_from_w(w)), (1 + w) * c - w * u)
        assert cfg.w_from_scale(cfg.scale_from_w(w)) == pytest.approx(w)

    @pytest.mark.parametrize('t', [0, 3, 30, 99])
    @pytest.mark.parametrize('scale', [0., 1., 2.5, 20.])
    def test_it_is_classifier_guidance_in_the_exact_world(self, t, scale):
        x, y, step = points(), torch.arange(50) % 3, LINE.steps()[T - 1 - t]
        p = Denoiser(NET, LINE).guided(raw=cfg.classifier_free(scale, y=3)).denoise(x, step, y=y)
        classify = adm.exact_classifier(WORLD, KINDS, LINE)
        q = exact_denoiser(WORLD, LINE).guided(raw=adm.label_hidden(), prediction=adm.classifier_guidance(classify, scale)).denoise(x, step, y=y)
        for a, b in ((p.eps, q.eps), (p.x0, q.x0), (p.mean, q.mean)): assert (a - b).abs().max() < 1e-8 * (1 + b.abs().max())

    def test_swapped_branches_are_seen(self, monkeypatch):
        "The checker above can fail: a hook with its halves swapped is not the class's own denoiser at scale 1"
        good = cfg.two_answers
        monkeypatch.setattr(cfg, 'two_answers', lambda *a, **k: good(*a, **k)[::-1])
        with pytest.raises(AssertionError): self.test_it_is_classifier_guidance_in_the_exact_world(30, 2.5)


class TestComposition:
    @pytest.mark.parametrize('variance', ddpm.VARIANCES)
    @pytest.mark.parametrize('parameterization', ddpm.PARAMETERIZATIONS)
    def test_the_same_in_every_language(self, parameterization, variance):
        "x0 and mean do not depend on what the network predicts; the variance is the conditional branch's"
        hook = cfg.classifier_free(3., y=3)
        x, y = points(), torch.arange(50) % 3
        for step in LINE.steps()[:-1:20]:
            p = language(parameterization, variance).guided(raw=hook).denoise(x, step, y=y)
            q = language('eps').guided(raw=hook).denoise(x, step, y=y)
            plain = language(parameterization, variance).denoise(x, step, y=y)
            assert (p.x0 - q.x0).abs().max() < 1e-6 and (p.mean - q.mean).abs().max() < 1e-6
            torch.testing.assert_close(p.log_variance, plain.log_variance)

    @pytest.mark.parametrize('parameterization', ddpm.PARAMETERIZATIONS)
    @pytest.mark.parametrize('sampler', SAMPLERS, ids=lambda s: s.__name__)
    def test_every_sampler(self, sampler, parameterization):
        d, path = language(parameterization), LINE.steps() if parameterization == 'previous_x' else LINE.steps(12)
        classify, y = adm.exact_classifier(WORLD, KINDS, LINE), torch.arange(90) % 3
        def sure(scale):
            x = sample(d.guided(raw=cfg.classifier_free(scale, y=3)), (90, 2), path, 1, sampler, dtype=torch.float64, y=y)
            return float(classify(x, torch.zeros(90).long()).softmax(1).gather(1, y[:, None]).mean())
        none, plain, strong = map(sure, (0., 1., 4.))
        assert plain > none + .3 and strong > plain + .03, (none, plain, strong)

    def test_it_composes_with_a_classifier_and_with_clipping(self):
        x, y, step = 3 * points(), torch.zeros(50).long(), LINE.steps()[20]
        d = Denoiser(NET, LINE).guided(raw=cfg.classifier_free(3., y=3), x0=ddpm.clip_x0)
        p = d.denoise(x, step, y=y)
        assert p.x0.abs().max() <= 1
        classify = adm.exact_classifier(WORLD, KINDS, LINE)
        both = d.guided(prediction=adm.classifier_guidance(classify, 2.)).denoise(x, step, y=y)
        g = adm.log_prob_gradient(classify, x, step.t.expand(50), y)
        torch.testing.assert_close(both.eps, p.eps - (1 - step.ᾱ).sqrt() * 2 * g)


class TestHook:
    @pytest.mark.parametrize('told', [300, 'each'])
    @pytest.mark.parametrize('out,variance', [(1, 'fixed_small'), (2, 'learned_range')])
    def test_one_batch_is_two_calls(self, told, out, variance):
        d, s = Denoiser(tiny(out=out), Schedule.linear(), 'eps', variance), Schedule.linear().steps()
        x, y = torch.randn(5, 1, 8, 8, generator=generator(1)), torch.arange(5)
        step = s[699] if told == 300 else s.at(torch.arange(5) * 100)
        raws = []
        for together in (True, False):
            with torch.no_grad(): raws.append(cfg.classifier_free(2.5, together=together, y=10)(d, x, step, {'y': y}))
        assert (raws[0] - raws[1]).abs().max() < 1e-5
        t = torch.as_tensor(step.t).expand(5)
        with torch.no_grad(): c, u = d.net(x, t, y), d.net(x, t, torch.full((5,), 10))
        assert (raws[0][:, :1] - (2.5 * c - 1.5 * u)[:, :1]).abs().max() < 1e-5
        assert (raws[0][:, 1:] - c[:, 1:]).abs().sum() < 1e-4 and (c - u).abs().max() > 1e-3

    def test_calls_are_counted(self):
        seen = []
        def net(x, t, **c):
            seen.append((len(x), {k: len(v) for k, v in c.items() if isinstance(v, torch.Tensor)}))
            return torch.zeros_like(x)
        d, x, step = Denoiser(net, LINE), torch.zeros(4, 2), LINE.steps()[3]
        given = dict(y=torch.arange(4), low_res=torch.zeros(4, 7), table=torch.zeros(9), flag=True)
        d.guided(raw=cfg.classifier_free(3., y=10)).denoise(x, step, **given)
        assert seen == [(8, {'y': 8, 'low_res': 8, 'table': 9})]
        seen.clear()
        d.guided(raw=cfg.classifier_free(1., y=10)).denoise(x, step, **given)
        assert [s[0] for s in seen] == [4]
        seen.clear()
        d.guided(raw=cfg.classifier_free(3., together=False, y=10)).denoise(x, step, **given)
        assert [s[0] for s in seen] == [4, 4]

    def test_nulls_of_every_kind_reach_the_second_half_only(self):
        seen = {}
        def net(x, t, **c):
            seen.update(c)
            return torch.zeros_like(x)
        y, text, clip, small = torch.arange(3), torch.randn(3, 5, 6), torch.randn(3, 4), torch.randn(3, 2)
        empty, negative = torch.randn(5, 6), torch.randn(3, 4)
        hook = cfg.classifier_free(2., y=10, text=empty, clip=negative)
        Denoiser(net, LINE).guided(raw=hook).denoise(torch.zeros(3, 2), LINE.steps()[3], y=y, text=text, clip=clip, small=small)
        assert seen['y'].tolist() == [0, 1, 2, 10, 10, 10] and seen['text'][:3].equal(text) and seen['text'][3:].equal(empty.expand(3, 5, 6))
        assert seen['clip'].equal(torch.cat([clip, negative])) and seen['small'].equal(torch.cat([small, small]))
        assert cfg.nothing(text, torch.zeros_like).equal(torch.zeros(3, 5, 6)) and cfg.nothing(text, empty[None]).equal(empty.expand(3, 5, 6))
        assert cfg.nothing(y, 10).dtype == y.dtype and cfg.nothing(torch.ones(3, 4).bool(), False).dtype == torch.bool

    def test_a_scale_may_depend_on_the_step(self):
        counts = []
        def net(x, t, y):
            counts.append(len(x))
            return NET(x, t, y)
        path = LINE.steps(10)
        hook = cfg.classifier_free(cfg.within(4., .3, 3.), y=3)
        x = points(5)
        for x in ddim.ddim(Denoiser(net, LINE).guided(raw=hook), path, x, y=torch.zeros(5).long()): pass
        inside = [.3 <= float(((1 - s.ᾱ) / s.ᾱ).sqrt()) <= 3. for s in path]
        assert counts == [10 if i else 5 for i in inside] and 0 < sum(inside) < 10

    def test_a_scale_for_each_item(self):
        x, y, step = points(4), torch.zeros(4).long(), LINE.steps()[50]
        d = Denoiser(NET, LINE)
        many = d.guided(raw=cfg.classifier_free(lambda step: torch.tensor([0., 1., 2., 5.]), y=3)).denoise(x, step, y=y).eps
        for i, s in enumerate((0., 1., 2., 5.)):
            one = d.guided(raw=cfg.classifier_free(s, y=3)).denoise(x, step, y=y).eps
            torch.testing.assert_close(many[i], one[i])

    def test_half_precision_answers_are_combined_in_full(self):
        x = torch.randn(3, 2)
        raw = lambda x, t, y: (x + y[:, None]).bfloat16()
        p = Denoiser(raw, LINE).guided(raw=cfg.classifier_free(7.5, y=3)).guidance.raw(Denoiser(raw, LINE), x, LINE.steps()[2], {'y': torch.arange(3)})
        want = 7.5 * raw(x, 0, torch.arange(3)).float() - 6.5 * raw(x, 0, torch.full((3,), 3)).float()
        assert p.dtype == torch.float32 and (p - want).abs().max() < 1e-5


class TestRefused:
    @pytest.mark.parametrize('scale', [float('nan'), float('inf'), -1.])
    def test_scales(self, scale):
        with pytest.raises(ValueError, match='scale must be a finite number'): cfg.classifier_free(scale, y=3)
        d = Denoiser(NET, LINE).guided(raw=cfg.classifier_free(lambda step: scale, y=3))
        with pytest.raises(ValueError, match='scale must be a finite number'): d.denoise(points(2), LINE.steps()[0], y=torch.zeros(2).long())

    def test_no_null_at_all(self):
        with pytest.raises(ValueError, match='no condition'): cfg.classifier_free(3.)

    @pytest.mark.parametrize('null', [10, -1])
    def test_a_network_without_a_null_class(self, null):
        d = Denoiser(tiny(classes=10), Schedule.linear(), 'eps', 'learned_range').guided(raw=cfg.classifier_free(3., y=null))
        with pytest.raises(ValueError, match='no null class'): d.denoise(torch.zeros(2, 1, 8, 8), Schedule.linear().steps()[5], y=torch.zeros(2).long())

    def test_a_condition_that_is_not_given(self):
        d = Denoiser(NET, LINE).guided(raw=cfg.classifier_free(3., y=3))
        with pytest.raises(ValueError, match=r'sample\(…, y=…\)'): d.denoise(points(2), LINE.steps()[0])

    @pytest.mark.parametrize('null', [torch.zeros(5), torch.zeros(2, 1, 3), torch.zeros(1, 1, 1, 1)])
    def test_nulls_of_another_shape(self, null):
        with pytest.raises(ValueError, match='cannot stand for'): cfg.nothing(torch.zeros(4, 3), null)

    def test_a_fraction_for_a_label(self):
        with pytest.raises(ValueError, match='integer'): cfg.nothing(torch.arange(3), 10.5)

    @pytest.mark.parametrize('call', [lambda: cfg.within(3., 2., 1.), lambda: cfg.dynamic_threshold(0.), lambda: cfg.dynamic_threshold(1.5),
                                      lambda: cfg.match_std(torch.ones(2, 2), torch.ones(2, 2), 2.),
                                      lambda: cfg.drop_conditions({'y': torch.arange(2)}, 1.5, Draws(0, 0, 'cpu'), y=10),
                                      lambda: cfg.drop_conditions({'y': torch.arange(2)}, .5, Draws(0, 0, 'cpu'), z=10)])
    def test_arguments(self, call):
        with pytest.raises(CourseError): call()


class TestTraining:
    def test_dropping_is_the_label_function_and_drops_together(self):
        y, e = torch.arange(3000) % 10, torch.randn(3000, 4, 2, generator=generator(0))
        out = cfg.drop_conditions({'x': e, 'y': y, 'e': e}, .2, Draws(0, 1, 'cpu'), y=10, e=torch.zeros(2))
        lost = out['y'] == 10
        assert out['y'].equal(adm.drop_labels(y, 10, .2, Draws(0, 1, 'cpu'))) and out['x'] is e
        assert lost.equal((out['e'] == 0).all((1, 2))) and out['e'][~lost].equal(e[~lost])
        assert abs(float(lost.double().mean()) - .2) < 4 * (.2 * .8 / 3000) ** .5

    @pytest.mark.parametrize('recipe', [cfg.cfg_fashion, cfg.cfg_emoji], ids=lambda r: r.name)
    def test_recipes_train_and_draw(self, recipe):
        from diffcourse.train import train_recipe
        assert set(recipe.settings) == {'smoke', 'laptop', 'gpu'}
        trainer = train_recipe(recipe, 'smoke', progress=False, steps=1, batch_size=2)
        assert math.isfinite(trainer.losses[0])
        net = randomise(recipe.model(), generator(0)).eval()          # a fresh one answers 0 to everything
        a, b, again = (recipe.sample(net, 3, 0, steps=2, scale=s) for s in (1., 5., 5.))
        assert a.shape[1:] == recipe.data('smoke').shape and b.equal(again) and not a.equal(b) and b.abs().max() <= 1

    def test_the_shared_recipe_is_the_same_network(self):
        assert cfg.cfg_fashion.model is adm.cond_fashion.model and cfg.cfg_fashion.loss is adm.cond_fashion.loss

    def test_cifar_at_smoke_without_the_photographs(self, monkeypatch):
        def absent(*a, **k): raise CourseError('cifar10 is not on this machine')
        monkeypatch.setattr(data, 'cifar10', absent)
        pictures = cfg.cifar_pictures('smoke')
        assert pictures.shape == (3, 32, 32) and 'in place of CIFAR-10' in pictures.name and int(pictures.labels.max()) == 9
        with pytest.raises(CourseError, match='not on this machine'): cfg.cifar_pictures('gpu')

    def test_cifar_network_on_the_meta_device(self):
        with torch.device('meta'):
            net = cfg.cfg_cifar10.model()
            assert net(torch.zeros(2, 3, 32, 32), torch.zeros(2), torch.zeros(2, dtype=torch.long)).shape == (2, 3, 32, 32)
        assert 8e6 < sum(p.numel() for p in net.parameters()) < 15e6


    def test_rescaling_x0_is_the_same_in_every_language(self):
        x, y, step = 2 * points(), torch.arange(50) % 3, LINE.steps()[60]
        found = {p: language(p).guided(raw=cfg.classifier_free(8., rescale=.7, on='x0', y=3)).denoise(x, step, y=y).x0 for p in ddpm.PARAMETERIZATIONS}
        c, u = (Denoiser(NET, LINE).denoise(x, step, y=v).x0 for v in (y, torch.full((50,), 3)))
        for x0 in found.values(): torch.testing.assert_close(x0, cfg.match_std(cfg.combine(c, u, 8.), c, .7), rtol=1e-6, atol=1e-8)
        wrong = Denoiser(NET, LINE).guided(raw=cfg.classifier_free(2., rescale=.5, on='eps', y=3))
        with pytest.raises(ValueError, match='raw or on x0'): wrong.denoise(x, step, y=y)


class TestZoo:
    def test_a_scale_from_python_and_from_the_command_line(self, tmp_path, monkeypatch):
        from typer.testing import CliRunner
        from diffcourse import cli, weights, zoo
        net = randomise(cfg.cfg_fashion.model(), generator(0))
        path = weights.save_weights(tmp_path / 'w.safetensors', net, {'recipe': 'cfg_fashion'})
        short = cfg.guided_sampler(ddpm.picture_denoiser, 10, 1, 28, 28, scale=2., steps=2)
        monkeypatch.setattr(cfg.cfg_fashion, 'sample', short)
        one, two = (zoo.sample('cfg_fashion', 2, 0, path, 'cpu', s) for s in (1., 4.))
        assert one.shape == (2, 1, 28, 28) and not one.equal(two) and zoo.sample('cfg_fashion', 2, 0, path, 'cpu').equal(
            zoo.sample('cfg_fashion', 2, 0, path, 'cpu', 2.))
        ask = ['sample', 'cfg_fashion', '-n', '2', '--scale', '4', '--weights', str(path), '--device', 'cpu', '--out', str(tmp_path / 'a.png')]
        assert CliRunner().invoke(cli.app, ask).exit_code == 0 and (tmp_path / 'a.png').exists()
        assert CliRunner().invoke(cli.app, [*ask[:-1], str(tmp_path / 'a.npz')]).exit_code == 0
        from diffcourse.measure import pictures_of
        drawn = next(iter(pictures_of(str(tmp_path / 'a.npz')).parts(8)))
        assert drawn.shape == (2, 1, 28, 28) and drawn.equal(to_uint8(two))
        with pytest.raises(CourseError, match='scale must be'): zoo.sample('cfg_fashion', 2, 0, path, 'cpu', -1.)
        with pytest.raises(CourseError, match='no guidance scale; these have: .*cfg_fashion'): zoo.sample('ddpm_fashion', 2, 0, None, 'cpu', 2.)

    def test_the_table_names_whose_weights_they_are(self):
        from diffcourse import zoo
        rows = {r[0]: r for r in zoo.recipes().rows}
        for name, whose in cfg.SHARES.items():
            assert zoo.weights_of(name) == whose and (whose in rows[name][3] or 'open' in rows[name][3])
        assert 'open' in rows['cfg_cifar10'][3]


class TestRepairs:
    def test_dynamic_threshold(self):
        x = torch.randn(4, 3, 8, 8, generator=generator(0)) * torch.tensor([.2, 1., 3., 10.])[:, None, None, None]
        out = cfg.dynamic_threshold(.95)(x)
        q = x.flatten(1).abs().quantile(.95, 1)
        assert out[0].equal(x[0]) and out.abs().max() <= 1
        for i in (1, 2, 3): torch.testing.assert_close(out[i], (x[i] / q[i]).clamp(-1, 1))
        assert cfg.dynamic_threshold(1.)(torch.full((2, 5), 3., dtype=torch.float64)).dtype == torch.float64

    def test_large_batches(self):
        x = torch.full((2, 2 ** 24 // 2 + 3), 2.)
        assert cfg.dynamic_threshold(.5)(x).equal(torch.ones_like(x))

    def test_rescaling_gives_back_the_spread(self):
        c, u = torch.randn(2, 6, 1, 8, 8, generator=generator(2))
        wide = cfg.combine(c, u, 7.5)
        full, half = cfg.match_std(wide, c, 1.), cfg.match_std(wide, c, .5)
        std = lambda v: v.flatten(1).std(1)
        torch.testing.assert_close(std(full), std(c))
        torch.testing.assert_close(std(half), (std(c) + std(wide)) / 2)

    def test_diffusers_agrees(self):
        "Rescaling and dynamic thresholding, as diffusers' pipelines and schedulers compute them"
        pytest.importorskip('diffusers')
        from diffusers import DDPMScheduler
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
        c, u = torch.randn(2, 6, 3, 8, 8, generator=generator(5))
        wide = cfg.combine(c, u, 7.5)
        torch.testing.assert_close(cfg.match_std(wide, c, .7), rescale_noise_cfg(wide, c, .7))
        theirs = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=.9, sample_max_value=1e9)
        torch.testing.assert_close(cfg.dynamic_threshold(.9)(wide), theirs._threshold_sample(wide))

    def test_the_hook_rescales(self):
        d, step = Denoiser(tiny(out=1), Schedule.linear()), Schedule.linear().steps()[500]
        x, y = torch.randn(3, 1, 8, 8, generator=generator(1)), torch.arange(3)
        with torch.no_grad():
            raw = cfg.classifier_free(9., rescale=1., y=10)(d, x, step, {'y': y})
            torch.testing.assert_close(raw.flatten(1).std(1), d(x, step.t, y=y).flatten(1).std(1))


def plain_loop(c, uc, x, noises, S, scale, η, kind):
    "Latent diffusion's DDIM with guidance in numpy: 0.7·x + 0.1·sin(t/50) + 0.05·mean(c), taken as ε or as v"
    ᾱ = np.cumprod(1 - np.linspace(.00085 ** .5, .012 ** .5, 1000) ** 2)
    ts, states = np.arange(0, 1000, 1000 // S) + 1, [x]
    before = np.append(ᾱ[0], ᾱ[ts[:-1]])
    answer = lambda x, t, c: .7 * x + .1 * np.sin(t / 50) + .05 * c.reshape(len(c), -1).mean(1)[:, None, None, None]
    for t, a_next, z in zip(ts[::-1], before[::-1], noises):
        a, u = ᾱ[t], answer(x, t, uc)
        out = u + scale * (answer(x, t, c) - u)
        e = out if kind == 'eps' else a ** .5 * out + (1 - a) ** .5 * x
        x0, σ = (x - (1 - a) ** .5 * e) / a ** .5, η * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** .5
        x = a_next ** .5 * x0 + (1 - a_next - σ ** 2) ** .5 * e + σ * z
        states.append(x)
    return np.stack(states)


def swapped_halves(original): return lambda *a, **k: original(*a, **k)[::-1]
def paper_convention(original): return lambda cond, uncond, scale: original(cond, uncond, 1 + scale)
def never(original): return lambda cond, uncond, scale: cond


class TestParity:
    "Checkers of latent diffusion's loops, on goldens made here by plain numpy; the official ones are too large for this folder"
    def made(self, folder, kind):
        rng = np.random.RandomState(3)
        f = lambda *size: rng.randn(*size).astype(np.float32)
        c, uc, x, noises = f(3, 4, 5), f(3, 4, 5), f(3, 4, 4, 4), f(8, 3, 4, 4, 4)
        model = '(x,t,c) = 0.7*x + 0.1*sin(t/50) + 0.05*mean(c over tokens and channels)'
        inputs = {'in/c': c, 'in/uc': uc, 'in/x_T': x}
        loop = lambda η, scale=5.: plain_loop(c, uc, x, noises, 8, scale, η, kind).astype(np.float32)
        if kind == 'v': return golden(folder, 'sd2_v_prediction', dict(S=8, scale=5., model='v' + model), **inputs, **{
            'in/t': np.array([3]), 'in/x': x[:1], 'in/v': x[1:2], 'in/noise': x[2:], 'out/ddim10': loop(0.)[-1]})
        config = dict(S=8, unconditional_guidance_scale=5., model='eps' + model)
        outs = {f'out/ddim_eta{η}{tail}': loop(η)[-1] if not tail else loop(η) for η in (0., .6) for tail in ('', '_trajectory')}
        return golden(folder, 'ldm_samplers', config, **inputs, **{'in/noises': noises}, **outs, **{'out/ddim_noguide': loop(0., 1.)[-1]})

    @pytest.mark.parametrize('kind', ['eps', 'v'])
    def test_plain_numpy_agrees(self, kind, tmp_path): assert self.made(tmp_path, kind).word == 'passed'

    @pytest.mark.parametrize('where,name,change', [('two_answers', 'halves', swapped_halves), ('combine', 'w', paper_convention),
                                                   ('combine', 'none', never)])
    @pytest.mark.parametrize('kind', ['eps', 'v'])
    def test_mutations_fail(self, kind, where, name, change, tmp_path, monkeypatch):
        monkeypatch.setattr(cfg, where, change(getattr(cfg, where)))
        assert self.made(tmp_path, kind).word == 'FAILED'


class TestClaims:
    def test_frontiers_compare_at_equal_scores(self):
        import claims_cfg as script
        curve = lambda factor: [{'is': s, 'fid': factor * (1 + (s - 3) ** 2)} for s in (1., 2., 3., 4., 5.)]
        found = script.compare({.1: curve(1.), .2: curve(1.), .5: curve(2.)})
        assert found[.1] == found[.2] and found[.5] - found[.1] == pytest.approx(math.log(2), abs=1e-6)

    def test_every_number_that_the_rules_use_is_measured(self, tmp_path):
        from diffcourse.core import verdict
        import claims_cfg as script
        script.main(['--budget', 'smoke', '--out', str(tmp_path / 'c.json'), '--seeds', '0', '--only', 'CFG-2'])
        rules, found = json.loads((ROOT / 'data/claims/rules.json').read_text()), json.loads((tmp_path / 'c.json').read_text())
        verdict(rules['CFG-2']['rule'], found['CFG-2']['numbers'])
        assert len(found['CFG-2']['runs']) == 3
