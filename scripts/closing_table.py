"""The same prompts for GLIDE, unCLIP and latent diffusion: alignment, realism and time, into data/measured/text_to_image.json

    python scripts/closing_table.py [--n 200] [--only shapes emoji] [--judge clip_emoji_judge.safetensors] [--no-inception]

Scenes: n held-out sentences, half of one thing and half of two; the parser's verdict, feature-FID (shapes_classifier)
and FID against 500 true scenes of the same kinds, with 200 further true scenes as the control. Emoji: n / 2 captions, half of
them pairs of concept and style that were held out; retrieval among all of these captions by clip_emoji_judge (another
seed, split and picture tower than any CLIP that a model was trained with; not shipped: `diffcourse train clip_emoji_judge`),
feature-FID (emoji_classifier) and FID. FIDs of so few pictures are far too high; compare them with the control only.
Some fifteen minutes of one core.
"""
import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from diffcourse import clip, dalle2, data, glide, inception, latent, metrics, zoo  # noqa: F401 (inception registers itself)
from diffcourse.core import atomic_write, default_device, to_float
from diffcourse.train import device_name
from diffcourse.weights import load_weights

ROOT = Path(__file__).resolve().parent.parent
SHAPES, EMOJI = ('glide_shapes', 'unclip_shapes', 'ldm_shapes'), ('glide_emoji', 'unclip_emoji', 'ldm_emoji')


def painter(name: str):
    "captions → pictures, 25 steps, each model at its recipe's own guidance"
    if name.startswith('unclip'):
        system = dalle2.dalle2(name[7:])
        return lambda captions: system.imagine(captions, 1)
    net, kind = zoo.load(name), name.split('_')[1]
    if name.startswith('ldm'): return lambda captions: latent.text_to_image(net, captions, kind, 1)
    bpe, denoiser = (glide.shapes_bpe, glide.glide_denoiser) if kind == 'shapes' else (glide.emoji_bpe, glide.glide_emoji_denoiser)
    return lambda captions: glide.text_to_image(net, bpe(), captions, 1, denoiser=denoiser)


def painted(name, captions) -> tuple:
    "Pictures of all captions, and seconds of a core for each"
    paint, start = painter(name), time.process_time()
    x = torch.cat([paint(captions[i:i + 50]).cpu() for i in range(0, len(captions), 50)])
    return x, round((time.process_time() - start) / len(captions), 2)


def realism(x, reference, extractor, with_fid) -> dict:
    kinds = {'feature_fid': extractor} | ({'fid': 'inception'} if with_fid else {})
    return {k: round(metrics.feature_fid(x, reference, e, resamples=0).value, 2) for k, e in kinds.items()}


def scenes(n, with_fid) -> dict:
    captions = [c for k in (1, 2) for c in glide.unseen_captions(n // 2, k)]
    reference, control = data.shapes(500, seed=99, things=(1, 2)), data.scenes(n, seed=98, things=(1, 2))
    def row(captions, x, seconds):
        hits = glide.scene_hits(captions, x)
        share = lambda k: [round(v, 3) for v in glide.share_interval(hits[k])]
        return {k: share(k) for k in ('all', 'binding', 'shapes', 'colours')} | realism(x, reference, 'shapes_classifier', with_fid) | {'seconds': seconds}
    out = {'true scenes': row(control[1], to_float(control[0]), 0)}
    for name in SHAPES: out[name] = row(captions, *painted(name, captions)); print(name, out[name], flush=True)
    return out


def emoji(n, judge, with_fid) -> dict:
    half, train, test = n // 4, data.emoji('train', size=32), data.emoji('test', size=32)
    chosen = [s.subset(torch.randperm(len(s), generator=torch.Generator().manual_seed(3))[:half]) for s in (train, test)]
    captions, real = [c for s in chosen for c in s.captions], torch.cat([to_float(s.images) for s in chosen])
    reference = train.subset(torch.randperm(len(train), generator=torch.Generator().manual_seed(4))[:500])
    model = clip.clip_emoji_judge.model()
    model = load_weights(judge, model).eval()
    with torch.no_grad(): text = clip.embedded(model.encode_text, clip.tokens_of(captions, 'emoji'))
    def row(x, seconds):
        small = F.avg_pool2d(x, 2) if x.shape[-1] == 64 else x
        with torch.no_grad(): found = (clip.embedded(model.encode_image, small) @ text.T).argmax(1) == torch.arange(len(x))
        share = lambda v: [round(k, 3) for k in glide.share_interval(v.tolist())]
        return {'found_trained': share(found[:half]), 'found_held_out': share(found[half:])} | \
            realism(small, reference, 'emoji_classifier', with_fid) | {'seconds': seconds}
    out = {'true emoji': row(real, 0)}
    for name in EMOJI: out[name] = row(*painted(name, captions)); print(name, out[name], flush=True)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--n', type=int, default=200)
    parser.add_argument('--only', nargs='+', choices=('shapes', 'emoji'), default=('shapes', 'emoji'))
    parser.add_argument('--judge', default='clip_emoji_judge')
    parser.add_argument('--no-inception', action='store_true')
    parser.add_argument('--out', type=Path, default=ROOT / 'data/measured/text_to_image.json')
    a = parser.parse_args()
    out = json.loads(a.out.read_text()) if a.out.exists() else {}
    for kind in a.only:
        rows = scenes(a.n, not a.no_inception) if kind == 'shapes' else emoji(a.n, a.judge, not a.no_inception)
        out[kind] = {'n': a.n if kind == 'shapes' else a.n // 2, 'rows': rows, 'device': device_name(default_device())}
        with atomic_write(a.out) as tmp: tmp.write_text(json.dumps(out, indent=1) + '\n')


if __name__ == '__main__': main()
