# `make demo` and `make test` work on a fresh machine with Python 3.11 and g++; both install what they need first.
PYTHON ?= python3
VENV ?= .venv
VLLM ?= 0.32.0
BIN = $(VENV)/bin

.PHONY: install demo test lint types clean

install:
	@$(PYTHON) scripts/install.py --venv $(VENV) --vllm $(VLLM)

demo: install
	@$(BIN)/python scripts/demo.py

test: install types
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/python -m pytest

lint: install types
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

types: install
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) runs build *.egg-info
