"Quantisers that follow batches, in one process or as one of two"
import json
import sys

import torch

from diffcourse import vqvae
from diffcourse.core import generator
from diffcourse.train import Trainer
from diffcourse.weights import digest

CODES, DIM, BATCH = 8, 3, 48


def rows(step):
    "A batch of dyadic numbers, so that their sums are exact in any order"
    return torch.randint(-64, 65, (BATCH, DIM), generator=generator(step)) / 32


def followed(rule, rank=0, world=1, steps=6):
    "What a quantiser knows after some batches, of which this process sees its share"
    torch.manual_seed(0)
    q, n = vqvae.Quantiser(CODES, DIM, rule).train(), BATCH // world
    for step in range(steps): q(rows(step)[rank * n:(rank + 1) * n])
    return {k: v.tolist() for k, v in q.state_dict().items()}


def trained(revive):
    "A whole network, trained by the Trainer on its share of every batch"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = vqvae.VQVAE(1, 16, 1, 8, 16, 4, revive=revive)
    t = Trainer(net, vqvae.vq_loss, {'x': torch.rand(64, 1, 8, 8, generator=generator(0)) * 2 - 1}, steps=8, batch_size=16, lr=1e-3,
                warmup=0, schedule='constant', bf16=False, device='cpu', progress=False).fit()
    return t


def report(out):
    "One of two processes: everything it found, and what it finds when nobody adds up the sums"
    t = trained(0.)
    found = {'world': t.world, 'codebook': t.model.quantise.codebook.tolist(), 'losses': t.losses,
             'revived': digest(trained(.5).model.state_dict()),
             'rules': {r: followed(r, t.rank, t.world) for r in vqvae.RULES if r != 'gradient'}}
    vqvae.summed = lambda x: x
    found['alone'] = followed('rosinality', t.rank, t.world)
    with open(f'{out}/{t.rank}.json', 'w') as f: json.dump(found, f)
    torch.distributed.destroy_process_group()


if __name__ == '__main__': report(sys.argv[1])
