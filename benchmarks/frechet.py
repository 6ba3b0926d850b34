"""Fréchet distance: ours against pytorch-fid's sqrtm, interleaved in one process, medians

python benchmarks/frechet.py [--d 2048] [--n 5000 1000] [--rounds 3] [--threads 1]

Each N is a row of cases: `ordinary` has variances over six decades, as Inception's features do; `steep` has them over sixteen,
so that half of the directions are rounding; `dead` has an eighth of the features constant. N below D makes any of them singular.
"""
import argparse, statistics, time, warnings

import torch
from pytorch_fid.fid_score import calculate_frechet_distance as peer

from diffcourse.core import Table, generator
from diffcourse.metrics import Statistics, frechet_distance
from diffcourse.train import device_name

CASES = {'ordinary': 3, 'steep': 8, 'dead': 3}   # name → decades of standard deviation


def moments(n: int, d: int, seed: int, case: str = 'ordinary') -> Statistics:
    "Statistics of n correlated features whose standard deviations fall over some decades"
    gen, scale = generator(seed), torch.logspace(0, -CASES[case], d, dtype=torch.float64)
    mix = torch.linalg.qr(torch.randn(d, d, generator=generator(0), dtype=torch.float64))[0]
    s = Statistics()
    for i in range(0, n, 500):
        x = torch.randn(min(500, n - i), d, generator=gen, dtype=torch.float64) * scale @ mix * (1 + .1 * seed)
        if case == 'dead': x[:, ::8] = .5
        s.update(x)
    return s


def timed(f):
    "Seconds, seconds of CPU, and the value"
    start, cpu = time.perf_counter(), time.process_time()
    value = f()
    return time.perf_counter() - start, time.process_time() - cpu, float(value)


def compare(n: int, d: int, rounds: int, case: str = 'ordinary') -> list:
    "One row of the table for each implementation"
    a, b = moments(n, d, 1, case), moments(n, d, 2, case)
    arrays = [x.numpy() for s in (a, b) for x in (s.mean, s.cov)]
    finished = [Statistics.from_moments(s.mean, s.cov, s.n) for s in (a, b)]   # both start from mean and covariance
    ways = {'pytorch-fid (sqrtm)': lambda: peer(*arrays), 'diffcourse': lambda: frechet_distance(*finished)}
    runs = {k: [] for k in ways}
    for _ in range(rounds):
        for k, f in ways.items(): runs[k].append(timed(f))
    wall, cpu = ({k: statistics.median(t[i] for t in v) for k, v in runs.items()} for i in (0, 1))
    them = 'pytorch-fid (sqrtm)'
    return [(case, n, k, wall[k], wall[them] / wall[k], cpu[them] / cpu[k], f'{v[0][2]:.10g}') for k, v in runs.items()]


def table(d: int = 2048, n: tuple = (5000, 1000), rounds: int = 3, cases: tuple = ('ordinary',)) -> Table:
    "Every case at every N"
    rows = [row for case in cases for k in n for row in compare(k, d, rounds, case)]
    return Table(rows, ('case', 'N', 'code', 'seconds', 'times faster', 'same, by CPU time', 'distance'))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--d', type=int, default=2048, help='features')
    parser.add_argument('--n', type=int, nargs='+', default=[5000, 1000], help='pictures on each side')
    parser.add_argument('--cases', nargs='+', choices=CASES, default=list(CASES), help='which covariances')
    parser.add_argument('--rounds', type=int, default=3, help='the median of so many is shown')
    parser.add_argument('--threads', type=int, help="PyTorch's threads; SciPy's follow OMP_NUM_THREADS")
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    if args.threads: torch.set_num_threads(args.threads)
    print(f'd = {args.d}, {device_name(torch.device("cpu"))}, torch {torch.__version__}, median of {args.rounds}')
    print(table(args.d, args.n, args.rounds, args.cases))
