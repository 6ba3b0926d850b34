"""Every score against the evaluators that others use, on the same features; against formulas of another kind; and its refusals"""
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from diffcourse import scores
from diffcourse.core import CourseError, generator
from diffcourse.metrics import Classifier, FashionClassifier, Score, Statistics, _factor, frechet_distance, score_name
from diffcourse.scores import (LastMap, clip_score, covered, distances, groups_in_order, groups_shuffled, inception_score,
                               inception_score_interval, information, kid, kid_subsets, manifold_radii, mmd2,
                               polynomial_kernel, precision_recall, realism)


def vectors(seed, n=300, d=24, shift=0.):
    "Correlated float32 features, none negative, as a network's last layer gives them"
    g = generator(seed)
    x = torch.randn(n, d, generator=g) @ torch.randn(d, d, generator=generator(99)) / d**.5 + shift
    return torch.nn.functional.silu(x)


def logits(seed, n=500, k=12): return 2 * torch.randn(n, k, generator=generator(seed))


class Same(nn.Module):
    "Hands features through where an evaluator wants a network"
    num_features = 24
    def forward(self, x): return x


# ---------------------------------------------------------------- the same features in other people's evaluators

TARGET = 1e-6   # relative agreement on given features


@pytest.mark.parametrize('n, m', [(300, 280), (2000, 1500), (20, 30)])
def test_fid_is_that_of_pytorch_fid(n, m):
    from pytorch_fid.fid_score import calculate_frechet_distance
    a, b = vectors(1, n), vectors(2, m, shift=.2)
    moments = [v for x in (a, b) for v in (x.double().numpy().mean(0), np.cov(x.double().numpy(), rowvar=False))]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        want = calculate_frechet_distance(*moments)
    got = frechet_distance(*(Statistics().update(x) for x in (a, b)))
    assert got == pytest.approx(float(want), rel=TARGET if n > 24 else 1e-4)   # fewer pictures than features: sqrtm is noisy


def test_fid_is_that_of_torch_fidelity():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    a, b = vectors(1, 900), vectors(2, 800, shift=.2)
    want = fid_statistics_to_metric(*map(fid_features_to_statistics, (a, b)), False)['frechet_inception_distance']
    assert frechet_distance(*(Statistics().update(x) for x in (a, b))) == pytest.approx(float(want), rel=TARGET)


def test_fid_is_that_of_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance
    a, b = vectors(1, 900), vectors(2, 800, shift=.2)
    peer = FrechetInceptionDistance(feature=Same()).set_dtype(torch.float64)
    peer.update(a, real=True)
    peer.update(b, real=False)
    got = frechet_distance(*(Statistics().update(x) for x in (a, b)))
    assert got == pytest.approx(float(peer.compute()), rel=TARGET)


@pytest.mark.parametrize('splits, shuffle', [(10, True), (10, False), (3, True), (1, False)])
def test_inception_score_is_that_of_torch_fidelity(splits, shuffle):
    from torch_fidelity.metric_isc import isc_features_to_metric
    want = isc_features_to_metric(logits(3), splits, shuffle, 2020)
    got = inception_score(logits(3), groups_shuffled(500, splits, 2020 if shuffle else None))
    assert float(got.mean()) == pytest.approx(want['inception_score_mean'], rel=TARGET)
    assert float(got.std(unbiased=False)) == pytest.approx(want['inception_score_std'], rel=TARGET, abs=1e-12)


def test_inception_score_is_that_of_torchmetrics():
    from torchmetrics.image.inception import InceptionScore
    peer = InceptionScore(feature=Same(), splits=1)
    peer.update(logits(4))
    assert float(inception_score(logits(4))[0]) == pytest.approx(float(peer.compute()[0]), rel=TARGET)


def test_kid_is_that_of_torch_fidelity():
    from torch_fidelity.metric_kid import kid_features_to_metric
    a, b = vectors(5).double(), vectors(6, 350, shift=.1).double()
    want = kid_features_to_metric(a, b, kid_subsets=15, kid_subset_size=120, kid_kernel='poly', rng_seed=2020, verbose=False,
                                  kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1)
    got = kid(a, b, 15, 120)
    assert float(got.mean()) == pytest.approx(want['kernel_inception_distance_mean'], rel=TARGET)
    assert float(got.std(unbiased=False)) == pytest.approx(want['kernel_inception_distance_std'], rel=TARGET)


def test_kid_is_that_of_torchmetrics():
    from torchmetrics.image.kid import KernelInceptionDistance
    a, b = vectors(5), vectors(6, shift=.3)
    peer = KernelInceptionDistance(feature=Same(), subsets=1, subset_size=len(a)).set_dtype(torch.float64)
    peer.update(a.double(), real=True)
    peer.update(b.double(), real=False)
    assert float(mmd2(a, b)) == pytest.approx(float(peer.compute()[0]), rel=TARGET)


@pytest.mark.parametrize('k', [1, 3, 7])
def test_precision_and_recall_are_those_of_torch_fidelity(k):
    from torch_fidelity.metric_prc import calculate_precision_recall_full
    real, fake = vectors(7), vectors(8, 260, shift=.3)
    assert precision_recall(real, fake, k) == pytest.approx(calculate_precision_recall_full(fake, real, k), abs=1e-7)


# ---------------------------------------------------------------- formulas of another kind

def test_two_gaussians_have_their_closed_form():
    "Thirty pairs of samples; the mean within three of its standard errors, after the bias that is known for perfect samples"
    λ, κ, n, g = torch.linspace(.5, 2, 6).double(), torch.linspace(2, .5, 6).double(), 20_000, generator(9)
    draw = lambda v: Statistics().update(torch.randn(n, 6, generator=g, dtype=torch.float64) * v.sqrt())
    values = torch.tensor([frechet_distance(draw(λ), draw(κ)) for _ in range(30)])
    exact = float((λ.sqrt() - κ.sqrt()).square().sum())
    assert abs(float(values.mean()) - exact) < 3 * float(values.std()) / 30**.5 + 6 * 2 / n


def test_information_is_that_of_a_table():
    p = logits(10, 40, 5).double().softmax(1)
    joint = p / 40
    entropy = lambda v: -torch.xlogy(v, v).sum()
    want = entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint)
    assert float(information(p.log()).mean()) == pytest.approx(float(want), rel=1e-12)


@pytest.mark.parametrize('k', [2, 10, 1008])
def test_inception_score_reaches_its_bounds(k):
    assert float(inception_score(torch.eye(k).log())[0]) == pytest.approx(k)             # one-hot: zeros are legal
    assert float(inception_score(torch.zeros(7, k))[0]) == pytest.approx(1)


def test_score_of_groups_counts_short_ones_as_much():
    x = logits(11, 25)
    parts = groups_in_order(25, 10)
    assert [len(p) for p in parts] == [10, 10, 5]
    assert inception_score(x, parts).mean() == torch.stack([inception_score(x[p])[0] for p in parts]).mean()


def test_interval_of_the_score_covers():
    "A hundred heaps from a known source: the interval holds the mean of all scores in at least 88 of them"
    all_ = [logits(100 + i, 400, 6) for i in range(100)]
    mean = sum(float(inception_score(x)[0].log()) for x in all_) / 100
    ends = [inception_score_interval(x) for x in all_]
    assert sum(math.log(a) < mean < math.log(b) for a, b in ends) >= 88


def test_kernel_by_hand_and_all_pairs_by_loops():
    x, y = vectors(12, 9, 4).double(), vectors(13, 7, 4).double()
    k = lambda a, b: (float(a @ b) / 4 + 1)**3
    pairs = lambda u: sum(k(u[i], u[j]) for i in range(len(u)) for j in range(len(u)) if i != j) / (len(u) * (len(u) - 1))
    cross = sum(k(a, b) for a in x for b in y) / 63
    assert float(mmd2(x, y)) == pytest.approx(pairs(x) + pairs(y) - 2 * cross, rel=1e-12)
    assert float(polynomial_kernel(x, y, 2, .5, 0.)[3, 4]) == pytest.approx((.5 * float(x[3] @ y[4]))**2)


def test_unbiased_and_biased():
    g = generator(14)
    draws = [[torch.randn(20, 5, generator=g) for _ in 'xy'] for _ in range(400)]
    for unbiased in (True, False):
        values = torch.stack([mmd2(x, y, unbiased=unbiased) for x, y in draws])
        z = float(values.mean() / (values.std() / 20))
        assert (abs(z) < 4) if unbiased else z > 10


def test_neighbours_by_loops():
    real, fake = vectors(15, 50, 6), vectors(16, 40, 6, shift=.3)
    d = lambda a, b: float((a.double() - b.double()).square().sum().sqrt())
    radius = lambda x, i: sorted(d(x[i], x[j]) for j in range(len(x)) if j != i)[2]
    share = lambda a, b: sum(any(d(p, q) <= radius(b, j) * (1 + 1e-9) for j, q in enumerate(b)) for p in a) / len(a)
    assert precision_recall(real, fake) == pytest.approx((share(fake, real), share(real, fake)))


@pytest.mark.parametrize('kind', scores.DISTANCES)
def test_a_set_covers_itself_and_blocks_change_nothing(kind, monkeypatch):
    x, y = vectors(17, 90), vectors(18, 70)
    assert precision_recall(x, x, kind=kind) == (1, 1)
    whole = precision_recall(x, y, kind=kind), realism(x, y, kind=kind), manifold_radii(x, kind=kind)
    monkeypatch.setattr(scores, '_rows', lambda a, m: iter(a.split(7)))
    parts = precision_recall(x, y, kind=kind), realism(x, y, kind=kind), manifold_radii(x, kind=kind)
    assert whole[0] == parts[0]
    torch.testing.assert_close(whole[1:], parts[1:], rtol=1e-3, atol=1e-3)


def test_blocks_are_bounded():
    x = torch.zeros(70_000, 1)
    assert max(len(part) for part in scores._rows(x, 50_000)) * 50_000 <= 2**24
    assert sum(len(part) for part in scores._rows(x, 50_000)) == 70_000


def test_realism_above_one_is_inside():
    real, fake = vectors(19, 80, 5), vectors(20, 60, 5, shift=.2)
    inside = covered(fake, real, manifold_radii(real))
    assert ((realism(real, fake) > 1) == inside).double().mean() > .97   # 1e-5 is added to distances


def test_float16_overflow_falls_back():
    big = 1000 * torch.randn(20, 8, generator=generator(21))
    torch.testing.assert_close(distances(big, big.flip(0), 'adm'), torch.cdist(big, big.flip(0)).square(), rtol=1e-4, atol=5)


def test_clip_score_is_a_cosine():
    class Model:
        def encode_image(self, x): return x.flatten(1)
        def encode_text(self, t): return torch.stack([v for v in t])
    a, b = torch.randn(2, 9, 4, generator=generator(22))
    got = clip_score(a.reshape(9, 1, 2, 2), list(b), Model(), lambda c: c, batch=4)
    torch.testing.assert_close(got, 100 * torch.cosine_similarity(a.double(), b.double()).clamp(min=0), rtol=1e-6, atol=1e-6)
    assert (got == 0).any() and (got > 0).any()


def test_last_map_is_what_it_says():
    model = LastMap(FashionClassifier())
    x = torch.rand(3, 1, 28, 28) * 2 - 1
    out = model.outputs(x, ('features', 'spatial'))
    m = model.base.body[:-1](x)
    assert out['features'].shape == (3, 96) and out['spatial'].shape == (3, 343)
    torch.testing.assert_close(out['features'], m.mean((2, 3)))
    torch.testing.assert_close(out['spatial'].unflatten(1, (7, 7, 7)), m[:, :7])
    assert model.name == 'fashion_classifier_map'


# ---------------------------------------------------------------- whole numbers

def test_any_order_any_batches_any_shards_give_the_same_bits(tmp_path):
    from diffcourse.metrics import load_statistics, save_statistics
    x = vectors(23, 3000, 16) * 7 + 2
    whole = Statistics().update(x)
    for seed, size in ((1, 1), (2, 37), (3, 1024), (4, 900)):
        shards = [Statistics() for _ in range(3)]
        for i, part in enumerate(x[torch.randperm(3000, generator=generator(seed))].split(size)): shards[i % 3].update(part)
        for i, s in enumerate(shards): save_statistics(tmp_path / f'{i}.npz', s)
        read = [load_statistics(tmp_path / f'{i}.npz') for i in range(3)]
        for merged in (shards[2].merge(shards[0]).merge(shards[1]), read[0].merge(read[1].merge(read[2]))):
            assert merged.mean.equal(whole.mean) and merged.cov.equal(whole.cov) and merged.n == 3000


@pytest.mark.parametrize('scale, shift', [(1, 0), (1, 1e6), (1e-4, 0), (500, -3e4), (1e-3, 1)])
def test_counting_keeps_the_digits(scale, shift):
    "Against NumPy in extended precision, to a billionth of the feature"
    x = torch.randn(2000, 5, generator=generator(24), dtype=torch.float64) * scale + shift
    y = x.numpy().astype(np.longdouble)
    y = y - y.mean(0)
    want = (y.T @ y / 1999).astype(float)
    error = 4 * 2.**-30 * scale / 2000**.5 + 1e-12 * scale**2
    s = Statistics().update(x)
    assert float((s.cov - torch.from_numpy(want)).abs().max()) < error
    assert float((s.mean - x.mean(0)).abs().max()) < 1e-9


def test_counting_refuses_what_it_cannot_hold():
    with pytest.raises(CourseError, match='count 16384 at most: divide'): Statistics().update(torch.tensor([[0.], [1e5]])).cov
    given = Statistics.from_moments(torch.zeros(2), torch.eye(2), 5)
    with pytest.raises(CourseError, match='nothing can be added'): given.update(torch.ones(1, 2))
    with pytest.raises(CourseError, match='cannot be merged'): Statistics().update(torch.eye(2)).merge(given)


def test_saved_npz_is_read_by_others_and_theirs_by_us(tmp_path):
    from diffcourse.metrics import load_statistics, save_statistics
    s, places = Statistics('eyes', 'as is', 'heap').update(vectors(25)), Statistics('eyes', 'as is', 'heap').update(vectors(26))
    save_statistics(tmp_path / 'ours.npz', s, places)
    with np.load(tmp_path / 'ours.npz') as f: mu, sigma, sigma_s = f['mu'], f['sigma'], f['sigma_s']
    assert np.array_equal(mu, s.mean) and np.array_equal(sigma, s.cov) and np.array_equal(sigma_s, places.cov)
    assert load_statistics(tmp_path / 'ours.npz', part='spatial').cov.equal(places.cov)
    np.savez(tmp_path / 'theirs.npz', mu=mu, sigma=sigma)
    theirs = load_statistics(tmp_path / 'theirs.npz')
    assert theirs.n is None and theirs.extractor == '' and 'theirs.npz, sha256' in theirs.data
    assert abs(frechet_distance(theirs, s)) < 1e-9
    with pytest.raises(CourseError, match='no statistics'): load_statistics(tmp_path / 'theirs.npz', part='spatial')
    with pytest.raises(CourseError, match="extractor 'eyes', you asked for 'ears'"): load_statistics(tmp_path / 'ours.npz', 'ears')
    (tmp_path / 'cut.npz').write_bytes((tmp_path / 'ours.npz').read_bytes()[:-100])
    with pytest.raises(CourseError, match='cut.npz is truncated'): load_statistics(tmp_path / 'cut.npz')


# ---------------------------------------------------------------- factors

@pytest.mark.parametrize('d, rank', [(5, 5), (40, 7), (130, 129), (200, 64)])
def test_factor_has_the_rank(d, rank):
    g = torch.randn(d, rank, generator=generator(27), dtype=torch.float64)
    F = _factor(g @ g.T)
    assert F.shape == (d, rank)
    assert float((F @ F.T - g @ g.T).abs().max()) < 1e-12 * float((g @ g.T).abs().max()) * d


@pytest.mark.parametrize('Σ', [-torch.eye(3), torch.tensor([[1., 2.], [2., 1.]]), torch.tensor([[0., 1.], [1., 0.]])])
def test_factor_refuses_what_is_no_covariance(Σ):
    with pytest.raises(CourseError, match='no covariance'): _factor(Σ.double())


def test_dead_and_doubled_features_add_nothing():
    a, b = vectors(28, 400, 10).double(), vectors(29, 350, 10, shift=.1).double()
    wide = lambda x: torch.cat([x, x, torch.full((len(x), 3), .5)], 1)
    plain, more = (frechet_distance(*(Statistics().update(f(x)) for x in (a, b))) for f in (lambda x: x, wide))
    assert more == pytest.approx(2 * plain, rel=1e-8)   # every direction twice as long: twice the squared distance


# ---------------------------------------------------------------- names and refusals

def test_only_the_published_network_gives_plain_names():
    model = Classifier()
    assert [score_name(n, model) for n in ('FID', 'sFID', 'IS', 'KID')] == ['feature-FID', 'feature-sFID', 'feature-IS', 'feature-KID']
    model.standard = True
    assert score_name('FID', model) == 'FID'
    text = repr(Score(1., 0., 2., 'eyes@1', 7, None, 'as is', name='IS', how='a guess'))
    assert all(part in text for part in ('IS 1 [0, 2] (a guess)', 'eyes@1', 'N 7', 'as is')) and 'against' not in text


nan = torch.full((9, 3), math.nan)


@pytest.mark.parametrize('make, message', [
    (lambda: inception_score(torch.zeros(0, 3)), r'\(N, K\), got \(0, 3\)'),
    (lambda: inception_score(nan), '9 of 9 pictures have logits with NaN'),
    (lambda: groups_shuffled(5, 10), '5 pictures cannot be cut into 10'),
    (lambda: precision_recall(torch.zeros(3, 2), torch.zeros(9, 2)), '3 neighbours need at least 4 pictures on each side, got 3'),
    (lambda: precision_recall(torch.zeros(9, 2), torch.zeros(9, 2), k=0), 'k must be at least 1'),
    (lambda: precision_recall(nan, torch.zeros(9, 3)), '9 of 9 feature vectors hold NaN'),
    (lambda: distances(torch.zeros(2, 2), torch.zeros(2, 2), 'taxi'), "'taxi' is none of euclid, adm"),
    (lambda: mmd2(torch.zeros(1, 2), torch.zeros(9, 2)), 'got 1'),
    (lambda: mmd2(nan, nan), 'NaN'),
    (lambda: list(kid_subsets(500, 2000)), 'subsets of 1000 need at least 1000 pictures on each side, got 500 and 2000'),
    (lambda: clip_score(torch.zeros(2, 1), ['a'], None, None), '2 pictures but 1 captions')])
def test_refusals(make, message):
    with pytest.raises(CourseError, match=message): make()
