"""Draw the pictures of README.md from the shipped weights: nbs/images/ladder.png and one strip a rung

    python scripts/pictures.py
"""
from pathlib import Path

import torch
from PIL import Image

from diffcourse import zoo
from diffcourse.core import atomic_write, image_grid, to_float
from diffcourse.data import fashion_mnist, shapes

OUT = Path(__file__).resolve().parent.parent / 'nbs/images'


def save(name: str, x, columns: int = 6, width: int = 48) -> None:
    "One strip of pictures, at most 50 KB"
    with atomic_write(OUT / f'{name}.png') as tmp: Image.fromarray(image_grid(x, columns, scale=max(1, width // x.shape[-1]))).save(tmp, 'PNG', optimize=True)


def main() -> None:
    OUT.mkdir(exist_ok=True)
    real = fashion_mnist('test').images
    save('rung_shapes', shapes(6, seed=3, size=48).images)
    save('rung_data', real[:6])
    save('rung_ae', torch.cat([to_float(real[:6]), zoo.reconstruct('ae_fashion', real[:6])]))
    save('rung_vae', zoo.sample('vae_fashion', 6, seed=1))
    save('rung_ddpm', zoo.sample('ddpm_fashion', 6, seed=1))
    if zoo.shipped('ddpm_emoji'): save('rung_emoji', zoo.sample('ddpm_emoji', 6, seed=1))
    figure, _ = zoo.ladder()
    figure.savefig(OUT / 'ladder.png', dpi=96, bbox_inches='tight')
    icon = Image.fromarray(image_grid(real[:1], scale=1)).resize((32, 32))
    icon.save(OUT / 'favicon.png')


if __name__ == '__main__': main()
