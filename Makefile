PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SEED ?= 0
TESTS_AT_ONCE ?= 2
GPU_TESTS_AT_ONCE ?= 4

LOCKS := $(wildcard requirements/*.txt)
PROTOS := $(shell find protos -name '*.proto')
BUILT_FROM := setup.py pyproject.toml $(PROTOS) $(wildcard csrc/*)
CODE := tandem weight_transfer inference_service trainer_service benchmarks examples clients tests setup.py

.PHONY: help setup demo test test-gpu check fix bench clean

help: ## What there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

setup: $(VENV)/.built ## Make .venv from the lock, build the extension and the protobuf code

# PyTorch's CPU build comes from wherever pip looks by itself, and otherwise from PyTorch's own index, which is named
# for this one line: pip tries every index for every package, and waits minutes for one that it cannot reach.
$(VENV)/.locked: $(LOCKS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q --no-deps -r requirements/torch-cpu.txt \
		|| $(PIP) install -q --no-deps --index-url https://download.pytorch.org/whl/cpu -r requirements/torch-cpu.txt
	$(PIP) install -q --no-deps -r requirements/cpu.txt -r requirements/demo.txt -r requirements/dev.txt
	$(PIP) install -q --no-deps --upgrade --target $(VENV)/deepspeed -r requirements/deepspeed.txt
	touch $@

$(VENV)/.built: $(VENV)/.locked $(BUILT_FROM)
	$(PIP) install -q --no-deps -e .
	touch $@

demo: setup ## Train a real model on this CPU and watch it learn: SEED=0
	$(BIN)/python -m examples.demo --seed $(SEED)

test: setup ## The whole test suite: TESTS_AT_ONCE=2
	$(BIN)/python -m pytest -n $(TESTS_AT_ONCE) --dist loadfile --no-loadscope-reorder

test-gpu: setup ## The tests that need a CUDA device: GPU_TESTS_AT_ONCE=4
	$(BIN)/python -m pytest tests/gpu -m alone
	$(BIN)/python -m pytest tests/gpu -m "not alone" -n $(GPU_TESTS_AT_ONCE) --dist loadfile

check: setup ## Lint, format, types, layers, contract, and the C++ with warnings as errors
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint protos
	$(BIN)/buf breaking protos --against tests/contract/tandem.binpb
	$(BIN)/clang-format --dry-run --Werror csrc/*
	TANDEM_WERROR=1 $(BIN)/python setup.py -q build_ext --build-lib build/check --build-temp build/check --force

fix: setup ## Format, and mend what the linter can
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)
	$(BIN)/clang-format -i csrc/*

bench: setup ## Measure beside vLLM and TRL: figures to benchmarks/results, table to docs/benchmarks.md
	$(BIN)/python -m benchmarks

clean: ## Remove what was built; .venv and out/ too
	rm -rf $(VENV) build out *.egg-info weight_transfer/*.so tandem/engine tandem/inference tandem/reward tandem/trainer tandem/weights
