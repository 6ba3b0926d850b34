"""Pictures from anywhere, one pass, the same bits on two processes, and what is said when something is wrong"""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffcourse.core import CourseError, generator
from diffcourse.data import ImageSet
from diffcourse.measure import (METRICS, FairSample, Seen, Ticker, cautions, collect, duration, extractor_for, measure, merged,
                                pictures_of, share_interval)
from diffcourse.metrics import (Classifier, Statistics, feature_fid, features, fingerprint, load_statistics, outputs,
                                preprocessing, quantise, save_statistics)
from diffcourse.scores import groups_in_order, inception_score, kid, precision_recall

ROOT = Path(__file__).resolve().parent.parent


class Eyes(Classifier):
    "A tiny network that offers everything, for RGB pictures of any size"
    name, shape, offers, classes, batch = 'eyes', (3, None, None), ('features', 'spatial', 'logits'), 4, 16

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv, self.head = torch.nn.Conv2d(3, 6, 3, 2), torch.nn.Linear(6, 4)

    def outputs(self, x, wanted=('features',)):
        m = self.conv(x).tanh()
        h = m.mean((2, 3))
        known = dict(features=lambda: h, spatial=lambda: m[:, :2, :3, :3].flatten(1), logits=lambda: 5 * self.head(h))
        return {k: known[k]() for k in wanted}

    def features(self, x): return self.outputs(x)['features']


def pictures(n=40, seed=0, size=12, channels=3):
    return torch.randint(0, 256, (n, channels, size, size), generator=generator(seed), dtype=torch.uint8)


@pytest.fixture
def folder(tmp_path):
    "Twenty PNG files in two folders"
    for i, p in enumerate(pictures(20)):
        path = tmp_path / 'heap' / f'{i // 10}' / f'{i:02}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(p.permute(1, 2, 0).numpy()).save(path)
    return tmp_path / 'heap'


def all_of(source, batch=7, **how): return torch.cat(list(pictures_of(source, **how).parts(batch)))


# ---------------------------------------------------------------- sources

def test_every_source_gives_the_same_pictures(folder, tmp_path):
    x = pictures(20)
    np.savez_compressed(tmp_path / 'x.npz', x.permute(0, 2, 3, 1).numpy(), np.zeros(20))
    for source in (x, ImageSet(x, 'x'), folder, str(folder), tmp_path / 'x.npz', x.split(6), ({'x': p} for p in x.split(6)),
                   (ImageSet(p) for p in x.split(6))):
        assert all_of(source).equal(x)
    assert pictures_of(tmp_path / 'x.npz').total == pictures_of(folder).total == 20 and pictures_of(x.split(6)).total is None


def test_shares_of_processes_are_disjoint_and_complete(folder, tmp_path):
    x = pictures(20)
    np.savez(tmp_path / 'x.npz', x.permute(0, 2, 3, 1).numpy())
    for source in (x, folder, tmp_path / 'x.npz'):
        shares = [list(pictures_of(source).parts(3, rank, 3)) for rank in range(3)]
        together = [p for i in range(3) for r in range(3) if i < len(shares[r]) for p in [shares[r][i]]]
        assert torch.cat(together).equal(x)


def test_a_set_by_name_and_scaling(folder):
    heap = pictures_of('fashion_mnist:test')
    assert heap.name.startswith('fashion_mnist test') and next(heap.parts(5)).shape == (5, 1, 28, 28)
    assert all_of(folder, size=8).shape == (20, 3, 8, 8) and all_of(folder, channels=1).shape == (20, 1, 12, 12)


def test_rotated_photographs_are_judged_as_they_are_shown(tmp_path):
    (tmp_path / 'p').mkdir()
    for i, (size, turn) in enumerate((((10, 6), 1), ((6, 10), 6))):
        exif = Image.Exif()
        exif[274] = turn
        Image.new('RGB', size, 'red').save(tmp_path / 'p' / f'{i}.png', exif=exif)
    assert all_of(tmp_path / 'p').shape == (2, 3, 6, 10)


def test_a_broken_or_odd_picture_is_named_before_the_work(folder):
    (folder / 'a.png').write_bytes(b'no picture')
    with pytest.raises(CourseError, match=r'1 of 21 files are no pictures.*\n.*heap/a\.png'): pictures_of(folder)
    Image.new('RGB', (30, 12)).save(folder / 'a.png')
    with pytest.raises(CourseError, match=r'1 of 21 pictures are not 12×12.*--size 12.*\n.*heap/a\.png: 12×30'): pictures_of(folder)
    assert all_of(folder, size=12).shape == (21, 3, 12, 12)


def test_a_truncated_picture_is_named(folder):
    path = folder / '0' / '03.png'
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(CourseError, match=r'1 pictures cannot be read.*\n.*03\.png'): all_of(folder)


@pytest.mark.parametrize('make, message', [
    (lambda d: pictures_of(d / 'nowhere'), 'neither there nor the name of a data set'),
    (lambda d: pictures_of(d), 'holds no pictures'),
    (lambda d: pictures_of(3), 'int is no heap'),
    (lambda d: pictures_of(torch.zeros(3, 4)), r'must be \(N, C, H, W\)'),
    (lambda d: all_of([torch.zeros(3, 4)]), 'batch 0 is no tensor'),
    (lambda d: pictures_of(npz(d, np.zeros((3, 4)))), r'must be uint8 \(N, H, W'),
    (lambda d: pictures_of(npz(d, np.zeros((3, 4, 4, 3), np.uint8), 'images')), 'no pictures'),
    (lambda d: pictures_of(text(d)), 'truncated or no .npz'),
    (lambda d: pictures_of(text(d, 'x.csv')), 'is no folder and no .npz')])
def test_sources_that_are_refused(tmp_path, make, message):
    with pytest.raises(CourseError, match=message): make(tmp_path)


def npz(folder, array, key='arr_0'):
    np.savez(folder / 'x.npz', **{key: array})
    return folder / 'x.npz'


def text(folder, name='x.npz'):
    (folder / name).write_text('no archive')
    return folder / name


# ---------------------------------------------------------------- one pass

def test_a_pass_collects_what_separate_passes_would(folder):
    model, x = Eyes(), pictures(20)
    seen = collect(folder, model, ('features', 'spatial', 'logits'), ('logits',), batch=6)
    for k in ('features', 'spatial'):
        want = Statistics().update(torch.cat([outputs(model, p, k, 6)[k] for p in x.split(6)]))
        assert seen.statistics[k].cov.equal(want.cov) and seen.statistics[k].mean.equal(want.mean)
    assert seen.rows['logits'].shape == (20, 4) and seen.n == 20
    assert seen.name == collect(x.split(7), model).name.replace('batches', 'heap, 20 pictures')   # the hash knows the bytes only


def test_the_sample_is_bounded_and_fair():
    s = FairSample(10, 3)
    for part in torch.arange(1000).split(33):
        s.update(part)
        assert sum(map(len, s.kept)) <= 20 + 33
    assert len(s.rows()) == 10 and s.rows().equal(s.rows().sort().values)
    whole = FairSample(None)
    for part in torch.arange(100).split(33): whole.update(part)
    assert whole.rows().equal(torch.arange(100))


def test_nan_features_stop_the_pass():
    class Broken(Eyes):
        def outputs(self, x, wanted=('features',)): return {k: v / 0 * 0 for k, v in super().outputs(x, wanted).items()}
    with pytest.raises(CourseError, match='pictures, pictures 1 to 16 of this pass: 16 of 16 .* NaN or infinity'):
        measure(pictures(), pictures(), extractor=Broken())


@pytest.mark.parametrize('fake, message', [('nowhere', 'neither there'), (pictures(1), 'has 1 picture,'), (pictures()[0], 'must be')])
def test_the_second_heap_is_looked_at_before_the_first_pass(fake, message):
    "An hour's work should not end in a missing folder"
    def never(): pytest.fail('the reference was read'); yield
    with pytest.raises(CourseError, match=message): measure(never(), fake, extractor=Eyes())


def test_the_interval_of_kid_covers():
    "150 pairs of heaps: at least nine of ten intervals hold the mean of all estimates (with √(m/N) for √(m/(N−m)) 81 % did)"
    g, model, found = generator(3), Eyes(), []
    for _ in range(150):
        x, y = (torch.randn(200, 6, generator=g) + shift for shift in (0, .3))
        sides = [Seen('x', 200, {}, {'features': v}, model) for v in (x, y)]
        found += METRICS['kid'][3](*sides, dict(subset=100))
    values = torch.tensor([s.value for s in found]).double()
    inside = sum(s.low <= values.mean() <= s.high for s in found) / 150
    assert .9 <= inside <= .995, inside


def test_kid_of_few_pictures_takes_half_of_them():
    s, = measure(pictures(30), pictures(25, 1), ('kid',), Eyes())
    assert 'subsets of 12' in s.how and s.low < s.value < s.high
    s, = measure(pictures(2), pictures(2, 1), ('kid',), Eyes())
    assert math.isnan(s.low) and 'no interval' in repr(s)


def test_every_extractor_is_known_to_the_command():
    "In a process of its own, that has imported nothing else"
    probe = 'import diffcourse.measure; from diffcourse.metrics import EXTRACTORS; print(*EXTRACTORS)'
    known = subprocess.run([sys.executable, '-c', probe], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    assert {'inception', 'cifar_resnet56', 'shapes_classifier', 'emoji_classifier', 'fashion_map'} <= set(known)


# ---------------------------------------------------------------- scores

def test_measure_agrees_with_the_functions():
    model, real, fake = Eyes(), pictures(60), pictures(50, 1) // 2
    found = {s.name: s for s in measure(real, fake, METRICS, model, batch=60, resamples=30, subset=20)}
    both = ('IS', 'precision', 'recall')
    assert set(found) == {'feature-' + k for k in ('FID', 'sFID', 'KID', *both, *(f'{b} (ADM)' for b in both))}
    a, b = (outputs(model, x, model.offers, 60) for x in (real, fake))
    assert found['feature-FID'].value == feature_fid(fake, real, model, resamples=0, batch=60).value
    assert found['feature-KID'].value == pytest.approx(float(kid(a['features'], b['features'], size=20).mean()))
    shares = precision_recall(a['features'], b['features'], kind='adm')
    assert (found['feature-precision (ADM)'].value, found['feature-recall (ADM)'].value) == pytest.approx(shares)
    assert found['feature-IS (ADM)'].value == pytest.approx(float(inception_score(b['logits'], groups_in_order(50)).mean()))
    for s in found.values():
        assert s.low <= s.value <= s.high and s.extractor == fingerprint(model) and s.n == 50 and 'sha256' in s.data
        assert s.preprocessing == preprocessing(model) and (s.n_reference == 60 or s.name.startswith('feature-IS'))


def test_a_set_against_itself_is_zero():
    x = pictures(30)
    for s in measure(x, x, ('fid', 'sfid', 'pr'), Eyes(), resamples=0):
        assert abs(s.value - s.name.endswith(('precision', 'recall'))) < 1e-6


def test_scores_of_an_unlike_set_are_larger():
    model, x = Eyes(), pictures(80)
    near, far = (measure(x[:40], y, ('fid', 'sfid', 'kid'), model, resamples=0, subset=40) for y in (x[40:], x[40:] // 4))
    assert all(b.value > 3 * abs(a.value) for a, b in zip(near, far))


def test_saved_references(tmp_path):
    model, x = Eyes(), pictures(40)
    now = measure(x[:20], x[20:], ('fid', 'sfid'), model, resamples=0, keep=tmp_path / 'r.npz')
    again = measure(tmp_path / 'r.npz', x[20:], ('fid', 'sfid'), model, resamples=0)
    assert [s.value for s in now] == [s.value for s in again] and again[0].reference == now[0].reference
    with pytest.raises(CourseError, match='kid: every picture is compared with others'): measure(tmp_path / 'r.npz', x, ('kid',), model)
    with pytest.raises(CourseError, match=f'extractor differs: .{fingerprint(model)}. against .eyes@'):
        measure(tmp_path / 'r.npz', x, extractor=Eyes(1))
    np.savez(tmp_path / 'adm.npz', mu=load_statistics(tmp_path / 'r.npz').mean, sigma=load_statistics(tmp_path / 'r.npz').cov)
    foreign, = measure(tmp_path / 'adm.npz', x[20:], extractor=model, resamples=0)
    assert foreign.value == pytest.approx(now[0].value, abs=1e-9) and foreign.n_reference is None
    assert any('does not say how many' in c for c in cautions([foreign])) and 'unknown N' in repr(foreign)
    with pytest.raises(CourseError, match='differs'): measure(Statistics('other').update(torch.eye(6)), x, extractor=model)


@pytest.mark.parametrize('how, message', [
    (dict(fake=pictures(1)), r'heap to judge \(pictures\) has 1 picture, fid need at least 2'),
    (dict(real=pictures(1)), 'reference .* has 1 picture,'),
    (dict(metrics=('pr',), fake=pictures(3)), 'has 3 pictures, pr need at least 4'),
    (dict(metrics=('pr',), k=9, fake=pictures(9)), 'at least 10'),
    (dict(metrics=('fid', 'fud')), 'metrics fud: choose among fid, sfid, is'),
    (dict(metrics=()), 'metrics none'),
    (dict(batch=0), 'batch must be at least 1'), (dict(size=0), 'size must be at least 1'), (dict(k=0), 'k must be at least 1'),
    (dict(resamples=-1), 'resamples must be at least 0'), (dict(subset=1), 'subset must be at least 2'),
    (dict(keep='statistics.txt'), 'kept in .npz or .safetensors files, not in statistics.txt'),
    (dict(fake=pictures(0)), 'has 0 pictures'),
    (dict(fake=iter(())), 'there are no pictures'),
    (dict(fake=torch.full((4, 3, 12, 12), math.nan)), 'pictures hold NaN'),
    (dict(extractor='no_such_eye'), "'no_such_eye' is none of"),
    (dict(fake=pictures(5, size=9), real=pictures(5), extractor='fashion_classifier'), r'takes pictures \(N, 1, 28, 28\)')])
def test_refusals(how, message):
    with pytest.raises(CourseError, match=message): measure(**{**dict(real=pictures(), fake=pictures(), extractor=Eyes()), **how})


def test_an_extractor_must_offer_what_a_metric_needs():
    class Poor(Eyes): offers = ('features',)
    with pytest.raises(CourseError, match='sfid needs spatial of the extractor, and eyes offers features only'):
        measure(pictures(), pictures(), ('sfid',), Poor())


def test_cautions():
    few, = measure(pictures(), pictures(), extractor=Eyes(), resamples=0)
    texts = cautions([few])
    assert any('N = 40 is few' in t for t in texts) and any('published Inception' in t for t in texts)
    from dataclasses import replace
    many = replace(few, n=10_000, n_reference=10_000, name='FID')
    assert cautions([many]) == [] and 'N = 40 is few' in cautions([replace(many, n_reference=40)])[0]


def test_share_interval_is_wilsons():
    assert share_interval(0., 10)[0] == pytest.approx(0) and share_interval(1., 10)[1] == pytest.approx(1)
    low, high = share_interval(.5, 100)
    assert (low, high) == pytest.approx((.4038, .5962), abs=1e-4)


# ---------------------------------------------------------------- processes

WORKER = """
import sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
from test_measure import Eyes, pictures
from diffcourse.measure import across_processes, collect
torch.distributed.init_process_group('gloo')
rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
assert world == 2
s = across_processes(collect(pictures(45), Eyes(), batch=4, rank=rank, world=world).statistics['features'])
alone = collect(pictures(45), Eyes(), batch=4).statistics['features']
assert s.n == 45 and s.mean.equal(alone.mean) and s.cov.equal(alone.cov)
print('equal', flush=True)
"""


def test_two_processes_give_the_bits_of_one(tmp_path):
    (tmp_path / 'worker.py').write_text(WORKER.format(root=str(ROOT), tests=str(ROOT / 'tests')))
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', tmp_path / 'worker.py']
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count('equal') == 2


def test_machines_that_meet_in_files(tmp_path):
    model, x = Eyes(), pictures(45)
    for r in range(3):
        save_statistics(tmp_path / f'{r}.safetensors', collect(x, model, batch=4, rank=r, world=3).statistics['features'])
    whole = collect(x, model, batch=4).statistics['features']
    for order in ((0, 1, 2), (2, 0, 1)):
        together = merged(load_statistics(tmp_path / f'{r}.safetensors') for r in order)
        assert together.cov.equal(whole.cov) and together.mean.equal(whole.mean)


# ---------------------------------------------------------------- progress and the command

def test_durations(): assert [duration(s) for s in (0, 89, 91, 3600, 9000)] == ['0 s', '89 s', '2 min', '60 min', '2 h 30 min']


def test_progress_tells_speed_and_what_is_left(capsys, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr('time.monotonic', lambda: next(clock))
    tick = Ticker()
    for n in (50, 100, 150): tick('real', n, 200)
    tick('fake', 10, None)
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == 'real: 100 of 200 pictures, 5.0/s, 20 s left' and lines[-1] == 'fake: 10 pictures'


def run(*args):
    from typer.testing import CliRunner
    from diffcourse.cli import app
    return CliRunner().invoke(app, ['metrics', *map(str, args)])


@pytest.fixture
def garments(tmp_path):
    "Two folders of grey 28×28 pictures"
    out = []
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        for i, p in enumerate(pictures(12, seed, 28, 1)): Image.fromarray(p[0].numpy()).save(tmp_path / str(seed) / f'{i:02}.png')
        out.append(tmp_path / str(seed))
    return out


def test_command(garments, tmp_path):
    how = ('--extractor', 'fashion_classifier', '--metrics', 'fid,is,pr', '--resamples', '10')
    done = run(*garments, *how, '--save-real', tmp_path / 'r.npz')
    assert done.exit_code == 0, done.output
    for part in ('feature-FID', 'fashion_classifier@', 'N 12 against 12', '8 bits', 'N = 12 is few', 'fake: 12 of 12 pictures'):
        assert part in done.output, part
    done = run(tmp_path / 'r.npz', garments[1], '--extractor', 'fashion_classifier', '--json', '--resamples', '0')
    record, = json.loads(done.stdout)
    assert record['name'] == 'feature-FID' and record['low'] is None and record['n_reference'] == 12
    assert record['extractor'].startswith('fashion_classifier@') and 'sha256' in record['data']


def test_command_refuses(garments, tmp_path):
    for args, message in (((garments[0], tmp_path / 'x'), 'neither there'), ((*garments, '--metrics', 'foo'), 'choose among'),
                          ((*garments, '--resize', 'clean'), 'has no meaning'), ((*garments, '--device', 'toaster'), 'toaster'), ((*garments, '--batch', '0'), 'batch')):
        done = run(*args, '--extractor', 'fashion_classifier')
        assert isinstance(done.exception, CourseError) and message in str(done.exception)


def test_resize_goes_to_extractors_that_know_it(monkeypatch):
    from diffcourse import metrics
    monkeypatch.setitem(metrics.EXTRACTORS, 'sized', lambda resize='a': Eyes(seed=len(resize)))
    assert fingerprint(extractor_for('sized', 'cpu', 'bb')) == fingerprint(Eyes(2))
    with pytest.raises(CourseError, match='no meaning'): extractor_for('fashion_classifier', 'cpu', 'bb')


def test_a_score_of_logits_asks_for_weights_that_have_them(monkeypatch):
    from diffcourse import metrics
    asked = []
    monkeypatch.setitem(metrics.EXTRACTORS, 'layered', lambda logits=False: asked.append(logits) or Eyes())
    metrics._loaded.cache_clear()
    for names in (('fid',), ('is',), ('pr', 'is-adm')): measure(pictures(), pictures(), names, 'layered', resamples=0)
    assert asked == [False, True]   # the third is the second, kept


def test_quantised_alike():
    assert quantise(pictures(3).float() / 127.5 - 1).equal(pictures(3))
    assert features(Eyes(), pictures(3)).shape == (3, 6)
