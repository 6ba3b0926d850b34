"""Measure claims GLIDE-1 … GLIDE-3: guidance with and without a CLIP, what a CLIP for clean pictures is worth, two ways of inpainting

    python scripts/claims_glide.py --budget laptop --out glide.json

Writes {'GLIDE-1': {'numbers': …, 'budget': …, 'device': …, 'seeds': …, …}, …}; the rules are in data/claims/rules.json, older than the
numbers. Uses the shipped weights of glide_shapes, glide_inpaint_shapes, noised_clip_shapes and clip_shapes; at the smoke budget what is
missing is replaced by untrained networks, so that the script can be tried. `--only GLIDE-3` measures some.
"""
import claims_common
import torch

from diffcourse import clip, edit, glide
from diffcourse.core import budget, default_device, require
from diffcourse.dalle import shapes_bpe
from diffcourse.train import device_name, find_recipe
from diffcourse.weights import load_weights, shipped

SETTINGS = {
    'smoke': dict(n=4, mend=4, steps=2, cfg=(1., 3.), clip=(1.,)),
    'laptop': dict(n=500, mend=120, steps=25, cfg=(1., 2., 3., 5.), clip=(.003, .01, .03, .1, .3)),
    'gpu': dict(n=1000, mend=1000, steps=25, cfg=(1., 1.5, 2., 3., 5., 8.), clip=(.001, .003, .01, .03, .1, .3, 1.))}


def network(name, level, device):
    "A recipe's shipped network"
    model = find_recipe(name).model()
    require(shipped(name) or level == 'smoke', f'no weights are shipped for {name}: train it first')
    return (load_weights(name, model) if shipped(name) else model).to(device).eval()


def hits(captions, pictures) -> dict:
    "Shares by the parser, with intervals"
    return {k: glide.share_interval(v) for k, v in glide.scene_hits(captions, pictures).items() if k in ('binding', 'all')}


@torch.no_grad()
def against_clip(level, device) -> dict:
    "GLIDE-1 and GLIDE-2: one network, the same noise, three kinds of guidance"
    s, net, bpe = SETTINGS[level], network('glide_shapes', level, device), shapes_bpe()
    noised, plain = (network(n, level, device) for n in ('noised_clip_shapes', 'clip_shapes'))
    captions = glide.unseen_captions(s['n'], 1)
    tokens = clip.tokens_of(captions, 'shapes').to(device)
    text, text_plain = noised.encode_text(tokens), torch.nn.functional.normalize(plain.encode_text(tokens), dim=-1)

    def score(x):
        t = torch.zeros(len(x), dtype=torch.long, device=device)
        return float((noised.encode_image(x.to(device), t) * text).sum(1).mean())

    def draw(scale, told=captions, **hooks): return glide.text_to_image(net, bpe, told, 40_000, scale, s['steps'], **hooks)

    def row(scale, x): return dict(scale=scale, score=score(x), **hits(captions, x))
    by = {'cfg': [row(c, draw(c)) for c in s['cfg']],
          'clip': [row(c, draw(1., prediction=glide.clip_guidance(noised.gradient, text, c))) for c in s['clip']]}
    empty = [''] * len(captions)
    alone = {'none': [row(0., draw(1., empty))],
             'noised': [row(c, draw(1., empty, prediction=glide.clip_guidance(noised.gradient, text, c))) for c in s['clip']],
             'clean': [row(c, draw(1., empty, prediction=glide.clip_guidance(glide.clean_gradient(plain), text_plain, c)))
                       for c in s['clip']]}
    best = lambda rows, k: max(r[k][0] if isinstance(r[k], tuple) else r[k] for r in rows)
    one = {f'align_{k}': best(v, 'all') for k, v in by.items()} | {f'score_{k}': best(v, 'score') for k, v in by.items()}
    return {'GLIDE-1': dict(numbers=one, sweep=by, seeds=1),
            'GLIDE-2': dict(numbers={f'align_{k}': best(v, 'binding') for k, v in alone.items()}, sweep=alone, seeds=1)}


@torch.no_grad()
def mending(level, device) -> dict:
    "GLIDE-3: the same cuts, mended by both networks"
    s, numbers, both = SETTINGS[level], {}, {}
    for word, name in (('tuned', 'glide_inpaint_shapes'), ('pasted', 'glide_shapes')):
        both[word] = found = edit.evaluate_inpaint(network(name, level, device), s['mend'], steps=s['steps'])
        numbers |= {f'seam_{word}': found['seam'], f'all_{word}': found['all']}
    return {'GLIDE-3': dict(numbers=numbers, runs=both, seeds=1)}


def main():
    p = claims_common.parser(__doc__, 'not used: one set of noise', (0,))
    p.add_argument('--only', nargs='+', default=['GLIDE-1', 'GLIDE-2', 'GLIDE-3'])
    a = p.parse_args()
    level, device, result = budget(a.budget), default_device(), {}
    if {'GLIDE-1', 'GLIDE-2'} & set(a.only): result |= against_clip(level, device)
    if 'GLIDE-3' in a.only: result |= mending(level, device)
    for r in result.values(): r |= dict(budget=level, device=device_name(device))
    claims_common.store({k: v for k, v in result.items() if k in a.only}, a.out)


if __name__ == '__main__': main()
