"""Measure claims DDPM-3 … DDPM-7: small networks trained in five ways, three seeds each

    python scripts/claims_ddpm.py --budget gpu --out ddpm.json

Writes {'DDPM-3': {'numbers': …, 'budget': …, 'device': …, 'seeds': …, 'runs': [...]}, …}; the rules are in
data/claims/rules.json, older than the numbers. On a GPU several networks train at once, one process each (--workers).
"""
import math, statistics, time
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context

import claims_common
import torch
import torch.nn.functional as F
from torch import nn

from diffcourse import data, metrics
from diffcourse.core import budget, default_device, generator, to_float, to_uint8
from diffcourse.ddpm import (Denoiser, Schedule, ancestral, bits_per_dim, clip_x0, loss_simple, loss_vlb,
                             sample)
from diffcourse.train import Trainer, device_name, shipped
from diffcourse.unet import UNet

# way of training → (parameterisation, loss, does the network see t?)
WAYS = {'eps_simple': ('eps', loss_simple, True), 'eps_bound': ('eps', loss_vlb, True),
        'mu_mse': ('previous_x', loss_simple, True), 'mu_bound': ('previous_x', loss_vlb, True),
        'eps_without_t': ('eps', loss_simple, False)}
BANDS = {'low': (1, 2), 'mid': (3, 6), 'high': (7, 14)}  # cycles per picture
# pictures of 28×28, or shrunk to 16×16 (a third of the work; enlarged again for the extractor, real ones alike)
# samples in so many sampling steps score a way of training; test pictures in so many terms give the bound; DDPM-4, 5 and 7
# draw pictures in few steps and in full
SETTINGS = {
    'smoke': dict(size=16, net=dict(channels=16, multipliers=(1, 2)), train=dict(steps=20, batch_size=16, lr=2e-3, warmup=4),
                  samples=48, sampling=10, likelihood=8, bound=20, pictures=24, few=(4, 10), full=20),
    'laptop': dict(size=16, net=dict(channels=8, multipliers=(1, 3, 6)), train=dict(steps=450, batch_size=32, lr=2e-3, warmup=50),
                   samples=256, sampling=50, likelihood=32, bound=200, pictures=64, few=(10, 30, 100), full=1000),
    'gpu': dict(size=28, net=dict(channels=32, multipliers=(1, 2, 2)), train=dict(steps=2500, batch_size=512, lr=1.5e-3, warmup=150),
                samples=2048, sampling=1000, likelihood=256, bound=1000, pictures=2048, few=(10, 20, 50, 100), full=1000),
}


class WithoutTime(nn.Module):
    "A network that is always told t = 0"
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t): return self.net(x, torch.zeros_like(t))


def build(level, seed, sees_t) -> nn.Module:
    "One network of the ablation"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        size = SETTINGS[level]['size']
        net = UNet(1, blocks=1, attention_resolutions=(size // 4,), image_size=size, groups=8, **SETTINGS[level]['net'])
    return net if sees_t else WithoutTime(net)


def resized(x, size):
    "Floats in [-1, 1], bilinear with antialiasing"
    return x if x.shape[-1] == size else F.interpolate(x, size=(size, size), mode='bilinear', antialias=True).clamp(-1, 1)


@lru_cache(2)
def garments(split, size) -> data.ImageSet:
    "Fashion-MNIST at the size of the experiment"
    full = data.fashion_mnist(split)
    if size == 28: return full
    return data.ImageSet(to_uint8(resized(to_float(full.images), size)), f'{full.name}, shrunk to {size}×{size}')


@lru_cache(1)
def judge(device, size):
    "Extractor and the statistics of the real pictures; an untrained extractor where none is shipped"
    name = 'fashion_classifier'
    model = metrics.get_extractor(name, device) if shipped(name) else metrics.FashionClassifier().eval().to(device)
    return model, metrics.statistics(resized(to_float(garments('train', size).images), 28), model)


def fid(denoiser, steps, n, s, device, seed=0) -> float:
    "Feature-FID of `n` samples drawn in `steps` steps"
    pictures = sample(denoiser, (n, 1, s['size'], s['size']), denoiser.schedule.steps(steps), seed, batch_size=2048)
    if not torch.isfinite(pictures).all(): return math.inf
    model, reference = judge(device, s['size'])
    return float(metrics.feature_fid(resized(pictures.clamp(-1, 1), 28), reference, model, resamples=0))


def nats(denoiser, s, device) -> float:
    "Upper bound on test bits per dimension"
    x = to_float(garments('test', s['size']).images[:s['likelihood']]).to(device)
    denoiser = Denoiser(denoiser.net, denoiser.schedule, denoiser.parameterization, denoiser.variance)
    return float(bits_per_dim(denoiser, x, denoiser.schedule.steps(s['bound']))['total'].mean())


@torch.no_grad()
def coherence(denoiser, s, device, n=256) -> dict:
    "How well the early guess at x0 agrees with the final picture, band by band, over t"
    path, gen = denoiser.schedule.steps(min(s['full'], 250)), generator(77, device)
    x, guesses = torch.randn(min(n, s['pictures']), 1, s['size'], s['size'], generator=gen, device=device), []
    told = [int(step.t) for step in path]
    def keep(p, x, step, cond):
        guesses.append(p.x0)
        return p
    for x in ancestral(denoiser.guided(prediction=keep), path, x, gen): pass
    spectrum = lambda p: torch.fft.fft2((p - p.mean(0)).squeeze(1).double())
    final, k = spectrum(x), torch.fft.fftfreq(s['size'], 1 / s['size'], device=device)
    radius, out = (k[:, None] ** 2 + k[None] ** 2).sqrt(), {'t': told}
    for band, (low, high) in BANDS.items():
        inside = (radius >= low - .5) & (radius < high + .5)
        pick = lambda f: f[:, inside]
        agree = lambda f: float((pick(f) * pick(final).conj()).real.sum() / (pick(f).norm() * pick(final).norm() + 1e-12))
        out[band] = [round(agree(spectrum(g)), 4) for g in guesses]
    return out


def crossing(t, values, level=.5) -> float:
    "The noisiest t from which agreement stays above `level`, counted from the data's side"
    for time_now, v in zip(reversed(t), reversed(values)):
        if v < level: return float(time_now)
    return float(t[0])


def run(job) -> dict:
    "Train one network one way and measure it"
    level, way, seed, device, overrides = job
    s, (parameterization, loss, sees_t), device = SETTINGS[level], WAYS[way], torch.device(device)
    start, schedule = time.perf_counter(), Schedule.linear()
    how = {**s['train'], **overrides}
    make = lambda net, variance='fixed_large': Denoiser(net, schedule, parameterization, variance).guided(x0=clip_x0)
    trainer = Trainer(build(level, seed, sees_t), loss(Denoiser(None, schedule, parameterization, 'fixed_large')),
                      garments('train', s['size']), seed=seed, device=device, progress=False, **how).fit()
    net = trainer.ema_model().to(device)
    out = {'way': way, 'seed': seed, 'loss': statistics.mean(trainer.losses[-100:]), 'train_seconds': round(trainer.seconds, 2)}
    out['fid'] = fid(make(net), s['sampling'], s['samples'], s, device, seed=1000 * seed)
    if sees_t: out['bpd'] = nats(make(net), s, device)
    if way == 'eps_simple': out |= extras(make, net, s, device, seed, trainer)
    return out | {'seconds': round(time.perf_counter() - start, 2)}


def extras(make, net, s, device, seed, trainer) -> dict:
    "What only the paper's own way of training is measured for: variances, order of detail, cost"
    kinds = {'small': make(net, 'fixed_small'), 'large': make(net, 'fixed_large')}
    curve = {k: {n: fid(d, n, s['pictures'], s, device, seed=1000 * seed + 7) for n in (*s['few'], s['full'])}
             for k, d in kinds.items()}
    synchronise = torch.cuda.synchronize if device.type == 'cuda' else (lambda: None)
    n, start, steps = min(512, s['pictures']), time.perf_counter(), min(50, s['full'])
    sample(kinds['large'], (n, 1, s['size'], s['size']), kinds['large'].schedule.steps(steps))
    synchronise()
    seconds = (time.perf_counter() - start) / n * (1000 / steps)  # every step costs the same
    per_image = trainer.seconds / (trainer.step * trainer.settings.batch_size)
    return {'variance': curve, 'coherence': coherence(kinds['large'], s, device), 'sample_seconds': seconds,
            'train_seconds_per_image': per_image}


def vae_seconds(device, n=512) -> float:
    "Seconds for one picture from the VAE of chapter 04"
    from diffcourse import vae  # noqa: F401  (registers its recipes)
    from diffcourse.train import RECIPES
    recipe = next(r for name, r in RECIPES.items() if name.startswith('vae') and r.sample)
    model = recipe.model().eval().to(device)
    recipe.sample(model, n, 0)
    start = time.perf_counter()
    pictures = recipe.sample(model, n, 1)
    pictures.cpu()
    return (time.perf_counter() - start) / n


def numbers(runs, s, vae) -> dict:
    "From runs to the numbers that the rules name"
    of = lambda way, key: [r[key] for r in runs if r['way'] == way and key in r]
    mean, deviation = statistics.mean, lambda v: statistics.stdev(v) if len(v) > 1 else 0.
    fids = {w: mean(of(w, 'fid')) for w in WAYS}
    base = [r for r in runs if r['way'] == 'eps_simple']
    at = lambda kind, n: [r['variance'][kind][n] for r in base]
    gap = lambda n: abs(mean(at('large', n)) - mean(at('small', n)))
    full, few = s['full'], s['few'][0]
    cross = {b: mean(crossing(r['coherence']['t'], r['coherence'][b]) for r in base) for b in BANDS}
    return {
        'DDPM-3': dict(fid_eps_simple=fids['eps_simple'], fid_eps_bound=fids['eps_bound'], fid_mu_bound=fids['mu_bound'],
                       fid_mu_mse=fids['mu_mse'], bpd_eps_simple=mean(of('eps_simple', 'bpd')),
                       bpd_eps_bound=mean(of('eps_bound', 'bpd'))),
        'DDPM-3b': dict(fid_mu_bound=fids['mu_bound'], fid_eps_bound=fids['eps_bound']),
        'DDPM-3c': dict(fid_mu_mse=fids['mu_mse'], fid_eps_simple=fids['eps_simple']),
        'DDPM-4': dict(gap_1000=gap(full), gap_10=gap(few), fid_1000=min(mean(at(k, full)) for k in ('small', 'large')),
                       spread=max(deviation(at(k, full)) for k in ('small', 'large'))),
        'DDPM-5': {f't_{b}': cross[b] for b in BANDS},
        'DDPM-6': dict(fid_with=fids['eps_simple'], fid_without=fids['eps_without_t']),
        'DDPM-7': dict(sample_passes=1000, train_passes=1, sample_seconds=min(r['sample_seconds'] for r in base),
                       vae_seconds=vae, train_seconds=min(r['train_seconds_per_image'] for r in base)),
    }


def measure(level, seeds, workers, device, **overrides) -> dict:
    "All ways and seeds, the numbers, and under each claim the runs it rests on"
    jobs, s = [(level, way, seed, str(device), overrides) for seed in seeds for way in WAYS], SETTINGS[level]
    start = time.perf_counter()
    if workers > 1:
        with ProcessPoolExecutor(workers, get_context('spawn')) as pool: runs = list(pool.map(run, jobs))
    else: runs = [run(job) for job in jobs]
    common = {'budget': level, 'device': device_name(torch.device(device)), 'seeds': len(seeds), 'samples': s['samples'],
              'settings': {**s['train'], **s['net'], **overrides}, 'data': garments('train', s['size']).name,
              'steps': s['sampling'], 'pictures': s['pictures'], 'full': s['full'], 'extractor': 'fashion_classifier' if shipped('fashion_classifier') else 'untrained'}
    common['seconds'] = round(time.perf_counter() - start, 1)
    slim = lambda r, keys: {k: r[k] for k in keys if k in r}
    keys = {'DDPM-3': ('fid', 'bpd', 'loss', 'train_seconds'), 'DDPM-4': ('variance',), 'DDPM-5': ('coherence',),
            'DDPM-7': ('sample_seconds', 'train_seconds_per_image')}
    only = lambda id: [r for r in runs if r['way'] == 'eps_simple'] if id in ('DDPM-4', 'DDPM-5', 'DDPM-7') else runs
    return {id: {'numbers': n, **common, 'runs': [slim(r, ('way', 'seed', *keys.get(id, ('fid',)))) for r in only(id)]}
            for id, n in numbers(runs, s, vae_seconds(device)).items()}


def main(args=None):
    parser = claims_common.parser(__doc__, 'one training per way for each')
    parser.add_argument('--workers', type=int, help='processes at once; default 4 on a GPU, else 1')
    parser.add_argument('--steps', type=int, help="training steps, instead of the budget's")
    a = parser.parse_args(args)
    device = default_device()
    result = measure(budget(a.budget), a.seeds, a.workers or (4 if device.type == 'cuda' else 1), device,
                     **({'steps': a.steps} if a.steps else {}))
    claims_common.store(result, a.out)


if __name__ == '__main__': main()
