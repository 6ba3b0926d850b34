"The conventions of the notebooks, as tests: outputs present and fresh, size, imports, documentation, references, maths"
import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from run_notebooks import code_hash

ROOT = Path(__file__).resolve().parent.parent

NOTEBOOKS = sorted((ROOT / 'nbs').glob('*.ipynb'))
LADDER = ['core', 'shapes', 'data', 'weights', 'train', 'layers', 'metrics', 'inception', 'extractors', 'scores', 'measure', 'ae', 'vae', 'vqvae', 'priors', 'vqvae2', 'dvae', 'dalle', 'unet', 'ddpm', 'exact', 'openai_unet', 'iddpm', 'ddim', 'adm', 'cfg', 'clip', 'glide', 'edit', 'unclip', 'dalle2', 'first_stage', 'latent', 'sd_keys', 'stable_diffusion', 'zoo', 'cli']
MODULES = [m for m in LADDER if (ROOT / 'diffcourse' / f'{m}.py').exists()]
CELL_LINES, LINE_LENGTH = 25, 120   # of a code cell: lines that are not blank, characters in each
LONG_CELLS = set() # pages that are still to be cut to that size; shall become empty
BARE_METHODS = set()           # modules with public methods that still lack their line; shall become empty
FULLY_DOCUMENTED = {'core', 'shapes', 'data', 'weights', 'train', 'layers', 'metrics', 'inception', 'extractors', 'scores', 'measure', 'ae', 'vae', 'vqvae', 'priors', 'vqvae2', 'dvae', 'dalle', 'unet', 'ddpm', 'exact', 'openai_unet', 'iddpm', 'ddim', 'adm', 'cfg', 'clip', 'glide', 'edit', 'unclip', 'dalle2', 'first_stage', 'latent', 'sd_keys', 'stable_diffusion', 'zoo', 'cli'}  # modules whose public methods document their arguments too; shall become all
HEAVY = {'matplotlib', 'torchvision', 'accelerate', 'PIL', 'huggingface_hub', 'scipy', 'diffusers', 'IPython', 'fastprogress'}


def read(path): return nbformat.read(path, 4)


def code_cells(nb): return [c for c in nb.cells if c.cell_type == 'code' and c.source.strip()]


def quiet(source):
    "Cells that need not show anything: exports, imports, directives, assertions, plain assignments"
    return bool(re.search(r'#\s*\|\s*(export|hide|default_exp|eval:\s*false)|^\s*(import|from)\s|\bassert|=\s*[^=]', source, re.M))


def too_large(nb):
    "Code cells with too many lines, and lines with too many characters"
    for c in code_cells(nb):
        lines = [l for l in c.source.splitlines() if l.strip()]
        if len(lines) > CELL_LINES: yield f'{c.id}: {len(lines)} lines, {lines[1]}'
        yield from (f'{c.id}: {len(l)} characters, {l}' for l in lines if len(l) > LINE_LENGTH)


def test_size_check_can_fail():
    cell = lambda text: nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text)])
    assert len(list(too_large(cell('\n'.join(['x = 1'] * 26 + ['', '']))))) == 1 and len(list(too_large(cell('#' * 121)))) == 1
    assert not list(too_large(cell('\n\n'.join(['#' * 120] * 25))))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
class TestNotebook:
    def test_outputs_come_from_this_code(self, path):
        nb = read(path)
        stamp = nb.metadata.get('diffcourse')
        if not code_cells(nb): return
        assert stamp, f'{path.name} was not run by scripts/run_notebooks.py'
        assert stamp['code'] == code_hash(nb), f'{path.name} changed since its outputs were made: python scripts/run_notebooks.py {path.stem}'

    def test_no_error_outputs_and_few_silent_cells(self, path):
        nb = read(path)
        errors = [c.source for c in code_cells(nb) for o in c.outputs if o.output_type == 'error' and 'raises-exception' not in c.metadata.get('tags', [])]
        assert not errors
        silent = [c.source for c in code_cells(nb) if not c.outputs and not quiet(c.source)]
        assert len(silent) <= 2, silent

    def test_size_and_formats(self, path):
        assert path.stat().st_size <= 1_000_000, f'{path.name}: {path.stat().st_size / 1e6:.2f} MB'
        for c in code_cells(read(path)):
            for o in c.outputs:
                assert 'image/svg+xml' not in o.get('data', {}), 'PNG or JPEG, not SVG'

    def test_cells_of_a_screen(self, path):
        if path.stem in LONG_CELLS: pytest.skip('still to be cut')
        found = list(too_large(read(path)))
        assert not found, '\n'.join(found)

    def test_shape_of_the_page(self, path):
        cells = read(path).cells
        assert re.match(r'(---\n.*?---\n+)?# \S', cells[0].source, re.S), 'the first cell is the H1'
        if path.stem != 'index': assert '\n> ' in cells[0].source, 'a one-line subtitle follows the H1'
        for c in cells:
            if c.cell_type == 'markdown' and path.stem != 'index' and re.match(r'#{2,3} ', c.source):
                assert len(c.source.strip().splitlines()) == 1, f'a heading stands alone in its cell: {c.source[:60]!r}'

    def test_no_machine_paths(self, path):
        bad = re.compile(r'(?<![\w.])/(root|home)/\w+|/tmp/\w+|\.cuda\(\)')
        for c in read(path).cells:
            assert not bad.search(c.source), bad.search(c.source)
            for o in c.get('outputs', []):
                for text in [o.get('text', ''), *(str(v) for k, v in o.get('data', {}).items() if k.startswith('text/') and 'base64' not in str(v))]:
                    assert not bad.search(text), bad.search(text)


def prose(path): return '\n\n'.join(c.source for c in read(path).cells if c.cell_type == 'markdown')


def test_citations_and_cross_references_resolve():
    keys = set(re.findall(r'^@\w+\{([^,]+),', (ROOT / 'nbs/refs.bib').read_text(encoding='utf-8'), re.M))
    for path in NOTEBOOKS:
        text = re.sub(r'`[^`]*`', '', prose(path))
        labels = set(re.findall(r'\{#((?:eq|fig|tbl|sec)-[\w-]+)\}', text))
        for ref in re.findall(r'(?<![\w`/.])@([A-Za-z][\w-]*)', text):
            known = ref in labels if re.match(r'(eq|fig|tbl|sec)-', ref) else ref in keys
            assert known, f'{path.name}: @{ref} does not resolve'
        duplicated = [l for l in labels if len(re.findall(r'\{#' + l + r'\}', text)) > 1]
        assert not duplicated, f'{path.name}: {duplicated}'


def pandoc_warnings(text):
    import pypandoc
    run = subprocess.run([pypandoc.get_pandoc_path(), '-f', 'markdown', '-t', 'html', '--mathml'], input=text, capture_output=True, text=True)
    return run.returncode, run.stderr


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_pandoc_parses_every_formula(path):
    code, warnings = pandoc_warnings(prose(path))
    assert code == 0 and 'Could not convert TeX math' not in warnings, warnings


def test_the_formula_check_can_fail():
    assert 'Could not convert TeX math' in pandoc_warnings('a $\\frac{1}{$ b')[1]


def test_links_between_notebooks_lead_somewhere():
    for path in NOTEBOOKS:
        for target in re.findall(r'\]\(([\w./-]+\.(?:ipynb|png|md))', prose(path)):
            assert (path.parent / target).exists(), f'{path.name} links to {target}'


def imports_of(module):
    tree = ast.parse((ROOT / 'diffcourse' / f'{module}.py').read_text(encoding='utf-8'))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1: yield from [node.module] if node.module else [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith('diffcourse'): yield from [node.module.split('.')[1]] if '.' in node.module else [a.name for a in node.names]
        if isinstance(node, ast.Import): yield from (a.name.split('.')[1] for a in node.names if a.name.startswith('diffcourse.'))


def test_the_import_check_sees_what_nbdev_writes():
    assert {'core', 'shapes'} <= set(imports_of('data'))   # as `from .core import …`


@pytest.mark.parametrize('module', MODULES)
def test_a_module_imports_only_from_rungs_above(module):
    for used in imports_of(module):
        if used == '__version__': continue
        assert LADDER.index(used) < LADDER.index(module), f'{module} imports {used}'


@pytest.mark.parametrize('module', MODULES)
def test_heavy_libraries_are_imported_where_used(module):
    for node in ast.parse((ROOT / 'diffcourse' / f'{module}.py').read_text(encoding='utf-8')).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ''] if isinstance(node, ast.ImportFrom) else []
        assert not {n.split('.')[0] for n in names} & HEAVY, f'{module} imports {names} at the top'


def test_importing_ddpm_is_cheap():
    probe = "import time, torch; t = time.perf_counter(); import diffcourse.ddpm; print(time.perf_counter() - t)"
    times = [float(subprocess.run([sys.executable, '-c', probe], capture_output=True, text=True, check=True).stdout) for _ in range(3)]
    assert min(times) <= 0.3, times


def own_members(cls):
    "Public methods and properties that a class defines itself"
    for k, v in vars(cls).items():
        f = v.__func__ if isinstance(v, (classmethod, staticmethod)) else v
        if (inspect.isfunction(f) or isinstance(f, property)) and not k.startswith('_'): yield k, f


def undocumented(m):
    "Exported functions, classes, their public methods and properties without a line of their own, and arguments without a comment"
    from fastcore.docments import docments
    for name in getattr(m, '__all__', []):
        o = getattr(m, name)
        if not (inspect.isclass(o) or inspect.isfunction(o)) or o.__module__ != m.__name__ or o.__name__ != name: continue
        if not (o.__doc__ or '').strip() or (inspect.isclass(o) and o.__doc__.startswith(f'{name}(')): yield name
        if inspect.isfunction(o) and not m.__name__.endswith('.cli'):  # there typer's help documents the arguments
            docs, kinds = docments(o, full=False), {k: p.kind for k, p in inspect.signature(o).parameters.items()}
            yield from (f'{name}({a})' for a, k in kinds.items()
                        if not docs.get(a) and k != inspect.Parameter.VAR_KEYWORD and not a.startswith('_'))
        elif inspect.isclass(o): yield from (f'{name}.{k}' for k, f in own_members(o) if not (f.__doc__ or '').strip())


@pytest.mark.parametrize('module', MODULES)
def test_every_exported_name_is_documented(module):
    missing = list(undocumented(importlib.import_module(f'diffcourse.{module}')))
    if module in BARE_METHODS: missing = [m for m in missing if '.' not in m]
    if module in FULLY_DOCUMENTED: missing += undocumented_arguments(importlib.import_module(f'diffcourse.{module}'))
    assert not missing, missing


def undocumented_arguments(m):
    "Arguments of public methods, and of constructors, that no comment explains"
    from fastcore.docments import docments
    missing = []
    for name, cls in ((n, getattr(m, n)) for n in m.__all__):
        if not inspect.isclass(cls) or cls.__module__ != m.__name__: continue
        for k, f in vars(cls).items():
            f = getattr(f, '__func__', f)
            if not inspect.isfunction(f) or (k.startswith('_') and k not in ('__init__', '__call__')): continue
            f = cls if k == '__init__' and '__dataclass_fields__' in vars(cls) else f
            docs = docments(f, full=False)
            if f is cls:                                             # a dataclass has the fields of those it extends
                docs = {**{a: d for b in cls.__mro__[1:-1] for a, d in docments(b, full=False).items() if d}, **{a: d for a, d in docs.items() if d}}
            many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)   # docments cannot see their comments
            missing += [f'{name}.{k}({a})' for a, p in inspect.signature(f).parameters.items()
                        if a not in ('self', 'cls') and p.kind not in many and not docs.get(a)]
    return missing


def test_documentation_check_can_fail(tmp_path, monkeypatch):
    (tmp_path / 'barely.py').write_text("""__all__ = ['Bare', 'f']
class Bare:
    "A class"
    def forward(self): pass
    @property
    def size(self): return 1
    @classmethod
    def make(cls): pass
    def _private(self): pass
def f(
    a,
    b,  # the only argument with a comment
): "A function"
""")
    monkeypatch.syspath_prepend(tmp_path)
    assert set(undocumented(importlib.import_module('barely'))) == {'Bare.forward', 'Bare.size', 'Bare.make', 'f(a)'}


def test_export_and_clean_leave_no_diff(tmp_path):
    "nbdev_export and nbdev_clean on a copy of the tree change nothing"
    import shutil
    copy = tmp_path / 'tree'
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns('.venv', '.git', 'runs', 'demo', '_docs', '_proc', '*.egg-info', '__pycache__', 'golden'), symlinks=True)
    before = {p.relative_to(copy): p.read_bytes() for d in ('nbs', 'diffcourse') for p in (copy / d).glob('*') if p.is_file() and p.suffix in ('.py', '.ipynb')}
    bin = Path(sys.executable).parent
    for command in ('nbdev_export', 'nbdev_clean'): subprocess.run([bin / command], cwd=copy, check=True, capture_output=True)
    changed = [str(p) for p, b in before.items() if (copy / p).read_bytes() != b]
    assert not changed, changed


def test_readme_matches_the_index_page():
    from readme import readme
    assert (ROOT / 'README.md').read_text(encoding='utf-8') == readme()


def test_front_page_tells_of_the_weights_that_are_shipped():
    "Its table is an output of earlier: new weights or recipes need `scripts/run_notebooks.py index 18_zoo` and `scripts/readme.py`"
    from diffcourse import zoo
    table = zoo.recipes()._repr_markdown_()
    for page in ('index', '18_zoo'):
        shown = [o['data'].get('text/markdown') for c in read(ROOT / f'nbs/{page}.ipynb').cells for o in c.get('outputs', []) if 'data' in o]
        assert table in shown, f'{page} shows another table of recipes than the weights in data/ give: run it again'


def test_manifest_matches_the_files():
    from manifest import entries
    assert json.loads((ROOT / 'data/MANIFEST.json').read_text(encoding='utf-8')) == entries()


def test_the_tracked_tree_is_small():
    run = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True)
    if run.returncode: pytest.skip('not a git checkout')
    size = sum((ROOT / f).lstat().st_size for f in run.stdout.splitlines() if (ROOT / f).exists())
    assert size <= 48 * 2**20, f'{size / 2**20:.1f} MiB'
