"The common ground: devices and number formats, chance, budgets, files, pictures, tables, verdicts, graders"
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffcourse import core
from diffcourse.core import (CourseError, Draws, Exercise, Table, animate, asset, atomic_write, autocast, budget, claim,
                             default_device, fast_bf16, generator, image_grid, ledger, manifest, measurement, plot_lines,
                             show_images, smooth, to_float, to_uint8, verdict)


# ---------------------------------------------------------------- device and number format

def machine(monkeypatch, cuda=False, mps=False):
    "Pretend that this machine has such devices"
    monkeypatch.delenv('DIFFCOURSE_DEVICE', raising=False)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: mps)


@pytest.mark.parametrize('have, want', [(dict(cuda=True, mps=True), 'cuda'), (dict(mps=True), 'mps'), ({}, 'cpu')])
def test_cuda_then_mps_then_cpu(monkeypatch, have, want):
    machine(monkeypatch, **have)
    assert default_device().type == want and default_device('cpu').type == 'cpu'


def test_the_environment_chooses_and_the_argument_wins(monkeypatch):
    machine(monkeypatch, cuda=True)
    monkeypatch.setenv('DIFFCOURSE_DEVICE', 'cpu')
    assert default_device().type == 'cpu' and default_device('cuda:1') == torch.device('cuda:1')


def test_absent_or_unknown_devices_are_named(monkeypatch):
    machine(monkeypatch)
    for name in ('cuda', 'mps'):
        with pytest.raises(CourseError, match=f'{name} was asked for'): default_device(name)
    with pytest.raises(CourseError, match="'abacus' is no device"): default_device('abacus')
    monkeypatch.setenv('DIFFCOURSE_DEVICE', 'cuda')
    with pytest.raises(CourseError, match='cuda was asked for'): default_device()


@pytest.mark.parametrize('flags, want', [('fma avx512_bf16 x', True), ('amx_bf16', True), ('avx2 avx512f', False), (None, False)])
def test_bf16_on_a_cpu_asks_the_hardware(monkeypatch, flags, want):
    def read(path, *a, **k):
        if str(path) != '/proc/cpuinfo': return real(path, *a, **k)
        if flags is None: raise FileNotFoundError(path)
        return f'flags : {flags}\n'
    real = Path.read_text
    monkeypatch.setattr(Path, 'read_text', read)
    fast_bf16.cache_clear()
    try: assert fast_bf16('cpu') is want and fast_bf16('mps') is False
    finally: fast_bf16.cache_clear()


def test_autocast_follows_the_policy(monkeypatch):
    a = torch.ones(2, 2)
    for wanted in (True, False):
        monkeypatch.setattr(core, 'fast_bf16', lambda kind: wanted)
        with autocast(torch.device('cpu')): product = a @ a
        assert product.dtype == (torch.bfloat16 if wanted else torch.float32)
    with autocast(torch.device('cpu'), enabled=False): assert (a @ a).dtype == torch.float32


# ---------------------------------------------------------------- chance and budgets

@pytest.mark.parametrize('draw', [lambda d, n: d.normal(n, 3), lambda d, n: d.uniform(n, 2, 2), lambda d, n: d.integers(9, n)])
def test_draws_are_a_function_of_seed_and_step_shared_out_by_rank(draw):
    whole = draw(Draws(1, 7), 12)
    assert whole.equal(draw(Draws(1, 7), 12)) and not whole.equal(draw(Draws(1, 8), 12)) and not whole.equal(draw(Draws(2, 7), 12))
    for world in (2, 3): assert whole.equal(torch.cat([draw(Draws(1, 7, rank=r, world=world), 12 // world) for r in range(world)]))


def test_draws_have_their_distributions_and_disturb_nobody():
    before = torch.get_rng_state()
    d = Draws(0, 0)
    x, u, i = d.normal(40_000), d.uniform(40_000), d.integers(5, 40_000)
    assert abs(x.mean()) < .02 and abs(x.std() - 1) < .02 and 0 <= u.min() and u.max() < 1 and abs(u.mean() - .5) < .01
    assert i.unique().tolist() == [0, 1, 2, 3, 4] and before.equal(torch.get_rng_state())


def test_budget_from_argument_environment_default(monkeypatch):
    monkeypatch.delenv('DIFFCOURSE_BUDGET', raising=False)
    assert budget() == 'laptop' and budget('gpu') == 'gpu'
    monkeypatch.setenv('DIFFCOURSE_BUDGET', 'smoke')
    assert budget() == 'smoke' and budget('gpu') == 'gpu'
    monkeypatch.setenv('DIFFCOURSE_BUDGET', 'plenty')
    with pytest.raises(CourseError, match='plenty.*smoke, laptop, gpu'): budget()


# ---------------------------------------------------------------- files

@pytest.fixture
def assets(tmp_path, monkeypatch):
    "A data folder with one file in its manifest"
    (tmp_path / 'a.bin').write_bytes(b'right')
    entry = {'a.bin': {'sha256': core.sha256(tmp_path / 'a.bin'), 'bytes': 5}, 'gone.bin': {'sha256': '0' * 64, 'bytes': 1}}
    (tmp_path / 'MANIFEST.json').write_text(json.dumps(entry))
    monkeypatch.setattr(core, 'asset_roots', lambda: [tmp_path / 'nowhere', tmp_path])
    return tmp_path


def test_assets_are_verified(assets):
    assert asset('a.bin').read_bytes() == b'right'
    (assets / 'a.bin').write_bytes(b'wrong')
    with pytest.raises(CourseError, match='SHA-256'): asset('a.bin')
    assert asset('a.bin', verify=False).read_bytes() == b'wrong'
    with pytest.raises(CourseError, match='gone.bin is missing'): asset('gone.bin')
    with pytest.raises(CourseError, match='not an embedded file'): asset('b.bin')
    (assets / 'MANIFEST.json').unlink()
    with pytest.raises(CourseError, match='reinstall diffcourse'): manifest()


def test_atomic_write_is_all_or_nothing(tmp_path):
    target = tmp_path / 'deep' / 'x'
    with atomic_write(target) as tmp: tmp.write_bytes(b'old')
    with pytest.raises(OSError):
        with atomic_write(target) as tmp:
            tmp.write_bytes(b'half')
            raise OSError(28, 'No space left on device')
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(target) as tmp: raise KeyboardInterrupt
    assert target.read_bytes() == b'old' and [p.name for p in target.parent.iterdir()] == ['x']


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    target = tmp_path / 'x'
    target.write_bytes(b'old')
    code = (f'import os, signal\nfrom diffcourse.core import atomic_write\n'
            f'with atomic_write({str(target)!r}) as t:\n    t.write_bytes(b"half")\n    os.kill(os.getpid(), signal.SIGKILL)')
    assert subprocess.run([sys.executable, '-c', code]).returncode == -9
    assert target.read_bytes() == b'old' and not [p for p in tmp_path.iterdir() if p.name != 'x' and not p.name.endswith('.part')]


def test_home_and_offline(monkeypatch, tmp_path):
    monkeypatch.setenv('DIFFCOURSE_HOME', str(tmp_path))
    assert core.home() == tmp_path
    monkeypatch.delenv('DIFFCOURSE_HOME')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'c'))
    if sys.platform == 'linux': assert core.home() == tmp_path / 'c' / 'diffcourse'
    for value, want in (('1', True), ('true', True), ('0', False), ('', False), ('no', False)):
        monkeypatch.setenv('DIFFCOURSE_OFFLINE', value)
        assert core.offline() is want


# ---------------------------------------------------------------- pictures, plots, tables

def test_bytes_and_floats_are_inverse_and_clip():
    every = torch.arange(256, dtype=torch.uint8)
    assert to_uint8(to_float(every)).equal(every) and to_float(every).min() == -1 and to_float(every).max() == 1
    assert to_uint8(torch.tensor([-9., 9.])).tolist() == [0, 255]


def test_image_grid_puts_every_pixel_in_its_place():
    x = torch.randint(0, 256, (5, 3, 4, 6), generator=generator(0), dtype=torch.uint8)
    grid = image_grid(x, columns=2, pad=1)
    assert grid.shape == (3 * 5 - 1, 2 * 7 - 1, 3) and (grid[4] == 255).all() and (grid[10:, 7:] == 255).all()
    for i, p in enumerate(x):
        r, c = divmod(i, 2)
        assert (grid[r * 5:r * 5 + 4, c * 7:c * 7 + 6] == p.permute(1, 2, 0).numpy()).all()
    assert (image_grid(x, 2, scale=3)[::3, ::3] == grid).all()
    grey = image_grid(torch.zeros(1, 1, 2, 2))
    assert grey.shape == (2, 2, 3) and (grey == 128).all()
    with pytest.raises(CourseError, match='pictures must be'): image_grid(torch.zeros(3, 4, 4))
    with pytest.raises(CourseError, match='pictures must be'): image_grid(torch.zeros(1, 2, 4, 4))


def test_show_images_returns_the_figure():
    x = torch.rand(5, 1, 8, 8, generator=generator(0)) * 2 - 1
    together, titled = show_images(x, columns=5, title='all'), show_images(x, list('abcde'), columns=3)
    assert len(together.axes) == 1 and together.get_suptitle() == 'all'
    assert [ax.get_title() for ax in titled.axes] == [*'abcde', ''] and len(titled.axes) == 6
    shown = titled.axes[1].images[0].get_array()
    assert (np.asarray(shown) == image_grid(x[1:2])).all()


def test_an_animation_keeps_first_and_last_and_is_a_gif():
    from PIL import Image
    states = [torch.full((4, 1, 8, 8), v) for v in torch.linspace(-1, 1, 50).tolist()]
    film = animate(states, frames=7, columns=2, scale=1)
    assert len(film.frames) == 7 and film.frames[0].min() == 0 and film.frames[-1].min() == 255
    assert (film.frames[0] == image_grid(states[0], 2)).all()
    gif = Image.open(io.BytesIO(film.gif()))
    assert gif.n_frames == 7 and gif.size == (17, 17) and gif.info['loop'] == 0
    assert 'data:image/gif;base64,' in film._repr_html_() and 'alt=' in film._repr_html_()
    with pytest.raises(CourseError, match='at least one'): animate([])


def test_plots_show_the_numbers_they_were_given():
    x, y = np.arange(1, 6), np.array([5., 4, 3, 2, 1])
    fig = plot_lines({'a': (x, y), 'b': (x, 2 * y, [.1] * 5)}, 'step', 'loss', logx=True, logy=True)
    ax = fig.axes[0]
    assert [l.get_label() for l in ax.lines] == ['a', 'b'] and (ax.lines[1].get_ydata() == 2 * y).all()
    assert ax.get_xscale() == ax.get_yscale() == 'log' and ax.get_xlabel() == 'step' and ax.get_legend()
    band = ax.collections[1].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(10.1) and not plot_lines({'a': (x, y)}).axes[0].get_legend()


def test_running_mean():
    y = torch.rand(30, generator=generator(0)).tolist()
    for window in (1, 7, 100): np.testing.assert_allclose(smooth(y, window), [np.mean(y[max(0, i + 1 - window):i + 1]) for i in range(30)])


def test_tables_as_text_and_as_markdown():
    t = Table([('a|b', 1.23456789, 3), ('long name', 1e-9, 'x')], ('what', 'value', 'n'))
    assert str(t).splitlines() == ['what       value  n', 'a|b        1.235  3', 'long name  1e-09  x'] and repr(t) == str(t)
    assert t._repr_markdown_().splitlines()[:3] == ['| what | value | n |', '| --- | --- | --- |', '| a\\|b | 1.235 | 3 |']


# ---------------------------------------------------------------- claims

@pytest.mark.parametrize('rule', ['__import__("os")', 'x.real > 1', '[x for x in y]', 'x if x else y', '(lambda: 1)()', 'f"{x}"',
                                  'x[0]', 'print(x)'])
def test_a_rule_is_arithmetic_and_nothing_else(rule):
    with pytest.raises(CourseError): verdict(rule, dict(x=1., y=2.))


def test_rules_are_applied():
    assert verdict('a < 0.9 * b and not abs(c) > 3', dict(a=1, b=2, c=-2)) and not verdict('max(a, b) < min(c, 9)', dict(a=1, b=2, c=2))
    with pytest.raises(CourseError, match="needs \\['b'\\]"): verdict('a < b', dict(a=1))


def test_claims_show_number_spread_and_how_they_were_made(assets):
    (assets / 'claims').mkdir()
    rules = {'X-1': dict(claim='it works', paper='a paper', rule='a < b'), 'X-2': dict(claim='it too', rule='a < b', otherwise='contradicted')}
    results = {'X-1': dict(numbers=dict(a=1., b=2.), spread=dict(a=.25), budget='laptop', device='an abacus', seeds=3, runs=[1, 2])}
    for name, content in (('rules', rules), ('results', results)): (assets / f'claims/{name}.json').write_text(json.dumps(content))
    listed = {f'claims/{n}.json': {'sha256': core.sha256(assets / f'claims/{n}.json'), 'bytes': 1} for n in ('rules', 'results')}
    (assets / 'MANIFEST.json').write_text(json.dumps(listed))
    assert measurement('X-1')['runs'] == [1, 2] and measurement('X-2') == {}
    assert claim('X-1').rows[0][2:] == ('a = 1 ± 0.25, b = 2', 'a < b', 'reproduced')
    assert claim('X-2').rows[0][2:] == ('–', 'a < b', 'not measured yet')
    assert claim('X-1', a=3., b=2.).rows[0][2:] == ('a = 3, b = 2', 'a < b', 'not at this scale')
    assert claim('X-2', a=3., b=2.).rows[0][-1] == 'contradicted'
    assert [r[0] for r in ledger().rows] == ['X-1', 'X-2'] and ledger('X-2').rows[0][0] == 'X-2'
    assert ledger('X-1').rows[0][4] == 'laptop, 3 seeds, an abacus'
    for f in (claim, ledger, measurement):
        with pytest.raises(CourseError, match='no rule for claim Y-9'): f('Y-9')


def test_every_stored_measurement_has_a_rule_and_says_how_it_was_made():
    rules = json.loads(asset('claims/rules.json').read_text(encoding='utf-8'))
    for id in rules:
        found = measurement(id)
        if not found: continue
        assert isinstance(verdict(rules[id]['rule'], found['numbers']), bool), id
        for k in ('budget', 'device', 'seeds'): assert found.get(k), f'{id} does not say its {k}'


# ---------------------------------------------------------------- exercises

def test_grades_name_the_kind_of_error():
    ex = Exercise('twice', lambda x: 2 * x, lambda g: (torch.rand(4, generator=g) + 1,), {'you squared': lambda x: x**2})
    def hole(x): raise NotImplementedError
    def crash(x): raise KeyError('k')
    said = {f: ex.grade(f).message for f in (hole, crash)}
    assert 'hole' in said[hole] and 'KeyError' in said[crash] and ex.grade(lambda x: x + x).ok
    for f, words in ((lambda x: x**2, 'you squared'), (lambda x: None, 'return missing'), (lambda x: x[:2], 'shape (2,), expected (4,)'),
                     (lambda x: x / 0, 'NaN or infinity'), (lambda x: 3 * x, 'off by up to')):
        grade = ex.grade(f)
        assert not grade.ok and words in grade.message and repr(grade).startswith('✗')
