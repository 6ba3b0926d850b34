"""Write the embedded emoji set: one 64×64 WebP atlas for each style, and one JSON file of captions.

    python scripts/build_emoji.py [--packages FOLDER]

FOLDER holds the five packages below as `npm pack` writes them; those that are missing are fetched by name and
version. Each must have the SHA-256 given here. Running it twice writes identical bytes (with one version of
Pillow: another WebP encoder may choose other bytes).
"""
import argparse
import hashlib
import io
import json
import lzma
import re
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from diffcourse.core import atomic_write, require, sha256

OUT = Path(__file__).resolve().parent.parent / 'data' / 'sets' / 'emoji'
SIDE, COLUMNS = 64, 48
PACKAGES = {
    'noto': ('emoji-datasource-google@16.0.0', 'fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438'),
    'twemoji': ('emoji-datasource-twitter@16.0.0', 'f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877'),
    'fluent': ('@lobehub/fluent-emoji-3d@1.1.0', 'c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58'),
    'names': ('cldr-annotations-full@48.2.0', '28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1'),
    'derived': ('cldr-annotations-derived-full@48.2.0', '4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e'),
}
FILES = {'noto': 'package/img/google/64/{}.png', 'twemoji': 'package/img/twitter/64/{}.png', 'fluent': 'package/assets/{}.webp'}
STYLES = tuple(FILES)
HAS = {'noto': 'has_img_google', 'twemoji': 'has_img_twitter'}
BORROWED = ('country-flag', 'subdivision-flag')  # the Fluent package fills these with Noto's drawings: leave them out


def fetch(key: str, folder: Path) -> tarfile.TarFile:
    "Open one package, packing it with npm when it is not in the folder; its SHA-256 must be the known one"
    spec, want = PACKAGES[key]
    path = folder / (spec.lstrip('@').replace('/', '-').replace('@', '-') + '.tgz')
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(['npm', 'pack', spec], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    require(sha256(path) == want, f'{path} is not the {spec} this script was written for (SHA-256 differs)')
    return tarfile.open(path)


def annotations(packages: dict) -> dict:
    "CLDR's English names and keywords: emoji without variation selectors → {'tts': [name], 'default': [keywords]}"
    read = lambda tar, path: json.load(tar.extractfile(path))
    derived = read(packages['derived'], 'package/annotationsDerived/en/annotations.json')['annotationsDerived']
    names = read(packages['names'], 'package/annotations/en/annotations.json')['annotations']
    return {**derived['annotations'], **names['annotations']}


NO_ARTICLE = {'Aries', 'Taurus', 'Gemini', 'Cancer', 'Leo', 'Virgo', 'Libra', 'Scorpio', 'Ophiuchus', 'Sagittarius', 'Capricorn',
              'Aquarius', 'Pisces'}


def phrase(name: str) -> str:
    "CLDR's short name as a noun phrase: 'polar bear' → 'a polar bear', 'woman: red hair' → 'a woman with red hair'"
    head, _, rest = name.partition(': ')
    if head == 'flag': return f'the flag of {rest}'
    if head == 'keycap': return f'a keycap {rest}'
    if rest in ('bald', 'beard'): rest = {'bald': 'a bald head', 'beard': 'a beard'}[rest]
    if rest.endswith(('hair', 'head', 'beard')): name = f'{head} with {rest}'
    subject = re.split(' (?:with|in|of|holding|lifting|over|and) ', name)[0]
    if re.search(r'[^suaio]s$|^(?:people|men|women)$', subject) or name in NO_ARTICLE: return name
    an = re.match(r'[aeioAEIO]|u[^ns]|un[^i]|[FHLMNRSX][A-Z]', name) and not re.match('one|eu|ewe|SOON|NEW|FREE', name)
    return f'{"an" if an else "a"} {name}'


def share(*words: str) -> float:
    "A number in [0, 1) that is a function of the words alone"
    return int.from_bytes(hashlib.sha256('|'.join(words).encode()).digest()[:6], 'big') / 2**48


def held_out(code: str, styles: list) -> str | None:
    "The style in which a concept is kept for the test split: one concept in five of those drawn in all styles"
    if len(styles) < len(STYLES) or share('held out', code) >= .2: return None
    return STYLES[int(share('style', code) * len(STYLES))]


def concepts(packages: dict) -> list[dict]:
    "Every base emoji: code, name, phrase, keywords, categories, the styles that draw it, the style held out"
    cldr, out = annotations(packages), []
    present = {s: set(packages[s].getnames()) for s in STYLES}
    table = json.load(packages['noto'].extractfile('package/emoji.json'))
    for e in sorted((e for e in table if e['category'] != 'Component'), key=lambda e: e['sort_order']):
        code = e['unified'].lower()
        char = ''.join(chr(int(c, 16)) for c in code.split('-'))
        known = cldr.get(char.replace('\ufe0f', ''), {})
        name = known.get('tts', [e['name'].lower()])[0]
        styles = [s for s in STYLES if FILES[s].format(code) in present[s] and e.get(HAS.get(s), True)]
        if e['subcategory'] in BORROWED: styles = [s for s in styles if s != 'fluent']
        out.append(dict(code=code, name=name, phrase=phrase(name), keywords=known.get('default', []), category=e['category'],
                        subcategory=e['subcategory'], styles=styles, held_out=held_out(code, styles)))
    return out


def tile(data: bytes) -> Image.Image:
    "A picture of any size as 64×64 RGB on white"
    image = Image.open(io.BytesIO(data)).convert('RGBA')
    flat = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')
    scale = SIDE / max(flat.size)
    if scale != 1: flat = flat.resize([max(1, round(n * scale)) for n in flat.size], Image.Resampling.LANCZOS)
    out = Image.new('RGB', (SIDE, SIDE), 'white')
    out.paste(flat, ((SIDE - flat.width) // 2, (SIDE - flat.height) // 2))
    return out


def tiles(tar: tarfile.TarFile, wanted: list) -> list:
    "The wanted members as tiles, in the order wanted (read in the order of the archive: seeking back is slow)"
    want, out = set(wanted), {}
    for member in tar.getmembers():
        if member.name in want: out[member.name] = tile(tar.extractfile(member).read())
    return [out[name] for name in wanted]


def atlas(pictures: list) -> Image.Image:
    "Tiles in reading order, 48 a row"
    rows = -(-len(pictures) // COLUMNS)
    out = Image.new('RGB', (COLUMNS * SIDE, rows * SIDE), 'white')
    for i, t in enumerate(pictures): out.paste(t, (i % COLUMNS * SIDE, i // COLUMNS * SIDE))
    return out


def build(folder: Path, quality: int = 95) -> int:
    "Write the set; returns the bytes written"
    packages = {k: fetch(k, folder) for k in PACKAGES}
    items, total = concepts(packages), 0
    for style in STYLES:
        wanted = [FILES[style].format(c['code']) for c in items if style in c['styles']]
        picture = atlas(tiles(packages[style], wanted))
        with atomic_write(OUT / f'{style}.webp') as tmp:
            picture.save(tmp, 'WEBP', quality=quality, method=6)
            total += tmp.stat().st_size
    lines = ',\n'.join(json.dumps(c, ensure_ascii=False) for c in items)
    with atomic_write(OUT / 'emoji.json.xz') as tmp:
        tmp.write_bytes(lzma.compress(f'[\n{lines}\n]\n'.encode(), preset=9))
        total += tmp.stat().st_size
    return total


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--packages', type=Path, default=Path('packages'), help='folder of the packed npm packages')
    print(f'emoji: {build(parser.parse_args().packages):,} bytes')
