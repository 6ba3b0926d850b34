"""Twenty CPU minutes of Fashion-MNIST: this package's recipe beside diffusers' documented loop, samples and scores.

    python benchmarks/twenty_minutes.py ours theirs --minutes 20 --out runs/twenty   # one core each, one after the other
    python benchmarks/twenty_minutes.py compare --out runs/twenty                    # the table and the picture

Time is the CPU time of the training process on one thread, so that a busy machine is fair to both. `theirs` is diffusers'
`UNet2DModel` of 1.16 M parameters (32, 64, 64; one block a level; attention at 14 and 7) in the loop of its tutorial and its
unconditional example: PIL pictures through torchvision transforms in a DataLoader, batch 64, AdamW 1e-4 with 500 warm-up steps and
cosine decay, gradient clipping 1, EMAModel as in the example. `ours` is the recipe `ddpm_fashion` with the width of its network
moved to the coarser levels and its run sized to the time. Both draw 500 pictures from the same seeds in 50 ancestral steps.
"""
import argparse
import json
import time
from pathlib import Path

import torch

from diffcourse.core import image_grid
from diffcourse.data import fashion_mnist
from diffcourse.ddpm import Denoiser, Schedule, clip_x0, fashion_loss, sample
from diffcourse.train import Trainer, device_name
from diffcourse.unet import UNet

OURS = dict(net=dict(channels=16, multipliers=(1, 3, 6), blocks=1, attention_resolutions=(7,), image_size=28, groups=8),
            train=dict(batch_size=32, lr=2e-3, warmup=100, ema=.997))


def ours(data, seconds):
    "Train our recipe for about `seconds` of CPU time; returns (net, steps, pictures seen, seconds used)"
    make = lambda steps: Trainer(UNet(1, **OURS['net']), fashion_loss, data, steps=steps, progress=False, device='cpu', **OURS['train'])
    torch.manual_seed(0)
    probe = make(30)
    for _ in range(5): probe.update()
    start = time.process_time()
    for _ in range(25): probe.update()
    torch.manual_seed(0)
    trainer, start = make(int(.97 * seconds * 25 / (time.process_time() - start))), time.process_time()
    while trainer.step < trainer.settings.steps and time.process_time() - start < seconds: trainer.update()
    used = time.process_time() - start
    return trainer.ema_model(), trainer.step, trainer.step * OURS['train']['batch_size'], used, trainer.losses


def theirs(data, seconds, batch=64, total=1000):
    "diffusers' documented loop for `seconds` of CPU time"
    import train_step
    from diffusers.training_utils import EMAModel
    torch.manual_seed(0)
    loop = train_step.theirs(data, batch, steps=total)
    average = EMAModel(loop.model.parameters(), decay=.9999, use_ema_warmup=True, inv_gamma=1., power=.75)
    start, losses = time.process_time(), []
    while time.process_time() - start < seconds:
        losses.append(loop())
        average.step(loop.model.parameters())
    used = time.process_time() - start
    average.copy_to(loop.model.parameters())
    net = loop.model.eval()
    wrapped = lambda x, t: net(x, t, return_dict=False)[0]
    return wrapped, len(losses), len(losses) * batch, used, losses


def run(name, minutes, out, n=500):
    "Train, sample, store"
    torch.set_num_threads(1)
    data = fashion_mnist('train')
    extra = {}
    if name == 'theirs':  # its cosine schedule needs to know its length: time a few steps first
        speed = theirs(data, 15)
        extra = dict(total=int(minutes * 60 * speed[1] / speed[3]))
    net, steps, seen, used, losses = {'ours': ours, 'theirs': theirs}[name](data, minutes * 60, **extra)
    denoiser = Denoiser(net, Schedule.linear(), 'eps', 'fixed_small').guided(x0=clip_x0)
    pictures = sample(denoiser, (n, 1, 28, 28), denoiser.schedule.steps(50), seed=0, batch_size=125, device='cpu').clamp(-1, 1)
    out.mkdir(parents=True, exist_ok=True)
    torch.save(pictures, out / f'{name}.pt')
    card = dict(steps=steps, pictures_seen=seen, cpu_seconds=round(used, 1), loss=sum(losses[-100:]) / len(losses[-100:]),
                device=device_name(torch.device('cpu')), data=data.name)
    (out / f'{name}.json').write_text(json.dumps(card, indent=1))
    print(name, card)


def compare(out):
    "The table, and a picture with the first 24 samples of each"
    from PIL import Image

    from diffcourse.metrics import feature_fid, judge
    reference, rows = fashion_mnist('train'), []
    print('| | pictures seen | loss | feature-FID, N = 500 | 95 % | judge confidence |\n|---|---:|---:|---:|---|---:|')
    for name in ('theirs', 'ours'):
        pictures, card = torch.load(out / f'{name}.pt', weights_only=True), json.loads((out / f'{name}.json').read_text())
        score = feature_fid(pictures, reference)
        print(f'| {name} | {card["pictures_seen"]:,} | {card["loss"]:.4f} | {score.value:.1f} | [{score.low:.1f}, {score.high:.1f}] '
              f'| {judge(pictures)["confidence"]:.3f} |')
        rows.append(pictures[:24])
    Image.fromarray(image_grid(torch.cat(rows), 12, scale=2)).save(out / 'twenty_minutes.png')


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('what', nargs='+', choices=('ours', 'theirs', 'compare'))
    p.add_argument('--minutes', type=float, default=20)
    p.add_argument('--out', type=Path, default=Path('runs/twenty'))
    a = p.parse_args()
    for name in a.what: compare(a.out) if name == 'compare' else run(name, a.minutes, a.out)


if __name__ == '__main__': main()
