"""Inception features and the Fréchet distance, against pytorch-fid, interleaved in one process, medians

python benchmarks/metrics.py                      # features, bf16's shift of the FID, memory; quiet machine, minutes
python benchmarks/metrics.py --frechet            # also the distance at d = 2048 (benchmarks/frechet.py)
python benchmarks/metrics.py --batch 4 --rounds 1 --shift 0 --memory 500 1000   # smoke"""
import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from diffcourse import data, inception, metrics
from diffcourse.core import Table, fast_bf16, to_float
from diffcourse.train import device_name, peak_memory, read_tensors


def weights() -> dict:
    "pytorch-fid's state dict; where the packaged weights end before the last layer, zeros stand for it"
    net = inception.Inception()
    return {**net.state_dict(), 'fc.weight': torch.zeros(1008, 2048), 'fc.bias': torch.zeros(1008),
            **read_tensors(inception.fetch())[0]}


def peer(device):
    "pytorch-fid's own network as its command line uses it"
    import pytorch_fid.inception as theirs
    theirs.load_state_dict_from_url = lambda *a, **k: weights()
    return theirs.InceptionV3([3]).to(device).eval()


def contenders(device) -> dict:
    "name → function of bytes (B, 3, H, W) that returns features (B, 2048)"
    theirs, networks = peer(device), {p: inception.load_inception(precision=p).to(device, memory_format=torch.channels_last)
                                      for p in ('float32', 'bf16')}
    run = lambda net: lambda u: net.features(to_float(u.to(device)))
    return {'pytorch-fid': lambda u: theirs(u.to(device).float() / 255)[0].flatten(1), **{f'diffcourse, {p}': run(n) for p, n in networks.items()}}


def timed(f, u, device):
    "CPU seconds and wall seconds of one call, and its result"
    if device.type == 'cuda': torch.cuda.synchronize()
    cpu, wall = time.process_time(), time.perf_counter()
    with torch.no_grad(): y = f(u)
    if device.type == 'cuda': torch.cuda.synchronize()
    return time.process_time() - cpu, time.perf_counter() - wall, y.float().cpu()


def feature_table(batch: int, rounds: int, device, bf16: bool) -> Table:
    "Pictures a second of each contender, by wall time and (on a CPU) by CPU time, and the largest relative difference"
    u = data.emoji('test', size=32).images[:batch]
    ways = {k: f for k, f in contenders(device).items() if bf16 or 'bf16' not in k}
    runs = {k: [] for k in ways}
    for i in range(rounds + 1):                                  # the first round warms up
        for k, f in ways.items(): runs[k].append(timed(f, u, device))
    first, middle = 'pytorch-fid', lambda k, j: statistics.median(r[j] for r in runs[k][1:])
    ratio = lambda k, j: statistics.median(a[j] / b[j] for a, b in zip(runs[first][1:], runs[k][1:]))
    error = lambda k: float((runs[k][0][2] - runs[first][0][2]).abs().max() / runs[first][0][2].abs().max())
    return Table([(k, batch / middle(k, 1), ratio(k, 1), ratio(k, 0) if device.type == 'cpu' else '–', f'{error(k):.1e}') for k in ways],
                 ('contender', 'images/s', 'times faster', 'by CPU time', 'largest relative difference'))


def shift_table(n: int, device) -> Table:
    "What bfloat16 does to the FID between two halves of the emoji, n pictures each"
    images = data.emoji('all', size=32).images
    halves, rows = (images[0:2 * n:2], images[1:2 * n:2]), []
    made = {p: [metrics.statistics(h, inception.load_inception(precision=p).to(device)) for h in halves] for p in ('float32', 'bf16')}
    for p, s in made.items(): rows.append((f'FID of the halves, both {p}', metrics.frechet_distance(*s)))
    for s in made['bf16']: s.extractor = made['float32'][0].extractor   # otherwise refused, for good reason
    rows.append(('FID of one half, bf16 against float32', metrics.frechet_distance(made['bf16'][0], made['float32'][0])))
    return Table(rows, (f'{n:,} pictures a side', 'value'))


class Cheap(metrics.Classifier):
    "2048 features for next to nothing: what is measured is the memory around the network"
    name, shape = 'cheap', (3, None, None)

    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Linear(192, 2048)

    def features(self, x): return self.mix(torch.nn.functional.adaptive_avg_pool2d(x, 8).flatten(1))


def high_water() -> int:
    "Peak bytes of this process alone: Linux's getrusage starts a child at its parent's peak, /proc does not"
    try: lines = Path('/proc/self/status').read_text().splitlines()
    except OSError: return peak_memory(torch.device('cpu'))
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith('VmHWM'))


def stream(n: int) -> None:
    "Statistics of n pictures that never lie in memory together; prints the process's peak in MB"
    torch.manual_seed(0)
    s, model = metrics.Statistics(), Cheap().eval()
    if not n: return print(round(high_water() / 1e6))
    for i in range(0, n, 500):
        s.update(metrics.features(model, torch.randint(0, 256, (min(500, n - i), 3, 32, 32), dtype=torch.uint8)))
    assert s.cov.shape == (2048, 2048)                           # what a distance needs is made, too
    print(round(high_water() / 1e6), s.n)


def memory_table(sizes) -> Table:
    "Peak memory of a process that streams so many pictures into 2048-dimensional statistics"
    rows = [('none: only the imports', 0)] + [(f'{n:,}', n) for n in sizes]
    run = lambda n: subprocess.run([sys.executable, __file__, '--stream', str(n)], capture_output=True, text=True, check=True)
    return Table([(what, int(run(n).stdout.split()[0])) for what, n in rows], ('pictures', 'peak MB of the process'))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--batch', type=int, default=50, help='pictures at a time (pytorch-fid: 50)')
    p.add_argument('--rounds', type=int, default=5, help='the median of so many is shown')
    p.add_argument('--threads', type=int, help="of torch; default: torch's own")
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--bf16', action='store_true', help='bfloat16 even where it is emulated')
    p.add_argument('--shift', type=int, default=1000, help="pictures a side for bfloat16's shift of the FID; 0: leave out")
    p.add_argument('--memory', type=int, nargs='*', default=[10_000, 50_000], help='numbers of pictures')
    p.add_argument('--frechet', action='store_true', help='also the Fréchet distance at d = 2048')
    p.add_argument('--stream', type=int, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.stream is not None: return stream(a.stream)
    if a.threads: torch.set_num_threads(a.threads)
    device = torch.device(a.device)
    bf16 = a.bf16 or fast_bf16(device.type)
    print(f'{device_name(device)}, torch {torch.__version__}, batch {a.batch}, median of {a.rounds}'
          + ('' if bf16 else '; bfloat16 is not native here and left out (--bf16)'))
    print(feature_table(a.batch, a.rounds, device, bf16), '\n')
    if a.shift and bf16: print(shift_table(a.shift, device), '\n')
    if a.memory: print(memory_table(a.memory), '\n')
    if a.frechet:
        from frechet import table
        print(table(d=2048, n=(5000,), rounds=3))


if __name__ == '__main__': main()
