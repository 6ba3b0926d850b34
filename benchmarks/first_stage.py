"""Stable Diffusion's first stage, ours against diffusers' AutoencoderKL: the same tensors, encode and decode in turn, medians; peak memory apart.

    python benchmarks/first_stage.py [--size 128] [--rounds 5] [--threads N] [--json FILE]
    python benchmarks/first_stage.py --memory                     # each contender alone in a process, highest resident size

Weights are random (speed does not depend on them); both are checked to give the same picture first.
"""
import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from diffcourse.first_stage import from_official, stage_to_diffusers


def ours():
    "Ours, random weights"
    torch.manual_seed(0)
    return from_official('sd-v1/first_stage_AutoencoderKL').eval()


def theirs(net=None):
    "Theirs, with our tensors or with its own"
    import diffusers
    config, state = stage_to_diffusers(net or from_official('sd-v1/first_stage_AutoencoderKL', 'meta'))
    other = diffusers.AutoencoderKL.from_config(config).eval()
    if net: other.load_state_dict(state, assign=True)
    return other


def calls(a, b, x, z) -> dict:
    "What is timed"
    return {('diffcourse', 'encode'): lambda: a.encode(x).mean, ('diffusers', 'encode'): lambda: b.encode(x).latent_dist.mean,
            ('diffcourse', 'decode'): lambda: a.decode(z), ('diffusers', 'decode'): lambda: b.decode(z).sample}


@torch.no_grad()
def timed(size, rounds) -> list:
    "Medians of wall and CPU time, contenders shuffled in every round"
    a = ours()
    b, x, z = theirs(a), torch.randn(1, 3, size, size), torch.randn(1, 4, size // 8, size // 8)
    todo, took = calls(a, b, x, z), {}
    for what in ('encode', 'decode'):
        first, second = (todo[who, what]() for who in ('diffcourse', 'diffusers'))
        assert torch.allclose(first, second, atol=1e-4), (what, float((first - second).abs().max()))
    for _ in range(rounds):
        for key in random.sample(list(todo), len(todo)):
            wall, cpu = time.perf_counter(), time.process_time()
            todo[key]()
            took.setdefault(key, []).append((time.perf_counter() - wall, time.process_time() - cpu))
    return [dict(who=who, what=what, seconds=statistics.median(w for w, _ in t), cpu=statistics.median(c for _, c in t)) for (who, what), t in took.items()]


@torch.no_grad()
def alone(who, size):
    "Decode once in this process; its highest resident size in MB"
    net = ours() if who == 'diffcourse' else theirs()
    before = int(re.search(r'VmRSS:\s+(\d+)', Path('/proc/self/status').read_text())[1])
    calls(net, net, None, torch.randn(1, 4, size // 8, size // 8))[who, 'decode']()
    print(json.dumps([before // 1024, int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1]) // 1024]))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--size', type=int, default=128, help='pixels per side of the picture')
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--threads', type=int, default=None)
    p.add_argument('--memory', action='store_true')
    p.add_argument('--alone', help=argparse.SUPPRESS)
    p.add_argument('--json', type=Path, default=None)
    a = p.parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    if a.alone: return alone(a.alone, a.size)
    if a.memory:
        for who in ('diffcourse', 'diffusers'):
            done = subprocess.run([sys.executable, __file__, '--alone', who, '--size', str(a.size)], capture_output=True, text=True, check=True)
            print(who, 'MB before and at most:', *json.loads(done.stdout.splitlines()[-1]))
        return
    rows = timed(a.size, a.rounds)
    by = {(r['who'], r['what']): r for r in rows}
    for r in rows:
        ratio = {k: by['diffusers', r['what']][k] / r[k] for k in ('seconds', 'cpu')}
        print(f"{r['what']} {r['who']:12} {r['seconds']:7.2f} s  {ratio['seconds']:.2f}× (CPU time {ratio['cpu']:.2f}×)")
    if a.json: a.json.write_text(json.dumps(dict(size=a.size, rounds=a.rounds, threads=torch.get_num_threads(), rows=rows), indent=1))


if __name__ == '__main__': main()
