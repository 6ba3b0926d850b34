"""Measure claims M-3b and M-4b: the FID Inception on CIFAR-10, test pictures against training pictures

    python scripts/claims_metrics.py --n 10000 --reference 50000 --out metrics.json     # a GPU: minutes
    python scripts/claims_metrics.py --n 2000 --reference 2000 --out metrics.json       # a CPU: about an hour of one core

Writes {'M-3b': {'numbers': …, 'budget': …, 'device': …, 'n': …, 'reference': …}, …}; the rules are in data/claims/rules.json,
older than the numbers. Needs CIFAR-10 (`diffcourse data get cifar10`) and the Inception's weights (it says where from).
"""
import argparse, io, json, time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffcourse import inception  # noqa: F401: registers the extractor
from diffcourse.core import atomic_write, budget, default_device, generator
from diffcourse.data import cifar10
from diffcourse.measure import Ticker, collect
from diffcourse.metrics import Statistics, fingerprint, frechet_distance, get_extractor
from diffcourse.train import device_name


def jpeg(images, quality=90):
    "Bytes (N, 3, H, W) through JPEG and back"
    out = []
    for p in images.permute(0, 2, 3, 1).numpy():
        Image.fromarray(p).save(file := io.BytesIO(), 'JPEG', quality=quality)
        out.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2)


def quarters(x):
    "The four quarters of every picture in another order"
    (a, b), (c, d) = (row.split(x.shape[-1] // 2, -1) for row in x.split(x.shape[-2] // 2, -2))
    return torch.cat([torch.cat([d, a], -1), torch.cat([b, c], -1)], -2)


def noisy(x):
    "Noise of 0.2 in [-1, 1], that is 25.5 grey values"
    return (x + 25.5 * torch.randn(x.shape, generator=generator(0))).round().clamp(0, 255).to(torch.uint8)


def scores(test, train, batch, device):
    "Pooled and spatial Fréchet distance of every heap, and the distance through the other resizing"
    usual, tf = (get_extractor('inception', device, resize=r) for r in ('pytorch-fid', 'torch-fidelity'))
    tick = Ticker()
    look = lambda model, x, what: collect(x, model, ('features', 'spatial'), batch=batch, sample=1,
                                          tell=lambda k, total: tick(what, k, total)).statistics
    heaps = {'whole': test, 'noise': noisy(test), 'shift': test.roll(8, -1), 'shuffle': quarters(test), 'jpeg': jpeg(test)}
    real, out = look(usual, train, 'training pictures'), {}
    for name, x in heaps.items():
        seen = look(usual, x, name)
        out[name] = {kind: frechet_distance(seen[k], real[k]) for kind, k in (('pooled', 'features'), ('spatial', 'spatial'))}
    other = look(tf, test, 'other resizing')['features']   # mixing two makes of features is the point here
    out['resize'] = {'pooled': frechet_distance(Statistics.from_moments(other.mean, other.cov, other.n), real['features'])}
    return out, fingerprint(usual)


def main(n, reference, batch, device):
    "Both claims' numbers and how they were made"
    train, test = cifar10('train').images, cifar10('test').images
    train = train[torch.randperm(len(train), generator=generator(1))[:reference]]
    test = test[torch.randperm(len(test), generator=generator(2))[:n]]
    score, eyes = scores(test, train, batch, device)
    rise = {f'{kind}_{k}': score[k][kind] - score['whole'][kind] for k in ('noise', 'shift', 'shuffle') for kind in ('pooled', 'spatial')}
    change = {name: score[k]['pooled'] - score['whole']['pooled'] for name, k in (('jpeg_90', 'jpeg'), ('resize', 'resize'))}
    about = dict(budget=budget(), device=device_name(torch.device(device)), seeds=1, n=n, reference=reference, extractor=eyes,
                 fid=score['whole']['pooled'], sfid=score['whole']['spatial'])
    return {'M-3b': dict(numbers=rise, **about), 'M-4b': dict(numbers=change, **about)}


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--n', type=int, default=2000, help='test pictures')
    parser.add_argument('--reference', type=int, default=2000, help='training pictures')
    parser.add_argument('--batch', type=int, help='pictures at a time')
    parser.add_argument('--device', help='default: the best present')
    parser.add_argument('--out', type=Path, default=Path('metrics.json'))
    a = parser.parse_args()
    start = time.time()
    found = main(a.n, a.reference, a.batch, str(default_device(a.device)))
    for r in found.values(): r['seconds'] = round(time.time() - start)
    with atomic_write(a.out) as tmp: tmp.write_text(json.dumps(found, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    print(json.dumps(found, indent=1, ensure_ascii=False))
