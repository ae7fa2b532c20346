# Every target makes the environment it needs; a set of packages is installed again when its definition changes.
#   make test PYTHON=python3.12 VENV=/some/where
# TORCH is a version of PyTorch other than the pinned one, in an environment of its own; pip's settings lead to nightly ones:
#   make test TORCH=2.14.1
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/nightly/cpu make smoke TORCH=2.16.0.dev20261101+cpu

PYTHON ?= python3
TORCH ?=
VENV ?= .venv$(addprefix -,$(TORCH))
ARGS ?=

BIN := $(VENV)/bin
PINS := $(if $(TORCH),$(VENV)/constraints.txt,constraints.txt)
INSTALL := $(BIN)/python -m pip install --quiet --constraint $(PINS)
DEFINITION := pyproject.toml constraints.txt
FIGURES := demo.png batched_jacobians.png diag_ggn_optimizer.png train_compiled.png train_distributed.png

.PHONY: help venv test test-all smoke demo examples docs dist bench bench-kernels bench-scaling bench-selection lint clean

help:
	@echo "make venv | test | test-all | smoke | demo | examples | docs | dist | bench | bench-kernels | bench-scaling | bench-selection | lint | clean"
	@echo "TORCH=2.14.1 takes that PyTorch, in an environment of its own"
	@echo "ARGS goes to what is run: make test ARGS='-k linear', make demo ARGS='--epochs 3'"

venv: $(VENV)/.installed

$(VENV)/.installed: $(DEFINITION)
	@echo "Installing fxcurv and its dependencies into $(VENV); PyTorch is a large download."
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH),{ grep -vE '^(torch|triton)==' constraints.txt; echo 'torch==$(TORCH)'; } > $(PINS))
	$(INSTALL) --editable '.[test,demo]'
	@touch $@

$(VENV)/.installed-lint: $(VENV)/.installed
	$(INSTALL) --editable '.[lint]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(INSTALL) --editable '.[docs]'
	@touch $@

$(VENV)/.installed-all: $(VENV)/.installed-docs
	$(INSTALL) --editable '.[models,plugs,estimators]'
	@touch $@

$(VENV)/.installed-dist: $(VENV)/.installed
	$(INSTALL) --editable '.[dist]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(INSTALL) --editable '.[bench]'
	@touch $@

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(ARGS)

# With the packages that people bring and plug into. The last -m wins over the one in pyproject.toml that leaves slow tests out.
test-all: $(VENV)/.installed-all
	$(BIN)/python -m pytest -m '' $(ARGS)

# Whether a PyTorch will do, in a minute: a test or two of each part, slow ones too, and all that it has to have.
smoke: $(VENV)/.installed
	$(BIN)/python -m pytest -m '' @tests/smoke.txt $(ARGS)

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py $(ARGS)

examples: $(VENV)/.installed
	@set -e; for script in $(filter-out examples/data.py,$(wildcard examples/*.py)); do \
		echo "== $$script"; MPLBACKEND=agg $(BIN)/python -W "ignore:FigureCanvasAgg is non-interactive" $$script; done

# The site, its gallery run; what has not changed is not run again. A warning is an error.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going -j auto -b html docs docs/_build/html $(ARGS)

# Wheel and source archive in dist/, each installed without its dependencies (they are in the environment) and imported.
dist: $(VENV)/.installed-dist
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	@set -e; for archive in dist/*; do bash tests/import_archive.sh $(BIN)/python $$archive; done

bench: $(VENV)/.installed-bench
	$(BIN)/python bench/run.py $(ARGS)

bench-kernels: $(VENV)/.installed-bench
	$(BIN)/python bench/kernels.py --plot bench/results/roofline.png $(ARGS)

bench-scaling: $(VENV)/.installed-bench
	$(BIN)/python bench/scaling.py $(ARGS)

bench-selection: $(VENV)/.installed-bench
	$(BIN)/python bench/selection.py $(ARGS)

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Leaves the environment, which is slow to make; `rm -r $(VENV)` removes it.
clean:
	rm -rf build dist docs/_build docs/_generated docs/gallery *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	rm -f $(FIGURES) docs/sg_execution_times.rst
	find . -path './.venv*' -prune -o -path './$(VENV)' -prune -o -name __pycache__ -type d -exec rm -rf {} +
