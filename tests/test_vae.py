"""The VAE chapter's module: distributions, bounds, losses, recipes, and the claims script's plumbing"""
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffcourse import data
from diffcourse.ae import Decoder, Encoder
from diffcourse.core import CourseError, Draws, generator
from diffcourse.train import RECIPES, fixed_loss, load_weights, save_weights, train_recipe
from diffcourse.vae import (VAE, DiagonalGaussian, active_units, binarise, bits_per_dim, gradient_samples, importance_bound,
                            iwae_bound, log_weights, loss_elbo, measure, prepare, reconstruct, sample_prior, sharpness)

HERE = Path(__file__).parent


@pytest.fixture
def digits():
    return data.ImageSet((torch.rand(40, 1, 28, 28, generator=generator(9)) * 255).byte(), 'noise')


def small(likelihood='bernoulli', latent=4, seed=0):
    torch.manual_seed(seed)
    return VAE(width=8, latent=latent, likelihood=likelihood).eval()


def test_diagonal_gaussian_is_latent_diffusions():
    T = load_file(HERE / 'golden/diagonal_gaussian.safetensors')
    p, other = DiagonalGaussian(T['in/parameters']), DiagonalGaussian(T['in/other_parameters'])
    found = dict(mean=p.mean, logvar=p.logvar, std=p.std, var=p.var, mode=p.mode(), sample=p.sample(T['in/noise']),
                 kl=p.kl(), kl_other=p.kl(other), nll=p.nll(T['in/sample']))
    for name, value in found.items(): torch.testing.assert_close(value, T[f'out/{name}'], rtol=1e-5, atol=1e-4)
    assert p.kl().shape == (2,) and p.logvar.min() == -30 and p.logvar.max() == 20


def test_diagonal_gaussian_edges():
    with pytest.raises(CourseError, match='parameters'): DiagonalGaussian(torch.zeros(2, 3))
    with pytest.raises(CourseError, match='parameters'): DiagonalGaussian(torch.zeros(4))
    assert DiagonalGaussian(torch.zeros(2, 4, dtype=torch.bfloat16)).kl().dtype == torch.float32
    q = DiagonalGaussian(torch.randn(3, 8, dtype=torch.float64, generator=generator(1)))
    torch.testing.assert_close(q.kl(q), torch.zeros(3, dtype=torch.float64))
    standard = DiagonalGaussian(torch.zeros(3, 8, dtype=torch.float64))
    torch.testing.assert_close(q.kl(standard), q.kl())
    assert q.sample(gen=generator(0)).equal(q.sample(gen=generator(0)))


def test_kl_against_torch_distributions():
    a, b = (DiagonalGaussian(torch.randn(5, 6, dtype=torch.float64, generator=generator(s))) for s in (0, 1))
    normal = lambda g: torch.distributions.Normal(g.mean, g.std)
    want = torch.distributions.kl_divergence(normal(a), normal(b)).sum(1)
    torch.testing.assert_close(a.kl(b), want)
    x = torch.randn(5, 3, dtype=torch.float64, generator=generator(2))
    torch.testing.assert_close(a.nll(x), -normal(a).log_prob(x).sum(1))


@pytest.mark.parametrize('likelihood', ['gaussian', 'bernoulli'])
def test_log_likelihood_is_normalised_and_summed(likelihood):
    model = small(likelihood)
    x = torch.rand(3, 1, 28, 28, generator=generator(0)) * 2 - 1
    z = torch.randn(3, 4, generator=generator(1))
    out = model.decoder(z)
    if likelihood == 'gaussian': want = torch.distributions.Normal(out, model.sigma).log_prob(x)
    else:
        x = x.sign()
        want = torch.distributions.Bernoulli(logits=out).log_prob((x + 1) / 2)
    torch.testing.assert_close(model.log_likelihood(x, z), want.sum((1, 2, 3)))
    mean = model.decode(z)
    if likelihood == 'bernoulli': torch.testing.assert_close((mean + 1) / 2, out.sigmoid(), atol=1e-6, rtol=1e-5)
    assert mean.abs().max() <= 1 and reconstruct(model, x).shape == x.shape


def test_bad_models_are_refused():
    with pytest.raises(CourseError, match='likelihood'): VAE(likelihood='poisson')
    with pytest.raises(CourseError, match='sigma'): VAE(sigma=0.)
    with pytest.raises(CourseError, match='k must'): iwae_bound(small(), torch.ones(1, 1, 28, 28), 0)


def test_loss_is_minus_the_elbo_and_repeats(digits):
    model = small('gaussian')
    x = digits.images.float() / 127.5 - 1
    total, parts = loss_elbo()(model, {'x': x}, Draws(0, 0))
    again, _ = loss_elbo()(model, {'x': x}, Draws(0, 0))
    assert total.equal(again)
    torch.testing.assert_close(total, parts['rate'] + parts['distortion'])
    q = model.encode(x)
    z = q.sample(Draws(0, 0).normal(len(x), 4))
    torch.testing.assert_close(total, (q.kl() - model.log_likelihood(x, z)).mean())
    heavy, parts = loss_elbo(beta=3.)(model, {'x': x}, Draws(0, 0))
    torch.testing.assert_close(heavy, 3 * parts['rate'] + parts['distortion'])


def test_free_bits_are_a_floor_per_code_number(digits):
    model, x = small('gaussian'), digits.images.float() / 127.5 - 1
    _, parts = loss_elbo()(model, {'x': x}, Draws(0, 0))
    free, _ = loss_elbo(free_bits=100.)(model, {'x': x}, Draws(0, 0))
    torch.testing.assert_close(free, parts['distortion'] + 4 * 100)
    none, _ = loss_elbo(free_bits=1e-9)(model, {'x': x}, Draws(0, 0))
    torch.testing.assert_close(none, parts['distortion'] + parts['rate'])


def test_binarisation_is_dynamic_in_training_and_fixed_in_tests(digits):
    model, x = small(), digits.images.float() / 127.5 - 1
    a, b = (loss_elbo()(model, {'x': x}, Draws(0, s))[0] for s in (0, 1))
    assert not a.equal(b)
    fixed = prepare(model, digits)
    assert fixed.equal(prepare(model, digits)) and set(fixed.unique().tolist()) == {-1., 1.}
    torch.testing.assert_close(prepare(small('gaussian'), digits, 7), x[:7])
    assert binarise(torch.tensor([-1., 1.]), torch.tensor([0., .9999])).tolist() == [-1, 1]


def test_both_gradients_estimate_the_same_thing():
    mean, std = torch.tensor([.5, -1.]).double(), torch.tensor([.7, .2]).double()
    noise = torch.randn(100_000, 2, generator=generator(0), dtype=torch.float64)
    f = lambda z: z[:, 0]**2 * z[:, 1]
    want = torch.stack([2 * mean[0] * mean[1], mean[0]**2 + std[0]**2])     # of E f = (m0² + s0²) m1
    for g in gradient_samples(f, mean, std, noise): assert ((g.mean(0) - want).abs() < 5 * g.std(0) / 100_000**.5).all()


def test_importance_bound_orders_and_limits():
    log_w = torch.randn(500, 6, generator=generator(0), dtype=torch.float64) * 20 - 400
    nested = [log_w.view(-1, k, 6).logsumexp(1).sub(math.log(k)).mean(0) for k in (1, 5, 50, 500)]
    assert all((a <= b).all() for a, b in zip(nested, nested[1:]))
    torch.testing.assert_close(importance_bound(log_w), nested[-1])
    torch.testing.assert_close(importance_bound(log_w[:1]), log_w[0])


class Linear(VAE):
    "x = W z + noise: log p(x) is known exactly"
    def __init__(self, W, sigma=.5):
        torch.nn.Module.__init__(self)
        self.W, self.sigma, self.latent, self.likelihood = torch.nn.Parameter(W), sigma, W.shape[1], 'gaussian'

    def decoder(self, z): return z @ self.W.T

    def encode(self, x):
        "The exact posterior is Gaussian; its diagonal is a good proposal"
        precision = torch.eye(self.latent) + self.W.T @ self.W / self.sigma**2
        cov = torch.linalg.inv(precision)
        mean = x @ self.W @ cov / self.sigma**2
        return DiagonalGaussian(torch.cat([mean, cov.diagonal().log().expand_as(mean)], 1))


def test_bounds_against_an_exact_likelihood():
    W = torch.randn(6, 2, generator=generator(0))
    model, x = Linear(W), torch.randn(40, 6, generator=generator(1))
    exact = torch.distributions.MultivariateNormal(torch.zeros(6), W @ W.T + .25 * torch.eye(6)).log_prob(x).mean()
    bounds = [float(iwae_bound(model, x, k, seed=k, chunk=1000).mean()) for k in (1, 10, 3000)]
    assert bounds[0] < exact + .05 and abs(bounds[-1] - exact) < .01 and bounds[0] < bounds[1] < bounds[2] + .02
    q = model.encode(x)
    elbo = (-q.kl() + model.log_likelihood(x[None].expand(2000, -1, -1).flatten(0, 1),
            q.sample(torch.randn(2000, 40, 2, generator=generator(2))).flatten(0, 1)).view(2000, 40).mean(0)).mean()
    assert abs(elbo - log_weights(model, x, q, torch.randn(2000, 40, 2, generator=generator(3))).mean()) < .02


def test_bound_does_not_depend_on_chunks(digits):
    model = small()
    x = prepare(model, digits, 6)
    a, b = (iwae_bound(model, x, 20_000 // 200, chunk=c) for c in (10_000, 10_000))
    assert a.equal(b)
    c = iwae_bound(model, x, 100, chunk=12)
    assert c.isfinite().all() and abs(float((c - a).mean())) < 5


def test_measures():
    assert active_units(torch.tensor([[0., 5.], [1., 5.05], [-1., 4.95]])) == 1
    assert abs(bits_per_dim(784 * math.log(2), 784) - math.log2(255)) < 1e-12
    board = torch.ones(1, 1, 8, 8)
    board[..., ::2, 1::2] = board[..., 1::2, ::2] = -1
    assert sharpness(torch.zeros(1, 1, 8, 8)) == 0 and sharpness(board) == 2
    model = small('gaussian')
    found = measure(model, torch.zeros(5, 1, 28, 28), batch=2)
    assert found['elbo'] == pytest.approx(-found['rate'] - found['distortion']) and 'bits_per_dim' in found


def test_the_autoencoder_is_inside():
    "The same networks as the previous chapter's, with twice as many numbers from the encoder"
    model = VAE(latent=16)
    assert isinstance(model.encoder, Encoder) and isinstance(model.decoder, Decoder)
    assert model.encoder.head.out_features == 32


@pytest.mark.parametrize('name', ['vae_fashion', 'vae_digits'])
def test_recipe_learns_saves_and_samples(name, tmp_path, monkeypatch):
    recipe = RECIPES[name]
    assert set(recipe.settings) == {'smoke', 'laptop', 'gpu'}
    train = recipe.data('smoke')
    before = fixed_loss(recipe.model(), recipe.loss, train)
    trainer = train_recipe(name, 'smoke', steps=20, device='cpu', progress=False)
    assert fixed_loss(trainer.model, recipe.loss, train) < before
    path = save_weights(tmp_path / 'w.safetensors', trainer.ema_model(), dtype='fp16')
    assert path.stat().st_size < 600_000
    model = load_weights(path, recipe.model())
    samples = recipe.sample(model, 3, 5)
    assert samples.shape == (3, 1, 28, 28) and samples.abs().max() <= 1 and samples.equal(sample_prior(model, 3, 5))
    x = prepare(model, train, 4)
    assert recipe.reconstruct(model, x).shape == x.shape


def test_claims_script_collects(monkeypatch):
    import claims_vae as script
    runs = {'gradients': [dict(seed=s, reparam=1. + s, score=9., score_baseline=8.) for s in (0, 1)],
            'beta': [dict(seed=0, beta=b, rate=1 / b, distortion=b, active=3) for b in script.BETAS.values()],
            'digits': [dict(seed=0, k1=-90., k5=-89., k50=-88., k500=-87., nll=87., rate=20., active=20)],
            'prior': [dict(seed=0, ae_prior_fid=9., ae_gaussian_fid=3., vae_prior_fid=2.)]}
    found = script.collect(runs, dict(budget='smoke', device='cpu', seeds=2))
    assert set(found) == {'VAE-1', 'VAE-2', 'VAE-3', 'VAE-4', 'AE-2'} and found['VAE-1']['numbers']['reparam'] == 1.5
    from diffcourse.core import claim
    for id, entry in found.items(): assert claim(id, **entry['numbers']).rows[0][-1]
