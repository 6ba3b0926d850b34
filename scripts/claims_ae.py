"""Measure claim AE-1: an autoencoder against PCA at the same number of code numbers, three seeds each

    python scripts/claims_ae.py --budget laptop --out ae1.json

Writes {'AE-1': {'numbers': …, 'budget': …, 'device': …, 'seeds': …, 'runs': [...]}}; the rule is in data/claims/rules.json.
"""
import time

import claims_common
import torch

from diffcourse.ae import PCA, ae_recipe, evaluate
from diffcourse.core import budget, default_device, to_float
from diffcourse.data import fashion_mnist
from diffcourse.train import device_name, train_recipe

WIDTHS = (2, 4, 8, 16, 32, 64)
SETTINGS = {
    'smoke': dict(steps=24, batch_size=64, lr=4e-3, warmup=5, ema=.9),
    'laptop': dict(steps=200, batch_size=128, lr=4e-3, warmup=50, ema=.99),
    'gpu': dict(steps=800, batch_size=512, lr=4e-3, warmup=50, ema=.99),
}


def pca_errors(train, test, widths) -> dict:
    "Test MSE of PCA for each width, all from one eigendecomposition on the training pictures"
    pca = PCA.fit(train, max(widths))
    error = lambda p: (p.decode(p.encode(test), test.shape[1:]) - test).double().square().mean()
    return {d: float(error(pca.keep(d))) for d in widths}


def run(width, seed, level, test, **how) -> dict:
    "Train one autoencoder and measure its test MSE"
    start = time.perf_counter()
    recipe = ae_recipe(f'ae_{width}', width, SETTINGS)
    trainer = train_recipe(recipe, level, seed=seed, progress=False, **how)
    scores = evaluate(trainer.ema_model(), test)
    return {'width': width, 'seed': seed, **scores, 'loss': sum(trainer.losses[-50:]) / len(trainer.losses[-50:]),
            'steps': trainer.step, 'seconds': round(time.perf_counter() - start, 2)}


def measure(level, widths=WIDTHS, seeds=(0, 1, 2), **how) -> dict:
    "All widths and seeds, and the numbers that the rule of AE-1 names"
    train_set, test_set = fashion_mnist('train'), fashion_mnist('test')
    test = to_float(test_set.images)
    pca = pca_errors(to_float(train_set.images), test, widths)
    runs = [run(d, seed, level, test, **how) for d in widths for seed in seeds]
    worst = {d: max(r['mse'] for r in runs if r['width'] == d) for d in widths}
    return {'numbers': {f'r{d}': worst[d] / pca[d] for d in widths}, 'budget': level,
            'device': device_name(torch.device(how.get('device') or default_device())), 'seeds': len(seeds),
            'runs': runs, 'pca': {str(d): e for d, e in pca.items()}, 'settings': {**SETTINGS[level], **how},
            'train': train_set.name, 'test': test_set.name}


def main(args=None):
    parser = claims_common.parser(__doc__, 'one training for each')
    parser.add_argument('--widths', type=int, nargs='+', default=WIDTHS, help='code widths')
    parser.add_argument('--steps', type=int, help="training steps, instead of the budget's")
    a = parser.parse_args(args)
    how = {'steps': a.steps} if a.steps else {}
    result = {'AE-1': measure(budget(a.budget), a.widths, a.seeds, **how)}
    claims_common.store(result, a.out)


if __name__ == '__main__': main()
