"Classifier guidance: exact on a mixture in both forms, with every sampler and parameterisation, and refused in words where it cannot work"
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffcourse import adm, data, ddim, ddpm
from diffcourse.core import CourseError, Draws, generator
from diffcourse.ddpm import Denoiser, Schedule, ancestral, sample
from diffcourse.exact import Mixture, exact_denoiser
from diffcourse.openai_unet import EncoderUNetModel, randomise

POINTS = torch.tensor([[-.9, -.5], [-.3, .5], [.1, -.6], [.6, .3], [.9, -.4], [0., 1.]], dtype=torch.float64)
KINDS = torch.tensor([0, 1, 1, 2, 2, 0])
WORLD, T = Mixture(POINTS, .3, torch.tensor([.1, .2, .3, .1, .2, .1], dtype=torch.float64)), 100
LINE = Schedule.linear(T)
CLASSIFY = adm.exact_classifier(WORLD, KINDS, LINE)


def points(n=50, seed=0): return 1.5 * torch.randn(n, 2, generator=generator(seed), dtype=torch.float64)


def tiny_classifier(size=16, **settings):
    how = dict(image_size=size, in_channels=1, model_channels=16, out_channels=4, num_res_blocks=1, channel_mult=(1, 2),
               attention_resolutions=(2,), num_head_channels=8, groups=4)
    return randomise(EncoderUNetModel(**how | settings), generator(3)).eval()


class TestExact:
    @pytest.mark.parametrize('t', [0, 3, 30, 99])
    def test_the_classifier_is_bayes_rule(self, t):
        x = points()
        p = CLASSIFY(x, torch.full((50,), t)).softmax(1)
        parts = [adm.class_mixture(WORLD, KINDS, k) for k in range(3)]
        prior = torch.stack([WORLD.weights[KINDS == k].sum() for k in range(3)])
        joint = prior * torch.stack([m.log_density(x, LINE.alphas_cumprod[t]) for m in parts], 1).exp()
        torch.testing.assert_close(p, joint / joint.sum(1, keepdim=True))

    @pytest.mark.parametrize('parameterization', ddpm.PARAMETERIZATIONS)
    @pytest.mark.parametrize('t', [1, 30, 99])
    def test_scale_one_is_the_class_itself(self, parameterization, t):
        "In every parameterisation: ε, x0 and mean of the guided prediction are those of the class's own denoiser"
        x, step = points(), LINE.steps()[T - 1 - t]
        for k in range(3):
            hook = adm.classifier_guidance(CLASSIFY, 1.)
            d = exact_denoiser(WORLD, LINE, parameterization).guided(raw=adm.label_hidden(), prediction=hook)
            p = d.denoise(x, step, y=torch.full((50,), k))
            own = exact_denoiser(adm.class_mixture(WORLD, KINDS, k), LINE).denoise(x, step)
            for got, want in ((p.eps, own.eps), (p.x0, own.x0), (p.mean, own.mean)): assert (got - want).abs().max() < 1e-9

    def test_the_gradient_is_the_slope_of_the_log_probability(self):
        x, y, told, h = points(), torch.arange(50) % 3, torch.full((50,), 20), 1e-5
        g = adm.log_prob_gradient(CLASSIFY, x, told, y)
        log_p = lambda x: CLASSIFY(x, told).log_softmax(1).gather(1, y[:, None])[:, 0]
        for axis in (0, 1):
            by = torch.zeros(2, dtype=torch.float64).index_fill(0, torch.tensor(axis), h)
            assert ((log_p(x + by) - log_p(x - by)) / (2 * h) - g[:, axis]).abs().max() < 1e-6

    @pytest.mark.parametrize('variance', ['fixed_small', 'fixed_large'])
    def test_the_forms_shift_the_mean_by_the_formula(self, variance):
        x, y = points(), torch.arange(50) % 3
        d = exact_denoiser(WORLD, LINE, variance=variance)
        for step in LINE.steps(10)[:-1]:
            p, g = d.denoise(x, step), 2.5 * adm.log_prob_gradient(CLASSIFY, x, step.t.expand(50), y)
            by_mean = adm.mean_shift(p, g).mean - p.mean
            by_score = adm.score_shift(p, g, x, step).mean - p.mean
            torch.testing.assert_close(by_mean, p.variance * g)
            torch.testing.assert_close(by_score, step.β / (1 - step.β).sqrt() * g)

    def test_they_are_not_one_another_in_disguise(self):
        "Over 25 steps of 1000 levels the two shifts differ by a factor of 0.7 with Σ = β, and by far more with β̃ at the clean end"
        ratio = lambda step, variance: float((1 - step.β).sqrt() * (step.β if variance == 'large' else step.variance) / step.β)
        path = Schedule.linear().steps(25)
        assert min(ratio(s, 'large') for s in path) < .7 and min(ratio(s, 'small') for s in path[:-1]) < .6
        assert min(ratio(s, 'large') for s in Schedule.linear().steps()) > .98

    def test_they_agree_in_the_limit(self):
        def gap(n):
            s = Schedule.linear(n)
            d, judge = exact_denoiser(WORLD, s).guided(raw=adm.label_hidden()), adm.exact_classifier(WORLD, KINDS, s)
            start, y, ends = points(60) / 1.5, torch.arange(60) % 3, []
            for form in adm.FORMS:
                for x in ancestral(d.guided(prediction=adm.classifier_guidance(judge, 2., form)), s.steps(), start, generator(1), y=y): pass
                ends.append(x)
            return float((ends[0] - ends[1]).square().sum(1).median().sqrt())  # a few walks choose another mode
        gaps = [gap(n) for n in (25, 100, 400)]
        assert gaps[1] < .5 * gaps[0] and gaps[2] < .5 * gaps[1]


SAMPLERS = [ancestral, ddim.ddim, ddim.dpm_2m, ddim.heun]


class TestComposition:
    @pytest.mark.parametrize('variance', ['fixed_small', 'fixed_large', 'learned', 'learned_range'])
    @pytest.mark.parametrize('parameterization', ddpm.PARAMETERIZATIONS)
    @pytest.mark.parametrize('form', adm.FORMS)
    @pytest.mark.parametrize('sampler', SAMPLERS, ids=lambda s: s.__name__)
    def test_every_pair_works_or_says_what_would(self, sampler, form, parameterization, variance):
        "The whole grid on the exact denoiser: guided points are surer of their class than unguided ones, or a ValueError names the form"
        inner = exact_denoiser(WORLD, LINE, parameterization).net
        def net(x, t):   # the learned kinds say the variance too: log β̃, or the middle of the range
            raw, step = inner(x, t), LINE.steps().at(t)
            if not variance.startswith('learned'): return raw
            v = torch.zeros_like(x) if variance == 'learned_range' else ddpm.spread(step.log_variance, x).expand_as(x)
            return torch.cat([raw, v], 1)
        d = Denoiser(net, LINE, parameterization, variance).guided(raw=adm.label_hidden())
        steered = d.guided(prediction=adm.classifier_guidance(CLASSIFY, 4., form))
        draw = lambda d: sample(d, (40, 2), LINE.steps(10), 1, sampler, dtype=torch.float64, y=torch.zeros(40).long())
        if form == 'mean' and sampler is not ancestral:
            with pytest.raises(ValueError, match="score"): draw(steered)
            return
        sure = lambda x: float(CLASSIFY(x, torch.zeros(40).long()).softmax(1)[:, 0].mean())
        assert sure(draw(steered)) > sure(draw(d)) + .15

    def test_an_unknown_sampler_cannot_ignore_a_mean_shift(self):
        d = exact_denoiser(WORLD, LINE).guided(raw=adm.label_hidden(), prediction=adm.classifier_guidance(CLASSIFY, 1., 'mean'))
        p = d.denoise(points(4), LINE.steps()[3], y=torch.zeros(4).long())
        for name in ('eps', 'x0'):
            with pytest.raises(ValueError, match="form='score'"): getattr(p, name)
        assert p.mean.shape == (4, 2) and not hasattr(p, 'nothing')

    def test_x0_is_clipped_before_guidance_and_not_after(self):
        d = exact_denoiser(WORLD, LINE).guided(raw=adm.label_hidden(), x0=ddpm.clip_x0)
        x, step, y = 3 * points(), LINE.steps()[0], torch.zeros(50).long()
        assert d.denoise(x, step, y=y).x0.abs().max() <= 1
        assert d.guided(prediction=adm.classifier_guidance(CLASSIFY, 50.)).denoise(x, step, y=y).x0.abs().max() > 1

    def test_batches_do_not_change_the_gradient(self):
        x, told, y = points(), torch.full((50,), 20), torch.arange(50) % 3
        whole = adm.log_prob_gradient(CLASSIFY, x, told, y)
        torch.testing.assert_close(whole, torch.cat([adm.log_prob_gradient(CLASSIFY, *(v[i:i + 1] for v in (x, told, y))) for i in range(50)]))

    def test_hidden_labels(self):
        seen = []
        d = Denoiser(lambda x, t, **c: seen.append(c) or torch.zeros_like(x), LINE)
        x, step = points(3), LINE.steps()[0]
        d.guided(raw=adm.label_hidden()).denoise(x, step, y=torch.arange(3), z=1)
        d.guided(raw=adm.label_hidden(10)).denoise(x, step, y=torch.arange(3), z=1)
        assert seen[0] == {'z': 1} and seen[1]['y'].tolist() == [10] * 3 and seen[1]['z'] == 1


class TestFrozen:
    def test_no_graph_reaches_the_parameters_and_they_are_left_as_they_were(self):
        net = tiny_classifier()
        net.time_embed[0].weight.requires_grad_(False)
        before = [p.requires_grad for p in net.parameters()]
        x, t, y = torch.randn(2, 1, 16, 16), torch.tensor([3, 70]), torch.tensor([0, 3])
        with torch.no_grad(): g = adm.log_prob_gradient(net, x, t, y)
        assert g.shape == x.shape and not g.requires_grad and g.abs().sum() > 0
        assert [p.requires_grad for p in net.parameters()] == before and all(p.grad is None for p in net.parameters())

    def test_saves_nothing_for_the_weights(self):
        "With frozen parameters autograd keeps fewer tensors than without"
        net, x, t = tiny_classifier(), torch.randn(2, 1, 16, 16), torch.tensor([3, 70])
        def kept(freeze):
            size = 0
            def pack(v):
                nonlocal size
                size += v.numel()
                return v
            noisy = x.clone().requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
                if freeze:
                    with adm.frozen(net): net(noisy, t)
                else: net(noisy, t)
            return size
        assert kept(True) < kept(False)

    def test_restored_after_an_error(self):
        net = tiny_classifier()
        with pytest.raises(CourseError): adm.log_prob_gradient(net, torch.zeros(2, 1, 16, 16), torch.zeros(2), torch.tensor([0, 9]))
        assert all(p.requires_grad for p in net.parameters())


class TestRefused:
    @pytest.mark.parametrize('scale', [math.nan, math.inf, -1.])
    def test_scales(self, scale):
        with pytest.raises(ValueError, match='scale'): adm.classifier_guidance(CLASSIFY, scale)

    def test_forms(self):
        with pytest.raises(ValueError, match='form'): adm.classifier_guidance(CLASSIFY, form='epsilon')

    @pytest.mark.parametrize('y', [torch.tensor([0, 4]), torch.tensor([-1, 0]), torch.tensor([0.]), torch.tensor([0, 1, 2])])
    def test_labels(self, y):
        with pytest.raises(ValueError, match='labels'): adm.log_prob_gradient(tiny_classifier(), torch.zeros(2, 1, 16, 16), torch.zeros(2), y)

    def test_no_labels(self):
        d = exact_denoiser(WORLD, LINE).guided(prediction=adm.classifier_guidance(CLASSIFY))
        with pytest.raises(ValueError, match='y=labels'): sample(d, (2, 2), LINE.steps(3))

    @pytest.mark.parametrize('pool', ['adaptive', 'attention', 'spatial'])
    def test_a_classifier_for_another_size(self, pool):
        with pytest.raises(ValueError, match='16×16'):
            adm.log_prob_gradient(tiny_classifier(pool=pool), torch.zeros(2, 1, 32, 32), torch.zeros(2), torch.zeros(2).long())

    def test_a_classifier_for_other_channels(self):
        with pytest.raises(ValueError, match=r'\(B, 1, H, W\)'):
            adm.log_prob_gradient(tiny_classifier(), torch.zeros(2, 3, 16, 16), torch.zeros(2), torch.zeros(2).long())

    def test_a_class_without_components(self):
        with pytest.raises(ValueError, match='label 7'): adm.class_mixture(WORLD, KINDS, 7)


class TestTraining:
    def test_labels_are_dropped_at_the_rate_asked_for(self):
        y = torch.arange(20_000) % 10
        for p in (0., .15, 1.):
            dropped = adm.drop_labels(y, 10, p, Draws(0, 1))
            share = float((dropped == 10).double().mean())
            assert abs(share - p) < 4 * (p * (1 - p) / 20_000) ** .5 + 1e-12 and bool(((dropped == y) | (dropped == 10)).all())
        with pytest.raises(CourseError, match='p must'): adm.drop_labels(y, 10, 1.5, Draws(0, 1))

    def test_dropping_changes_the_labels_and_nothing_else(self):
        seen = []
        loss = adm.loss_dropping(lambda model, batch, draws: seen.append(batch) or torch.zeros(()), 10, .5)
        batch = {'x': torch.ones(64, 1), 'y': torch.zeros(64).long()}
        loss(None, batch, Draws(0, 3))
        assert torch.equal(seen[0]['x'], batch['x']) and 10 < int((seen[0]['y'] == 10).sum()) < 54 and batch['y'].sum() == 0

    def test_the_classifier_is_shown_what_the_schedule_says(self):
        "Fed the noised picture back, a linear probe must see √ᾱ x0 + √(1−ᾱ) ε for the t it is told"
        seen = []
        class Spy(nn.Module):
            def forward(self, x, t):
                seen.append((x, t))
                return torch.zeros(len(x), 10)
        value, more = adm.loss_noisy_classifier(LINE)(Spy(), {'x': torch.full((4000, 1, 2, 2), .5), 'y': torch.zeros(4000).long()}, Draws(0, 0))
        x, t = seen[0]
        assert abs(float(value) - math.log(10)) < 1e-6 and set(more) == {'accuracy'}
        late = t > 80
        want = LINE.alphas_cumprod[t[late]].float()
        z = (x[late] - .5 * want.sqrt()[:, None, None, None]) / (1 - want).sqrt()[:, None, None, None]
        assert abs(float(z.mean())) < .05 and abs(float(z.std()) - 1) < .05

    def test_the_upsampler_sees_its_own_picture_small(self):
        seen = []
        class Spy(nn.Module):
            def forward(self, x, t, low_res):
                seen.append(low_res)
                return torch.zeros_like(x)
        x = torch.randn(3, 1, 8, 8)
        adm.loss_upsampler(ddpm.picture_denoiser(None), 4)(Spy(), {'x': x}, Draws(0, 0))
        assert torch.equal(seen[0], F.avg_pool2d(x, 4))

    def test_emoji_kinds(self):
        e = adm.emoji_kinds('train', 8)
        assert len(e.classes) == 18 and e.labels.min() == 0 and e.labels.max() == 17 and len(e.labels.unique()) == 18
        for label, sub, style in zip(e.labels.tolist(), e.extra['subcategory'], e.extra['style']):
            kind, name = e.classes[label].split(', ')
            assert sub.startswith(adm.EMOJI_KINDS[kind]) and name == style
        assert len(adm.emoji_kinds('test', 8)) > 50 and e.hash != adm.emoji_kinds('all', 8).hash

    @pytest.mark.parametrize('recipe', [adm.cond_fashion, adm.noisy_fashion_classifier, adm.upsample_fashion, adm.adm_emoji,
                                        adm.adm_classifier], ids=lambda r: r.name)
    def test_recipes_take_one_step_and_all_budgets_are_there(self, recipe):
        from diffcourse.train import train_recipe
        assert set(recipe.settings) == {'smoke', 'laptop', 'gpu'}
        trainer = train_recipe(recipe, 'smoke', progress=False, steps=1, batch_size=2)
        assert math.isfinite(trainer.losses[0])


class TestRecipesDraw:
    def test_labelled_samples(self):
        net = adm.cond_fashion.model().eval()
        assert adm.label_sampler(10, 1, 28, 28)(net, 3, 0, steps=2).shape == (3, 1, 28, 28)
        x = adm.draw_emoji(adm.adm_emoji.model().eval(), 2, steps=2)
        assert x.shape == (2, 3, 32, 32) and x.abs().max() <= 1

    def test_recognised_counts(self):
        test = data.fashion_mnist('test').subset(range(200))
        x = test.images.float() / 127.5 - 1
        right = adm.recognised(x, test.labels)
        assert right > .8 and adm.recognised(x, (test.labels + 1) % 10) < .1

    def test_upsampled(self):
        net = adm.upsample_fashion.model().eval()
        assert adm.upsample(net, torch.zeros(2, 1, 7, 7), 28, steps=2).shape == (2, 1, 28, 28)


class TestReleased:
    @pytest.mark.parametrize('name, T, variance', [('guided-diffusion/64x64_diffusion', 1000, 'learned_range'),
                                                   ('improved-diffusion/cifar10_uncond_50M_500K', 4000, 'learned_range'),
                                                   ('improved-diffusion/lsun_uncond_100M_2400K_bs64', 1000, 'learned_range')])
    def test_a_released_network_knows_its_schedule(self, name, T, variance):
        d = adm.official_denoiser(adm.from_official(name, device='meta'))
        assert d.schedule.T == T and d.variance == variance and d.parameterization == 'eps'
        told = adm.official_path(d, '10')[0].t
        assert float(told) == (999.75 if T == 4000 else 999)

    def test_a_classifier_is_no_denoiser(self):
        with pytest.raises(CourseError, match='classifier_guidance'):
            adm.official_denoiser(adm.from_official('guided-diffusion/64x64_classifier', device='meta'))
