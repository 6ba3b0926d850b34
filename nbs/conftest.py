"Make nbval run notebooks that nbdev_clean has cleaned, and honour the directives that nbdev honours"
import os
import re

import pytest

RUN_CUDA = os.environ.get('DIFFCOURSE_BUDGET') == 'gpu'
SKIP = re.compile(r'^\s*#\s*\|\s*(eval:\s*false|notest' + ('' if RUN_CUDA else r'|cuda|slow') + r')\b', re.M | re.I)

try:
    from nbval.kernel import RunningKernel

    def _execute(self, source, allow_stdin=None):  # a trailing `;` must silence the display hook, as in Jupyter
        return self.kc.execute(source, store_history=True, allow_stdin=False, stop_on_error=False)
    RunningKernel.execute_cell_input = _execute
except ImportError: pass


def pytest_collectstart(collector):
    if getattr(collector, 'path', None) and collector.path.suffix == '.ipynb' and hasattr(collector, 'skip_compare'):
        collector.skip_compare += ('stderr', 'text/html', 'image/svg+xml')


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        cell = getattr(item, 'cell', None)
        if cell is None: continue
        if cell.execution_count is None and cell.outputs: cell.execution_count = 1  # nbdev_clean sets it to null
        if SKIP.search(cell.source): item.options['skip'] = True
