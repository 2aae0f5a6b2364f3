# make demo    train, build the lookups, generate from disk (about 6 minutes on 2 cores after set-up)
# make test    the test suite (make test-gpu: what needs a GPU)
# make lint    formatting, lint, types, spelling
# GPU tests run without the jaxtyping hook: under it Triton does not find `tl` in kernels (Python 3.12, beartype 0.23).
# Each sets up .venv by itself: the torch build that fits this machine (CPU without a GPU), then the package.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-gpu lint format clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend=auto -c constraints.txt torch \
		|| $(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/flexmemory demo --out runs/demo

test: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadfile
	$(BIN)/python -m pytest -q -n 2 -o addopts= -m "compile and not gpu"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 -o addopts= -m interpreted tests/engine tests/tol tests/train

test-gpu: setup
	$(BIN)/python -m pytest -q -o addopts=--strict-markers -m gpu

lint: setup
	$(BIN)/ruff format --check src tests benchmarks models examples docs/site_hooks.py
	$(BIN)/ruff check src tests benchmarks models examples docs/site_hooks.py
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/codespell src tests benchmarks models examples docs *.md

format: setup
	$(BIN)/ruff format src tests benchmarks models examples docs/site_hooks.py
	$(BIN)/ruff check --fix src tests benchmarks models examples docs/site_hooks.py

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache
