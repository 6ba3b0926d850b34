"""Measure claims UNCLIP-1 to UNCLIP-5: what the prior is worth, guidance, binding, variations and text differences

    python scripts/claims_unclip.py --budget laptop --out unclip.json [--only UNCLIP-1 …]

Needs the shipped clip_shapes and unclip_*_shapes, and glide_shapes for UNCLIP-3 and UNCLIP-4. The rules are in data/claims/rules.json.
"""
import json
import time
from dataclasses import replace

import claims_common
import torch

from diffcourse import data, glide, metrics, scores
from diffcourse.core import budget, require
from diffcourse.dalle import shapes_bpe
from diffcourse.dalle2 import dalle2, decoder_denoiser, moments_of, nothing_said, painted, told, unclip_decoder_shapes
from diffcourse.shapes import COLOURS, caption, parse_many
from diffcourse.train import Trainer
from diffcourse.unclip import loss_decoder
from diffcourse.weights import load_card, load_weights, shipped

SIZES = {'smoke': dict(captions=8, steps=20, train=300, scenes=4), 'laptop': dict(captions=200, steps=300, train=20_000, scenes=80),
         'gpu': dict(captions=1000, steps=3000, train=100_000, scenes=500)}
ATTRIBUTES = ('shapes', 'colours', 'sizes', 'background', 'binding')


def obeyed(captions, pictures) -> tuple:
    "Mean share of attributes obeyed, and its standard error over captions"
    hits = glide.scene_hits(captions, pictures)
    each = torch.tensor([hits[k] for k in ATTRIBUTES], dtype=torch.float64).mean(0)
    return float(each.mean()), float(each.std() / len(each) ** .5)


def asked(n, *things): return [c for k in things for c in glide.unseen_captions(n, k)]


def true_scenes(n, things=(1,)): return data.shapes(n, seed=99, things=things).images


def went_on(size, seed, text: bool):
    "The shipped decoder after some more steps, on image embeddings or on text embeddings"
    table = painted('shapes', size['train'])
    if text: table['y'] = moments_of('shapes').whiten(table['txt_feat'])
    model = load_weights('unclip_decoder_shapes', unclip_decoder_shapes.model())
    loss = loss_decoder(decoder_denoiser(None), lambda: told(nothing_said('shapes')))
    return Trainer(model, loss, table, steps=size['steps'], batch_size=32, lr=5e-4, ema=.98, seed=seed, progress=False).fit().ema_model()


def unclip_1(system, size, seed) -> dict:
    captions, real, out = asked(size['captions'], 1), true_scenes(size['captions']), {}
    onward = {text: replace(system, decoder=went_on(size, seed, text)) for text in (False, True)}
    for name, which, prior in (('prior', False, 'diffusion'), ('zero_shot', False, 'none'), ('on_text', True, 'none')):
        x = onward[which].imagine(captions, seed, prior, say=False)
        out[name], out[f'{name}_se'] = obeyed(captions, x)
        out[f'fid_{name}'] = metrics.feature_fid(x, real, 'shapes_classifier', resamples=0).value
    return out


def unclip_2(system, size, seed) -> dict:
    captions, out = asked(size['captions'] // 2, 1, 2), {}
    for name, kind in (('diffusion', 'diffusion'), ('ar', 'ar')):
        out[name], out[f'{name}_se'] = obeyed(captions, system.imagine(captions, seed, kind, say=False))
        start = time.process_time()
        system.embed(captions[:100], seed, kind)
        out[f'draw_{name}'] = (time.process_time() - start) * 100 / len(captions[:100])
        card = load_card(f'unclip_{"ar_" * (kind == "ar")}prior_shapes')
        out[f'train_{name}'] = card['seconds' if card['budget'] == 'gpu' else 'cpu_seconds']
    return out


def glide_painter():
    "GLIDE's pictures at a scale"
    model = load_weights('glide_shapes', glide.glide_shapes.model())
    return lambda captions, seed, scale: glide.text_to_image(model, shapes_bpe(), captions, seed, scale)


def unclip_3(system, size, seed) -> dict:
    captions, out = asked(size['captions'] // 2, 1, 2), {}
    real = metrics.features('shapes_classifier', true_scenes(len(captions), (1, 2)))
    painters = dict(unclip=lambda c, s, scale: system.imagine(c, s, say=False, scale=scale), glide=glide_painter())
    for name, paint in painters.items():
        for scale in (1, 2, 4):
            x = paint(captions, seed, float(scale))
            out[f'{name}_{scale}'] = scores.precision_recall(real, metrics.features('shapes_classifier', x), 3)[1]
            out[f'align_{name}_{scale}'] = obeyed(captions, x)[0]
    return out


def unclip_4(system, size, seed) -> dict:
    captions, out, paint = asked(size['captions'], 2), {}, glide_painter()
    for name, x in (('unclip', system.imagine(captions, seed, say=False)), ('unclip_told', system.imagine(captions, seed)),
                    ('glide', paint(captions, seed, 3.))):
        hits = glide.scene_hits(captions, x)
        out |= {f'{name}_{k}': sum(hits[k]) / len(hits[k]) for k in ('binding', 'shapes', 'colours')}
    return out


def same_kind(scene, thing, background) -> bool:
    "One thing of that shape and colour, on that background?"
    return bool(scene) and len(scene.things) == 1 and scene.background == background and \
        (scene.things[0].shape, scene.things[0].colour) == (thing.shape, thing.colour)


def unclip_5(system, size, seed) -> dict:
    images, captions, drawn = data.scenes(size['scenes'], seed=31 + seed, things=1)
    found = [parse_many(v) for v in system.vary(images, 2, seed=seed)]
    kept = [(o, s) for o, row in zip(drawn, found) for s in row if same_kind(s, o.things[0], o.background)]
    chance = [same_kind(s, o.things[0], o.background) for o, row in zip(drawn[1:] + drawn[:1], found) for s in row]
    moved = [max(abs(o.things[0].x - s.things[0].x), abs(o.things[0].y - s.things[0].y)) for o, s in kept]
    hits = {'before': [], 'edited': []}
    for image, c, o in zip(images, captions, drawn):
        old, names = o.things[0], list(COLOURS)
        new = names[(names.index(old.colour) + 3) % len(names)]
        after = caption(replace(o, things=(replace(old, colour=new, rgb=None),)))
        for k, s in zip(hits, parse_many(system.rewrite(image, c, after, (0., .5)))):
            hits[k].append(bool(s) and any(t.colour == new for t in s.things))
    share = lambda v: sum(v) / max(1, len(v))
    return dict(kept=len(kept) / sum(map(len, found)), others=share(chance), moved=share(moved), **{k: share(v) for k, v in hits.items()})


CLAIMS = {'UNCLIP-1': unclip_1, 'UNCLIP-2': unclip_2, 'UNCLIP-3': unclip_3, 'UNCLIP-4': unclip_4, 'UNCLIP-5': unclip_5}
NEEDED = {'UNCLIP-1': ['prior'], 'UNCLIP-2': ['prior', 'ar_prior'], 'UNCLIP-3': ['prior'], 'UNCLIP-4': ['prior'], 'UNCLIP-5': []}


def main(args=None):
    parser = claims_common.parser(__doc__, 'noise, and for UNCLIP-1 the further training', (0,))
    parser.add_argument('--only', nargs='+', choices=CLAIMS, default=list(CLAIMS))
    a = parser.parse_args(args)
    level, system, out = budget(a.budget), dalle2('shapes'), {}
    for id in a.only:
        names = ['clip_shapes', 'unclip_decoder_shapes', *(f'unclip_{k}_shapes' for k in NEEDED[id])]
        if id in ('UNCLIP-3', 'UNCLIP-4'): names.append('glide_shapes')
        missing = [n for n in names if not shipped(n)]
        require(not missing, f'{id} needs weights that are not shipped: {", ".join(missing)}; choose others with --only')
        runs = [CLAIMS[id](system, SIZES[level], s) for s in a.seeds]
        out[id] = claims_common.over_seeds(id, runs, level, SIZES[level])
    claims_common.store(out, a.out)


if __name__ == '__main__': main()
