"""Draw from a trained cfg_cifar10 at several scales and score with the FID's Inception, into data/measured/cifar10.json

    python scripts/cifar10_fid.py --real DIR                     # statistics of all training pictures, once
    python scripts/cifar10_fid.py cfg_cifar10.safetensors --real DIR [--scales 1 1.3 1.6 2] [--few 5000] [--n 10000 50000]
    python scripts/cifar10_fid.py --real DIR --control 5000      # real test pictures in place of samples

The first `few` samples of each scale choose the scale; the chosen one is scored at every N of `--n`. The reference are
all 50,000 training pictures; the test pictures against the same reference say what a perfect model of this N would get.
Every result is written as soon as it is there.
On a GPU about a minute for each 25,000 samples; on a CPU 0.2 s of one core for each picture that Inception sees.
"""
import argparse
import json
import time
from pathlib import Path

import torch

from diffcourse import data, inception, metrics, zoo  # noqa: F401 (inception registers the extractor)
from diffcourse.core import atomic_write, default_device, image_grid
from diffcourse.metrics import Statistics, frechet_distance, load_statistics, outputs, save_statistics
from diffcourse.train import device_name, find_recipe, read_tensors, write_tensors

ROOT = Path(__file__).resolve().parent.parent


def of(x) -> Statistics: return Statistics().update(x)


def reference(folder: Path, net, limit: int | None) -> Statistics:
    "Statistics of the training pictures, kept in the folder"
    path = folder / 'train.safetensors'
    if not path.exists(): save_statistics(path, of(outputs(net, data.cifar10('train', full=True).images[:limit], batch=500)['features']))
    return load_statistics(path)


def test_features(folder: Path, net, n: int) -> torch.Tensor:
    "Features of the first n test pictures; a hundred at a time they are kept in the folder"
    images, parts = data.cifar10('test').images[:n], []
    for i in range(0, n, 100):
        path = folder / f'test-{i}.safetensors'
        if not path.exists(): write_tensors(path, outputs(net, images[i:i + 100]), {})
        parts.append(read_tensors(path)[0]['features'])
    return torch.cat(parts)


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
    parser.add_argument('--limit', type=int, help='of the training pictures, for a trial')
    parser.add_argument('--control', type=int, help='score this many real test pictures')
    parser.add_argument('--scales', type=float, nargs='+', default=[1., 1.3, 1.6, 2.])
    parser.add_argument('--few', type=int, default=5000)
    parser.add_argument('--n', type=int, nargs='+', default=[10_000])
    parser.add_argument('--steps', type=int, default=50)
    parser.add_argument('--picture', type=Path, help='a PNG of the first forty samples at the chosen scale')
    parser.add_argument('--out', type=Path, default=ROOT / 'data/measured/cifar10.json')
    a = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    net, start = metrics.get_extractor('inception'), time.time()
    train, score = reference(a.real, net, a.limit), lambda f: round(frechet_distance(of(f), train), 2)
    print(f'training pictures after {time.time() - start:.0f} s', flush=True)
    out = json.loads(a.out.read_text()) if a.out.exists() else {}
    def write():
        with atomic_write(a.out) as tmp: tmp.write_text(json.dumps(out, indent=1) + '\n')
    if a.control:
        out.setdefault('test', {})[str(a.control)] = score(test_features(a.real, net, a.control))
        write()
    if not a.weights: return
    model, card, sweep = zoo.load('cfg_cifar10', a.weights), json.loads(a.weights.with_suffix('.json').read_text()), {}
    keep = ('device', 'seconds', 'steps', 'images_per_second', 'parameters', 'loss', 'bf16', 'beside', 'start')
    out |= dict(reference=f'{train.n} training pictures', ddim_steps=a.steps, few=a.few, sweep=sweep,
                images_seen=card['steps'] * card['settings']['batch_size'], training={k: card[k] for k in keep if k in card},
                scored_on=device_name(default_device()), drawn={})
    for s in a.scales:
        sweep[str(s)] = score(outputs(net, drawn(model, a.few, 50_000_000, s, a.steps), batch=500)['features'])
        print(f'scale {s}: {sweep[str(s)]} after {time.time() - start:.0f} s', flush=True)
        write()
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
