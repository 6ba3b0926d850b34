"""Draw from a trained cfg_cifar10 at several scales and score with the FID's Inception, into data/measured/cifar10.json

    python scripts/cifar10_fid.py --real DIR                           # features of the real pictures, once
    python scripts/cifar10_fid.py cfg_cifar10.safetensors --real DIR [--scales 1 1.3 1.6 2] [--few 5000] [--n 10000 50000]

The first `few` samples of each scale choose the scale; the chosen one is scored at every N of `--n`. The reference are
all 50,000 training pictures; the test pictures against the same reference say what a perfect model of this N would get.
On a GPU about a minute for each 25,000 samples; on a CPU 0.2 s of one core for each picture that Inception sees.
"""
import argparse
import json
import time
from pathlib import Path

import torch

from diffcourse import data, inception, metrics, zoo  # noqa: F401 (inception registers the extractor)
from diffcourse.core import atomic_write, default_device, image_grid
from diffcourse.metrics import Statistics, frechet_distance, outputs
from diffcourse.train import device_name, find_recipe, read_tensors, write_tensors

ROOT = Path(__file__).resolve().parent.parent


def of(x) -> Statistics: return Statistics().update(x)


def real(split: str, folder: Path, net, limit: int | None) -> torch.Tensor:
    "Features of the real pictures, kept in the folder"
    path = folder / f'{split}.safetensors'
    if not path.exists():
        images = data.cifar10(split, full=True).images[:limit]
        write_tensors(path, dict(outputs(net, images, batch=500), n=torch.tensor(len(images))), {})
    return read_tensors(path)[0]['features']


def drawn(model, n: int, seed: int, scale: float, steps: int) -> torch.Tensor:
    "Samples as bytes, the classes in turn"
    recipe, parts = find_recipe('cfg_cifar10'), []
    for k in range(0, n, 2500):
        x = recipe.sample(model, min(2500, n - k), seed + 100 * k, steps=steps, scale=scale)
        parts.append(((x + 1) * 127.5).round().clamp(0, 255).byte().cpu())
    return torch.cat(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('weights', type=Path, nargs='?')
    parser.add_argument('--real', type=Path, required=True)
    parser.add_argument('--limit', type=int, help='of the real pictures, for a trial')
    parser.add_argument('--scales', type=float, nargs='+', default=[1., 1.3, 1.6, 2.])
    parser.add_argument('--few', type=int, default=5000)
    parser.add_argument('--n', type=int, nargs='+', default=[10_000])
    parser.add_argument('--steps', type=int, default=50)
    parser.add_argument('--picture', type=Path, help='a PNG of the first forty samples at the chosen scale')
    parser.add_argument('--out', type=Path, default=ROOT / 'data/measured/cifar10.json')
    a = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    net, start = metrics.get_extractor('inception'), time.time()
    train, test = of(real('train', a.real, net, a.limit)), real('test', a.real, net, a.limit)
    print(f'real pictures after {time.time() - start:.0f} s', flush=True)
    if not a.weights: return
    model, card = zoo.load('cfg_cifar10', a.weights), json.loads(a.weights.with_suffix('.json').read_text())
    sweep, score = {}, lambda f: round(frechet_distance(of(f), train), 2)
    keep = ('device', 'seconds', 'steps', 'images_per_second', 'parameters', 'loss', 'bf16', 'beside', 'start')
    out = dict(reference=f'{train.n} training pictures', ddim_steps=a.steps, few=a.few, sweep=sweep,
               images_seen=card['steps'] * card['settings']['batch_size'], training={k: card[k] for k in keep if k in card},
               scored_on=device_name(default_device()), drawn={}, test={str(n): score(test[:n]) for n in (a.few, 10_000)})
    def write():
        with atomic_write(a.out) as tmp: tmp.write_text(json.dumps(out, indent=1) + '\n')
    for s in a.scales:
        sweep[str(s)] = score(outputs(net, drawn(model, a.few, 50_000_000, s, a.steps), batch=500)['features'])
        print(f'scale {s}: {sweep[str(s)]} after {time.time() - start:.0f} s', flush=True)
    out['scale'] = float(min(sweep, key=sweep.get))
    samples, found = torch.empty(0, 3, 32, 32, dtype=torch.uint8), torch.empty(0, 2048)
    for n in sorted(a.n):
        more = drawn(model, n - len(samples), len(samples) * 100, out['scale'], a.steps)
        samples, found = torch.cat([samples, more]), torch.cat([found, outputs(net, more, batch=500)['features']])
        out['drawn'][str(n)] = score(found)
        print(f'{n} samples: {out["drawn"][str(n)]} after {time.time() - start:.0f} s', flush=True)
        if a.picture:
            from PIL import Image
            Image.fromarray(image_grid(samples[:40].float() / 127.5 - 1, 20)).save(a.picture, optimize=True)
        write()


if __name__ == '__main__': main()
