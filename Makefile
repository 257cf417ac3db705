# make demo   installs luthier, then fine-tunes the embedded model and compares it with its base
# make test   installs luthier and its test dependencies, then runs the quick tests in two processes
# make docs   builds the documentation site in build/site; it opens without a network
# make verify-gpu  verifies luthier on a GPU (benchmarks/verify_gpu.py)
# make bench  compares luthier with the tutorials' recipe on the same rows; options: BENCH="--data FILE --rows 80"
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: setup demo test test-slow test-all bench verify-gpu docs lint types check-all clean

setup: $(VENV)/.dev model

$(VENV)/.core: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing luthier into $(VENV)"
	@$(PIP) -e . && touch $@

$(VENV)/.dev: $(VENV)/.core
	@echo "installing dependencies of tests and benchmarks"
	@$(PIP) -e '.[dev]' && touch $@

.PHONY: model
model: $(VENV)/.core
	@$(BIN)/luthier pull smollm2-135m || echo "the embedded model could not be fetched: tests that need it will be skipped"

demo: $(VENV)/.core
	$(BIN)/luthier demo --output-dir runs/demo

test: $(VENV)/.dev model
	$(BIN)/python -m pytest -m "not slow" -n 2

test-slow: $(VENV)/.dev model
	$(BIN)/python -m pytest -m slow

test-all: $(VENV)/.dev model
	$(BIN)/python -m pytest

bench: $(VENV)/.dev model
	$(BIN)/python benchmarks/bench.py --json runs/bench.json --markdown runs/bench.md $(BENCH)

verify-gpu: $(VENV)/.dev
	$(BIN)/python benchmarks/verify_gpu.py

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests benchmarks examples mkdocs_hooks.py
	$(BIN)/ruff format --check src tests benchmarks examples mkdocs_hooks.py

types: $(VENV)/.dev
	$(BIN)/mypy

check-all: lint types test

clean:
	rm -rf $(VENV) runs build dist src/*.egg-info
