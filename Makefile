# `make demo` and `make test` work on a fresh machine with Python 3.11 and g++; both install what they need first.
PYTHON ?= python3
VENV ?= .venv
VLLM ?= 0.32.0
BIN = $(VENV)/bin

.PHONY: install demo test-fast test test-long lint types clean

install:
	@$(PYTHON) scripts/install.py --venv $(VENV) --vllm $(VLLM)

demo: install
	@$(BIN)/python scripts/demo.py

# For every commit: no engine, no cluster; under 2 minutes.
test-fast: install
	@$(BIN)/python -m pytest -m "not engine and not cluster and not slow and not long"

# What continuous integration runs; about 25 minutes on 2 cores.
test: install types
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/python -m pytest -m "not long"

# All families and kinds of death, and ten times as many drawn cases.
test-long: install
	@SERE_EXAMPLES=10 $(BIN)/python -m pytest

lint: install types
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

types: install
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) runs build *.egg-info
