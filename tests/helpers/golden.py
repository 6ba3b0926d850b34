"Goldens made by this package: passing proves nothing about the package, failing after a change everything about the checker"
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests import parity


def one(folder, name):
    "The verdict on one golden of a folder"
    return parity.check(parity.Golden(Path(folder) / f'{name}.json'))


def write_golden(folder, name, config, inputs, weights=(), **more):
    "Store what the checker of this name answers to these inputs and weights, as the official goldens are stored; path and answers"
    path = Path(folder) / f'{name}.json'
    path.write_text(json.dumps(dict(name=name, config=config, rtol=1e-5, atol=2e-5) | more))
    tensors = {f'weights/{k}': v for k, v in dict(weights).items()} | {f'in/{k}': v for k, v in inputs.items()}
    save = lambda tensors: save_file({k: v.clone().contiguous() for k, v in tensors.items()}, path.with_suffix('.safetensors'))
    save(tensors)
    with torch.no_grad(): out = parity.checker(name)(parity.Golden(path))
    save(tensors | {f'out/{k}': v for k, v in out.items()})
    return path, out
