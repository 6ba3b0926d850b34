"""How many pictures a second reach the network: diffcourse's Batcher against torchvision with a DataLoader.

    python benchmarks/data_throughput.py [--rounds 5] [--batch 128] [--pictures 10000] [--threads 1] [--json FILE]

Both deliver float32 batches of mirrored, scaled Fashion-MNIST in [-1, 1]. torchvision is used as its documentation
shows (dataset with transforms RandomHorizontalFlip, ToTensor, Normalize; shuffling DataLoader; 0 and 2 workers, kept
alive between epochs). One process, one epoch of each in turn, medians over the rounds.
"""
import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from diffcourse.core import Table
from diffcourse.data import SOURCES, Batcher, fashion_mnist, write_idx
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms


def torchvision_set(root: Path):
    "torchvision's own class over the embedded subset, written where it looks"
    raw = root / 'FashionMNIST' / 'raw'
    raw.mkdir(parents=True)
    parts = [fashion_mnist(s, full=False) for s in ('train', 'test')]
    arrays = [a for p in parts for a in (p.images[:, 0].numpy(), p.labels.byte().numpy())]
    for file, array in zip(SOURCES['fashion_mnist'].files(), arrays): write_idx(raw / file, array)
    steps = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(.5, .5)]
    return datasets.FashionMNIST(root, train=True, transform=transforms.Compose(steps))


def seconds(epoch) -> tuple[float, int]:
    "Time one epoch; returns (seconds, pictures)"
    start, n = time.perf_counter(), 0
    for x in epoch: n += len(x)
    return time.perf_counter() - start, n


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--batch', type=int, default=128)
    parser.add_argument('--pictures', type=int, default=10_000, help='how many make an epoch')
    parser.add_argument('--threads', type=int, help="of PyTorch; use 1 on a busy machine, where threads wait for each other")
    parser.add_argument('--json', type=Path, help='also write the numbers here')
    args = parser.parse_args()
    if args.threads: torch.set_num_threads(args.threads)
    data = fashion_mnist(full=False).subset(slice(args.pictures))
    steps = len(data) // args.batch
    with tempfile.TemporaryDirectory() as root:
        theirs = Subset(torchvision_set(Path(root)), range(len(data)))
        loaders = {w: DataLoader(theirs, args.batch, shuffle=True, num_workers=w, drop_last=True, persistent_workers=w > 0)
                   for w in (0, 2)}
        ours = Batcher(data, args.batch, flip=True)
        ways = {'diffcourse Batcher': lambda: (ours(s)['x'] for s in range(steps)),
                **{f'torchvision DataLoader, {w} workers': lambda w=w: (x for x, _ in loaders[w]) for w in loaders}}
        rates = {name: [] for name in ways}
        for r in range(args.rounds + 1):
            for name, epoch in ways.items():
                t, n = seconds(epoch())
                if r: rates[name].append(n / t)  # the first round warms up
    median = {name: statistics.median(v) for name, v in rates.items()}
    best = median['diffcourse Batcher']
    rows = [(name, round(m), f'{min(rates[name]):.0f}…{max(rates[name]):.0f}', round(best / m, 1)) for name, m in median.items()]
    print(Table(rows, ('loader', 'pictures per second', 'range', 'Batcher is faster by')))
    print(f'\n{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, batch {args.batch}, '
          f'median of {args.rounds} rounds, torch {torch.__version__}')
    if args.json: args.json.write_text(json.dumps({'pictures_per_second': median, 'ratio': {k: best / v for k, v in median.items()}}))


if __name__ == '__main__': main()
