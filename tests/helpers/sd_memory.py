"""What Stable Diffusion's files cost in memory, each step in a process of its own.

    python tests/helpers/sd_memory.py write FILE released|half     # made-up numbers in half precision, one tensor after the other
    python tests/helpers/sd_memory.py file FILE | ckpt FILE | folder FOLDER | convert FILE FOLDER
prints JSON: MB beyond what the imports took, at most; MB that were read or written; are the numbers the announced ones?
"""
import json
import re
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import torch

from diffcourse import sd_keys
from diffcourse.core import generator
from diffcourse.sd_keys import FAMILY, SDModel, write_one_by_one
from diffcourse.weights import layout

SMALLER = replace(FAMILY['sd-1'], unet=FAMILY['sd-1'].unet | dict(model_channels=128, context_dim=256),
                  text=FAMILY['sd-1'].text | dict(hidden_size=256, num_attention_heads=4, vocab_size=9000))
FAMILY['half'] = SMALLER


def numbers(key, shape):
    "Numbers that follow from a key: a thousand, again and again"
    n = torch.Size(shape).numel()
    return torch.randn(1009, generator=generator(zlib.crc32(key.encode()))).half().repeat(n // 1009 + 1)[:n].reshape(shape)


def peak(): return int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1]) / 1024


def megabytes(path): return sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob('*.safetensors'))) / 2**20


def touched(model):
    "Read every number once; are some of them right?"
    total = sum(float(v.view(torch.int16).max()) for v in model.state_dict().values())
    keys = list(model.state_dict())[::50]
    return total == total and all(v.equal(numbers(k, v.shape)) for k, v in model.state_dict().items() if k in keys)


def main(what, path, *more):
    SDModel.from_member('half')                    # the meta device imports more of PyTorch
    before, path, right = peak(), Path(path), True
    if what == 'write':
        shapes = layout(SDModel.from_member('sd-1' if more[0] == 'released' else 'half'))
        write_one_by_one(path, {k: (torch.float16, s) for k, s in shapes.items()}, lambda k: numbers(k, shapes[k]))
        if more[0] == 'half': torch.save(dict(state_dict={k: numbers(k, s) for k, s in shapes.items()}, callbacks={Path('x'): 1}), path.with_suffix('.ckpt'))
        return print(json.dumps([0, megabytes(path), True]))
    if what == 'convert': SDModel.from_single_file(path, bpe=sd_keys.BPE([], sd_keys.CLIP_SPECIALS)).to_diffusers(more[0])
    else: right = touched(SDModel.from_pretrained(path) if what == 'folder' else SDModel.from_single_file(path))
    print(json.dumps([peak() - before, megabytes(path), right]))


if __name__ == '__main__': main(*sys.argv[1:])
