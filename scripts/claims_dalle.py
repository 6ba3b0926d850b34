"""Measure claims DALLE-1, DALLE-2 and DALLE-2b: reranking, and what the KL weight and the temperature do to a dVAE

    python scripts/claims_dalle.py --budget laptop --out dalle.json [--only sweep rerank]

The sweep trains six small dVAEs for each seed; reranking uses the shipped dalle_shapes. The rules are in data/claims/rules.json.
"""
import json

import claims_common
import numpy as np
import torch

from diffcourse import data
from diffcourse.core import budget, default_device, to_float
from diffcourse.dalle import best_of, classifier_score, paint, shapes_bpe, vocabulary, dalle_shapes
from diffcourse.dvae import DVAE, loss_dvae
from diffcourse.shapes import matches, parse_many
from diffcourse.train import Trainer, device_name
from diffcourse.vqvae import evaluate_codes
from diffcourse.weights import load_weights

SIZES = {  # steps and batch of each dVAE, test scenes; captions and candidates for reranking
    'smoke': dict(steps=20, batch=16, test=50, captions=4, candidates=16),
    'laptop': dict(steps=300, batch=16, test=300, captions=40, candidates=64),
    'gpu': dict(steps=10_000, batch=128, test=1000, captions=200, candidates=64)}
WAYS = {'0': (0., (1., 1 / 16)), '1': (1., (1., 1 / 16)), '6': (6.6, (1., 1 / 16)), '40': (40., (1., 1 / 16)),
        'warm': (6.6, (1., 1.)), 'cold': (6.6, (1 / 16, 1 / 16))}


def sweep(seed, size, way) -> dict:
    "One dVAE: words in use, error with hard words, and with soft ones at the last temperature"
    (β, τ), steps = WAYS[way], size['steps']
    torch.manual_seed(seed)
    model = DVAE(vocab_size=128, n_hid=16, n_init=32, n_blk_per_group=1, group_count=3)
    loss = loss_dvae(β=(0., β), β_steps=steps // 20, τ=τ, τ_steps=steps // 2)
    trainer = Trainer(model, loss, data.shapes(5000, things=(1, 2)), steps=steps, batch_size=size['batch'], lr=3e-3,
                      ema=.98, seed=seed, progress=False).fit()
    model, x = trainer.ema_model(), to_float(data.shapes(size['test'], seed=1, things=(1, 2)).images)
    with torch.no_grad():
        soft = torch.cat([model.draw((model.logits(p) / τ[1]).softmax(1)) for p in x.split(100)])
    found = evaluate_codes(model, x, model.words)
    return dict(seed=seed, way=way, **found, soft=float((soft - x).double().square().mean()),
                rate=float(np.mean(trainer.extras['rate'][-20:])), seconds=round(trainer.cpu_seconds, 1))


def reranked(size) -> tuple:
    "Share of captions of two things obeyed in full by the winner of N, for N = 1 … all"
    model, n = load_weights('dalle_shapes', dalle_shapes.model()), size['candidates']
    _, captions, _ = data.scenes(size['captions'], seed=11, things=2)
    right, scores = [], []
    for i, c in enumerate(captions):
        x = paint(model, vocabulary('vqvae_shapes'), shapes_bpe(), [c] * n, seed=i)
        right.append([float(matches(c, s)['all']) for s in parse_many(x)])
        scores.append(classifier_score(x, [c] * n))
    right, scores = torch.tensor(right), torch.stack(scores)
    sizes = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= n]
    of_caption = {k: right.gather(1, best_of(scores, k)).mean(1) for k in sizes}
    numbers = {f'n{k}': float(v.mean()) for k, v in of_caption.items()}
    perfect = {f'perfect{k}': float(right[:, :n // k * k].view(len(right), -1, k).amax(2).mean()) for k in sizes}
    return numbers | perfect, {f'n{k}': float(v.std() / len(v) ** .5) for k, v in of_caption.items()}


def main(args=None):
    parser = claims_common.parser(__doc__, 'six trainings for each')
    parser.add_argument('--only', nargs='+', choices=('sweep', 'rerank'), default=('sweep', 'rerank'))
    a = parser.parse_args(args)
    level = budget(a.budget)
    size, out = SIZES[level], {}
    common = dict(budget=level, device=device_name(default_device()), settings=size)
    if 'sweep' in a.only:
        runs = [sweep(s, size, w) for s in a.seeds for w in WAYS]
        for r in runs: print(json.dumps(r), flush=True)
        of = lambda w, k: [r[k] for r in runs if r['way'] == w]
        numbers = {f'{name}_{w}': (k, w) for w in ('0', '1', '6', '40') for name, k in (('perplexity', 'perplexity'), ('error', 'mse'))}
        many = {'annealed': '6', 'warm': 'warm', 'cold': 'cold'}
        second = {f'error_{n}': ('mse', w) for n, w in many.items()}
        for id, names in (('DALLE-2', numbers), ('DALLE-2b', second)):
            stat = lambda f: {n: float(f(of(w, k))) for n, (k, w) in names.items()}
            out[id] = dict(numbers=stat(np.mean), spread=stat(lambda v: np.std(v, ddof=1) if len(v) > 1 else 0.),
                           seeds=len(a.seeds), runs=runs if id == 'DALLE-2' else [], **common)
        out['DALLE-2b']['numbers'] |= {f'gap_{n}': float(np.mean(of(w, 'mse')) - np.mean(of(w, 'soft'))) for n, w in many.items()}
    if 'rerank' in a.only:
        numbers, spread = reranked(size)
        out['DALLE-1'] = dict(numbers=numbers, spread=spread, seeds=1, **common)
    claims_common.store(out, a.out)


if __name__ == '__main__': main()
