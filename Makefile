# make demo   set up, train a small DDPM, draw the ladder       make test   set up, pass every test
# make lab    open the notebooks      make site   render the site (needs Quarto)      make clean   remove what was made here
PYTHON ?= python3
BIN     = .venv/bin
GOLDEN ?= tests/golden
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test lab site parity readme notebooks clean
.DEFAULT_GOAL := demo

.venv/.ready: settings.ini setup.py pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else f'Python 3.11 to 3.13 is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12')"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --progress-bar off -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/.ready
	$(BIN)/diffcourse demo --out demo

test: .venv/.ready
	DIFFCOURSE_BUDGET=smoke OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests nbs --nbval-lax --nbval-current-env --nbval-cell-timeout 300 -n 2 --dist loadscope -q

parity: .venv/.ready
	$(BIN)/python -m tests.parity $(GOLDEN)

lab: .venv/.ready
	$(BIN)/pip install -q jupyterlab
	$(BIN)/jupyter lab nbs

readme: .venv/.ready
	$(BIN)/python scripts/readme.py

notebooks: .venv/.ready
	$(BIN)/python scripts/run_notebooks.py

site: .venv/.ready
	@command -v quarto >/dev/null || { echo 'make site needs Quarto 1.7 or newer: https://quarto.org/docs/get-started'; exit 1; }
	PATH="$(CURDIR)/$(BIN):$$PATH" nbdev_docs

clean:
	rm -rf .venv build dist demo runs _docs _proc *.egg-info .pytest_cache
