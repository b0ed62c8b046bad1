# Every target sets itself up: a virtual environment of this checkout with the versions pinned in constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup test test-interpreter test-gpu published lint types demo evaluate bench bench-smoke bench-gpu tune doctor verify clean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

setup: $(READY)  ## the virtual environment, and nothing else

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("carma_kernels needs Python 3.11 or later, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)  ## the main job: a small GPT-2 learns word definitions with and without CARMA
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

test-gpu: $(READY)  ## everything on this machine's GPU: needs one
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else f"make test-gpu needs a GPU, and torch {torch.__version__} finds none that it can use: see make doctor")'
	CARMA_KERNELS_TEST_DEVICE=cuda CUBLAS_WORKSPACE_CONFIG=:4096:8 $(BIN)/python -m pytest tests/ops tests/contracts tests/metamorphic tests/kernels tests/gpu

published: $(READY)  ## the published repository's training loop with swapped imports: CARMA_PUBLISHED_CODE=its/checkout
	@test -d "$(CARMA_PUBLISHED_CODE)/src" || { echo 'set CARMA_PUBLISHED_CODE to a checkout of github.com/nura-j/CARMA, commit 0106af6'; exit 2; }
	CARMA_PUBLISHED_CODE=$(CARMA_PUBLISHED_CODE) $(BIN)/python -m pytest tests/integration/upstream/test_training_loop.py

lint: $(READY)  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## static types
	$(BIN)/mypy

evaluate: $(READY)  ## accuracy of the newest demo's two models when the tokens of each word are pooled into one
	$(BIN)/python -m carma_kernels evaluate

bench: $(READY)  ## speed and memory against the published algorithm, on this machine
	$(BIN)/python -m pytest bench --growth --save
	$(BIN)/python -m bench.train_step --threads 1 --checkpointing no yes --save

bench-smoke: $(READY)  ## every bench once on a tiny case, untimed
	$(BIN)/python -m pytest bench --benchmark-disable -m smoke
	TRITON_INTERPRET=1 $(BIN)/python -m pytest bench --benchmark-disable -m smoke -k triton

bench-gpu: $(READY)  ## the same on a GPU, with the paper's seven models
	$(BIN)/python -m pytest bench --device cuda --dtype bfloat16 --models --growth --save
	$(BIN)/python -m bench.train_step --device cuda --models gpt2 gpt2-large gemma-2b llama-3.2-1b llama-3.2-3b qwen2.5-0.5b qwen2.5-3b --shapes 16x58 8x1024 --checkpointing no yes --save

tune: $(READY)  ## measure the kernels' launch table on this machine's GPU
	$(BIN)/python -m bench.tune

doctor: $(READY)  ## versions, devices, and which backend would be picked
	$(BIN)/python -m carma_kernels doctor

verify: $(READY)  ## this installation against its own fp64 oracle
	$(BIN)/python -m carma_kernels verify

clean:  ## remove the virtual environment and everything generated
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
