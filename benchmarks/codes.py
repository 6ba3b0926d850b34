"""Nearest codes: the search in pieces against the naive table of all distances, time and peak memory, side by side in one run.

    python benchmarks/codes.py [--vectors 8192] [--codes 128 1024 8192] [--dims 16 64 512] [--rounds 5] [--threads N] [--json FILE]

Every contender finds the codes of the same vectors in every round, in another order; medians of time are reported. Memory is by
how much the process grows at its highest while a contender runs once more, after the timings. The peer, vector-quantize-pytorch, takes part
where it is installed (it is not among this package's requirements).
"""
import argparse
import gc
import importlib.util
import json
import random
import statistics
import time
from functools import lru_cache
from pathlib import Path

import torch

from diffcourse.vqvae import nearest_code


def naive(z, codebook):
    "All distances at once, as most published quantisers write them"
    return (z.square().sum(1, keepdim=True) - 2 * z @ codebook.T + codebook.square().sum(1)).argmin(1)


def onehot(z, codebook):
    "The same, then the one-hot table from which such code takes counts and codes (zalando, Sonnet, VQGAN's first)"
    indices = naive(z, codebook)
    table = torch.zeros(len(z), len(codebook)).scatter_(1, indices[:, None], 1)
    return (table @ codebook).shape and indices


@lru_cache(1)
def peer_module(K, D):
    "Made once for each size, in the first round"
    from vector_quantize_pytorch import VectorQuantize
    return VectorQuantize(dim=D, codebook_size=K, kmeans_init=False).eval()


def peer(z, codebook):
    "vector-quantize-pytorch in eval mode with our codes; it returns codes and loss as well"
    vq = peer_module(*codebook.shape)
    vq._codebook.embed.data.copy_(codebook[None])
    return vq(z[None])[1][0]


CONTENDERS = {'in pieces of 32 MiB': nearest_code, 'in pieces of 2 MiB': lambda z, c: nearest_code(z, c, 2 << 20),
              'all distances': naive, 'all distances and one-hot': onehot}
if importlib.util.find_spec('vector_quantize_pytorch'): CONTENDERS['vector-quantize-pytorch'] = peer


def task(n, K, D):
    "Vectors and codes, the same for all"
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, D, generator=g), torch.randn(K, D, generator=g)


def status(field):
    "A line of /proc/self/status, in MiB"
    lines = dict(l.split(':', 1) for l in Path('/proc/self/status').read_text().splitlines() if ':' in l)
    return int(lines[field].split()[0]) / 1024


def peak(search, z, codes):
    "MiB by which the process grows at most while one contender runs (Linux only)"
    gc.collect()
    Path('/proc/self/clear_refs').write_text('5')   # forget the highest mark so far
    before = status('VmRSS')
    search(z, codes)
    return status('VmHWM') - before


@torch.no_grad()
def compare(n, K, D, rounds):
    "One row for each contender"
    z, codes = task(n, K, D)
    times, want = {k: [] for k in CONTENDERS}, nearest_code(z, codes)
    for _ in range(rounds):
        for name in random.sample(list(CONTENDERS), len(CONTENDERS)):
            start = time.perf_counter()
            found = CONTENDERS[name](z, codes)
            times[name].append(time.perf_counter() - start)
            assert (found == want).double().mean() > .999, name   # ties within rounding may fall differently
    return [dict(vectors=n, codes=K, dims=D, contender=k, ms=round(1000 * statistics.median(t), 1),
                 mib=round(peak(CONTENDERS[k], z, codes), 1), table_mib=round(n * K * 4 / 2**20, 1)) for k, t in times.items()]


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--vectors', type=int, default=8192)
    p.add_argument('--codes', type=int, nargs='+', default=[128, 1024, 8192])
    p.add_argument('--dims', type=int, nargs='+', default=[16, 64, 512], help='as many as --codes')
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--threads', type=int, default=None)
    p.add_argument('--json', default=None)
    a = p.parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    rows = [r for K, D in zip(a.codes, a.dims) for r in compare(a.vectors, K, D, a.rounds)]
    for r in rows: print('{codes:6} × {dims:3}  {contender:28} {ms:8.1f} ms {mib:8.1f} MiB  (table {table_mib:.0f} MiB)'.format(**r))
    if a.json: open(a.json, 'w', encoding='utf-8').write(json.dumps(rows, indent=1) + '\n')


if __name__ == '__main__': main()
