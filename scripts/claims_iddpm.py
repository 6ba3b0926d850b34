"""Measure claims IDDPM-1 … IDDPM-4: small networks with learned variance, on either schedule and in three widths

    python scripts/claims_iddpm.py --budget laptop --out iddpm.json

Writes {'IDDPM-1': {'numbers': …, 'budget': …, 'device': …, 'seeds': …, …}, …}; the rules are in data/claims/rules.json, older
than the numbers.
"""
import statistics
import sys
import time

import claims_common
import torch

from diffcourse import data, metrics
from diffcourse.core import Draws, budget, default_device, generator, to_float
from diffcourse.data import Batcher
from diffcourse.ddpm import (Denoiser, Schedule, ancestral, clip_x0, prior_bpd, q_sample, vlb_term)
from diffcourse.iddpm import SecondMoment, forward_flops, gradient_noise, loss_hybrid, loss_vlb_importance
from diffcourse.train import Trainer, device_name
from diffcourse.weights import shipped
from diffcourse.unet import UNet

SCHEDULES = {'linear': Schedule.linear(), 'cosine': Schedule.cosine()}
KINDS = {'learned': 'learned_range', 'small': 'fixed_small', 'large': 'fixed_large'}
# steps: of sampling for IDDPM-1 and 4; few, more and full: of IDDPM-2; bound: terms; batches: of IDDPM-3
SETTINGS = {
    'smoke': dict(widths=(4, 8, 12), train=dict(steps=20, batch_size=16, lr=2e-3, warmup=4), samples=12, steps=5, skip=(0., .2),
                  few=3, more=4, full=5, pictures=4, bound=8, history=1, batches=3, batch=8, T=40),
    'laptop': dict(widths=(4, 8, 12), train=dict(steps=400, batch_size=32, lr=2e-3, warmup=40), samples=120, steps=50,
                   skip=(0., .2, .4), few=10, more=25, full=100, pictures=32, bound=100, history=10, batches=60, batch=32, T=1000),
    'gpu': dict(widths=(16, 32, 48), train=dict(steps=4000, batch_size=256, lr=1e-3, warmup=200), samples=2000, steps=250,
                skip=(0., .05, .1, .2, .3, .4), few=25, more=50, full=1000, pictures=512, bound=1000, history=10, batches=200,
                batch=128, T=1000),
}


class Lab:
    "What every measurement shares: settings, device, judge, and a clock"
    def __init__(self, level, device):
        self.s, self.device, self.began = SETTINGS[level], device, time.perf_counter()
        name = 'fashion_classifier'
        self.extractor = name if shipped(name) else 'untrained'
        self.model = metrics.get_extractor(name, device) if shipped(name) else metrics.FashionClassifier().eval().to(device)
        self.real = data.fashion_mnist('train')
        self.reference = metrics.statistics(self.real, self.model)

    def say(self, what): print(f'{time.perf_counter() - self.began:6.0f} s  {what}', file=sys.stderr, flush=True)

    def train(self, schedule, channels, seed, steps=None):
        "One network with the hybrid loss; its averaged weights"
        how = self.s['train'] | ({'steps': steps} if steps else {})
        trainer = Trainer(build(channels, seed), loss_hybrid(Denoiser(None, schedule, 'eps', 'learned_range')), self.real, seed=seed,
                          device=self.device, progress=False, **how).fit()
        self.say(f'trained {channels} channels, {trainer.step} steps, {trainer.settings.batch_size * trainer.step / trainer.seconds:.0f} images/s')
        return trainer.ema_model().to(self.device)

    @torch.no_grad()
    def fid(self, net, schedule, path, kind='learned', seed=0):
        "Feature-FID of samples along a path"
        d, done, n = denoiser(net, schedule, kind), [], self.s['samples']
        for i in range(0, n, 500 if self.device.type == 'cuda' else 50):
            k = min(n - i, 500 if self.device.type == 'cuda' else 50)
            gen = generator(1000 * seed + i, self.device)
            for x in ancestral(d, path, torch.randn(k, 1, 28, 28, generator=gen, device=self.device), gen): pass
            done.append(x)
        pictures = torch.cat(done)
        if not bool(pictures.isfinite().all()): return float('inf')
        return float(metrics.feature_fid(pictures.clamp(-1, 1), self.reference, self.model, resamples=0))


def build(channels, seed):
    "A U-Net with two output channels"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet(1, out_channels=2, channels=channels, multipliers=(1, 3, 6), blocks=1, attention_resolutions=(7,),
                    image_size=28, groups=4)


def denoiser(net, schedule, kind):
    "With the learned variance, or with a fixed one in its place"
    if kind == 'learned': return Denoiser(net, schedule, 'eps', KINDS[kind]).guided(x0=clip_x0)
    return Denoiser(lambda x, t: net(x, t)[:, :1], schedule, 'eps', KINDS[kind]).guided(x0=clip_x0)


def skipping(schedule, steps, share):
    "An even path whose noisiest levels, from (1 − share)·T on, are left out"
    t = schedule.respaced(steps).table.t
    return schedule.steps(t[t < (1 - share) * schedule.T].tolist())


@torch.no_grad()
def bounds(lab, net, schedule) -> dict:
    "Bits per dimension with each variance, from the same passes"
    x0 = to_float(data.fashion_mnist('test').images[:lab.s['pictures']]).to(lab.device)
    path, gen, total = schedule.respaced(lab.s['bound']), generator(5, lab.device), dict.fromkeys(KINDS, 0.)
    for step in path:
        x = q_sample(x0, step.ᾱ, torch.randn(x0.shape, generator=gen, device=lab.device))
        raw = net(x, step.t.to(lab.device).expand(len(x)))
        for kind, variance in KINDS.items():
            p = Denoiser(None, schedule, 'eps', variance).predict(raw if kind == 'learned' else raw[:, :1], x, step, clip_x0)
            total[kind] += float(vlb_term(p, x0, x, step).mean())
    prior = float(prior_bpd(x0, Schedule(path.table.β)).mean())
    return {k: v + prior for k, v in total.items()}


def noises(lab, net, seed) -> dict:
    """Gradient noise of the bound with importance-sampled and with uniform timesteps

    Both estimate the same gradient. With uniform timesteps a few rare draws decide its mean, so that sixty batches do not measure
    the mean's length; the importance-sampled batches do, and their length serves for both.
    """
    s, d = lab.s, Denoiser(None, Schedule.cosine(lab.s['T']), 'eps', 'learned_range')
    batcher, out = Batcher(lab.real, s['batch'], seed, lab.device), {}
    batches = [batcher(i) for i in range(s['batches'])]
    length = None
    for name in ('importance', 'uniform'):
        times = SecondMoment(s['T'], s['history'], uniform=1. if name == 'uniform' else .001).to(lab.device)
        loss = loss_vlb_importance(d, times)
        if name == 'importance': fill(times, loss, net, batcher, lab)
        out[name], losses, length = gradient_noise(net.train(), loss, batches, seed, length)
        out[f'{name}_loss_std'] = statistics.stdev(losses)
    return out


class EveryTime(Draws):
    "Draws whose timesteps are given: to fill the histories"
    def __init__(self, t, seed, T, device):
        super().__init__(seed, 0, device)
        self.t, self.T = t, T

    def uniform(self, *shape): return ((self.t + .5) / self.T).double()


@torch.no_grad()
def fill(times, loss, net, batcher, lab):
    "Show the sampler every timestep as often as its history is long"
    T, size = len(times.counts), lab.s['batch']
    t = torch.arange(T, device=lab.device).repeat(lab.s['history'])
    for i, part in enumerate(t.split(size)):
        batch = {k: v[:len(part)] for k, v in batcher(10_000 + i).items()}
        loss(net, batch, EveryTime(part, i, T, lab.device))
    assert times.warm
    lab.say('histories are full')


def of_schedules(lab, seeds):
    "IDDPM-1, 2 and 3: the middle width on both schedules"
    s, skip, table, bpd, noise = lab.s, {k: [] for k in SCHEDULES}, {k: {} for k in KINDS}, [], []
    for seed in seeds:
        for name, schedule in SCHEDULES.items():
            net = lab.train(schedule, s['widths'][1], seed)
            skip[name].append([lab.fid(net, schedule, skipping(schedule, s['steps'], share), seed=seed) for share in s['skip']])
            lab.say(f'IDDPM-1 {name}')
        bpd.append(bounds(lab, net, schedule))                          # the last one is cosine
        for kind in KINDS:
            for n in (s['few'], s['more']): table[kind].setdefault(n, []).append(lab.fid(net, schedule, schedule.respaced(n), kind, seed))
        for kind in ('learned', 'small'):
            table[kind].setdefault(s['full'], []).append(lab.fid(net, schedule, schedule.respaced(s['full']), kind, seed))
        lab.say('IDDPM-2')
        noise.append(noises(lab, net, seed))
        lab.say('IDDPM-3')
        if seed == seeds[0]: lab.middle = net.eval()
    return skip, table, bpd, noise


def of_widths(lab):
    "IDDPM-4: equal steps, and equal compute (that of the narrowest)"
    s, schedule, rows = lab.s, SCHEDULES['cosine'], []
    flops = {c: forward_flops(build(c, 0), (1, 28, 28)) for c in s['widths']}
    path, steps, narrow = schedule.respaced(s['steps']), s['train']['steps'], s['widths'][0]
    for c in s['widths']:
        net = lab.middle if c == s['widths'][1] else lab.train(schedule, c, 0)
        full = lab.fid(net, schedule, path)
        equal = full if c == narrow else lab.fid(lab.train(schedule, c, 0, max(1, round(steps * flops[narrow] / flops[c]))), schedule, path)
        rows.append(dict(channels=c, parameters=sum(p.numel() for p in net.parameters()), mflops=flops[c] / 1e6,
                         petaflops=3 * flops[c] * steps * s['train']['batch_size'] / 1e15, fid=full, fid_equal_compute=equal))
    lab.say('IDDPM-4')
    return rows


def measure(level, seeds, device) -> dict:
    "All claims: numbers, and the tables they rest on"
    lab, mean = Lab(level, device), statistics.mean
    s = lab.s
    skip, table, bpd, noise = of_schedules(lab, seeds)
    rows = of_widths(lab)
    at = lambda name, share: mean(run[s['skip'].index(share)] for run in skip[name])
    few = {f'fid_{k}_few': mean(table[k][s['few']]) for k in KINDS}
    full = {f'fid_{k}_full': mean(table[k][s['full']]) for k in ('learned', 'small')}
    numbers = {
        'IDDPM-1': {f'{n}_{int(100 * share)}': at(n, share) for n in SCHEDULES for share in (0., .2)},
        'IDDPM-2': {f'bpd_{k}': mean(b[k] for b in bpd) for k in KINDS} | few | full,
        'IDDPM-3': {f'noise_{k}': mean(n[k] for n in noise) for k in ('uniform', 'importance')},
        'IDDPM-4': {f'fid_{k}': r['fid'] for k, r in zip(('narrow', 'middle', 'wide'), rows)}}
    more = {'IDDPM-1': dict(curves={n: dict(skip=list(s['skip']), fid=[at(n, v) for v in s['skip']]) for n in SCHEDULES}),
            'IDDPM-2': dict(fid={KINDS[k]: {str(n): v for n, v in by.items()} for k, by in table.items()}, bpd=bpd),
            'IDDPM-3': dict(runs=noise), 'IDDPM-4': dict(table=rows)}
    common = dict(budget=level, device=device_name(device), seeds=len(seeds), samples=s['samples'], pictures=s['pictures'],
                  settings={**s['train'], 'channels': s['widths'][1]}, data=lab.real.name, extractor=lab.extractor,
                  seconds=round(time.perf_counter() - lab.began, 1))
    return {id: {'numbers': n, **common, **more[id]} | ({'seeds': 1} if id == 'IDDPM-4' else {}) for id, n in numbers.items()}


def main(args=None):
    parser = claims_common.parser(__doc__, 'one pair of trainings for each', (0, 1))
    a = parser.parse_args(args)
    result = measure(budget(a.budget), tuple(a.seeds), default_device())
    claims_common.store(result, a.out)


if __name__ == '__main__': main()
