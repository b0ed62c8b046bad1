# Every target sets itself up: a virtual environment of this checkout with the versions pinned in constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup test lint types demo bench bench-smoke doctor verify clean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## the virtual environment, and nothing else

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("carma_kernels needs Python 3.11 or later, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)  ## the main job: a small GPT-2 learns word definitions with and without CARMA
	$(BIN)/python -m carma_kernels demo

test: $(READY)  ## the whole test suite
	$(BIN)/python -m pytest -n auto tests --ignore tests/kernels
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto tests/kernels  # has to be set before Triton is imported

lint: $(READY)  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## static types
	$(BIN)/mypy

bench: $(READY)  ## speed and memory against the published algorithm, on this machine
	$(BIN)/python -m pytest bench --save

bench-smoke: $(READY)  ## every bench once on a tiny case, untimed
	$(BIN)/python -m pytest bench --benchmark-disable -m smoke

doctor: $(READY)  ## versions, devices, and which backend would be picked
	$(BIN)/python -m carma_kernels doctor

verify: $(READY)  ## this installation against its own fp64 oracle
	$(BIN)/python -m carma_kernels verify

clean:  ## remove the virtual environment and everything generated
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
