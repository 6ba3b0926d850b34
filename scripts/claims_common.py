"""What the scripts that measure claims share: the beginning of their command line, means over seeds, and the file they write"""
import argparse
import json
from pathlib import Path

import torch

from diffcourse.core import BUDGETS, atomic_write, default_device
from diffcourse.train import device_name


def parser(
    doc: str,        # the script's own docstring; its first line is the description
    of_seeds: str,   # what is done once for each seed
    seeds=(0, 1, 2), # the default
) -> argparse.ArgumentParser:
    "--budget, --out and --seeds; a script adds its own"
    p = argparse.ArgumentParser(description=doc.splitlines()[0])
    p.add_argument('--budget', choices=BUDGETS, default=None, help='default: $DIFFCOURSE_BUDGET, then laptop')
    p.add_argument('--out', type=Path, required=True, help='JSON file to write')
    p.add_argument('--seeds', type=int, nargs='+', default=seeds, help=of_seeds)
    return p


def over_seeds(
    id: str,      # of a claim
    runs: list,   # one dict of numbers for each seed
    level: str,   # the budget
    size: dict,   # what the budget meant
) -> dict:        # an entry of `store`'s result
    "Means and spreads of a claim's numbers, with where and how they were measured"
    for r in runs: print(id, json.dumps(r), flush=True)
    numbers, several = {k: torch.tensor([r[k] for r in runs], dtype=torch.float64) for k in runs[0]}, len(runs) > 1
    return dict(numbers={k: float(v.mean()) for k, v in numbers.items()}, seeds=len(runs), runs=runs if several else [],
                spread={k: float(v.std()) for k, v in numbers.items()} if several else {}, budget=level,
                device=device_name(default_device()), settings=size)


def store(result: dict, out: Path) -> None:
    "Write {claim: {'numbers', …}}, whole or not at all, and print the numbers"
    with atomic_write(out) as tmp: tmp.write_text(json.dumps(result, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    for id, r in result.items(): print(id, json.dumps({k: round(v, 4) for k, v in r['numbers'].items()}))
