"""Measure the claims of the metrics chapters

    python scripts/claims_metrics.py pages --out pages.json             # M-1, M-2, M-3, M-4, M-5: minutes
    python scripts/claims_metrics.py inception --out inception.json     # M-3b, M-4b: 0.2 s of one CPU core for each of 5·n pictures and,
                                                                        # where --cache does not hold them, for 2·reference more
`pages` runs the code of 17_metrics and 17d_lab and writes down what they measure. `inception` looks at CIFAR-10 with the FID
Inception: the first n test pictures, whole and spoilt, against the first training pictures. The rules are in data/claims/rules.json,
older than the numbers. Needs CIFAR-10 (`diffcourse data get cifar10`) and the Inception's weights (it says where from).
"""
import argparse, io, json, os, time
from pathlib import Path

import nbformat
import numpy as np
import torch
from inception_numbers import walked
from PIL import Image

from diffcourse import core, metrics
from diffcourse.core import atomic_write, budget, default_device, generator
from diffcourse.data import cifar10
from diffcourse.metrics import Statistics, fingerprint, frechet_distance, get_extractor, outputs
from diffcourse.scores import exchanged
from diffcourse.train import device_name, read_tensors, write_tensors

ROOT = Path(__file__).resolve().parent.parent


def page_claims(page, names) -> dict:
    "id → numbers: the claims that a page measures, its code run from top to bottom without exports and exercises"
    found, claim = {}, core.claim
    def record(id, **numbers):
        if numbers: found[id] = {k: float(v) for k, v in numbers.items()}
        return claim(id, **numbers)
    core.claim, names = record, dict(names, __name__='page')
    for c in nbformat.read(ROOT / 'nbs' / f'{page}.ipynb', 4).cells:
        if c.cell_type == 'code' and not c.source.startswith('#| export') and not c.metadata.get('tags'): exec(c.source, names)
    core.claim = claim
    return found


def jpeg(images, quality=90):
    "Bytes (N, 3, H, W) through JPEG and back"
    out = []
    for p in images.permute(0, 2, 3, 1).numpy():
        Image.fromarray(p).save(file := io.BytesIO(), 'JPEG', quality=quality)
        out.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2)


def noisy(x):
    "Noise of 0.2 in [-1, 1], that is 25.5 grey values"
    return (x + 25.5 * torch.randn(x.shape, generator=generator(0))).round().clamp(0, 255).to(torch.uint8)


def looked_at(model, what, x, wanted, cache) -> dict:
    "What the network says of a heap, a hundred pictures at a time; hundreds that lie in the cache are not looked at again"
    parts = []
    for i, part in enumerate(x.split(100)):
        path = cache / f'{what}-{100 * i}-{100 * i + len(part)}.safetensors' if cache else None
        if path and path.exists(): parts.append(read_tensors(path)[0])
        else:
            parts.append(outputs(model, part, wanted))
            if path: write_tensors(path, parts[-1], {})
            print(what, 100 * i, flush=True)
    return {k: torch.cat([p[k] for p in parts]) for k in wanted}


def inception_scores(n, reference, cache, device):
    "Pooled and spatial distance of every heap to the training pictures; through the other resizing; the network's name"
    usual, tf = (get_extractor('inception', device, resize=r) for r in ('pytorch-fid', 'torch-fidelity'))
    test, kinds, out = cifar10('test').images[:n], {'pooled': 'features', 'spatial': 'spatial'}, {}
    of = lambda rows: Statistics().update(rows)
    real = {k: of(v) for k, v in walked(usual, 'train', reference, cache).items()}
    seen = {'whole': walked(usual, 'test', n, cache)}
    for name, spoil in dict(noise=noisy, shift=lambda x: x.roll(8, -1), shuffle=exchanged, jpeg=jpeg).items():
        seen[name] = looked_at(usual, name, spoil(test), ('features', 'spatial'), cache)
    out = {name: {kind: frechet_distance(of(rows[k]), real[k]) for kind, k in kinds.items()} for name, rows in seen.items()}
    other = looked_at(tf, 'torch-fidelity', test, ('features',), cache)   # mixing two makes of features is the point here
    return out | {'resize': {'pooled': frechet_distance(of(other['features']), real['features'])}}, fingerprint(usual)


def inception_claims(n, reference, cache, device) -> dict:
    "M-3b and M-4b: numbers and how they were made"
    if cache: cache.mkdir(parents=True, exist_ok=True)
    score, eyes = inception_scores(n, reference, cache, device)
    rise = {f'{kind}_{k}': score[k][kind] - score['whole'][kind] for k in ('noise', 'shift', 'shuffle') for kind in ('pooled', 'spatial')}
    change = {name: score[k]['pooled'] - score['whole']['pooled'] for name, k in (('jpeg_90', 'jpeg'), ('resize', 'resize'))}
    about = dict(n=n, reference=reference, extractor=eyes, fid=score['whole']['pooled'], sfid=score['whole']['spatial'])
    return {'M-3b': dict(numbers=rise, **about), 'M-4b': dict(numbers=change, **about)}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=['pages', 'inception'])
    p.add_argument('--n', type=int, default=1000, help='test pictures, each looked at in six states')
    p.add_argument('--reference', type=int, default=2000, help='training pictures')
    p.add_argument('--cache', type=Path, help='a folder that keeps what the Inception said, shared with inception_numbers.py')
    p.add_argument('--device', help='default: the best present')
    p.add_argument('--out', type=Path, default=Path('metrics.json'))
    a = p.parse_args()
    start, device = time.process_time(), default_device(a.device)
    if a.what == 'inception': found = inception_claims(a.n, a.reference, a.cache, str(device))
    else:
        os.environ['MPLBACKEND'], found = 'Agg', {}
        for page, names in (('17_metrics', vars(metrics)), ('17d_lab', {})):
            found |= {id: dict(numbers=v, page=page) for id, v in page_claims(page, names).items()}
    for r in found.values(): r.update(budget=budget(), device=device_name(device), seeds=1, cpu_seconds=round(time.process_time() - start))
    with atomic_write(a.out) as tmp: tmp.write_text(json.dumps(found, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    print(json.dumps(found, indent=1, ensure_ascii=False))


if __name__ == '__main__': main()
