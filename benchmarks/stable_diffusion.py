"""Stable Diffusion 1's U-Net and decoder, ours against diffusers: the same tensors, in turn, ratios of neighbours in time; peak memory apart.

    python benchmarks/stable_diffusion.py [--size 32] [--batch 1] [--rounds 5] [--threads N] [--only unet decode] [--json FILE]
    python benchmarks/stable_diffusion.py --memory [--size 32] [--json FILE]    # each contender alone in a process, highest resident size

Page 16c reads data/measured/stable_diffusion.json, which is FILE of both commands.

`plain` is the network as it was loaded; `ready` is what `StableDiffusion.ready`, and with it `diffcourse sample --checkpoint`, makes of it. Weights are
random (speed does not depend on them); all are checked to give the same answer first. `--size` counts latents: 32 is a picture of 256×256.
"""
import argparse
import copy
import ctypes
import gc
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from diffcourse.core import atomic_write, generator
from diffcourse.openai_unet import randomise
from diffcourse.sd_keys import SDModel, folder_tensors, stage_to_diffusers, unet_to_folder
from diffcourse.stable_diffusion import hasten
from diffcourse.train import device_name
from side_by_side import interleaved, ratio


@torch.no_grad()
def ours(part: str) -> SDModel:
    "Ours, random weights where they are needed; the rest has shapes only"
    model = SDModel.from_member('sd-1').eval().requires_grad_(False)
    net = (model.unet if part == 'unet' else model.first_stage).to_empty(device='cpu')
    for p in randomise(net, generator(0)).parameters(): p.data.mul_(.7)
    return model


def theirs(model: SDModel, part: str):
    "diffusers' network with our tensors, not copied"
    import diffusers
    tensors = {k.partition('/')[2]: v for k, v in folder_tensors(model).items() if k.startswith(f'{part}/')}
    config = unet_to_folder(model.unet.config, 64) if part == 'unet' else stage_to_diffusers(model.first_stage)[0]
    with torch.device('meta'): net = getattr(diffusers, config['_class_name']).from_config(config)
    net.load_state_dict(tensors, assign=True)
    return net.eval().requires_grad_(False)


def contenders(part: str, model: SDModel, size: int, batch: int) -> dict:
    "name → function without arguments"
    if part == 'unet':
        x, t, c = torch.randn(batch, 4, size, size, generator=generator(1)), torch.full((batch,), 501), torch.randn(batch, 77, 768, generator=generator(2))
        other, fast = theirs(model, 'unet'), hasten(copy.deepcopy(model.unet))
        return {'diffusers': lambda: other(x, t, c).sample, 'diffcourse, plain': lambda: model.unet(x, t, c), 'diffcourse, ready': lambda: fast(x, t, c)}
    z, other, fast = torch.randn(batch, 4, size, size, generator=generator(1)), theirs(model, 'vae'), hasten(copy.deepcopy(model.first_stage))
    return {'diffusers': lambda: other.decode(z).sample, 'diffcourse, plain': lambda: model.first_stage.decode(z), 'diffcourse, ready': lambda: fast.decode(z)}


@torch.no_grad()
def timed(part, size, batch, rounds) -> list:
    "Medians of seconds and of ratios"
    todo = contenders(part, ours(part), size, batch)
    first = {k: f() for k, f in todo.items()}
    wrong = {k: float((v - first['diffusers']).abs().max() / first['diffusers'].std()) for k, v in first.items()}
    assert max(wrong.values()) < 1e-3, wrong
    seconds, cpu, _ = interleaved({k: lambda r, f=f: f() for k, f in todo.items()}, rounds)
    return [dict(part=part, who=k, seconds=statistics.median(seconds[k]), cpu=statistics.median(cpu[k]), faster=ratio(seconds, 'diffusers', k),
                 faster_cpu=ratio(cpu, 'diffusers', k), difference=wrong[k]) for k in todo]


def status(key): return int(re.search(key + r':\s+(\d+)', Path('/proc/self/status').read_text())[1]) // 1024


@torch.no_grad()
def alone(who, part, size, batch):
    "One contender once in this process (Linux): resident MB before, and at most"
    model = ours(part)
    if who == 'diffusers': net = theirs(model, 'unet' if part == 'unet' else 'vae')
    else: net = model.unet if part == 'unet' else model.first_stage
    del model
    if who == 'diffcourse, ready': hasten(net)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path('/proc/self/clear_refs').write_text('5')          # the highest size starts anew here
    before, x = status('VmRSS'), torch.randn(batch, 4, size, size)
    if part == 'unet': net(x, torch.full((batch,), 501), torch.randn(batch, 77, 768))
    else: net.decode(x)
    print(json.dumps([before, status('VmHWM')]))


def memory(parts, size, batch) -> list:
    rows = []
    for part in parts:
        for who in ('diffusers', 'diffcourse, plain', 'diffcourse, ready'):
            how = ['--alone', who, '--only', part, '--size', str(size), '--batch', str(batch)]
            done = subprocess.run([sys.executable, __file__, *how], capture_output=True, text=True, check=True)
            rows.append(dict(part=part, who=who, **dict(zip(('before', 'most'), json.loads(done.stdout.splitlines()[-1])))))
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--size', type=int, default=32, help='latents per side')
    p.add_argument('--batch', type=int, default=1)
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--threads', type=int, default=None)
    p.add_argument('--only', nargs='+', default=['unet', 'decode'], choices=['unet', 'decode'])
    p.add_argument('--memory', action='store_true')
    p.add_argument('--alone', help=argparse.SUPPRESS)
    p.add_argument('--json', type=Path, default=None)
    a = p.parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    if a.alone: return alone(a.alone, a.only[0], a.size, a.batch)
    rows = memory(a.only, a.size, a.batch) if a.memory else [r for part in a.only for r in timed(part, a.size, a.batch, a.rounds)]
    for r in rows:
        if a.memory: print(f"{r['part']} {r['who']:18} {r['before']} MB before, {r['most']} at most")
        else: print(f"{r['part']} {r['who']:18} {r['seconds']:6.2f} s  {r['faster']:.2f}× (CPU time {r['faster_cpu']:.2f}×)  differs by {r['difference']:.1e}")
    if a.json: stored(rows, a)


def stored(rows, a):
    "Put these rows where the file holds their like; the other kind stays"
    found, kind = json.loads(a.json.read_text(encoding='utf-8')) if a.json.exists() else {}, 'memory' if a.memory else 'speed'
    how = dict(size=a.size, batch=a.batch) | ({} if a.memory else dict(rounds=a.rounds, threads=torch.get_num_threads()))
    found[kind] = dict(device=device_name(torch.device('cpu')), torch=torch.__version__, **how, rows=[rounded(r) for r in rows])
    with atomic_write(a.json) as tmp: tmp.write_text(json.dumps(found, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


def rounded(row): return {k: float(f'{v:.3g}') if isinstance(v, float) else v for k, v in row.items()}


if __name__ == '__main__': main()
