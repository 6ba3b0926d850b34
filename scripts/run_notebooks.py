"""Execute notebooks top to bottom in a fresh kernel and stamp them.

    python scripts/run_notebooks.py                 # every notebook, at $DIFFCOURSE_BUDGET
    python scripts/run_notebooks.py 08_ddpm 04_vae  # these

The stamp (budget and a hash of the code cells, in the notebook's own metadata) lets a test tell
whether the committed outputs come from the committed code.
"""
import argparse
import base64
import hashlib
import io
import os
import subprocess
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def code_hash(nb) -> str:
    "A hash of the code cells, blind to outputs and prose"
    text = '\0'.join(c.source.strip() for c in nb.cells if c.cell_type == 'code' and c.source.strip())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def lighten(nb, limit: int = 8_000, colours: int = 96) -> None:
    "Store every PNG output above `limit` bytes with a palette: a third of the size, no change that one would see"
    for o in (o for c in nb.cells if c.cell_type == 'code' for o in c.outputs):
        png = base64.b64decode(o.get('data', {}).get('image/png', ''))
        if len(png) <= limit: continue
        buffer = io.BytesIO()
        Image.open(io.BytesIO(png)).convert('RGB').quantize(colours, Image.Quantize.MAXCOVERAGE, kmeans=2).save(buffer, 'PNG', optimize=True)
        if len(buffer.getvalue()) < len(png): o.data['image/png'] = base64.b64encode(buffer.getvalue()).decode()


def run(path: Path, budget: str, timeout: int = 3600) -> float:
    "Execute one notebook in place; returns seconds"
    nb, start = nbformat.read(path, 4), time.time()
    for c in nb.cells:
        if c.cell_type == 'code': c.outputs, c.execution_count = [], None
    os.environ['DIFFCOURSE_BUDGET'] = budget
    NotebookClient(nb, timeout=timeout, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}).execute()
    lighten(nb)
    nb.metadata = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'},
                   'diffcourse': {'budget': budget, 'code': code_hash(nb)}}
    nbformat.write(nb, path)
    return time.time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help='notebook names without .ipynb; default: all')
    parser.add_argument('--budget', default=os.environ.get('DIFFCOURSE_BUDGET', 'laptop'))
    args = parser.parse_args()
    paths = [ROOT / 'nbs' / f'{n}.ipynb' for n in args.names] or sorted((ROOT / 'nbs').glob('*.ipynb'))
    for path in paths:
        seconds = run(path, args.budget)
        print(f'{path.name:24} {seconds:6.0f} s {path.stat().st_size / 1000:7.0f} kB', flush=True)
    subprocess.run(['nbdev_clean'], cwd=ROOT, check=True)


if __name__ == '__main__': main()
