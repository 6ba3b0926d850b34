"""Measure claims VQ-1 and BEIT-1, and the transformer beside masked convolutions

    python scripts/claims_priors.py generate --budget laptop --out vq1.json
    python scripts/claims_priors.py beit --budget laptop --out beit1.json
    python scripts/claims_priors.py convolutions --budget laptop --out data/measured/priors.json   # no claim: the page's comparison

The first needs the shipped vqvae_fashion and vqvae_fashion_prior, the others vqvae_fashion. The rules are in data/claims/rules.json.
"""
import json
import sys
import time

import claims_common
import torch

from diffcourse import data
from diffcourse.core import atomic_write, budget, default_device, generator, to_float
from diffcourse.metrics import feature_fid, get_extractor, statistics
from diffcourse.priors import (PatchEncoder, code_bits, effective, fashion_codes, fashion_pixelcnn, fashion_prior, linear_probe, masked_loss,
                               patches_of, pooled, prior_loss, sample_fashion, tokenizer, vqvae_fashion_prior)
from diffcourse.train import Trainer, device_name, train_recipe
from diffcourse.weights import load_weights

SAMPLES = dict(smoke=100, laptop=2000, gpu=10_000)
BEIT = dict(smoke=dict(steps=24, batch_size=32, pictures=500, probe=300),
            laptop=dict(steps=350, batch_size=64, pictures=20_000, probe=4000),
            gpu=dict(steps=8000, batch_size=256, pictures=60_000, probe=10_000))
NETS = dict(smoke=dict(steps=24, batch_size=32, warmup=5), laptop=dict(steps=1000, batch_size=64), gpu=dict(steps=12_000, batch_size=256))


def about(level, seeds) -> dict:
    "How it was measured"
    return dict(budget=level, device=device_name(default_device()), seeds=seeds)


def by_place(codes, n, seed):
    "Codes for every place on its own, with the frequencies they have there"
    x = codes['x']
    pick = torch.randint(len(x), (n, x[0].numel()), generator=generator(seed))     # a place takes its code from a picture of its own
    return x.flatten(1).gather(0, pick).view(-1, *x.shape[1:])


def generate(level, seeds) -> dict:
    "VQ-1: pictures from codes of three origins, and from the test set's own codes as the best that is possible"
    n, model = SAMPLES[level], load_weights('vqvae_fashion_prior', fashion_prior()).eval()
    extractor, codes = get_extractor('fashion_classifier'), fashion_codes('train', None if level != 'smoke' else 500)
    reference = statistics(data.fashion_mnist('train'), extractor)
    decode = lambda maps: torch.cat([tokenizer().decode(part) for part in maps.split(500)])
    fid = lambda x: feature_fid(x, reference, extractor, resamples=0).value
    runs = []
    with torch.no_grad():
        for seed in seeds:
            uniform = torch.randint(model.codes, (n, *model.shape), generator=generator(seed))
            runs.append(dict(seed=seed, prior=fid(sample_fashion(model, n, seed)), uniform=fid(decode(uniform)), places=fid(decode(by_place(codes, n, seed)))))
        floor = fid(decode(fashion_codes('test', n)['x']))
    values = {f'fid_{k}': torch.tensor([r[k] for r in runs]).double() for k in ('prior', 'uniform', 'places')}
    return {'VQ-1': dict(numbers={k: float(v.mean()) for k, v in values.items()}, spread={k: float(v.std()) for k, v in values.items()},
                         **about(level, len(seeds)), runs=runs, n=n, reconstructed_test=floor)}


def pretrained(target, seed, s, pictures, codes):
    "An encoder after predicting hidden patches; None: as it was made"
    torch.manual_seed(seed)
    model = PatchEncoder(128 if target == 'tokens' else patches_of(pictures[:1]).shape[-1])
    if target == 'untrained': return model.eval()
    settings = dict(steps=s['steps'], batch_size=s['batch_size'], lr=2e-3, ema=None, seed=seed)
    return Trainer(model, masked_loss(target), dict(x=pictures, codes=codes), progress=False, **settings).fit().model.eval()


def beit(level, seeds) -> dict:
    "BEIT-1: a linear probe after three kinds of preparation"
    s, train, test = BEIT[level], data.fashion_mnist('train'), data.fashion_mnist('test')
    pictures, codes = to_float(train.images[:s['pictures']]), fashion_codes('train', s['pictures'])['x']
    held, n, runs = to_float(test.images[:s['probe']]), s['probe'], []
    for seed in seeds:
        for target in ('tokens', 'pixels', 'untrained'):
            start = time.process_time()
            model = pretrained(target, seed, s, pictures, codes)
            score = linear_probe((pooled(model, pictures[:n]), train.labels[:n]), (pooled(model, held), test.labels[:n]))
            runs.append(dict(seed=seed, target=target, accuracy=score, cpu_seconds=round(time.process_time() - start, 1)))
            print(runs[-1], file=sys.stderr, flush=True)
    v = {t: torch.tensor([r['accuracy'] for r in runs if r['target'] == t]).double() for t in ('tokens', 'pixels', 'untrained')}
    raw = linear_probe((patches_of(pictures[:n]).flatten(1), train.labels[:n]), (patches_of(held).flatten(1), test.labels[:n]))
    error = float((v['tokens'] - v['pixels']).std() / len(seeds) ** .5)
    return {'BEIT-1': dict(numbers={k: float(x.mean()) for k, x in v.items()} | dict(error=error), spread={k: float(x.std()) for k, x in v.items()},
                           **about(level, len(seeds)), runs=runs, settings=s, raw_pixels=raw)}


def convolutions(level, seeds) -> dict:
    "The transformer and the masked convolutions, as many parameters and steps, bits per code of the test set on the way"
    codes, held, out = fashion_codes('train', 2000 if level == 'smoke' else None), fashion_codes('test', 2000), {}
    for name, make in (('transformer', fashion_prior), ('masked convolutions', fashion_pixelcnn)):
        torch.manual_seed(seeds[0])
        model = make()
        t = Trainer(model, prior_loss, codes, lr=3e-3, weight_decay=.01, ema=.99, progress=False, seed=seeds[0], **NETS[level]).fit()
        bits = code_bits(t.ema_model(), held)
        start = time.process_time()
        t.ema_model().write(torch.arange(50)[:, None] % 10)
        out[name] = dict(parameters=effective(model), bits=float(bits.mean()), by_place=bits.mean(0).tolist(), loss=t.losses[::10],
                         train_cpu_seconds=round(t.cpu_seconds, 1), steps=t.step, write_ms=1000 * (time.process_time() - start) / 50)
    return dict(runs=out, **about(level, 1))


def main(args=None):
    parser = claims_common.parser(__doc__, 'one training (beit) or one draw (generate) for each')
    parser.add_argument('what', choices=('generate', 'beit', 'convolutions'))
    a = parser.parse_args(args)
    result = globals()[a.what](budget(a.budget), a.seeds)
    if a.what != 'convolutions': return claims_common.store(result, a.out)
    with atomic_write(a.out) as tmp: tmp.write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')
    print({k: round(v['bits'], 3) for k, v in result['runs'].items()})


if __name__ == '__main__': main()
