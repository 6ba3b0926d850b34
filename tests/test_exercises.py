"Every exercise: its solution passes; its hole and every listed mistake fail, and the mistake is named"
import importlib
import pkgutil
import re
from pathlib import Path

import matplotlib
import nbformat
import pytest

matplotlib.use('Agg')
ROOT = Path(__file__).resolve().parent.parent


def tagged(nb, tag): return [c.source for c in nb.cells if c.cell_type == 'code' and tag in c.metadata.get('tags', [])]


NOTEBOOKS = [p for p in sorted((ROOT / 'nbs').glob('*.ipynb')) if tagged(nbformat.read(p, 4), 'exercise')]


def without_last_line(source):
    "The cell less its call of the grader"
    lines = source.rstrip().splitlines()
    assert '.grade(' in lines[-1], f'the cell must end by grading itself:\n{source}'
    return '\n'.join(lines[:-1])


def namespace(nb, path, monkeypatch):
    "What a reader has at the exercises: imports and exported definitions"
    monkeypatch.chdir(path.parent)
    ns = {'__name__': 'exercises'}
    for c in nb.cells:
        if c.cell_type != 'code' or set(c.metadata.get('tags', [])) & {'hole', 'solution'}: continue
        lines = [l for l in c.source.splitlines() if l.strip() and not l.lstrip().startswith('#')]
        imports_only = lines and all(re.match(r'\s*(import|from)\s|[\w\s,()]+$', l) for l in lines) and re.match(r'(import|from)\s', lines[0])
        if imports_only or re.search(r'^#\|\s*export', c.source, re.M) or 'exercise' in c.metadata.get('tags', []): exec(c.source, ns)
    return ns


@pytest.fixture
def put_back():
    "A chapter's cells may patch classes of earlier chapters and register recipes again: afterwards all is as it was, for the tests that follow"
    import diffcourse
    from diffcourse.train import RECIPES
    modules = [importlib.import_module(f'diffcourse.{m.name}') for m in pkgutil.iter_modules(diffcourse.__path__) if not m.name.startswith('_')]
    classes = {c for m in modules for c in vars(m).values() if isinstance(c, type) and c.__module__.startswith('diffcourse.')}
    before, recipes = {c: dict(vars(c)) for c in classes}, dict(RECIPES)
    yield
    for c, had in before.items():
        for k in set(vars(c)) - set(had): delattr(c, k)
        for k, v in had.items():
            if vars(c).get(k) is not v: setattr(c, k, v)
    RECIPES.clear()
    RECIPES.update(recipes)


@pytest.mark.usefixtures('put_back')
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_exercises(path, monkeypatch):
    from diffcourse.core import Exercise
    nb = nbformat.read(path, 4)
    ns = namespace(nb, path, monkeypatch)
    exercises = {v.name: v for v in ns.values() if isinstance(v, Exercise) and v.name != 'spread'}
    assert len(exercises) >= 3
    holes, solutions = {}, {}
    for tag, found in (('hole', holes), ('solution', solutions)):
        for source in tagged(nb, tag):
            local = dict(ns)
            exec(without_last_line(source), local)
            name = re.search(r'\.grade\((\w+)\)', source.splitlines()[-1]).group(1)
            found[name] = local[name]
    assert set(exercises) == set(holes) == set(solutions)
    for name, ex in exercises.items():
        assert ex.grade(solutions[name]).ok, f'{name}: the solution fails: {ex.grade(solutions[name])}'
        assert not ex.grade(holes[name]).ok, f'{name}: the hole passes'
        assert len(ex.mistakes) >= 2, f'{name}: list at least two mistakes'
        for what, wrong in ex.mistakes.items():
            grade = ex.grade(wrong)
            assert not grade.ok and what in grade.message, f'{name}: {what!r} was graded {grade}'
