"""Measure claims ADM-1 … ADM-5: one choice of the network at a time, a sweep over the guidance scale, few steps, a classifier without noise

    python scripts/claims_adm.py --budget laptop --out adm.json

Writes {'ADM-1': {'numbers': …, 'budget': …, 'device': …, 'seeds': …, 'runs': [...]}, …}; the rules are in data/claims/rules.json, older
than the numbers. ADM-2, 4 and 5 sample from the shipped weights of cond_fashion and noisy_fashion_classifier; at the smoke budget both are
trained for a moment instead where they are missing. `--only ADM-3 ADM-5` measures some.
"""
import math, statistics, time
from functools import lru_cache

import claims_common
import torch
import torch.nn.functional as F

from diffcourse import adm, data, metrics, scores
from diffcourse.core import budget, default_device, generator, require, to_float, to_uint8
from diffcourse.ddim import ddim
from diffcourse.ddpm import Schedule, ancestral, loss_simple, picture_denoiser, sample
from diffcourse.exact import Mixture, exact_denoiser
from diffcourse.openai_unet import AttentionBlock, ResBlock, UNetModel
from diffcourse.train import Trainer, device_name, fixed_loss, train_recipe
from diffcourse.weights import load_weights, shipped

# what is undone → settings of the network; 'rescaled' divides every residual sum by √2 instead
CHANGES = {'all': {}, 'single_resolution': dict(attention_resolutions=(4,)), 'one_head': dict(num_head_channels=-1),
           'outside': dict(resblock_updown=False), 'added': dict(use_scale_shift_norm=False), 'rescaled': {}}
IDS = {'single_resolution': 'ADM-1', 'one_head': 'ADM-1b', 'outside': 'ADM-1c', 'added': 'ADM-1d', 'rescaled': 'ADM-1e'}
# pictures of the ablation are 28×28, or shrunk to 16×16 (a third of the work)
SETTINGS = {
    'smoke': dict(size=16, net=dict(model_channels=8, channel_mult=(1, 2, 2), groups=4), train=dict(steps=8, batch_size=8, lr=2e-3, warmup=2, ema=.5),
                  held_out=64, scales=(0., 2.), pictures=16, few=4, many=8, pictures_many=16, judges=dict(steps=8, batch_size=8, lr=2e-3, warmup=2, ema=.5),
                  judged=16, judge_scales=(2., 5.), limit=(25, 100)),
    'laptop': dict(size=16, net=dict(model_channels=8, channel_mult=(1, 3, 6), groups=4), train=dict(steps=200, batch_size=32, lr=2e-3, warmup=20, ema=.98),
                   held_out=1000, scales=(0., 1., 3., 10., 30.), pictures=150, few=25, many=250, pictures_many=80,
                   judges=dict(steps=150, batch_size=32, lr=2e-3, warmup=15, ema=.97, weight_decay=.05), judged=64,
                   judge_scales=(1., 4., 16.), limit=(25, 100, 400, 1600)),
    'gpu': dict(size=28, net=dict(model_channels=32, channel_mult=(1, 2, 4), groups=8), train=dict(steps=5000, batch_size=256, lr=1e-3, warmup=300, ema=.999),
                held_out=10_000, scales=(0., .5, 1., 2., 4., 10., 30.), pictures=2048, few=25, many=250, pictures_many=2048,
                judges=dict(steps=4000, batch_size=256, lr=1e-3, warmup=200, ema=.999, weight_decay=.05), judged=2048,
                judge_scales=(1., 4., 16.), limit=(25, 100, 400, 1600))}


# ---------------------------------------------------------------------------------------------- ADM-1: the network

@lru_cache(2)
def garments(split, size) -> data.ImageSet:
    "Fashion-MNIST at the size of the ablation"
    full = data.fashion_mnist(split)
    if size == 28: return full
    small = F.interpolate(to_float(full.images), size=(size, size), mode='bilinear', antialias=True)
    return data.ImageSet(to_uint8(small), f'{full.name}, shrunk to {size}×{size}')


def build(level, change, seed):
    "The small network with one choice undone"
    how = dict(image_size=SETTINGS[level]['size'], in_channels=1, out_channels=1, num_res_blocks=1, attention_resolutions=(2, 4), num_head_channels=8,
               use_scale_shift_norm=True, resblock_updown=True, **SETTINGS[level]['net'])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = UNetModel(**how | CHANGES[change])
    if change == 'rescaled':
        for m in net.modules():
            if isinstance(m, (ResBlock, AttentionBlock)): m.register_forward_hook(lambda m, given, out: out / 2 ** .5)
    return net


def ablation(level, seeds, device, **overrides) -> dict:
    "Every network and seed; the ratios of held-out losses with their standard errors"
    s, loss, runs = SETTINGS[level], loss_simple(picture_denoiser(None)), []
    for seed in seeds:
        for change in CHANGES:
            t = Trainer(build(level, change, seed), loss, garments('train', s['size']), seed=seed, device=device, progress=False,
                        **{**s['train'], **overrides}).fit()
            held = fixed_loss(t.ema_model().to(device), loss, garments('test', s['size']), s['held_out'])
            runs.append(dict(change=change, seed=seed, held_out=held, train=statistics.mean(t.losses[-50:]), seconds=round(t.seconds, 1),
                             parameters=sum(p.numel() for p in t.model.parameters())))
    at = {(r['change'], r['seed']): r['held_out'] for r in runs}
    out = {}
    for change, id in IDS.items():
        ratios = [at[change, k] / at['all', k] for k in seeds]
        error = statistics.stdev(ratios) / len(ratios) ** .5 if len(ratios) > 1 else 0.
        out[id] = dict(numbers={change: statistics.mean(ratios), 'error': error}, seeds=len(seeds),
                       runs=[r for r in runs if r['change'] in ('all', change)])
    return out


# ---------------------------------------------------------------------------------------------- ADM-3: the exact world

def exact(level, seeds, device) -> dict:
    "Identity at scale 1, and the gap between the forms as steps get shorter"
    centres = torch.tensor([[-.9, -.5], [-.3, .5], [.1, -.6], [.6, .3], [.9, -.4], [0., 1.]], dtype=torch.float64)
    kinds, world = torch.tensor([0, 1, 1, 2, 2, 0]), Mixture(centres, std=.3)
    line, x, error = Schedule.linear(), 1.5 * torch.randn(600, 2, generator=generator(0), dtype=torch.float64), 0.
    classify, everything = adm.exact_classifier(world, kinds, line), exact_denoiser(world, line)
    for t in (0, 5, 50, 200, 500, 999):
        for k in range(3):
            g = adm.log_prob_gradient(classify, x, torch.full((600,), t), torch.full((600,), k))
            own = exact_denoiser(adm.class_mixture(world, kinds, k), line)(x, t)
            error = max(error, float((everything(x, t) - (1 - line.alphas_cumprod[t]).sqrt() * g - own).abs().max()))

    def gap(n, points=256, scale=2.):
        s = Schedule.linear(n)
        d, judge = exact_denoiser(world, s).guided(raw=adm.label_hidden()), adm.exact_classifier(world, kinds, s)
        start, y, ends = torch.randn(points, 2, generator=generator(6), dtype=torch.float64), torch.arange(points) % 3, []
        for form in adm.FORMS:
            with torch.no_grad():
                for end in ancestral(d.guided(prediction=adm.classifier_guidance(judge, scale, form)), s.steps(), start, generator(7), y=y): pass
            ends.append(end)
        return float((ends[0] - ends[1]).square().sum(1).mean().sqrt())

    gaps = {f'gap_{n}': gap(n) for n in SETTINGS[level]['limit']}
    for n in (400, 1600): gaps.setdefault(f'gap_{n}', math.nan)     # the smoke budget stops early
    return {'ADM-3': dict(numbers=dict(identity_error=error, **gaps), seeds=1)}


# ---------------------------------------------------------------------------------------------- ADM-2, 4, 5: pictures

@lru_cache(4)
def network(name, level, device):
    "Shipped weights; at the smoke budget a few steps of training where there are none"
    recipe = getattr(adm, name)
    if shipped(name): return load_weights(name, recipe.model()).to(device)
    require(level == 'smoke', f'{name} has no shipped weights: train it first (diffcourse train {name})')
    return train_recipe(recipe, 'smoke', progress=False, device=device).ema_model().to(device)


@lru_cache(1)
def extractors(device):
    "The feature network with the statistics and some features of the training pictures, and the judge"
    real = data.fashion_mnist('train')
    f = metrics.get_extractor('fashion_classifier', device)
    return f, metrics.statistics(real, f), metrics.features(f, real.subset(slice(0, 5000))), metrics.get_extractor('fashion_judge', device)


def draw(level, device, n, steps, scale, judge=None, hide=False, seed=0):
    "Garments, classes in turn, by DDIM with the score shift"
    y = torch.arange(n, device=device) % 10
    hooks = dict(prediction=adm.classifier_guidance(judge or network('noisy_fashion_classifier', level, device), scale)) if scale else {}
    if hide: hooks['raw'] = adm.label_hidden(adm.FASHION_NULL)
    d = picture_denoiser(network('cond_fashion', level, device)).guided(**hooks)
    return sample(d, (n, 1, 28, 28), d.schedule.respaced(steps), 1000 * seed, ddim, batch_size=256, y=y).clamp(-1, 1).cpu()


def quality(pictures, device) -> dict:
    "feature-FID, feature-IS, precision, recall, and the share that the judge takes for its class"
    f, statistics_of_real, real, judge = extractors(device)
    x, n = metrics.features(f, pictures), len(pictures)
    precision, recall = scores.precision_recall(real[:n], x)
    logits = metrics.outputs(judge, pictures, ('logits',))['logits']
    return dict(fid=float(metrics.feature_fid(pictures, statistics_of_real, f, resamples=0)), precision=precision, recall=recall,
                **{'is': float(scores.inception_score(logits)[0])}, recognised=float((logits.argmax(1) == torch.arange(n) % 10).double().mean()))


def sweep(level, seeds, device) -> dict:
    "ADM-2, and at its best scale ADM-4"
    s = SETTINGS[level]
    rows = [dict(scale=c, **quality(draw(level, device, s['pictures'], s['few'], c), device)) for c in s['scales']]
    none, high, best = rows[0], rows[-1], min(rows, key=lambda r: r['fid'])
    numbers = {f'{k}_{w}': r[k] for k in ('is', 'precision', 'recall', 'fid') for w, r in (('none', none), ('high', high))}
    scale = best['scale'] or min(c for c in s['scales'] if c)
    fid = lambda n, scale: quality(draw(level, device, s['pictures_many'], n, scale), device)['fid']
    guided, unguided = {n: fid(n, scale) for n in (s['few'], s['many'])}, fid(s['many'], 0.)
    return {'ADM-2': dict(numbers=numbers | dict(fid_best=best['fid'], best_scale=best['scale']), seeds=1, sweep=rows),
            'ADM-4': dict(numbers=dict(guided_25=guided[s['few']], guided_250=guided[s['many']], unguided_250=unguided, scale=scale), seeds=1,
                          steps=[s['few'], s['many']], pictures=s['pictures_many'])}


def clean_loss(model, batch, draws):
    "Cross-entropy on pictures without noise, told t = 0"
    return F.cross_entropy(model(batch['x'], torch.zeros(len(batch['x']), device=batch['x'].device)).float(), batch['y'])


def judges(level, seeds, device) -> dict:
    "ADM-5: two classifiers, trained equally long on noised and on clean pictures, guide the null-label half"
    s, runs = SETTINGS[level], []
    for seed in seeds[:2]:
        for kind, loss in (('noisy', adm.loss_noisy_classifier(Schedule.linear())), ('clean', clean_loss)):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                net = adm.noisy_fashion_classifier.model()
            judge = Trainer(net, loss, data.fashion_mnist('train'), seed=seed, device=device, progress=False, **s['judges']).fit().ema_model().to(device)
            clear = adm.noisy_accuracy(judge, data.fashion_mnist('test'), Schedule.linear(), (0, 250, 500, 750), 500)
            rows = [dict(scale=c, **quality(draw(level, device, s['judged'], s['few'], c, judge, hide=True, seed=seed), device))
                    for c in s['judge_scales']]
            runs.append(dict(kind=kind, seed=seed, accuracy=clear, **max(rows, key=lambda r: r['recognised'])))
    mean = lambda kind, key: statistics.mean(r[key] for r in runs if r['kind'] == kind)
    return {'ADM-5': dict(numbers={f'{key}_{kind}': mean(kind, key) for key in ('recognised', 'fid') for kind in ('noisy', 'clean')},
                          seeds=len(seeds[:2]), runs=runs, pictures=s['judged'])}


PARTS = {ablation: set(IDS.values()), exact: {'ADM-3'}, sweep: {'ADM-2', 'ADM-4'}, judges: {'ADM-5'}}


def measure(level, seeds, device, only=None, **overrides) -> dict:
    "The claims asked for, each with how it was measured"
    out, s = {}, SETTINGS[level]
    for part, ids in PARTS.items():
        if only and not ids & set(only): continue
        start = time.perf_counter()
        found = part(level, seeds, device, **(overrides if part is ablation else {}))
        for id, r in found.items():
            out[id] = dict(numbers=r.pop('numbers'), budget=level, device=device_name(device), pictures=s['pictures']) | r
            out[id] |= dict(data=data.fashion_mnist('train').name, seconds=round(time.perf_counter() - start, 1))
    return out


def main(args=None):
    parser = claims_common.parser(__doc__, 'one training per network for each')
    parser.add_argument('--only', nargs='+', metavar='ID', help='measure the experiments behind these claims')
    parser.add_argument('--steps', type=int, help="training steps of the ablation, instead of the budget's")
    a = parser.parse_args(args)
    result = measure(budget(a.budget), a.seeds, default_device(), a.only, **({'steps': a.steps} if a.steps else {}))
    claims_common.store(result, a.out)


if __name__ == '__main__': main()
