"""Measure claim VQ-2: codebooks that follow by gradient, by moving averages, and by moving averages with revival, three seeds each

    python scripts/claims_vqvae.py --budget laptop --out vq2.json

Writes {'VQ-2': {'numbers': …, 'budget': …, 'device': …, 'seeds': …, 'runs': [...]}}; the rule is in data/claims/rules.json.
"""
import time

import claims_common
import torch

from diffcourse.core import budget, default_device, to_float
from diffcourse.data import fashion_mnist
from diffcourse.train import Recipe, device_name, train_recipe
from diffcourse.vqvae import VQVAE, evaluate_codes, vq_loss

SETTINGS = {
    'smoke': dict(steps=20, batch_size=32, lr=2e-3, warmup=5, ema=.9),
    'laptop': dict(steps=300, batch_size=64, lr=2e-3, warmup=50, ema=.99),
    'gpu': dict(steps=4000, batch_size=256, lr=1e-3, ema=.999),
}
ARMS = {'gradient': dict(rule='gradient'), 'ema': dict(rule='rosinality'), 'revived': dict(rule='rosinality', revive=.1),
        'gradient_revived': dict(rule='gradient', revive=.1)}   # the last is not in the rule


def run(arm, seed, level, test, **how) -> dict:
    "Train one network; what it reaches on the test pictures, and the curves of its perplexity and its error"
    start, n = time.perf_counter(), how.get('steps', SETTINGS[level]['steps'])
    recipe = Recipe(f'vq_{arm}', 'for VQ-2', lambda _: fashion_mnist('train'), settings=SETTINGS, loss=vq_loss,
                    model=lambda: VQVAE(1, width=32, blocks=1, hidden=16, codes=128, dim=16, **ARMS[arm]))
    trainer = train_recipe(recipe, level, seed=seed, progress=False, **how)
    curve = {f'{k}_curve': [round(v, 4) for v in trainer.extras[k][::max(1, n // 30)]] for k in ('perplexity', 'unexplained')}
    return {'arm': arm, 'seed': seed, **evaluate_codes(trainer.ema_model(), test), **curve,
            'seconds': round(time.perf_counter() - start, 2)}


def measure(level, seeds=(0, 1, 2), **how) -> dict:
    "All arms and seeds, and the numbers that the rule of VQ-2 names"
    test_set = fashion_mnist('test')
    runs = [run(arm, seed, level, to_float(test_set.images[:2000]), **how) for arm in ARMS for seed in seeds]
    of = lambda arm, key, pick: pick(r[key] for r in runs if r['arm'] == arm)
    numbers = {'ema_psnr': of('ema', 'psnr', min), 'gradient_psnr': of('gradient', 'psnr', max),
               'ema_perplexity': of('ema', 'perplexity', min), 'gradient_perplexity': of('gradient', 'perplexity', max),
               'ema_used': of('ema', 'used', max), 'revived_used': of('revived', 'used', min)}
    return {'numbers': numbers, 'budget': level, 'device': device_name(torch.device(how.get('device') or default_device())),
            'seeds': len(seeds), 'runs': runs, 'settings': {**SETTINGS[level], **how}, 'data': fashion_mnist('train').name,
            'test': f'the first 2,000 of {test_set.name}'}


def main(args=None):
    parser = claims_common.parser(__doc__, 'one training of each kind')
    a = parser.parse_args(args)
    claims_common.store({'VQ-2': measure(budget(a.budget), a.seeds)}, a.out)


if __name__ == '__main__': main()
