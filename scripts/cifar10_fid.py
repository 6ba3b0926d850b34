"""FID of CIFAR-10 samples with the FID's Inception, beside the same number for real pictures, into data/measured/cifar10.json

    python scripts/cifar10_fid.py SAMPLES.npy --card cfg_cifar10.json [--n 2000] [--cache DIR] [--out FILE]

SAMPLES.npy holds bytes (N, 3, 32, 32). The reference are the first n training pictures; the first n test pictures against
the same reference say how much of the number is the small n. About 0.2 s of one CPU core for each picture not in the cache.
"""
import argparse
import json
from pathlib import Path

import inception_numbers as numbers
import numpy as np
import torch

from diffcourse import metrics
from diffcourse.core import atomic_write, image_grid, to_float
from diffcourse.metrics import outputs
from diffcourse.train import device_name, read_tensors, write_tensors


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('samples', type=Path)
    parser.add_argument('--card', type=Path, required=True)
    parser.add_argument('--n', type=int, default=2000)
    parser.add_argument('--scale', type=float, default=1.5)
    parser.add_argument('--steps', type=int, default=50)
    parser.add_argument('--cache', type=Path)
    parser.add_argument('--picture', type=Path, help='a PNG of the first forty samples')
    parser.add_argument('--out', type=Path, default=numbers.ROOT / 'data/measured/cifar10.json')
    a = parser.parse_args()
    if a.picture:
        from PIL import Image
        grid = image_grid(to_float(torch.from_numpy(np.load(a.samples)[:40])), 20)
        Image.fromarray(grid).save(a.picture, optimize=True)
    net = metrics.get_extractor('inception', 'cpu')
    x, parts = torch.from_numpy(np.load(a.samples)[:a.n]), []
    for i in range(0, len(x), 100):
        path = a.cache / f'drawn-{i}.safetensors' if a.cache else None
        if path is None or not path.exists():
            part = outputs(net, x[i:i + 100], ('features',))
            if path: write_tensors(path, part, {})
            print(i, flush=True)
        parts.append((read_tensors(path)[0] if path else part)['features'])
    drawn = torch.cat(parts)
    test, train = (numbers.walked(net, s, a.n, a.cache)['features'] for s in ('test', 'train'))
    card, rows = json.loads(a.card.read_text()), {}
    for name, f in (('drawn', drawn), ('test', test)):
        value, low, high, bias = numbers.with_interval(f, train)
        rows[name] = dict(fid=round(value, 2), low=round(low, 2), high=round(high, 2), bias=round(bias, 1))
    keep = ('device', 'seconds', 'steps', 'images_per_second', 'parameters', 'loss', 'bf16', 'beside')
    out = dict(rows, n=a.n, reference=f'first {a.n} training pictures', scale=a.scale, ddim_steps=a.steps,
               images_seen=card['steps'] * card['settings']['batch_size'], training={k: card.get(k) for k in keep},
               scored_on=device_name(torch.device('cpu')))
    with atomic_write(a.out) as tmp: tmp.write_text(json.dumps(out, indent=1) + '\n')
    print(json.dumps(rows))


if __name__ == '__main__': main()
