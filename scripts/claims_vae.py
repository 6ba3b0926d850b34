"""Measure claims VAE-1 to VAE-4 and AE-2: three seeds each, several trainings at a time on a GPU

    python scripts/claims_vae.py --budget gpu --out vae.json

Writes {'VAE-1': {'numbers': …, 'spread': …, 'budget': …, 'device': …, 'seeds': …, 'runs': [...]}, …}; the rules are in
data/claims/rules.json.
"""
import json, multiprocessing, tempfile, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import claims_common
import numpy as np
import torch

from diffcourse import data
from diffcourse.ae import AutoEncoder, CodeGaussian, ae_loss, in_batches
from diffcourse.core import budget, default_device, generator, to_float
from diffcourse.metrics import FashionClassifier, feature_fid
from diffcourse.train import Trainer, device_name, load_weights, save_weights, shipped, train_recipe
from diffcourse.vae import VAE, gradient_samples, iwae_bound, loss_elbo, measure, sample_prior, prepare

BETAS = {'low': 0.1, 'one': 1., 'ten': 10., 'high': 100., 'collapsed': 10_000.}
PUBLISHED = 86.76    # Burda et al. 2016, table 1: VAE, one stochastic layer, k = 1
SIZES = {            # steps of each training, batch, draws per gradient, test pictures and codes for the likelihood, samples
    'smoke': dict(gradient=30, beta=30, digits=30, prior=30, batch=64, draws=200, n=30, samples=300),
    'laptop': dict(gradient=200, beta=300, digits=800, prior=500, batch=128, draws=1000, n=200, samples=1000),
    'gpu': dict(gradient=1000, beta=3000, digits=12_000, prior=5000, batch=256, draws=2000, n=10_000, samples=10_000)}


def trained(model, loss, pictures, steps, seed, size, lr=2e-3, **how):
    "Train from the initial weights of this seed; return the averaged weights in eval mode"
    torch.manual_seed(seed)
    trainer = Trainer(model(), loss, pictures, steps=steps, batch_size=size['batch'], lr=lr, seed=seed, progress=False, **how)
    return trainer.fit().ema_model().eval()


def vae(beta, steps, seed, size, pictures=None, **model):
    pictures = pictures or data.fashion_mnist()
    return trained(lambda: VAE(**model), loss_elbo(beta), pictures, steps, seed, size, clip=1e4)


def gradients(seed, size) -> dict:
    "VAE-1: variance of three estimators of the gradient of log p(x|z), at the cost of one forward and backward pass"
    model = vae(1., size['gradient'], seed, size, latent=16)
    device = next(model.parameters()).device
    x, gen, rows = prepare(model, data.fashion_mnist('test'), 16), generator(seed, device), []
    with torch.no_grad(): q = model.encode(x)
    for i in range(len(x)):
        noise = torch.randn(size['draws'], model.latent, generator=gen, device=device)
        f = lambda z: model.log_likelihood(x[i:i + 1].expand(len(z), -1, -1, -1), z)
        rows.append([float(g.double().var(0).sum()) for g in gradient_samples(f, q.mean[i], q.std[i], noise)])
    reparam, score, baseline = np.mean(rows, 0)
    return dict(reparam=reparam, score=score / 3, score_baseline=baseline / 3)


def rate_distortion(seed, size, beta) -> dict:
    "VAE-2: one point of the curve"
    model = vae(beta, size['beta'], seed, size, latent=16)
    return dict(beta=beta, **measure(model, prepare(model, data.fashion_mnist('test'))))


def likelihood(seed, size) -> dict:
    "VAE-3 and VAE-4: bounds on binarised digits at several k"
    model = vae(1., size['digits'], seed, size, data.mnist(), width=24, latent=30, likelihood='bernoulli')
    x = prepare(model, data.mnist('test'), size['n'])
    chunk = 100_000 if x.device.type == 'cuda' else 10_000
    bounds = {f'k{k}': float(iwae_bound(model, x, k, seed=seed * 1000 + k, chunk=chunk).mean()) for k in (1, 5, 50, 500)}
    return dict(**bounds, nll=-bounds['k500'], n=len(x), **measure(model, x))


def prior(seed, size, extractor) -> dict:
    "AE-2: feature-FID of decoded random codes, autoencoder against VAE"
    pictures, n = data.fashion_mnist(), size['samples']
    plain = trained(lambda: AutoEncoder(16), ae_loss, pictures, size['prior'], seed, size)
    var = vae(1., size['prior'], seed, size, latent=16)
    codes = in_batches(plain.encoder, to_float(pictures.images))
    gen = generator(seed)
    draws = {'ae_prior_fid': torch.randn(n, 16, generator=gen), 'ae_gaussian_fid': CodeGaussian.fit(codes).sample(n, gen)}
    images = {k: in_batches(plain.decoder, z).clamp(-1, 1) for k, z in draws.items()}
    images['vae_prior_fid'] = sample_prior(var, n, seed)
    judge = extractor if isinstance(extractor, str) else load_weights(extractor, FashionClassifier()).to(default_device())
    return {k: float(feature_fid(x, pictures, judge, resamples=0)) for k, x in images.items()}


def one(job) -> tuple:
    "Run one job; the unit of parallel work"
    kind, seed, size, extra = job
    if multiprocessing.parent_process(): torch.set_num_threads(1)
    start = time.perf_counter()
    found = dict(gradients=gradients, beta=rate_distortion, digits=likelihood, prior=prior)[kind](seed, size, *extra)
    return kind, dict(seed=seed, **found, seconds=round(time.perf_counter() - start, 2))


def run_all(jobs, processes) -> dict:
    "Runs by kind; one after another, or several at a time in processes of their own"
    runs = {}
    if processes == 1: results = map(one, jobs)
    else:
        pool = ProcessPoolExecutor(processes, multiprocessing.get_context('spawn'))
        results = pool.map(one, jobs)
    for kind, run in results:
        runs.setdefault(kind, []).append(run)
        print(kind, json.dumps(run), flush=True)
    return runs


def extractor_for(level, folder):
    "The shipped classifier, or the file of one trained now"
    if shipped('fashion_classifier'): return 'fashion_classifier'
    trainer = train_recipe('fashion_classifier', level, progress=False)
    return save_weights(Path(folder) / 'extractor.safetensors', trainer.ema_model(), dtype='fp32')


def summary(rows, keys) -> tuple:
    "Means and standard deviations over seeds"
    mean = {k: float(np.mean([r[k] for r in rows])) for k in keys}
    return mean, {k: float(np.std([r[k] for r in rows], ddof=1)) if len(rows) > 1 else 0. for k in keys}


def collect(runs, common) -> dict:
    "What the rules of the claims need"
    out, add = {}, lambda id, rows, numbers: out.update({id: dict(numbers=numbers[0], spread=numbers[1], runs=rows, **common)})
    if 'gradients' in runs: add('VAE-1', runs['gradients'], summary(runs['gradients'], ('reparam', 'score', 'score_baseline')))
    if 'beta' in runs:
        mean, spread = {}, {}
        for name, beta in BETAS.items():
            m, s = summary([r for r in runs['beta'] if r['beta'] == beta], ('rate', 'distortion', 'active'))
            mean |= {f'{k}_{name}': v for k, v in m.items()}
            spread |= {f'{k}_{name}': v for k, v in s.items()}
        add('VAE-2', runs['beta'], (mean, spread))
    if 'digits' in runs:
        add('VAE-3', runs['digits'], summary(runs['digits'], ('k1', 'k5', 'k50', 'k500')))
        mean, spread = summary(runs['digits'], ('nll', 'rate', 'active'))
        add('VAE-4', runs['digits'], (mean | dict(published=PUBLISHED), spread))
    if 'prior' in runs: add('AE-2', runs['prior'], summary(runs['prior'], ('ae_prior_fid', 'ae_gaussian_fid', 'vae_prior_fid')))
    return out


def main(args=None):
    parser = claims_common.parser(__doc__, 'one training of each kind for each')
    parser.add_argument('--only', nargs='+', choices=('gradients', 'beta', 'digits', 'prior'), help='default: all')
    parser.add_argument('--processes', type=int, help='trainings at a time; default: 8 on a GPU, else 1')
    a = parser.parse_args(args)
    level, device = budget(a.budget), default_device()
    size, wanted = SIZES[level], a.only or ('digits', 'prior', 'beta', 'gradients')     # the longest first
    processes = a.processes or (8 if device.type == 'cuda' else 1)
    with tempfile.TemporaryDirectory() as folder:
        extra = {'prior': [(extractor_for(level, folder),)] if 'prior' in wanted else [],
                 'beta': [(b,) for b in BETAS.values()], 'digits': [()], 'gradients': [()]}
        runs = run_all([(k, s, size, e) for k in wanted for s in a.seeds for e in extra[k]], processes)
    common = dict(budget=level, device=device_name(device), seeds=len(a.seeds), settings=size,
                  train=data.fashion_mnist().name, digits=data.mnist().name if 'digits' in wanted else None)
    result = collect(runs, common)
    claims_common.store(result, a.out)


if __name__ == '__main__': main()
