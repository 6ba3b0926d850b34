"Chapter 03: autoencoders, PCA, and what random codes decode to"
import json

import numpy as np
import pytest
import torch

from diffcourse import ae
from diffcourse.core import CourseError, Draws, asset, generator, to_float, verdict
from diffcourse.data import fashion_mnist
from diffcourse.train import RECIPES, load_weights, save_weights, shipped, train_recipe



@pytest.fixture(scope='module')
def pictures(): return to_float(fashion_mnist('test', full=False).images[:256])


@pytest.mark.parametrize('channels, size, latent', [(1, 28, 16), (3, 32, 16), (1, 28, 2), (1, 32, 32)])
def test_encoder_and_decoder_fit_together(channels, size, latent):
    x = torch.zeros(2, channels, size, size)
    z = ae.Encoder(channels, 16, latent, size)(x)
    assert z.shape == (2, latent)
    assert ae.Decoder(latent, channels, 16, size)(z).shape == x.shape


def test_wrong_pictures_are_named():
    with pytest.raises(CourseError, match=r'\(1, 32, 32\).*\(1, 28, 28\)'): ae.Encoder()(torch.zeros(2, 1, 32, 32))
    with pytest.raises(CourseError, match='image_size 30'): ae.Encoder(image_size=30)
    with pytest.raises(CourseError, match='image_size 30'): ae.Decoder(image_size=30)
    with pytest.raises(CourseError, match='groups'): ae.Encoder(width=30)


def test_recipes_are_small_enough_to_ship(tmp_path):
    for name, latent in (('ae_fashion', 16), ('ae_fashion_2d', 2)):
        model = RECIPES[name].model()
        assert sum(p.numel() for p in model.parameters()) <= 300_000
        assert model.encoder.head.out_features == latent
        save_weights(tmp_path / f'{name}.safetensors', model, dtype='fp16')
        assert (tmp_path / f'{name}.safetensors').stat().st_size <= 600_000
        assert set(RECIPES[name].settings) == {'smoke', 'laptop', 'gpu'}


def test_a_picture_does_not_see_its_batch(pictures):
    model = ae.AutoEncoder().eval()
    assert torch.allclose(ae.in_batches(model, pictures, size=7), ae.in_batches(model, pictures), atol=1e-5)
    assert not ae.in_batches(model, pictures[:2]).requires_grad


def test_pca_agrees_with_singular_vectors(pictures):
    x = pictures.double()
    pca = ae.PCA.fit(x, 9)
    flat = x.flatten(1).numpy()
    _, s, V = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    np.testing.assert_allclose(pca.variances[:50].numpy(), s[:50]**2 / len(x), rtol=1e-9)
    np.testing.assert_allclose((pca.components.T @ pca.components).numpy(), V[:9].T @ V[:9], atol=1e-9)
    lost = (pca.decode(pca.encode(x)) - x).square().sum() / len(x)
    np.testing.assert_allclose(float(lost), (s[9:]**2).sum() / len(x), rtol=1e-9)


def test_pca_beats_random_subspaces_and_keeps_a_prefix(pictures):
    x, pca = pictures.double(), ae.PCA.fit(pictures.double(), 9)
    few = pca.keep(4)
    assert few.components.shape == (4, 784) and few.components.equal(pca.components[:4])
    lost = lambda p: float((p.decode(p.encode(x)) - x).square().mean())
    Q = torch.linalg.qr(torch.randn(784, 4, generator=generator(0), dtype=torch.float64)).Q.T
    assert lost(pca) < lost(few) < lost(ae.PCA(pca.mean, Q, pca.variances))


def test_pca_in_chunks_is_pca():
    x = torch.randn(10_007, 5, generator=generator(0), dtype=torch.float64) + 3
    np.testing.assert_allclose(ae.PCA.fit(x, 2).variances.numpy(),
                               np.linalg.eigvalsh(np.cov(x.T.numpy(), bias=True))[::-1], rtol=1e-9)
    for d in (0, 6):
        with pytest.raises(CourseError, match=f'd = {d}'): ae.PCA.fit(x, d)


def test_evaluate_knows_the_range():
    white = torch.ones(4, 1, 28, 28)
    assert ae.evaluate(lambda x: -x, white) == {'mse': 4., 'psnr': 0.}


def test_random_codes_have_the_moments_of_the_codes():
    z = torch.randn(400, 3, generator=generator(0)) @ torch.tensor([[1., 2, 0], [0, 1, 0], [0, 0, 5]]) + 7
    draw = ae.CodeGaussian.fit(z).sample(200_000, generator(1))
    np.testing.assert_allclose(draw.mean(0), z.mean(0), atol=.05)
    np.testing.assert_allclose(np.cov(draw.T), np.cov(z.T), atol=.3)
    with pytest.raises(CourseError, match='3 codes'): ae.CodeGaussian.fit(z[:3])
    flat = z.clone()
    flat[:, 1] = 2.                                                     # a dead code number must not stop it
    assert torch.isfinite(ae.CodeGaussian.fit(flat).sample(5, generator(0))).all()


def test_prior_samples_are_pictures_and_repeatable():
    model = ae.AutoEncoder().eval()
    a, b, c = (ae.prior_samples(model, 4, seed) for seed in (0, 0, 1))
    assert a.shape == (4, 1, 28, 28) and a.abs().max() <= 1 and a.equal(b) and not a.equal(c)
    assert RECIPES['ae_fashion'].sample(model, 4, 0).equal(a)
    assert RECIPES['ae_fashion'].reconstruct(model, a).shape == a.shape


def test_nearest_against_brute_force():
    a, b = torch.randn(501, 3, generator=generator(0)), torch.randn(40, 3, generator=generator(1))
    np.testing.assert_allclose(ae.nearest(a, b), (a[:, None] - b).square().sum(2).sqrt().min(1).values, atol=1e-4)


def test_interpolation_is_straight_and_even():
    a, b = torch.randn(2, 4, 3, generator=generator(0))
    line = ae.interpolate(a, b, 5)
    assert line.shape == (4, 5, 3) and line[:, 0].equal(a) and torch.allclose(line[:, -1], b)
    assert torch.allclose(line.diff(dim=1), ((b - a) / 4)[:, None].expand(4, 4, 3), atol=1e-6)


def test_probes_at_chance_and_at_certainty():
    labels = torch.arange(600) % 3
    noise = torch.randn(600, 2, generator=generator(0))
    clear = noise * .1 + torch.nn.functional.one_hot(labels, 3)[:, :2]
    for probe in (ae.knn_accuracy, ae.linear_probe):
        assert probe(clear[:300], labels[:300], clear[300:], labels[300:]) == 1
        assert abs(probe(noise[:300], labels[:300], noise[300:], labels[300:]) - 1 / 3) < .12


def test_the_loss_does_not_fix_the_code(pictures):
    model, A = ae.AutoEncoder(latent=4).double(), torch.randn(4, 4, generator=generator(2), dtype=torch.float64)
    x = pictures[:8].double()
    before, z = model(x), model.encoder(x)
    with torch.no_grad():
        model.encoder.head.weight.copy_(A @ model.encoder.head.weight)
        model.encoder.head.bias.copy_(A @ model.encoder.head.bias)
        model.decoder.stem[0].weight.copy_(model.decoder.stem[0].weight @ torch.linalg.inv(A))
    assert torch.allclose(model(x), before, atol=1e-9) and torch.allclose(model.encoder(x), z @ A.T, atol=1e-9)


def test_losses():
    x = torch.zeros(64, 1, 28, 28)
    assert float(ae.ae_loss(lambda x: x + .5, {'x': x}, None)) == .25
    loss = ae.denoising_loss(.3)
    a, b, c = (float(loss(lambda x: x, {'x': x}, Draws(0, step))) for step in (1, 1, 2))
    assert a == b != c and abs(a - .09) < 4 * .09 * (2 / x.numel())**.5


def test_training_learns_and_reloads(tmp_path, pictures):
    run = train_recipe('ae_fashion_2d', 'smoke', steps=12, batch_size=32, device='cpu', progress=False)
    assert run.losses[-1] < .7 * run.losses[0]
    model = run.ema_model()
    save_weights(tmp_path / 'a.safetensors', model, dtype='fp16')
    again = load_weights(tmp_path / 'a.safetensors', ae.AutoEncoder(2))
    assert (ae.in_batches(again, pictures[:16]) - ae.in_batches(model, pictures[:16])).abs().max() < .02


def test_shipped_weights_are_better_than_pca(pictures):
    if not shipped('ae_fashion'): pytest.skip('no weights of ae_fashion are embedded yet')
    pca = ae.PCA.fit(to_float(fashion_mnist('train', full=False).images), 16)
    model = load_weights('ae_fashion', ae.AutoEncoder(16))
    assert ae.evaluate(model, pictures)['mse'] < .95 * float((pca.decode(pca.encode(pictures)) - pictures).square().mean())


def test_claims_script_measures_what_the_rule_names(tmp_path, monkeypatch):
    import claims_ae as script
    monkeypatch.setenv('DIFFCOURSE_DEVICE', 'cpu')
    monkeypatch.setattr(script, 'fashion_mnist', lambda split: fashion_mnist(split, full=False).subset(torch.arange(300)))
    script.main(['--budget', 'smoke', '--out', str(tmp_path / 'a.json'), '--widths', '2', '4', '--seeds', '0', '1', '--steps', '2'])
    r = json.loads((tmp_path / 'a.json').read_text())['AE-1']
    assert set(r) >= {'numbers', 'budget', 'device', 'seeds', 'runs'} and r['seeds'] == 2 and len(r['runs']) == 4
    assert set(r['numbers']) == {'r2', 'r4'} and r['pca']['2'] > r['pca']['4']
    worst = max(run['mse'] for run in r['runs'] if run['width'] == 2)
    assert r['numbers']['r2'] == worst / r['pca']['2']
    rule = json.loads(asset('claims/rules.json').read_text(encoding='utf-8'))['AE-1']['rule']
    numbers = {f'r{d}': .8 for d in script.WIDTHS}
    assert verdict(rule, numbers) and not verdict(rule, {**numbers, 'r64': 1.2})
