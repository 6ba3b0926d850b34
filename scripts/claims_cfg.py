"""Measure claims CFG-1 … CFG-3: a sweep over the scale beside ADM's classifier guidance, the share of dropped labels, the cost of a guided step

    python scripts/claims_cfg.py --budget laptop --out cfg.json

Writes {'CFG-1': {'numbers': …, 'budget': …, 'device': …, 'seeds': …, …}, …}; the rules are in data/claims/rules.json, older than the
numbers. CFG-1 and CFG-3 sample from the shipped weights of cond_fashion and noisy_fashion_classifier; at the smoke budget both are trained
for a moment instead where they are missing. `--only CFG-2` measures some.
"""
import math, statistics, time

import claims_adm
import claims_common
import torch
import torch.nn.functional as F

from diffcourse import data
from diffcourse.adm import FASHION_NULL, loss_dropping
from diffcourse.cfg import classifier_free
from diffcourse.core import budget, default_device
from diffcourse.ddim import ddim
from diffcourse.ddpm import loss_simple, picture_denoiser, sample
from diffcourse.openai_unet import UNetModel
from diffcourse.train import Trainer, device_name

# scales: s = 1 + w; adm: the classifier's, where 0 means no guidance; equal: (steps, scales) at equal passes, CFG first
SETTINGS = {
    'smoke': dict(pictures=12, steps=2, scales=(1., 3.), adm=(0., 2.), cfg_equal=(1, (2.,)), adm_equal=(2, (1.,)), p=(.1, .2, .5), timed=3,
                  net=dict(model_channels=8, channel_mult=(1, 2), groups=4), train=dict(steps=4, batch_size=8, lr=2e-3, warmup=1, ema=.5), swept=(1., 3.)),
    'laptop': dict(pictures=200, steps=25, scales=(1., 1.5, 2., 3., 5., 10.), adm=(0., 1., 3., 10., 30.), cfg_equal=(12, (1.5, 2., 3.)),
                   adm_equal=(24, (1., 3.)), p=(.1, .2, .5), timed=9, net=dict(model_channels=8, channel_mult=(1, 2, 4), groups=4),
                   train=dict(steps=500, batch_size=32, lr=2e-3, warmup=50, ema=.99), swept=(1., 1.5, 2., 3., 5., 8.)),
    'gpu': dict(pictures=5000, steps=25, scales=(1., 1.25, 1.5, 2., 3., 5., 10.), adm=(0., .5, 1., 3., 10., 30.), cfg_equal=(12, (1.25, 1.5, 2., 3.)),
                adm_equal=(24, (.5, 1., 3.)), p=(.1, .2, .5), timed=21, net=dict(model_channels=32, channel_mult=(1, 2, 4), groups=8),
                train=dict(steps=10_000, batch_size=256, lr=1e-3, warmup=300, ema=.999), swept=(1., 1.25, 1.5, 2., 3., 5., 8.)),
}


def draw(net, n, size, steps, scale, seed=0):
    "Garments, classes in turn, from ADM's starts; DDIM, guided by the network's own null label"
    device = next(net.parameters()).device
    d = picture_denoiser(net).guided(raw=classifier_free(scale, y=FASHION_NULL))
    y = torch.arange(n, device=device) % 10
    return sample(d, (n, 1, size, size), d.schedule.respaced(steps), 1000 * seed, ddim, batch_size=256, y=y).clamp(-1, 1).cpu()


def tradeoff(level, seeds, device) -> dict:
    "CFG-1: both kinds of guidance over their scales, from the same starts"
    s = SETTINGS[level]
    net, n = claims_adm.network('cond_fashion', level, device), s['pictures']
    rows = [dict(scale=c, **claims_adm.quality(draw(net, n, 28, s['steps'], c), device)) for c in s['scales']]
    adm = [{**(claims_adm.quality(claims_adm.draw(level, device, n, s['steps'], c), device) if c else rows[0]), 'scale': c} for c in s['adm']]
    none, high, best = rows[0], rows[-1], min(rows, key=lambda r: r['fid'])
    numbers = {f'{k}_{w}': r[k] for k in ('is', 'precision', 'recall', 'fid') for w, r in (('none', none), ('high', high))}
    return {'CFG-1': dict(numbers=numbers | dict(fid_best=best['fid'], best_scale=best['scale']), seeds=1, sweep=rows, adm=adm)}


def frontier(curve, levels) -> float:
    "Mean over levels of IS of the logarithm of the lowest FID on the curve at that level or above"
    points = []
    for a, b in zip(curve, curve[1:]):
        points += [(a['is'] + w * (b['is'] - a['is']), a['fid'] + w * (b['fid'] - a['fid'])) for w in torch.linspace(0, 1, 201, dtype=torch.float64).tolist()]
    return statistics.mean(math.log(min(fid for score, fid in points if score >= l)) for l in levels)


def compare(curves) -> dict:
    "p → frontier number, on the range of IS that all curves reach"
    low = max(min(r['is'] for r in c) for c in curves.values())
    high = min(max(r['is'] for r in c) for c in curves.values())
    if low > high: low = high                             # they share no range: compare at the top of the lowest
    levels = torch.linspace(low, high - 1e-9 * abs(high), 20, dtype=torch.float64).tolist()
    return {p: frontier(c, levels) for p, c in curves.items()}


def dropping(level, seeds, device) -> dict:
    "CFG-2: networks that differ in p_uncond"
    s, runs, by_seed = SETTINGS[level], [], []
    pictures = claims_adm.garments('train', 16)
    pictures = data.ImageSet(pictures.images, pictures.name, data.fashion_mnist('train').labels)
    for seed in seeds:
        curves = {}
        for p in s['p']:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                net = UNetModel(image_size=16, in_channels=1, out_channels=1, num_res_blocks=1, attention_resolutions=(4,), num_head_channels=8,
                                num_classes=FASHION_NULL + 1, use_scale_shift_norm=True, conv_resample=False, **s['net'])
            loss = loss_dropping(loss_simple(picture_denoiser(None), cond=('y',)), FASHION_NULL, p)
            t = Trainer(net, loss, pictures, seed=seed, device=device, progress=False, **s['train']).fit()
            net = t.ema_model().to(device)
            enlarged = lambda x: F.interpolate(x, size=(28, 28), mode='bilinear').clamp(-1, 1)
            curves[p] = [dict(scale=c, **claims_adm.quality(enlarged(draw(net, s['pictures'], 16, s['steps'], c, seed)), device)) for c in s['swept']]
            runs.append(dict(p=p, seed=seed, loss=statistics.mean(t.losses[-50:]), seconds=round(t.seconds, 1), sweep=curves[p]))
        by_seed.append(compare(curves))
    a, b, c = s['p']
    worse, differ = ([f[c] - (f[a] + f[b]) / 2 for f in by_seed], [f[b] - f[a] for f in by_seed])
    error = statistics.stdev(worse) / len(worse) ** .5 if len(worse) > 1 else 0.
    return {'CFG-2': dict(numbers=dict(worse_50=statistics.mean(worse), error_50=error, differ_20=statistics.mean(differ)), seeds=len(seeds),
                          frontiers=[{str(p): round(v, 4) for p, v in f.items()} for f in by_seed], runs=runs)}


def price(level, seeds, device) -> dict:
    "CFG-3: pictures, calls and seconds of a guided step; both kinds of guidance at equal passes"
    s = SETTINGS[level]
    net, n, seen = claims_adm.network('cond_fashion', level, device), s['pictures'], []
    step, x, y = picture_denoiser(net).schedule.steps()[400], torch.randn(32, 1, 28, 28, device=device), torch.arange(32, device=device) % 10

    def once(scale):
        d = picture_denoiser(net).guided(raw=classifier_free(scale, y=FASHION_NULL))
        start = time.perf_counter()
        with torch.no_grad(): d.denoise(x, step, y=y)
        if device.type == 'cuda': torch.cuda.synchronize()
        return time.perf_counter() - start

    times = [(once(1.), once(3.)) for _ in range(s['timed'] + 1)][1:]
    handle = net.register_forward_pre_hook(lambda m, given: seen.append(len(given[0])))
    for scale in (1., 3.): once(scale)
    handle.remove()
    plain, free = seen if len(seen) == 2 else (seen[0], sum(seen[1:]))
    best = lambda rows: min(r['fid'] for r in rows)
    steps, scales = s['cfg_equal']
    ours = [dict(scale=c, **claims_adm.quality(draw(net, n, 28, steps, c), device)) for c in scales]
    adm_steps, adm_scales = s['adm_equal']
    adm = [dict(scale=c, **claims_adm.quality(claims_adm.draw(level, device, n, adm_steps, c), device)) for c in adm_scales]
    numbers = dict(items_ratio=free / plain, calls_ratio=float(len(seen) - 1), seconds_ratio=statistics.median(t[1] for t in times) /
                   statistics.median(t[0] for t in times), cfg_equal=best(ours), adm_equal=best(adm))
    return {'CFG-3': dict(numbers=numbers, seeds=1, cfg=ours, adm=adm, steps=[steps, adm_steps])}


PARTS = {tradeoff: 'CFG-1', price: 'CFG-3', dropping: 'CFG-2'}


def measure(level, seeds, device, only=None) -> dict:
    "The claims asked for, each with how it was measured"
    out = {}
    for part, id in PARTS.items():
        if only and id not in only: continue
        start = time.perf_counter()
        r = part(level, seeds, device)[id]
        out[id] = dict(numbers=r.pop('numbers'), budget=level, device=device_name(device), **r, data=data.fashion_mnist('train').name,
                       pictures=SETTINGS[level]['pictures'], seconds=round(time.perf_counter() - start, 1))
    return out


def main(args=None):
    parser = claims_common.parser(__doc__, 'one training per p_uncond for each')
    parser.add_argument('--only', nargs='+', metavar='ID', help='measure these claims')
    a = parser.parse_args(args)
    result = measure(budget(a.budget), a.seeds, default_device(), a.only)
    claims_common.store(result, a.out)


if __name__ == '__main__': main()
