# make demo   sets up what it needs and runs the whole story on the embedded model
# make test   sets up what it needs and runs the tests
# make bench  the tutorials' recipe and luthier on the same rows; BENCH="--data FILE --rows 80" changes what is run
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: setup demo test test-slow test-all bench lint types check-all clean

setup: $(VENV)/.dev model

$(VENV)/.core: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing luthier into $(VENV)"
	@$(PIP) -e . && touch $@

$(VENV)/.dev: $(VENV)/.core
	@echo "installing what tests and benchmarks need"
	@$(PIP) -e '.[dev,bench]' && touch $@

.PHONY: model
model: $(VENV)/.core
	@$(BIN)/luthier pull smollm2-135m || echo "the embedded model could not be fetched: tests that need it will be skipped"

demo: $(VENV)/.core
	$(BIN)/luthier demo --output-dir runs/demo

test: $(VENV)/.dev model
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/.dev model
	$(BIN)/python -m pytest -m slow

test-all: $(VENV)/.dev model
	$(BIN)/python -m pytest

bench: $(VENV)/.dev model
	$(BIN)/python benchmarks/bench.py --json runs/bench.json --markdown runs/bench.md $(BENCH)

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks

types: $(VENV)/.dev
	$(BIN)/mypy

check-all: lint types test

clean:
	rm -rf $(VENV) runs build dist src/*.egg-info
