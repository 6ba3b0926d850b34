"""How well GLIDE and unCLIP obey 1,000 held-out sentences of each kind, over guidance and priors, into data/measured/alignment.json

    python scripts/alignment.py [--n 1000] [--only glide-cfg glide-clip unclip unclip-silent] [--out data/measured/alignment.json]

Sentences of one thing and of two, read back by the parser, with Wilson's intervals of 95 %; 25 DDIM steps. glide-cfg: guidance
without a classifier at four scales; glide-clip: the noised CLIP leads the conditional answer, at four scales; unclip: both priors
and none, the decoder told the caption; unclip-silent: the same, the decoder told nothing. A row that is there for the same
weights is not drawn again. An hour of one core that has bfloat16 at n = 1,000, two to three of one that has not.
"""
import argparse
import json
import time
from pathlib import Path

import torch

from diffcourse import clip, dalle2, glide, zoo
from diffcourse.core import atomic_write, default_device
from diffcourse.train import device_name
from diffcourse.weights import load_card, load_weights

ROOT = Path(__file__).resolve().parent.parent
CFG, CLIP, PRIORS = (1., 2., 3., 5.), (.003, .01, .03, .1), ('diffusion', 'ar', 'none')
WEIGHTS = {'glide-cfg': ('glide_shapes',), 'glide-clip': ('glide_shapes', 'noised_clip_shapes'),
           'unclip': ('clip_shapes', 'unclip_decoder_shapes', 'unclip_prior_shapes', 'unclip_ar_prior_shapes')}


def rows_of(kind: str) -> list:
    "(what tells the row apart, (captions, seed) → pictures)"
    if kind.startswith('unclip'):
        system, say = dalle2.dalle2('shapes'), kind == 'unclip'
        return [(dict(prior=p), lambda c, seed, p=p: system.imagine(c, seed, p, say=say)) for p in PRIORS]
    net, bpe = zoo.load('glide_shapes'), glide.shapes_bpe()
    if kind == 'glide-cfg': return [(dict(scale=s), lambda c, seed, s=s: glide.text_to_image(net, bpe, c, seed, s)) for s in CFG]
    judge = load_weights('noised_clip_shapes', clip.noised_clip_shapes.model()).to(default_device()).eval()

    def led(c, seed, s):
        with torch.no_grad(): text = judge.encode_text(clip.tokens_of(c, 'shapes').to(default_device()))
        return glide.text_to_image(net, bpe, c, seed, 1., prediction=glide.clip_guidance(judge.gradient, text, s))
    return [(dict(scale=s), lambda c, seed, s=s: led(c, seed, s)) for s in CLIP]


def in_parts(paint):
    "Fifty pictures at a time, each fifty from noise of its own"
    return lambda captions, seed: torch.cat([paint(captions[i:i + 50], seed + i).cpu() for i in range(0, len(captions), 50)])


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--n', type=int, default=1000, help='sentences of each of the two kinds')
    p.add_argument('--only', nargs='+', choices=(*WEIGHTS, 'unclip-silent'), default=(*WEIGHTS, 'unclip-silent'))
    p.add_argument('--out', type=Path, default=ROOT / 'data/measured/alignment.json')
    a = p.parse_args()
    rows = json.loads(a.out.read_text())['rows'] if a.out.exists() else []
    for kind in a.only:
        weights = {n: load_card(n)['sha256'][:12] for n in WEIGHTS[kind.removesuffix('-silent')]}
        for named, paint in rows_of(kind):
            key = dict(kind=kind, **named, n=a.n, weights=weights)
            if any(all(r.get(k) == v for k, v in key.items()) for r in rows): continue
            start = time.process_time()
            found = glide.obedience(in_parts(paint), a.n, 10_000)
            rows = [r for r in rows if any(r.get(k) != v for k, v in dict(kind=kind, **named).items())]
            rows.append(key | dict(seconds=round((time.process_time() - start) / (2 * a.n), 3), device=device_name(default_device()), **found))
            with atomic_write(a.out) as tmp: tmp.write_text(json.dumps(dict(rows=rows), indent=1) + '\n')
            print(key, {k: found[k] for k in ('one_binding', 'two_binding', 'two_relation')}, flush=True)


if __name__ == '__main__': main()
