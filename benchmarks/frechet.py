"""Fréchet distance: ours against pytorch-fid's sqrtm, interleaved in one process, medians

python benchmarks/frechet.py [--d 2048] [--n 5000 1000] [--rounds 3]"""
import argparse, statistics, time, warnings

import torch
from pytorch_fid.fid_score import calculate_frechet_distance as peer

from diffcourse.core import Table, generator
from diffcourse.metrics import Statistics, frechet_distance
from diffcourse.train import device_name


def moments(n: int, d: int, seed: int) -> Statistics:
    "Statistics of n correlated features whose variances fall over six decades, as Inception's do"
    gen, scale = generator(seed), torch.logspace(0, -3, d)
    mix = torch.linalg.qr(torch.randn(d, d, generator=generator(0)))[0]
    s = Statistics()
    for _ in range(0, n, 500): s.update((torch.randn(min(500, n), d, generator=gen) * scale) @ mix * (1 + .1 * seed))
    return s


def timed(f):
    "Seconds and value"
    start = time.perf_counter()
    value = f()
    return time.perf_counter() - start, float(value)


def compare(n: int, d: int, rounds: int) -> list:
    "One row of the table for each implementation"
    a, b = moments(n, d, 1), moments(n, d, 2)
    arrays = [x.numpy() for s in (a, b) for x in (s.mean, s.cov)]
    ways = {'pytorch-fid (sqrtm)': lambda: peer(*arrays), 'diffcourse': lambda: frechet_distance(a, b)}
    runs = {k: [] for k in ways}
    for _ in range(rounds):
        for k, f in ways.items(): runs[k].append(timed(f))
    seconds = {k: statistics.median(t for t, _ in v) for k, v in runs.items()}
    return [(n, k, seconds[k], seconds['pytorch-fid (sqrtm)'] / seconds[k], f'{v[0][1]:.10g}') for k, v in runs.items()]


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--d', type=int, default=2048, help='features')
    parser.add_argument('--n', type=int, nargs='+', default=[5000, 1000], help='pictures on each side')
    parser.add_argument('--rounds', type=int, default=3, help='the median of so many is shown')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    print(f'd = {args.d}, {device_name(torch.device("cpu"))}, torch {torch.__version__}, median of {args.rounds}')
    print(Table([row for n in args.n for row in compare(n, args.d, args.rounds)], ('N', 'code', 'seconds', 'times faster', 'distance')))
