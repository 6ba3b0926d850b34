"""The Fréchet distance against the official numbers and SciPy's root; statistics, scores and their refusals"""
import json, math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file, save_file

from diffcourse.core import CourseError, Draws, generator
from diffcourse.data import ImageSet
from diffcourse.metrics import (Classifier, FashionClassifier, FashionJudge, Statistics, bootstrap_frechet, classifier_loss,
                                feature_fid, features, fingerprint, frechet_distance, get_extractor, interval, jitter,
                                judge, load_statistics, psnr, save_statistics, ssim, statistics, trace_sqrt_product)
from diffcourse.train import RECIPES, Trainer, fixed_loss

GOLDEN = Path(__file__).parent / 'golden'
of = lambda *parts: [Statistics().update(p) for p in parts]


def gaussian(seed, n, d, dtype=torch.float64):
    g = generator(seed)
    return (torch.randn(n, d, generator=g, dtype=torch.float64) @ torch.randn(d, d, generator=g, dtype=torch.float64)
            + torch.randn(d, generator=g, dtype=torch.float64)).to(dtype)


def pictures(n=40, seed=0):
    return torch.randint(0, 256, (n, 1, 28, 28), generator=generator(seed), dtype=torch.uint8)


# ---------------------------------------------------------------- the distance

@pytest.mark.parametrize('name, a, b', [('fid', 'f1', 'f2'), ('fid_self', 'f1', 'f1'), ('fid_torch_fidelity', 'f1', 'f2'),
                                        ('fid_degenerate', 'degenerate_f1', 'degenerate_f2'),
                                        ('fid_singular', 'singular_f1', 'singular_f2')])
def test_golden(name, a, b):
    T = load_file(GOLDEN / 'metrics_features.safetensors')
    J = json.loads((GOLDEN / 'metrics_features.json').read_text())
    tol = dict(rtol=1e-3, atol=1e-3) if name == 'fid_singular' else dict(rtol=J['rtol'], atol=J['atol'])
    np.testing.assert_allclose(frechet_distance(*of(T[f'in/{a}'], T[f'in/{b}'])), float(T[f'out/{name}']), **tol)


def test_golden_moments():
    T = load_file(GOLDEN / 'metrics_features.safetensors')
    s, = of(T['in/f1'])
    np.testing.assert_allclose(s.mean, T['out/mu1'], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(s.cov, T['out/sigma1'], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('d, n1, n2', [(1, 50, 70), (5, 100, 80), (64, 500, 300), (64, 70, 66)])
def test_equals_sqrtm(d, n1, n2):
    a, b = gaussian(1, n1, d), gaussian(2, n2, d)
    Σ1, Σ2 = (np.atleast_2d(np.cov(x.numpy(), rowvar=False)) for x in (a, b))
    gap = (a.mean(0) - b.mean(0)).square().sum()
    want = float(gap) + np.trace(Σ1) + np.trace(Σ2) - 2 * np.trace(scipy.linalg.sqrtm(Σ1 @ Σ2)).real
    assert frechet_distance(*of(a, b)) == pytest.approx(want, rel=1e-8)


@pytest.mark.parametrize('n1, n2', [(8, 9), (2, 400), (400, 3), (30, 30)])
def test_fewer_pictures_than_features(n1, n2):
    "The nuclear norm of the centred features themselves: no covariance is formed"
    a, b = gaussian(3, n1, 48), gaussian(4, n2, 48)
    A, B = ((x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b))
    want = (a.mean(0) - b.mean(0)).square().sum() + A.square().sum() + B.square().sum() - 2 * torch.linalg.svdvals(A @ B.T).sum()
    assert frechet_distance(*of(a, b)) == pytest.approx(float(want), rel=1e-8)


@pytest.mark.parametrize('n', [2, 10, 64, 65, 1000])
def test_a_set_against_itself(n):
    s, = of(gaussian(5, n, 64, torch.float32))
    assert abs(frechet_distance(s, s)) < 1e-6 and abs(frechet_distance(s, s)) < 1e-8 * s.cov.trace()


def test_one_point_sets_and_zero_covariance():
    zero = (torch.zeros(3), torch.zeros(3, 3))
    assert frechet_distance(zero, zero) == 0
    assert frechet_distance(zero, (torch.ones(3), torch.eye(3))) == pytest.approx(6)


def test_commuting_and_one_dimension():
    λ, κ = torch.rand(2, 20, generator=generator(6), dtype=torch.float64)
    Q = torch.linalg.qr(gaussian(7, 20, 20)).Q
    got = frechet_distance((torch.zeros(20), Q * λ @ Q.T), (torch.zeros(20), Q * κ @ Q.T))
    assert got == pytest.approx(float((λ.sqrt() - κ.sqrt()).square().sum()), rel=1e-9)
    assert frechet_distance((1., 4.), (4., 36.)) == pytest.approx(25)


def test_ill_conditioned_keeps_its_digits():
    "Eigenvalues over 14 decades; the truth is known because both matrices share their axes"
    λ, κ = torch.logspace(-13, 1, 60, dtype=torch.float64), torch.logspace(1, -13, 60, dtype=torch.float64)
    Q = torch.linalg.qr(gaussian(8, 60, 60)).Q
    got = trace_sqrt_product(Q * λ @ Q.T, Q * κ @ Q.T)
    assert float(got) == pytest.approx(float((λ * κ).sqrt().sum()), rel=1e-5)


def test_symmetric_in_its_arguments():
    for n in (20, 300):
        a, b = of(gaussian(9, n, 32), gaussian(10, 200, 32))
        assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


# ---------------------------------------------------------------- statistics

def test_shards_equal_the_whole():
    x = gaussian(11, 1003, 17) + 1e4
    whole, shards = Statistics().update(x), [Statistics() for _ in range(4)]
    for i, part in enumerate(x.split(13)): shards[i % 4].update(part)
    merged = shards[0].merge(shards[1]).merge(shards[2].merge(shards[3]))
    assert merged.n == whole.n == 1003
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-13)
    np.testing.assert_allclose(merged.cov, np.cov(x.numpy(), rowvar=False), rtol=1e-10, atol=1e-10)


def test_merge_leaves_its_inputs_alone():
    a, b = of(gaussian(12, 9, 3), gaussian(13, 8, 3))
    before = a.mean.clone(), b.cov.clone()
    a.merge(b).update(torch.ones(4, 3))
    assert a.mean.equal(before[0]) and b.cov.equal(before[1]) and (a.n, b.n) == (9, 8)
    assert Statistics().merge(a).cov.equal(a.cov)


def test_statistics_do_not_alias_their_first_batch():
    x = torch.randn(5, 2, dtype=torch.float64)
    s = Statistics().update(x)
    mean = s.mean.clone()
    x.zero_()
    s.update(torch.ones(1, 2))
    assert not mean.equal(torch.zeros(2)) and s.n == 6


def test_save_and_load(tmp_path):
    s = Statistics('eyes@1', 'as is', 'garments').update(gaussian(14, 50, 6))
    save_statistics(tmp_path / 's.safetensors', s)
    t = load_statistics(tmp_path / 's.safetensors', extractor='eyes@1', preprocessing='as is', data='garments')
    assert t.n == 50 and t.mean.equal(s.mean) and t.cov.equal(s.cov) and t.data == 'garments'


@pytest.mark.parametrize('what', ['extractor', 'preprocessing', 'data'])
def test_load_refuses_a_mismatch_and_names_both(tmp_path, what):
    save_statistics(tmp_path / 's.safetensors', Statistics('this', 'this', 'this').update(torch.eye(3)))
    with pytest.raises(CourseError, match=f"{what} 'this', you asked for 'that'"):
        load_statistics(tmp_path / 's.safetensors', **{what: 'that'})


def test_load_refuses_damaged_and_foreign_files(tmp_path):
    path = tmp_path / 's.safetensors'
    with pytest.raises(CourseError, match='no file'): load_statistics(path)
    save_statistics(path, Statistics().update(torch.eye(3)))
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CourseError, match=r's\.safetensors'): load_statistics(path)
    save_file({'mean': torch.zeros(3)}, path)
    with pytest.raises(CourseError, match=r's\.safetensors'): load_statistics(path)


# ---------------------------------------------------------------- refusals

@pytest.mark.parametrize('make, message', [
    (lambda: Statistics().cov, 'at least 2 pictures, got 0'),
    (lambda: Statistics().update(torch.ones(1, 3)).cov, 'at least 2 pictures, got 1'),
    (lambda: Statistics().update(torch.tensor([[1., float('nan')], [2., 3.]])), '1 of 2 feature vectors'),
    (lambda: Statistics().update(torch.ones(3)), r'\(N, D\)'),
    (lambda: Statistics().update(torch.ones(2, 3)).update(torch.ones(2, 4)), '4 numbers do not mix with 3'),
    (lambda: frechet_distance(*of(torch.eye(3), torch.eye(4))), '3 numbers cannot be compared with 4'),
    (lambda: frechet_distance((torch.zeros(2), torch.eye(3)), (torch.zeros(2), torch.eye(2))), 'does not go with'),
    (lambda: frechet_distance((torch.zeros(2), torch.eye(2) * float('inf')), (torch.zeros(2), torch.eye(2))), 'infinity'),
    (lambda: frechet_distance((torch.zeros(2), -torch.eye(2)), (torch.zeros(2), torch.eye(2))), 'no covariance'),
    (lambda: frechet_distance(Statistics('a').update(torch.eye(2)), Statistics('b').update(torch.eye(2))), "'a' against 'b'"),
    (lambda: Statistics('', 'a').merge(Statistics('', 'b')), "preprocessing differs: 'a' against 'b'"),
    (lambda: feature_fid(pictures(1), pictures(), FashionClassifier()), 'at least 2 pictures, got 1'),
    (lambda: features(FashionClassifier(), pictures()[:0]), 'no pictures'),
    (lambda: features(FashionClassifier(), pictures().expand(-1, 3, -1, -1)), r'takes pictures \(N, 1, 28, 28\)'),
    (lambda: features(FashionClassifier(), pictures().long()), 'uint8 or floats'),
    (lambda: features(FashionClassifier(), pictures().float() * float('nan')), 'NaN'),
    (lambda: features(FashionClassifier(), pictures(), batch=0), 'batch must be at least 1'),
    (lambda: features(FashionClassifier(), pictures().numpy()), 'tensor or an ImageSet'),
    (lambda: get_extractor('no_such'), 'none of fashion_classifier, fashion_judge'),
    (lambda: get_extractor(torch.nn.Linear(2, 2)), r'features\(x\)'),
    (lambda: psnr(pictures(3), pictures(4)), 'in pairs'),
    (lambda: ssim(torch.zeros(1, 1, 10, 30), torch.zeros(1, 1, 10, 30)), 'at least 11×11')])
def test_refusals(make, message):
    with pytest.raises(CourseError, match=message): make()


# ---------------------------------------------------------------- features and scores

def test_features_do_not_depend_on_batch_or_on_number_format():
    model, x = FashionClassifier(), pictures()
    a = features(model, x)
    assert a.shape == (40, 64) and a.dtype == torch.float32
    torch.testing.assert_close(a, features(model, x, batch=7), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a, features(model, x.float() / 127.5 - 1 + .003), rtol=1e-4, atol=1e-5)
    assert model.training


def test_statistics_of_pictures_remember_where_they_come_from():
    model, data = FashionJudge(), ImageSet(pictures(), 'noise')
    s = statistics(data, model, batch=9)
    assert s.n == 40 and s.data.startswith('noise, sha256 ') and s.extractor == fingerprint(model)
    np.testing.assert_allclose(s.cov, np.cov(features(model, data).double().numpy(), rowvar=False), atol=1e-8)
    assert s.data == statistics(data, model, batch=40).data != statistics(pictures(seed=1), model).data


def test_two_trainings_never_pass_for_one_another():
    a, b = FashionClassifier(), FashionClassifier()
    assert fingerprint(a) != fingerprint(b) and fingerprint(a).startswith('fashion_classifier@')
    with pytest.raises(CourseError, match='extractor differs'):
        feature_fid(pictures(), statistics(pictures(), a), b)


def test_score_says_everything():
    model = FashionClassifier()
    score = feature_fid(pictures(30), pictures(40, seed=1), model, resamples=20)
    assert score.low <= score.value <= score.high and float(score) == score.value
    for part in (fingerprint(model), 'N 30 against 40', '8 bits', 'feature-FID', '20 resamples'): assert part in repr(score)
    assert score == feature_fid(pictures(30), statistics(pictures(40, seed=1), model), model, resamples=20)
    assert math.isnan(feature_fid(pictures(30), pictures(40), model, resamples=0).low)


def test_bootstrap_is_the_distance_of_resamples():
    x, reference = gaussian(15, 60, 5), Statistics().update(gaussian(16, 90, 5))
    index = torch.randint(60, (60,), generator=generator(3))
    want = frechet_distance(Statistics().update(x[index]), reference)
    assert float(bootstrap_frechet(x, reference, 1, seed=3)[0]) == pytest.approx(want, rel=1e-9)
    few = Statistics().update(gaussian(17, 3, 5))   # a singular reference
    want = frechet_distance(Statistics().update(x[index]), few)
    assert float(bootstrap_frechet(x, few, 1, seed=3)[0]) == pytest.approx(want, rel=1e-6)


def test_interval_covers_and_estimates_the_bias():
    d, n, reference = 6, 200, (torch.zeros(6).double(), torch.eye(6).double())
    exact = Statistics.from_moments(*reference)
    heaps = 1.3 * torch.randn(60, n, d, generator=generator(18), dtype=torch.float64)
    values = [frechet_distance(Statistics().update(x), reference) for x in heaps]
    found = [interval(v, bootstrap_frechet(x, exact, 60, i)) for i, (v, x) in enumerate(zip(values, heaps))]
    expected = sum(values) / 60
    assert sum(low <= expected <= high for low, high, _ in found) >= 52
    assert sum(f[2] for f in found) / 60 == pytest.approx(expected - d * .09, rel=.3)


def test_judge():
    class Sure(Classifier):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(1, 10)
            self.head.weight.data, self.head.bias.data = torch.zeros(10, 1), torch.zeros(10)
            self.head.weight.data[0], self.head.weight.data[1] = -50, 50
        def features(self, x): return x.mean((1, 2, 3))[:, None]
    x = torch.cat([torch.full((3, 1, 28, 28), 255), torch.zeros(1, 1, 28, 28)]).to(torch.uint8)
    opinion = judge(x, Sure())
    assert opinion['confidence'] == pytest.approx(1) and opinion['histogram'][:2].tolist() == [.25, .75]
    assert opinion['entropy'] == pytest.approx(-(.25 * math.log(.25) + .75 * math.log(.75))) and opinion['n'] == 4


# ---------------------------------------------------------------- pairs

def slow_ssim(a, b):
    "Window by window, on values in [0, 255] with L = 255, as the paper writes it"
    w = np.exp(-((np.arange(11) - 5)**2) / (2 * 1.5**2))
    w = np.outer(w, w) / np.outer(w, w).sum()
    out = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            p, q = a[i:i + 11, j:j + 11], b[i:i + 11, j:j + 11]
            m, k = (w * p).sum(), (w * q).sum()
            vp, vq, c = (w * (p - m)**2).sum(), (w * (q - k)**2).sum(), (w * (p - m) * (q - k)).sum()
            out.append((2 * m * k + 2.55**2) * (2 * c + 7.65**2) / ((m * m + k * k + 2.55**2) * (vp + vq + 7.65**2)))
    return np.mean(out)


def test_ssim_window_by_window():
    g = generator(19)
    a = torch.randint(0, 256, (3, 2, 14, 17), generator=g, dtype=torch.uint8)
    b = (a.float() + 30 * torch.randn(a.shape, generator=g)).clamp(0, 255).to(torch.uint8)
    want = [np.mean([slow_ssim(p.double().numpy(), q.double().numpy()) for p, q in zip(x, y)]) for x, y in zip(a, b)]
    np.testing.assert_allclose(ssim(a, b), want, rtol=1e-9)
    np.testing.assert_allclose(ssim(a.float() / 127.5 - 1, b.float() / 127.5 - 1), want, rtol=1e-5)


def test_psnr_by_hand():
    a = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    b = a.clone()
    b[0, 0, 0, 0] = 255
    assert psnr(a, b)[0] == pytest.approx(10 * math.log10(4)) and math.isinf(psnr(a, b)[1])


# ---------------------------------------------------------------- training

def test_jitter_moves_and_keeps():
    x = torch.rand(64, 1, 9, 9) * 2 - 1
    y = jitter(x, Draws(0, 3))
    inside = x[:, :, 1:-1, 1:-1]
    windows = torch.stack([y[:, :, i:i + 7, j:j + 7] for i in range(3) for j in range(3)])
    assert (windows == inside).flatten(2).all(2).any(0).all() and not y.equal(x)
    assert y.equal(jitter(x, Draws(0, 3))) and not y.equal(jitter(x, Draws(0, 4)))
    assert jitter(x, Draws(0, 3), by=0).equal(x)


@pytest.mark.parametrize('name', ['fashion_classifier', 'fashion_judge'])
def test_recipe_learns(name):
    "A two-class toy in the recipe's own settings; the real thing runs in the notebook"
    recipe = RECIPES[name]
    labels = torch.arange(200) % 2
    x = (pictures(200) // 4 + (labels * 120)[:, None, None, None]).to(torch.uint8)
    data = ImageSet(x, 'dark and bright', labels)
    torch.manual_seed(0)
    model = recipe.model()
    before = fixed_loss(model, recipe.loss, data, n=100)
    settings = {**recipe.settings['smoke'], 'steps': 12, 'batch_size': 32}
    trainer = Trainer(model, recipe.loss, data, progress=False, device='cpu', **settings).fit()
    assert fixed_loss(trainer.ema_model().cpu(), classifier_loss, data, n=100) < .6 * before
    assert set(recipe.settings) == {'smoke', 'laptop', 'gpu'} and 2 * sum(p.numel() for p in model.parameters()) < 600_000
