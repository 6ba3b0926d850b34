"A small training job, run by tests in processes that are killed, interrupted or doubled"
import json, sys, time

import torch
from torch import nn

from diffcourse.core import generator
from diffcourse.train import Trainer
from diffcourse.weights import digest


def net(seed=0, dropout=.2):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(8, 1, 3, padding=1))


def numbers(seed=1):
    return {'x': torch.randn(96, 1, 8, 8, generator=generator(seed))}


def denoise(model, batch, draws):
    noise = draws.normal(*batch['x'].shape)
    return (model(batch['x'] + noise) - batch['x']).square().mean(), {'noise': noise.mean()}


def telling(model, batch, draws):
    "The same loss, slowly and aloud, so that another process can choose its moment"
    time.sleep(.01)
    print('step', flush=True)
    return denoise(model, batch, draws)


def job(folder=None, loss=denoise, model=None, data=None, cls=Trainer, **how):
    "The trainer that all processes build alike; one thread, so that sums are added in one order"
    torch.set_num_threads(1)
    how = dict(steps=30, batch_size=16, lr=1e-2, warmup=4, device='cpu', folder=folder, save_every=1) | how
    return cls(model or net(), loss, data or numbers(), **how)


def damage(path, how):
    "Spoil a file in one of four ways"
    data = bytearray(path.read_bytes())
    if how == 'truncated': data = data[:-100]
    elif how == 'one bit': data[-3] ^= 1
    elif how == 'header': data[:8] = b'\xff' * 8
    else: data = b'<html>404</html>'
    path.write_bytes(data)


class SameShard(Trainer):
    "A mistake: every process sees the first share of the batch"
    def _batches(self, data):
        self.rank, rank = 0, self.rank
        batches = super()._batches(data)
        self.rank = rank
        return batches


def double(out):
    "One of two processes: train right, then wrong, and report both"
    found = {}
    for name, cls in (('right', Trainer), ('wrong', SameShard)):
        t = job(model=net(dropout=0.), cls=cls, steps=12, bf16=False).fit()
        found[name] = {'world': t.world, 'device': str(t.device), 'losses': t.losses, 'weights': digest(t.model.state_dict()),
                       'average': digest(t.ema.shadow), 'index': [t.batches(i)['index'].tolist() for i in range(12)]}
    with open(f'{out}/{t.rank}.json', 'w') as f: json.dump(found, f)
    torch.distributed.destroy_process_group()


def shards(out):
    "One of two processes with weights in shards: half the run, a checkpoint, and the rest from the checkpoint"
    first = job(out, model=net(dropout=0.), steps=12, bf16=False, save_every=5)
    for _ in range(5): first.update()
    first.save()
    t = job(out, model=net(seed=9, dropout=0.), steps=12, bf16=False, save_every=12).resume()
    here = {'held': sum(p.to_local().numel() for p in t.params), 'in all': sum(p.numel() for p in t.params),
            'averaged': sum(t.ema.shadow[k].to_local().numel() for k in t.ema.names)}
    t.fit()
    state, model = t.state(), t.ema_model()
    wrong = job(model=net(dropout=0.), cls=SameShard, steps=12, bf16=False).fit()
    found = {**here, 'losses': t.losses, 'state': digest(state), 'sharded': t.card()['sharded'], 'world': t.world,
             'wrong': wrong.losses, 'ema': digest(model.state_dict())}
    with open(f'{out}/{t.rank}.json', 'w') as f: json.dump(found, f)
    torch.distributed.destroy_process_group()


if __name__ == '__main__':
    if sys.argv[1] in ('double', 'shards'): globals()[sys.argv[1]](sys.argv[2])
    else: job(sys.argv[2], telling).fit()
