"""Measure the FID's Inception on real pictures and write data/measured/inception.json, which chapter 17a shows

    python scripts/inception_numbers.py [--n 2000] [--few 200] [--out FILE]

About 0.2 s of one CPU core for each of 2·n + 3·few pictures. CIFAR-10 and the weights are fetched if need be."""
import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path

import torch

from diffcourse import data, extractors, inception, metrics
from diffcourse.core import atomic_write, to_float
from diffcourse.metrics import Statistics, bootstrap_frechet, frechet_distance, interval, outputs
from diffcourse.train import device_name, read_tensors, write_tensors

ROOT = Path(__file__).resolve().parent.parent


def of(x) -> Statistics: return Statistics().update(x)


def walked(net, split, n, cache) -> dict:
    "Features and spatial numbers of the first n pictures; those in the cache folder are not made again"
    images, parts = data.cifar10(split).images[:n], []
    for i in range(0, n, 100):
        path = cache / f'{split}-{i}-{min(n, i + 100)}.safetensors' if cache else None
        if path is None or not path.exists():
            part = outputs(net, images[i:i + 100], ('features', 'spatial'))
            if path: write_tensors(path, part, {})
            print(split, i, flush=True)
        parts.append(read_tensors(path)[0] if path else part)
    return {k: torch.cat([p[k] for p in parts]) for k in ('features', 'spatial')}


def with_interval(x, y, resamples=20) -> tuple:
    "Distance, its 95 % interval by the bootstrap (spread of the resamples, about normal), estimated bias"
    value, reference = frechet_distance(of(x), of(y)), of(y)
    again = bootstrap_frechet(x, reference, resamples)
    spread = 1.96 * float(again.std())
    return value, value - spread, value + spread, float(again.mean()) - value


def real_rows(net, n, cache) -> tuple:
    "CIFAR-10 test against train, and the features of the latter"
    a, b = (walked(net, split, n, cache) for split in ('test', 'train'))
    value, low, high, bias = with_interval(a['features'], b['features'])
    rows = [dict(what=f'FID, first {n:,} test against first {n:,} training pictures', value=round(value, 2),
                 note=f'95 % interval {low:.2f} … {high:.2f}; bias by the bootstrap {bias:.1f}')]
    m = min(1500, n)
    rows.append(dict(what=f'FID, first {m:,} against first {m:,}', value=round(frechet_distance(of(a['features'][:m]), of(b['features'][:m])), 2),
                     note='the packaged TorchScript, measured elsewhere: 33.0 at 1,500' if m == 1500 else ''))
    rows.append(dict(what=f'sFID, first {n:,} against first {n:,}', value=round(frechet_distance(of(a['spatial']), of(b['spatial'])), 2), note='2,023 numbers of Mixed_6d'))
    self_distance = frechet_distance(of(b['features']), of(b['features']))
    rows.append(dict(what='FID of the training pictures against themselves', value=round(self_distance, 6), note='exact: 0'))
    return rows, b['features']


def resize_rows(net, standard, few) -> list:
    "The same pictures behind two resizings"
    train = data.cifar10('train').subset(range(few))
    rows = []
    for resize in ('torch-fidelity', 'clean'):
        other = outputs(metrics.get_extractor('inception', 'cpu', resize=resize), train)['features']
        rows.append(dict(what=f'the same {few} training pictures, {resize} against pytorch-fid', note='same weights; exact would be 0 if resizing did not matter',
                         value=round(frechet_distance(of(other), of(standard[:few])), 3)))
    return rows


def bf16_rows(standard, few) -> list:
    "The same pictures in bfloat16"
    train = data.cifar10('train').subset(range(few))
    rough = outputs(metrics.get_extractor('inception', 'cpu', precision='bf16'), train)['features']
    change = float((rough - standard[:few]).norm() / standard[:few].norm())
    return [dict(what=f'the same {few} training pictures, bfloat16 against float32', value=round(frechet_distance(of(rough), of(standard[:few])), 4),
                 note=f'features differ by {change:.1e} of their size')]


def agreement_rows(net) -> list:
    "The same pictures through the programs that others use, with the same weights"
    import pytorch_fid.inception as pf
    import torch_fidelity.feature_extractor_inceptionv3 as tf
    state = {**inception.Inception().state_dict(), 'fc.weight': torch.zeros(1008, 2048), 'fc.bias': torch.zeros(1008)}
    state |= read_tensors(inception.fetch())[0]
    u, rows = data.cifar10('test').images[:16], []
    error = lambda a, b: float((a - b).abs().max() / b.abs().max())
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')
        pf.load_state_dict_from_url = lambda *a, **k: state
        rows.append(('pytorch-fid', error(outputs(net, u)['features'], pf.InceptionV3([3]).eval()(u / 255)[0].flatten(1))))
        torch.save(state, Path(folder) / 'w.pth')
        theirs = tf.FeatureExtractorInceptionV3('it', ['2048'], feature_extractor_weights_path=str(Path(folder) / 'w.pth'))
        ours = metrics.get_extractor('inception', 'cpu', resize='torch-fidelity')
        rows.append(('torch-fidelity', error(outputs(ours, u)['features'], theirs(u)[0])))
        program = torch.jit.load(inception.wheel_member(*inception.PACKAGE, Path(folder)), map_location='cpu').eval()
        rows.append(('the packaged TorchScript', error(outputs(net, u)['features'], program(net.prepare(to_float(u))))))
    return [dict(what=f'features against {k}, 16 test pictures', value=float(f'{v:.1e}'), note='largest difference, of the largest feature') for k, v in rows]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--n', type=int, default=2000, help='pictures a side')
    p.add_argument('--few', type=int, default=200, help='pictures for what resizing and bfloat16 do')
    p.add_argument('--bf16', type=int, default=0, help='pictures for what bfloat16 does (slow where it is emulated); 0: leave out')
    p.add_argument('--cache', type=Path, help='a folder that keeps features, so that an interrupted run goes on')
    p.add_argument('--out', type=Path, default=ROOT / 'data/measured/inception.json')
    a = p.parse_args()
    start, net = time.process_time(), metrics.get_extractor('inception', 'cpu')
    real, standard = real_rows(net, a.n, a.cache)
    rows = real + resize_rows(net, standard, a.few) + (bf16_rows(standard, a.bf16) if a.bf16 else []) + agreement_rows(net)
    test = data.cifar10('test').subset(range(min(a.n, 2000)))
    right = float((outputs(extractors.load_resnet(), test, 'logits')['logits'].argmax(1) == test.labels).double().mean())
    rows.append(dict(what=f'accuracy of cifar_resnet56 on the first {len(test):,} test pictures', value=round(right, 4), note='published with the package: 93.2 %'))
    about = dict(device=device_name(torch.device('cpu')), torch=torch.__version__, cpu_seconds=round(time.process_time() - start),
                 extractor=metrics.fingerprint(net), preprocessing=net.preprocessing, n=a.n, rows=rows)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(a.out) as tmp: tmp.write_text(json.dumps(about, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    for r in rows: print(r['what'], r['value'], r['note'], sep='  |  ')


if __name__ == '__main__': main()
