# Everything below works on a machine that has python3, a C++ compiler and a package index.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CUDA   := cuda_src/*.cu cuda_src/*.cuh cuda_src/ladder/*.cu cuda_src/ladder/*.cuh
# Bytecode is kept, also where the shell forbids it: else every worker and every program that a test starts would compile
# our modules, and the tests themselves, anew.
export PYTHONDONTWRITEBYTECODE :=
# A worker per core; one that has finished takes tests of another.
PYTEST := $(BIN)/pytest -q -n auto --dist worksteal

.PHONY: demo test test-all mutate mutate-kernels check kernels format setup clean

demo: $(VENV)/.runtime          ## set up, then print a story
	$(BIN)/cuplama generate "Once upon a time" --echo --stats

test: $(VENV)/.dev              ## the fast tests: at most 4 minutes on two idle cores with nothing cached
	$(PYTEST) -m "not slow and not gpu"

test-all: $(VENV)/.dev          ## every test; those that need a GPU say so where there is none
	$(PYTEST)

mutate: $(VENV)/.dev            ## break engine, backends and models on purpose, and count what the tests find
	$(BIN)/python -m tools.mutate_host --sample 300

mutate-kernels: $(VENV)/.dev    ## the same for the kernels, on the emulator; 10 minutes
	$(BIN)/python -m tools.mutate_kernels --report build-mutations.md

check: $(VENV)/.dev             ## lint, format, types, and which module may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(CUDA)

kernels: $(VENV)/.runtime       ## compile every kernel for sm_75 to sm_120; needs no GPU
	$(BIN)/cuplama kernels compile --arch all > build-kernels.txt || { tail -n 30 build-kernels.txt; exit 1; }
	tail -n 1 build-kernels.txt

format: $(VENV)/.dev            ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CUDA)

setup: $(VENV)/.dev             ## only the set-up: an editable install with the dev extra

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml | $(BIN)/python
	$(BIN)/pip install -q -e .
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/pip install -q -e ".[dev]"
	touch $@ $(VENV)/.runtime

clean:                          ## remove the environment and caches
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
