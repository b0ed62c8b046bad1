# Every target sets itself up: a virtual environment of this checkout with what the target needs, in the versions pinned
# in constraints.txt. Which build of torch that is, for a CPU or a GPU, is pip's choice: PIP_EXTRA_INDEX_URL=... adds to it.
# READY= BIN=folder: the environment whose programs lie in that folder, as it is.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := $(READY:.ready=.demo)
CORE := $(READY:.ready=.core)
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable

.PHONY: help setup test test-interpreter test-triton test-gpu-quick test-gpu test-gpu-sanitizer published lint types demo evaluate bench bench-smoke bench-gpu-quick bench-gpu tune doctor verify clean distclean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

setup: $(READY)  ## the virtual environment with everything in it, and nothing else

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("carma_kernels needs Python 3.11 or later, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# each stamp's set has the next one's in it: dev, demo, torch and numpy alone
$(READY): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[dev]'
	@touch $(READY) $(DEMO) $(CORE)

$(DEMO): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[demo]'
	@touch $(DEMO) $(CORE)

$(CORE): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) .
	@touch $(CORE)

demo: $(DEMO)  ## the main job: a small GPT-2 learns word definitions with and without CARMA
	$(BIN)/python -m carma_kernels demo

# a thread a process: pytest starts one for each core, and threads that wait for each other take a core's time
ONE_THREAD := OMP_NUM_THREADS=1

test: $(READY)  ## the whole test suite
	$(ONE_THREAD) $(BIN)/python -m pytest -n auto tests --ignore tests/kernels
	$(ONE_THREAD) TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto $(ON_TRITON) -m 'not thorough'  # set before Triton is imported

# what runs on every backend; the interpreter is started for the Triton kernels' part
ON_TRITON := tests/kernels tests/ops tests/contracts tests/metamorphic tests/convergence tests/distributed/test_hidden_states.py

test-interpreter: $(READY)  ## the Triton kernels in the interpreter, to the last case: an hour
	$(ONE_THREAD) TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto $(ON_TRITON)

TRITON ?= 3.9.0
OTHER := .venv-triton-$(TRITON)

test-triton:  ## the Triton kernels in the interpreter of another version: TRITON=3.9.0
	$(MAKE) setup VENV=$(OTHER)
	$(OTHER)/bin/python -m pip install --quiet --no-deps triton==$(TRITON)
	$(ONE_THREAD) TRITON_INTERPRET=1 $(OTHER)/bin/python -m pytest -n auto $(ON_TRITON) -m 'not thorough'

# On a GPU that is lent for minutes: tests side by side, but for those that need it to themselves. A warning that only
# such a machine gives is shown and fails nothing; a test that hangs is ended, and so are many that fail.
# JOBS: processes; JUNIT: a folder for results; PYTEST_ARGS: more for pytest
JOBS ?= 12
JUNIT ?=
PYTEST_ARGS ?=
ON_GPU := CARMA_KERNELS_TEST_DEVICE=cuda CUBLAS_WORKSPACE_CONFIG=:4096:8 $(ONE_THREAD) $(BIN)/python -m pytest -q -W default -p no:cacheprovider --maxfail 60 --timeout 120
RESULTS = $(if $(JUNIT),--junitxml $(JUNIT)/$@-$(1).xml) $(PYTEST_ARGS)
SIDE_BY_SIDE = $(ON_GPU) -n $(JOBS) --dist worksteal --timeout-method thread -m 'not alone' $(call RESULTS,side-by-side)
ALONE = $(ON_GPU) -m alone $(call RESULTS,alone)
FIND_GPU := $(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else f"this needs a GPU, and torch {torch.__version__} finds none that it can use: see make doctor")'
GRID := tests/ops tests/kernels --ignore tests/kernels/test_compile.py
QUICK := $(addprefix tests/gpu/test_,shapes.py device.py graphs.py scores.py first_call.py)
REST := $(filter-out $(QUICK) tests/gpu/test_sanitizer.py,$(wildcard tests/gpu/test_*.py))

test-gpu-quick: $(READY)  ## on this machine's GPU, in minutes: what is installed, and whether the kernels are right
	@$(FIND_GPU)
	status=0; \
	$(BIN)/python -m carma_kernels doctor || status=1; \
	$(BIN)/python -m carma_kernels verify --backend triton --device cuda --cases 1 || status=1; \
	$(SIDE_BY_SIDE) $(QUICK) $(GRID) || status=1; \
	$(ALONE) $(QUICK) || status=1; \
	exit $$status

test-gpu: $(READY)  ## the rest of it: contracts, races, memory, large tensors, the tap, compiled steps, speed
	@$(FIND_GPU)
	status=0; \
	$(SIDE_BY_SIDE) tests/contracts tests/metamorphic $(REST) || status=1; \
	$(ALONE) $(REST) || status=1; \
	exit $$status

test-gpu-sanitizer: $(READY)  ## every kernel under compute-sanitizer, on small problems
	@$(FIND_GPU)
	$(ALONE) tests/gpu/test_sanitizer.py

published: $(READY)  ## the published repository's training loop with swapped imports: CARMA_PUBLISHED_CODE=its/checkout
	@test -d "$(CARMA_PUBLISHED_CODE)/src" || { echo 'set CARMA_PUBLISHED_CODE to a checkout of github.com/nura-j/CARMA, commit 0106af6'; exit 2; }
	CARMA_PUBLISHED_CODE=$(CARMA_PUBLISHED_CODE) $(BIN)/python -m pytest tests/integration/upstream/test_training_loop.py

lint: $(READY)  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## static types
	$(BIN)/mypy

evaluate: $(DEMO)  ## accuracy of the newest demo's two models when the tokens of each word are pooled into one
	$(BIN)/python -m carma_kernels evaluate

bench: $(READY)  ## speed and memory against the published algorithm, on this machine
	$(BIN)/python -m pytest bench --growth --save
	$(BIN)/python -m bench.train_step --threads 1 --checkpointing no yes --save
	$(BIN)/python -m bench.host_time --save

bench-smoke: $(READY)  ## every bench once on a tiny case, untimed
	$(BIN)/python -m pytest bench --benchmark-disable -m smoke
	TRITON_INTERPRET=1 $(BIN)/python -m pytest bench --benchmark-disable -m smoke -k triton

# ARGS: more for bench.gpu_quick, as --only candidates, --seconds 300, --out folder
ARGS ?=

bench-gpu-quick: $(READY)  ## the kernels, their peers and candidates for the launch table on a GPU, in nine minutes
	@$(FIND_GPU)
	$(BIN)/python -m bench.gpu_quick $(ARGS)

bench-gpu: $(READY)  ## every bench on a GPU, with the paper's seven models: hours
	$(BIN)/python -m pytest bench --device cuda --dtype bfloat16 --models --growth --save
	$(BIN)/python -m bench.train_step --device cuda --models gpt2 gpt2-large gemma-2b llama-3.2-1b llama-3.2-3b qwen2.5-0.5b qwen2.5-3b --shapes 16x58 8x1024 --checkpointing no yes --save

tune: $(READY)  ## measure the kernels' launch table on this machine's GPU
	$(BIN)/python -m bench.tune

doctor: $(CORE)  ## versions, devices, which backend would be picked, and whether Triton agrees with torch
	$(BIN)/python -m carma_kernels doctor

verify: $(CORE)  ## this installation against its own fp64 oracle
	$(BIN)/python -m carma_kernels verify

clean:  ## remove the virtual environment and what is generated, but for runs/
	rm -rf $(VENV) .venv-triton-* build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

distclean: clean  ## runs/ too: the models that demo has trained
	rm -rf runs
