"""One DDPM training step: this package against diffusers' documented loop, side by side in one process.

    python benchmarks/train_step.py [--batch 64] [--rounds 7] [--threads N] [--compile] [--json FILE]

Both train the same network (equal parameters, checked; equal layers) on the same pictures. Every round runs every contender once, in
another order, and medians are reported, so that a busy machine is busy for all of them. The documented loop is that of diffusers' tutorial
"Train a diffusion model": a data set of PIL pictures with torchvision transforms, a DataLoader, `noise_scheduler.add_noise`, `F.mse_loss`,
gradient clipping at 1, AdamW and a cosine learning rate. The rows between change one thing at a time.
"""
import argparse
import json
import platform
import re
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from diffcourse.data import fashion_mnist
from diffcourse.ddpm import Denoiser, Schedule, loss_simple
from diffcourse.train import Trainer
from diffcourse.unet import UNet, unet_to_diffusers
from side_by_side import interleaved, ratio

NET = dict(in_channels=1, channels=32, multipliers=(1, 2, 2), blocks=1, attention_resolutions=(14, 7), image_size=28,
           groups=32)


# --------------------------------------------------------------------------------------------------------- the contenders

def theirs(
    data,                        # an ImageSet
    batch: int,                  # pictures a step
    heads: int | None = 8,       # attention_head_dim: 8 is diffusers' default, None is one head as in DDPM
    in_memory: bool = False,     # batches from a tensor in place of the DataLoader of PIL pictures
    fused: bool = False,         # the fused AdamW
    channels_last: bool = False, # memory layout
    ema: bool = False,           # diffusers' EMAModel
    compile: bool = False,       # torch.compile
    steps: int = 100_000,        # length of the learning rate's cosine
):                               # a function that does one step; its attribute `model` is the network
    "diffusers' documented training loop, with one thing changed at a time"
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_cosine_schedule_with_warmup
    from diffusers.training_utils import EMAModel
    config, _ = unet_to_diffusers(UNet(**NET))
    model = UNet2DModel.from_config(config | dict(attention_head_dim=heads))
    if channels_last: model = model.to(memory_format=torch.channels_last)
    if compile: model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused or None)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, 500, steps)
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000)
    average = EMAModel(model.parameters(), .999) if ema else None
    batches = tensor_batches(data, batch) if in_memory else loader_batches(data, batch)

    def step():
        clean = next(batches)
        if channels_last: clean = clean.contiguous(memory_format=torch.channels_last)
        noise = torch.randn(clean.shape)
        t = torch.randint(0, 1000, (len(clean),), dtype=torch.int64)
        noisy = noise_scheduler.add_noise(clean, noise, t)
        loss = F.mse_loss(model(noisy, t, return_dict=False)[0], noise)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        if average: average.step(model.parameters())
        return float(loss.detach())
    step.parameters, step.model = sum(p.numel() for p in model.parameters()), model
    return step


def loader_batches(data, batch):
    "The documented data path: one PIL picture at a time through transforms"
    from PIL import Image
    from torchvision import transforms
    prepare = transforms.Compose([transforms.Resize((28, 28)), transforms.RandomHorizontalFlip(),
                                  transforms.ToTensor(), transforms.Normalize([.5], [.5])])
    pictures = [Image.fromarray(x[0].numpy()) for x in data.images]

    class Pictures(torch.utils.data.Dataset):
        def __len__(self): return len(pictures)
        def __getitem__(self, i): return prepare(pictures[i])
    loader = torch.utils.data.DataLoader(Pictures(), batch_size=batch, shuffle=True, drop_last=True)
    while True: yield from loader


def tensor_batches(data, batch):
    "All pictures in one tensor"
    while True: yield data.images[torch.randint(len(data.images), (batch,))].float() / 127.5 - 1


def ours(
    data,           # an ImageSet
    batch: int,     # pictures a step
    **settings,     # of the Trainer
):                  # a function that does one step
    "This package's trainer; without settings, its defaults"
    net = UNet(**NET)
    denoiser = Denoiser(net, Schedule.linear())
    trainer = Trainer(net, loss_simple(denoiser), data, steps=100_000, batch_size=batch, progress=False, device='cpu',
                      **settings)

    def step():
        trainer.update()
        return trainer.losses[-1]
    step.parameters = sum(p.numel() for p in net.parameters())
    return step


def contenders(data, batch, compile):
    "name → a function that makes the step"
    their = lambda **k: lambda: theirs(data, batch, **k)
    our = lambda **k: lambda: ours(data, batch, flip=True, **k)
    table = {
        'diffusers, documented': their(),
        '  + EMA': their(ema=True),
        '  one attention head': their(heads=None),
        '  one head, data in memory': their(heads=None, in_memory=True),
        '  one head, in memory, fused AdamW': their(heads=None, in_memory=True, fused=True),
        '  one head, in memory, fused, channels-last': their(heads=None, in_memory=True, fused=True,
                                                             channels_last=True),
        'diffcourse, defaults': our(),
        '  channels-last': our(channels_last=True),
        '  contiguous': our(channels_last=False),
        '  contiguous, without EMA': our(channels_last=False, ema=None),
        '  contiguous, float32': our(channels_last=False, bf16=False)}
    if compile: table |= {'  contiguous, compiled': our(channels_last=False, compile=True),
                          '  channels-last, compiled': our(channels_last=True, compile=True),
                          'diffusers, documented, compiled': their(compile=True)}
    return table


# ------------------------------------------------------------------------------------------------------------ measurement

def convolution_peak(seconds=1.5) -> float:
    "GFLOP/s of the machine's best 3×3 convolution among a few sizes, forward only"
    best = 0.
    for channels, size, batch in ((64, 28, 32), (128, 28, 16), (256, 14, 16)):
        conv, x = nn.Conv2d(channels, channels, 3, padding=1), torch.randn(batch, channels, size, size)
        flops, times = 2 * 9 * channels ** 2 * size ** 2 * batch, []
        with torch.no_grad():
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                start = time.perf_counter()
                conv(x)
                times.append(time.perf_counter() - start)
        best = max(best, flops / statistics.median(times) / 1e9)
    return best


def flops_per_image() -> float:
    "Floating point operations of one forward and backward pass, per picture"
    from torch.utils.flop_counter import FlopCounterMode
    net, x = UNet(**NET), torch.randn(4, 1, 28, 28)
    with FlopCounterMode(display=False) as counter: net(x, torch.zeros(4)).square().mean().backward()
    return counter.get_total_flops() / 4


def measure(table, batch, rounds) -> dict:
    "name → seconds of each step after the first, and of the first; every round in a new order"
    steps, first = {}, {}
    for name, make in table.items():
        steps[name] = make()
        start = time.perf_counter()
        steps[name]()
        first[name] = time.perf_counter() - start
        steps[name]()
        print(f'{name.strip()}: first step {first[name]:.1f} s', file=sys.stderr, flush=True)
    sizes = {s.parameters for s in steps.values()}
    assert len(sizes) == 1, f'unequal networks: {sizes}'

    def sane(name, loss): assert loss == loss and loss < 2, f'{name.strip()}: loss {loss}'
    times, cpu, _ = interleaved({k: lambda r, step=step: step() for k, step in steps.items()}, rounds, sane)
    return dict(seconds=times, cpu=cpu, first=first, parameters=sizes.pop())


def report(result, batch) -> str:
    "A Markdown table"
    median = {k: statistics.median(v) for k, v in result['seconds'].items()}
    used = {k: statistics.median(v) for k, v in result['cpu'].items()}
    base = 'diffusers, documented'
    rows = ['| contender | images/s | against the documented loop | same, by CPU time | first step (s) |',
            '|---|---:|---:|---:|---:|']
    rows += [f'| {k.replace("  ", "&emsp;")} | {batch / median[k]:.1f} | {ratio(result["seconds"], base, k):.2f}× | {used[base] / used[k]:.2f}× | {result["first"][k]:.1f} |' for k in median]
    return '\n'.join(rows)


def peak_memory() -> float:
    "Peak resident memory of this process in MB: VmHWM where there is a /proc, as ru_maxrss there remembers the parent's"
    status = Path('/proc/self/status')
    if not status.exists(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == 'darwin' else 1e3)
    return int(re.search(r'VmHWM:\s+(\d+)', status.read_text())[1]) / 1e3


def peak_of(name, batch, rounds=3) -> float:
    "Peak memory in MB of a contender alone, in a process of its own"
    import subprocess
    out = subprocess.run([sys.executable, __file__, '--batch', str(batch), '--alone', name, '--rounds', str(rounds)],
                         capture_output=True, text=True, check=True)
    return float(out.stdout.split()[-1])


def main():
    p = argparse.ArgumentParser(description='DDPM training step against diffusers, interleaved')
    p.add_argument('--batch', type=int, default=64)
    p.add_argument('--rounds', type=int, default=7)
    p.add_argument('--threads', type=int, default=0)
    p.add_argument('--compile', action='store_true', help='also the compiled rows (minutes of compilation, reported)')
    p.add_argument('--memory', action='store_true', help='also the peak memory of both, each alone in a process')
    p.add_argument('--only', nargs='*',
                   help='words: only the contenders whose name contains one of them, and the documented loop')
    p.add_argument('--json', type=Path)
    p.add_argument('--alone', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    data = fashion_mnist().subset(range(2000))
    table = contenders(data, a.batch, a.compile)
    if a.only: table = {k: v for k, v in table.items() if any(w in k for w in ('diffusers, documented', *a.only))}
    if a.alone:
        step = table[a.alone]()
        for _ in range(a.rounds): step()
        return print(peak_memory())
    result = measure(table, a.batch, a.rounds)
    flops, peak = flops_per_image(), convolution_peak()
    speed = a.batch / statistics.median(result['seconds']['diffcourse, defaults'])
    print(report(result, a.batch))
    print(f'\n{result["parameters"]:,} parameters, batch {a.batch}, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.processor() or platform.machine()}; '
          f'{flops / 1e9:.2f} GFLOP per picture and step; {speed * flops / 1e9:.0f} of {peak:.0f} GFLOP/s, the best 3×3 convolution here ({speed * flops / 1e9 / peak:.0%}).')
    if a.memory:
        for name in ('diffusers, documented',
                     'diffcourse, defaults'): print(f'{name}: peak {peak_of(name, a.batch):.0f} MB')
    if a.json: a.json.write_text(json.dumps(result | dict(batch=a.batch, threads=torch.get_num_threads(),
                                                          flops_per_image=flops, peak_gflops=peak), indent=1))


if __name__ == '__main__': main()
