"""Measure claims LDM-1 (from what scripts/reconstructions.py stored), LDM-1b (with and without a critic) and LDM-2 (f from 1 to 16)

    python scripts/claims_first_stage.py --budget laptop --out ldm2.json                   # all arms, one after the other
    python scripts/claims_first_stage.py --budget gpu --arms f4 --out f4.json              # one arm; then, when all are there:
    python scripts/claims_first_stage.py --budget gpu --join f1.json f2.json … --out ldm2.json
    python scripts/claims_first_stage.py --stored --out ldm1.json                          # LDM-1 alone

Writes {claim: {'numbers': …, 'budget': …, 'device': …, 'seeds': …, 'runs': [...]}}; the rules are in data/claims/rules.json.
"""
import json
import time
from pathlib import Path

import claims_common
import torch

from diffcourse import data, extractors  # noqa: F401  (importing registers the extractor)
from diffcourse.core import asset, budget, default_device, to_float
from diffcourse.ddim import ddim
from diffcourse.ddpm import Denoiser, Schedule, loss_simple, sample
from diffcourse.first_stage import AutoencoderKL, Contested, PatchGAN, contested_loss, evaluate_stage, stage_loss
from diffcourse.metrics import feature_fid
from diffcourse.train import Trainer, device_name
from diffcourse.unet import UNet
from diffcourse.vae import sharpness
from diffcourse.weights import load_card, shipped

STAGES = {2: (3, 8, (4, 4)), 4: (3, 8, (2, 3, 4)), 8: (4, 24, (1, 1, 1, 1)), 16: (16, 8, (2, 2, 3, 3, 3))}   # f → channels of the code, ch, ch_mult
ARMS = ('f1', 'f2', 'f4', 'f8', 'f16', 'critic')
SETTINGS = {
    'smoke': dict(stage=dict(steps=6, batch_size=4), net=dict(steps=6, batch_size=4), n=20, ddim=4, test=20),
    'laptop': dict(stage=dict(steps=600, batch_size=16), net=dict(steps=1000, batch_size=16), n=500, ddim=20, test=302),
    'gpu': dict(stage=dict(steps=2500, batch_size=64), net=dict(steps=5000, batch_size=128), n=5000, ddim=50, test=302)}


def pictures(split): return data.emoji(split, size=32)


def stage(f: int) -> AutoencoderKL:
    z, ch, mult = STAGES[f]
    torch.manual_seed(0)
    return AutoencoderKL(dict(ch=ch, ch_mult=mult, num_res_blocks=1, resolution=32, groups=4, z_channels=z), z, scale=None)


def count(net): return sum(p.numel() for p in net.parameters())


def copies_of(net, x): return torch.cat([net(part.to(next(net.parameters()).device)).detach().cpu() for part in x.split(100)])


def trained(net, loss, batches, how, seed=0):
    "Averaged weights after training, and its seconds"
    trainer = Trainer(net, loss, batches, lr=2e-3, ema=.99, warmup=20, seed=seed, progress=False, **how).fit()
    return trainer.ema_model(), trainer.seconds


def first_stage(f, s, test) -> tuple:
    "Trained first stage of an f, and what its copies reach; none for f = 1"
    if f == 1: return None, dict(stage_parameters=0, stage_seconds=0.)
    net, seconds = trained(stage(f), stage_loss(perceptual=0.), pictures('train'), s['stage'])
    return net, dict(stage_parameters=count(net), stage_seconds=seconds, **evaluate_stage(net, test))


@torch.no_grad()
def latents_of(net) -> tuple:
    "All training pictures as latents of unit variance, and the way back"
    x = to_float(pictures('train').images)
    if net is None:
        scale = 1 / float(x.std())
        return x * scale, lambda z: (z / scale).clamp(-1, 1)
    device = next(net.parameters()).device
    z = torch.cat([net.latents(part.to(device)).cpu() for part in x.split(100)])
    unit = 1 / float(z.std())
    return z * unit, lambda z: torch.cat([net.pictures(part / unit) for part in z.split(100)])


def sized(f, s) -> dict:
    "One f: first stage, U-Net on its latents, pictures and their distance to the training set"
    net, out = first_stage(f, s, to_float(pictures('test').images[:s['test']]))
    z, back = latents_of(net)
    torch.manual_seed(0)
    unet = UNet(z.shape[1], channels=32, multipliers=(1, 2), blocks=1, attention_resolutions=(), image_size=z.shape[2], groups=8)
    denoiser = Denoiser(unet, Schedule.linear(), 'v')
    unet, seconds = trained(unet, loss_simple(denoiser), {'x': z}, s['net'])
    denoiser.net = unet
    with torch.no_grad(): drawn = back(sample(denoiser, (s['n'], *z.shape[1:]), denoiser.schedule.steps(s['ddim']), 0, ddim, 100)).cpu()
    fid = feature_fid(drawn, pictures('train'), 'emoji_classifier')
    return dict(arm=f'f{f}', f=f, latent=list(z.shape[1:]), parameters=count(unet), seconds=seconds, fid=fid.value, low=fid.low, high=fid.high, **out)


def critics(s) -> dict:
    "f = 4 without and with a critic in the second half"
    test, out, half = to_float(pictures('test').images[:s['test']]), {}, s['stage']['steps'] // 2
    torch.manual_seed(1)
    critic = PatchGAN(3, 16, 2)
    plain, _ = trained(stage(4), stage_loss(perceptual=0.), pictures('train'), s['stage'])
    both, _ = trained(Contested(stage(4), critic), contested_loss(half, perceptual=0.), pictures('train'), s['stage'])
    for name, net in dict(plain=plain, critic=both.stage).items():
        copies = copies_of(net, test)
        fid = feature_fid(copies, pictures('test').subset(torch.arange(s['test'])), 'emoji_classifier', resamples=0)
        out |= {f'fid_{name}': fid.value, f'sharp_{name}': sharpness(copies), **{f'{k}_{name}': v for k, v in evaluate_stage(net, test).items()}}
    return dict(arm='critic', sharp_originals=sharpness(test), **out)


def claims(runs, level, s, device) -> dict:
    "The numbers that the rules name"
    by = {r['arm']: r for r in runs}
    about, out = dict(budget=level, device=device, seeds=1, settings=s, data=pictures('train').name), {}
    if all(a in by for a in ARMS[:5]):
        numbers = {f'fid_{a[1:]}': by[a]['fid'] for a in ARMS[:5]} | {f'seconds_{a[1:]}': by[a]['seconds'] for a in ('f1', 'f4')}
        out['LDM-2'] = dict(numbers=numbers | {f'psnr_{a[1:]}': by[a]['psnr'] for a in ('f4', 'f16')}, **about,
                            runs=[by[a] for a in ARMS[:5]])
    if 'critic' in by:
        numbers = {k: by['critic'][k] for k in ('fid_plain', 'fid_critic', 'psnr_plain', 'psnr_critic', 'sharp_plain', 'sharp_critic')}
        out['LDM-1b'] = dict(numbers=numbers, **about, runs=[by['critic']])
    return out | ({} if out else {'runs': dict(numbers={}, runs=runs)})


def stored() -> dict:
    "LDM-1, from data/measured/reconstructions.json, if it belongs to the weights that are shipped"
    found = json.loads(asset('measured/reconstructions.json').read_text(encoding='utf-8'))
    r = found['copies'].get('kl_emoji', {})
    if not shipped('kl_emoji') or r.get('weights') != load_card('kl_emoji')['sha256']: return {}
    return {'LDM-1': dict(numbers={k: r[k] for k in ('psnr', 'ssim', 'lpips', 'other')}, budget=load_card('kl_emoji')['budget'], device='CPU',
                          seeds=1, n=r['n'], data=r['data'], network=found['network'])}


def main(args=None):
    p = claims_common.parser(__doc__, 'not used: one training of each kind')
    p.add_argument('--arms', nargs='+', choices=ARMS, default=None, help='default: all')
    p.add_argument('--join', nargs='+', type=Path, default=None, help='files of single arms, to be put together; nothing is trained')
    p.add_argument('--stored', action='store_true', help='LDM-1 alone, from what is stored; nothing is trained')
    a = p.parse_args(args)
    if a.stored: return claims_common.store(stored(), a.out)
    level = budget(a.budget)
    s = SETTINGS[level]
    if a.join: runs = [r for f in a.join for c in json.loads(f.read_text(encoding='utf-8')).values() for r in c['runs']]
    else:
        runs = []
        for arm in a.arms or ARMS:
            start = time.perf_counter()
            runs.append((critics(s) if arm == 'critic' else sized(int(arm[1:]), s)) | dict(device=device_name(torch.device(default_device()))))
            print(arm, round(time.perf_counter() - start, 1), 's', {k: round(v, 3) for k, v in runs[-1].items() if isinstance(v, float)}, flush=True)
            claims_common.store(claims(runs, level, s, runs[-1]['device']), a.out)
    claims_common.store({**claims(runs, level, s, runs[-1]['device']), **stored()}, a.out)


if __name__ == '__main__': main()
