"""Draw the pictures of README.md: nbs/images/ladder.png and one strip a rung

    python scripts/pictures.py

Rungs with a trained network are drawn from the shipped weights; the others take a figure of their own executed page.
"""
import base64
import io
import json
from pathlib import Path

import torch
from PIL import Image

from diffcourse import zoo
from diffcourse.core import atomic_write, image_grid, ledger, require, to_float
from diffcourse.data import emoji, fashion_mnist, groceries, shapes

NBS = Path(__file__).resolve().parent.parent / 'nbs'
OUT = NBS / 'images'
FIGURES = {'rung_core': ('00_core', "f'contrast {c:.2f}'"), 'rung_weights': ('01a_weights', "'one scale a channel'"),
           'rung_train': ('02_train', "'their average'"), 'rung_layers': ('02a_layers', "ylabel='similarity of"),
           'rung_unet': ('07b_unet', 'draw(seen)'), 'rung_exact': ('08a_exact', "'best guess at x_0'"),
           'rung_iddpm': ('09_iddpm', "{'linear': (t, linear.alphas_cumprod)"), 'rung_adm': ('11_adm', 'asked, times ='),
           'rung_openai_unet': ('09a_openai_unet', "loc='lower center', ncols=3"),
           'rung_inception': ('17a_inception', 'window(plate)'), 'rung_extractors': ('17b_extractors', 'neighbours(second'),
           'rung_metrics': ('17_metrics', 'heaps.values()'), 'rung_scores': ('17c_scores', "ax.plot(*x[:700].T"),
           'rung_clip': ('13_clip', 'queries = ['), 'rung_edit': ('14a_edit', 'edits = ['),
           'rung_first_stage': ('16_first_stage', 'beside(model, unseen[some])'),
           'rung_sd': ('16c_stable_diffusion', 'shown = [walked['),
           'rung_lab': ('17d_lab', "'1 / N', 'feature-FID of perfect samples'"), 'rung_zoo': ('18_zoo', 'figure, seconds = ladder()')}
COLOURS = {'reproduced': (46, 139, 87), 'not measured yet': (200, 200, 200)}  # of a claim's tile; anything else is orange


def store(name: str, picture: Image.Image, colours: int = 128) -> None:
    "Write a PNG with a palette, whole or not at all"
    picture = picture.convert('RGB').quantize(colours, Image.Quantize.MAXCOVERAGE, kmeans=2)
    with atomic_write(OUT / f'{name}.png') as tmp: picture.save(tmp, 'PNG', optimize=True)


def strip(name: str, x, columns: int = 6, width: int = 48) -> None:
    "One row of pictures"
    store(name, Image.fromarray(image_grid(x, columns, scale=max(1, width // x.shape[-1]))))


def figure(name: str, page: str, text: str, width: int = 300) -> None:
    "The figure of the only cell of a page that holds this text, made smaller"
    cells = json.loads((NBS / f'{page}.ipynb').read_text(encoding='utf-8'))['cells']
    found = [o['data']['image/png'] for c in cells if c['cell_type'] == 'code' and text in ''.join(c['source'])
             for o in c['outputs'] if 'image/png' in o.get('data', {})]
    require(len(found) > 0, f'{page} has no figure in a cell with {text!r}: run it first')
    picture = Image.open(io.BytesIO(base64.b64decode(found[0]))).convert('RGB')
    picture = picture.resize((width, round(picture.height * width / picture.width)), Image.LANCZOS)
    store(name, picture, 64)


def tiles(name: str, side: int = 14) -> None:
    "One square for each claim of the ledger, coloured by its verdict"
    verdicts = [row[-1] for row in ledger().rows]
    picture = Image.new('RGB', (len(verdicts) * (side + 3), side), 'white')
    for i, word in enumerate(verdicts): picture.paste(COLOURS.get(word, (217, 140, 95)), (i * (side + 3), 0, i * (side + 3) + side, side))
    store(name, picture)


def main() -> None:
    OUT.mkdir(exist_ok=True)
    real = fashion_mnist('test').images
    strip('rung_shapes', shapes(6, seed=3, size=48).images)
    strip('rung_data', real[:6])
    strip('rung_ae', torch.cat([to_float(real[:6]), zoo.reconstruct('ae_fashion', real[:6])]))
    strip('rung_vae', zoo.sample('vae_fashion', 6, seed=1))
    strip('rung_vqvae', torch.cat([to_float(real[:6]), zoo.reconstruct('vqvae_fashion', real[:6])]))
    strip('rung_priors', zoo.sample('vqvae_fashion_prior', 6, seed=1))
    fruit = groceries('test').images[:160:32]
    strip('rung_vqvae2', torch.cat([to_float(fruit), zoo.reconstruct('vqvae2_grocery', fruit)]), 5, 64)
    small = torch.nn.functional.avg_pool2d(emoji('test').images[:6].float(), 2).round().byte()
    strip('rung_dvae', torch.cat([to_float(small), zoo.reconstruct('dvae_emoji', small)]))
    strip('rung_dalle', zoo.sample('dalle_shapes', 6, seed=1))
    strip('rung_ddpm', zoo.sample('ddpm_fashion', 6, seed=1))
    strip('rung_emoji', zoo.sample('ddpm_emoji', 6, seed=1))
    strip('rung_ddim', zoo.sample('ddim_fashion', 6, seed=1))
    strip('rung_cfg', zoo.sample('cfg_fashion', 6, seed=1))
    strip('rung_glide', zoo.sample('glide_emoji', 6, seed=1))
    strip('rung_dalle2', zoo.sample('unclip_shapes', 6, seed=1))
    strip('rung_ldm', zoo.sample('ldm_emoji', 6, seed=1), width=64)
    strip('rung_measure', torch.cat([to_float(real[:6]), zoo.sample('ddpm_fashion', 6, seed=2)]))
    for name, where in FIGURES.items(): figure(name, *where)
    tiles('rung_claims')
    figure('ladder', '18_zoo', 'figure, seconds = ladder()', 900)
    icon = Image.fromarray(image_grid(real[:1], scale=1)).resize((32, 32))
    icon.save(OUT / 'favicon.png')


if __name__ == '__main__': main()
