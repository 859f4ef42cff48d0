# Everything below works on a machine that has python3, a C++ compiler and a package index.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test check kernels format setup clean

demo: $(VENV)/.runtime          ## set up, then print a story
	$(BIN)/cuplama generate "Once upon a time" --stats

test: $(VENV)/.dev              ## set up, then run the test suite
	$(BIN)/pytest -q

check: $(VENV)/.dev             ## lint, format check, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

kernels: $(VENV)/.runtime       ## compile every kernel for sm_75 to sm_120; needs no GPU
	$(BIN)/cuplama kernels compile --arch all > build-kernels.txt || { tail -n 30 build-kernels.txt; exit 1; }
	tail -n 1 build-kernels.txt

format: $(VENV)/.dev            ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

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
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
