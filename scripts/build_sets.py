"""Write the embedded subsets of Fashion-MNIST and MNIST: the first items of each split, in official order.

    python scripts/build_sets.py --fashion FOLDER --mnist FOLDER

Each FOLDER holds the four original idx files, plain or .gz. The result is the same idx format, xz-compressed, so
one reader serves both. Running it twice writes identical bytes.
"""
import argparse
import gzip
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


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--fashion', type=Path, help='folder of the original Fashion-MNIST files')
    parser.add_argument('--mnist', type=Path, help='folder of the original MNIST files')
    args = parser.parse_args()
    for name, folder in (('fashion_mnist', args.fashion), ('mnist', args.mnist)):
        if folder: print(f'{name}: {build(name, folder):,} bytes')
