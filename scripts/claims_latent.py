"""Measure claims LDM-3 to LDM-5: where attention goes, what is near in the sequence of words, what the scale factor is worth

    python scripts/claims_latent.py --budget laptop --out latent.json [--only LDM-3 …]

Needs the shipped clip_emoji and clip_shapes (LDM-4), kl_shapes and ldm_shapes (LDM-3), kl_shapes (LDM-5). The rules are in data/claims/rules.json.
"""
import json

import claims_common
import torch
import torch.nn.functional as F

from diffcourse import data, metrics
from diffcourse.clip import tokens_of
from diffcourse.core import budget, default_device, generator, require
from diffcourse.dalle2 import world
from diffcourse.ddpm import device_of, q_sample
from diffcourse.glide import held_out, told_scenes, unseen_captions
from diffcourse.latent import (attention_maps, clouds, guided, latent_denoiser, ldm_shapes, loss_latent, read_words, small_unet,
                               stage_of, text_to_latents, word_maps)
from diffcourse.shapes import Scene, caption, masks
from diffcourse.train import Trainer
from diffcourse.weights import load_weights, shipped

SIZES = {'smoke': dict(scenes=6, pairs=20, steps=20, train=300, drawn=8), 'laptop': dict(scenes=200, pairs=300, steps=700, train=6000, drawn=200),
         'gpu': dict(scenes=1000, pairs=300, steps=5000, train=60_000, drawn=1000)}


def ranks_above(values, inside, outside) -> float:
    "Share of pairs (a place inside, one outside) in which the one inside has more"
    a, b = values[inside], values[outside]
    return float(((a[:, None] > b) + .5 * (a[:, None] == b)).double().mean())


@torch.no_grad()
def maps_of(net, images, captions, seed):
    "Word maps (B, L, 8, 8) of true scenes at equal parts of signal and noise"
    s = latent_denoiser(net).schedule
    z0, t = clouds(stage_of('shapes'), images).chunk(2, 1)[0], int((s.alphas_cumprod - .5).abs().argmin())
    z = q_sample(z0, s.alphas_cumprod[t], torch.randn(z0.shape, generator=generator(seed))).to(device_of(net))
    told, _ = guided(net, captions, 'shapes')
    with attention_maps(net) as maps: net(z, torch.full((len(z),), t, device=z.device), told)
    return word_maps(maps, z.shape[-1]).cpu()


def routed(net, scenes, seed) -> dict:
    "Mean areas under the curve, by kind of word, for a word's own thing and for the other one"
    images, captions, drawn = scenes
    found, out = maps_of(net, images, captions, seed), {}
    for maps, c, s in zip(found, captions, drawn):
        covered, words = F.avg_pool2d(masks(s)[None], 4)[0], c.split()
        for k, thing in enumerate(s.things):
            for kind, word in (('colour', thing.colour), ('shape', thing.shape)):
                at = [i for i, w in enumerate(words) if w == word]
                at = 1 + at[k if len(at) > 1 else 0]                       # the start mark is word 0
                for name, j in ((f'own_{kind}', k), (f'other_{kind}', 1 - k)):
                    inside, outside = covered[j] > .5, covered.sum(0) == 0
                    if inside.any() and outside.any(): out.setdefault(name, []).append(ranks_above(maps[at], inside, outside))
    mean = {k: sum(v) / len(v) for k, v in out.items()}
    return mean | {k: (mean[f'{k}_colour'] + mean[f'{k}_shape']) / 2 for k in ('own', 'other')}


def ldm_3(size, seed) -> dict:
    images, captions, drawn = data.scenes(20 * size['scenes'], seed=77 + seed, things=(2,))
    keep = [i for i, c in enumerate(captions) if held_out(c)][:size['scenes']]
    scenes = images[keep], [captions[i] for i in keep], [drawn[i] for i in keep]
    net = load_weights('ldm_shapes', ldm_shapes.model()).to(default_device()).eval()
    torch.manual_seed(seed)
    return routed(net, scenes, seed) | dict(fresh=routed(small_unet('shapes').to(default_device()).eval(), scenes, seed)['own'])


@torch.no_grad()
def farther(name, triples) -> tuple:
    "Shares of (A, same meaning, other meaning) in which the same meaning lies farther off: as a sequence, and as an embedding"
    clip, tokens = world(name).clip, [tokens_of(t, name) for t in zip(*triples)]
    a, p, d = (clip.text_states(t, skip=1).flatten(1) for t in tokens)
    za, zp, zd = (clip.encode_text(t, normalize=True) for t in tokens)
    share = lambda far, near: float((far > near).double().mean())
    return share((a - p).norm(dim=1), (a - d).norm(dim=1)), share(-(za * zp).sum(1), -(za * zd).sum(1))


def ldm_4(size, seed) -> dict:
    e, g = data.emoji('train', size=32), generator(seed)
    phrase = [c.rsplit(', ', 1)[0] for c in e.captions]
    style, length = e.extra['style'], (tokens_of(e.captions, 'emoji') > 0).sum(1).tolist()
    triples = []
    for i in torch.randperm(len(e), generator=g).tolist():
        others = [j for j in range(len(e)) if style[j] == style[i] and length[j] == length[i] and e.extra['code'][j] != e.extra['code'][i]]
        if not others: continue
        j = others[int(torch.randint(len(others), (1,), generator=g))]
        triples.append((e.captions[i], f'a {style[i]} emoji of {phrase[i]}', e.captions[j]))
        if len(triples) == size['pairs']: break
    out = dict(zip(('farther', 'farther_pooled'), farther('emoji', triples)))
    return out | dict(zip(('shapes', 'shapes_pooled'), farther('shapes', exchanged(size['pairs'], seed))))


def exchanged(n, seed):
    "X left of Y; Y right of X; the colours exchanged"
    rows, scenes = [], data.scenes(20 * n, seed=55 + seed, things=(2,))[2]
    for s in scenes:
        a, b = s.things
        if a.colour == b.colour or s.background == 'dark': continue
        text = caption(Scene((a, b), s.background))
        for said, back in (('left of', 'right of'), ('right of', 'left of'), ('above', 'below'), ('below', 'above')):
            if f' {said} ' in text:
                x, y = text.split(f' {said} ')
                other = ' '.join({a.colour: b.colour, b.colour: a.colour}.get(w, w) for w in text.split())
                rows.append((text, f'{y} {back} {x}', other))
        if len(rows) >= n: break
    return rows


def ldm_5(size, seed) -> dict:
    images, captions = told_scenes(size['train'])
    stage, told = stage_of('shapes'), read_words(captions, 'shapes')
    codes = clouds(stage, images)
    asked = [c for k in (1, 2) for c in unseen_captions(size['drawn'] // 2, k)]
    real, out = data.shapes(len(asked), seed=99, things=(1, 2)).images, {}
    for name, factor in (('1', 1.), ('big', 1 / .18215), ('small', .18215)):
        table = dict(x=factor * codes, context=told)
        torch.manual_seed(seed)
        net = Trainer(small_unet('shapes'), loss_latent(latent_denoiser(None), 'shapes'), table, steps=size['steps'], batch_size=32,
                      lr=3e-3, ema=.995, seed=seed, progress=False, bf16=False).fit().ema_model()
        z = text_to_latents(net, asked, 'shapes', 10_000 + seed).cpu() / factor
        with torch.no_grad(): x = stage.pictures(z)
        out[f'fid_{name}'] = metrics.feature_fid(x.cpu(), real, 'shapes_classifier', resamples=0).value
    return out


CLAIMS = {'LDM-3': (ldm_3, ['kl_shapes', 'clip_shapes', 'ldm_shapes']), 'LDM-4': (ldm_4, ['clip_emoji', 'clip_shapes']),
          'LDM-5': (ldm_5, ['kl_shapes', 'clip_shapes'])}


def main(args=None):
    parser = claims_common.parser(__doc__, 'scenes, pairs and noise, and for LDM-5 the training', (0,))
    parser.add_argument('--only', nargs='+', choices=CLAIMS, default=list(CLAIMS))
    a = parser.parse_args(args)
    level, out = budget(a.budget), {}
    for id in a.only:
        measure, names = CLAIMS[id]
        missing = [n for n in names if not shipped(n)]
        require(not missing, f'{id} needs weights that are not shipped: {", ".join(missing)}; choose others with --only')
        runs = [measure(SIZES[level], s) for s in a.seeds]
        out[id] = claims_common.over_seeds(id, runs, level, SIZES[level])
    claims_common.store(out, a.out)


if __name__ == '__main__': main()
