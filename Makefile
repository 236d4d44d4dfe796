# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
# The commands of this repository. Each makes the environment it needs in .venv; `make` alone lists them.

PYTHON ?= python3
# What to install as PyTorch before anything else; empty: the pin in constraints.txt, from pip's own index.
# A CPU-only build on Linux: see "Set-up" in CONTRIBUTING.md.
TORCH ?=
# More options for every call of pip.
PIP_FLAGS ?=
# Test processes; each is held to one thread, so that they do not fight over the cores. Each takes tests that follow
# each other, so that what the tests of a file share is made once, and steals from another when it has no more.
JOBS ?= 2
# More arguments for pytest, the demo or the benchmark.
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# -qq keeps pip to its errors.
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq $(PIP_FLAGS)
BASE := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
GGUF := $(VENV)/.installed-gguf
# The oldest Transformers that is supported; tests put this folder before the environment's own.
OLDEST := $(VENV)/oldest
OLDEST_TESTS := tests/model/transformers_contract tests/model/test_generation.py tests/model/common_suite \
	tests/model/exactness tests/cache tests/hub/test_remote_code.py tests/training \
	tests/ham_kernels/test_captured_step.py tests/model_cards/test_cost.py tests/model_cards/test_healing.py
# vLLM pins what it needs, so it has an environment of its own.
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip --disable-pip-version-check install -qq $(PIP_FLAGS)
HINT := if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi > /dev/null; then \
	echo "No NVIDIA GPU seen: if pip should not fetch CUDA libraries, see Set-up in CONTRIBUTING.md"; fi
PYTEST := OMP_NUM_THREADS=1 HAM_OLDEST_TRANSFORMERS="$(CURDIR)/$(OLDEST)" $(BIN)/pytest -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo demo-smollm2 test test-slow test-oldest test-vllm lint format bench gpu-check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(BASE) ## install the package and run its demo
	@$(BIN)/ham-hf demo $(ARGS)

# PROMPT="..." asks that in place of the demo's questions; shells have a variable of this name, which is not meant.
demo-smollm2: $(GGUF) ## fetch SmolLM2-135M-Instruct (93 MB), convert it once, and ask it at several cache sizes
	@$(BIN)/python -m model_cards.smollm2.demo $(if $(filter command,$(origin PROMPT)),"$$PROMPT") $(ARGS)

test: $(DEV) $(OLDEST)/.installed ## run the tests, without the slow ones
	@$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(DEV) $(OLDEST)/.installed ## run the slow tests, then those for the oldest Transformers (minutes)
	@$(PYTEST) -m slow $(ARGS)
	@$(MAKE) --no-print-directory test-oldest

test-oldest: $(DEV) $(OLDEST)/.installed ## run what depends on Transformers with the oldest supported release
	@PYTHONPATH="$(CURDIR)/$(OLDEST)" $(PYTEST) -m "not slow" $(OLDEST_TESTS) $(ARGS)
	@PYTHONPATH="$(CURDIR)/$(OLDEST)" $(PYTEST) tests/training/test_scale_out.py $(ARGS)

# A later -m takes the place of this one: ARGS="-m slow" runs the slow tests.
test-vllm: $(VLLM)/.installed ## run the tests of serving with vLLM on a CPU (Linux, x86-64), without the slow ones
	@OMP_NUM_THREADS=1 $(VLLM)/bin/pytest -n $(JOBS) --dist loadfile -m "not slow" tests/serving $(ARGS)

lint: $(DEV) ## check style, format and types; changes nothing
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(DEV) ## mend what ruff can mend, and format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(BASE) ## measure speed and memory on this machine
	@$(BIN)/python -m model_cards.benchmarks.bench $(ARGS)

# A machine with a GPU may have PyTorch and no network, so this takes the Python that is there.
gpu-check: ## test and measure the kernels on this machine's NVIDIA GPU; installs nothing
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) kernels/benchmarks/gpu_check.py $(ARGS)

clean: ## remove the environments, the caches and what was built
	rm -rf $(VENV) $(VLLM) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@echo "Making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)

$(BASE): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing ham-hf into $(VENV) (the first time takes a minute or two)"
	@$(if $(strip $(TORCH)),$(PIP) $(TORCH),$(HINT))
	@$(PIP) -c constraints.txt -e .
	@touch $@

$(DEV): $(BASE)
	@echo "Installing the tools for tests and lint into $(VENV)"
	@$(PIP) -c constraints.txt -e ".[dev,tools]"
	@touch $@

# Asks Python first: with the packages in place no network is needed.
$(GGUF): $(BASE)
	@$(BIN)/python -c "import accelerate, gguf" 2> /dev/null || \
		{ echo "Installing what reads GGUF into $(VENV)"; $(PIP) -c constraints.txt -e ".[gguf]"; }
	@touch $@

$(OLDEST)/.installed: constraints-oldest.txt | $(BIN)/python
	@echo "Installing the oldest supported Transformers into $(OLDEST)"
	@rm -rf $(OLDEST)
	@$(PIP) --no-deps --target $(OLDEST) -r constraints-oldest.txt
	@touch $@

$(VLLM)/.installed: pyproject.toml constraints.txt constraints-vllm.txt
	@echo "Making $(VLLM) with $(PYTHON): about 0.5 GB to download, 2 GB on disk"
	@$(PYTHON) -m venv --clear $(VLLM)
	@$(VLLM_PIP) --no-deps --require-hashes -r constraints-vllm.txt
	@$(if $(strip $(TORCH)),:,$(HINT))
	@$(VLLM_PIP) --no-warn-conflicts $(or $(strip $(TORCH)),$(shell grep ^torch== constraints.txt))
	@$(VLLM_PIP) --no-deps --no-build-isolation -e .
	@touch $@
