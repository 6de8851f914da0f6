# `make demo` and `make test` need Python 3.10 or newer and nothing else; everything lands in $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test slow lint clean

demo: $(VENV)/.coco
	$(BIN)/python examples/coco/demo.py --output runs/demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

# The tests that take longer, among them the demo itself and what it promises.
slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(VENV)/.coco: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[coco]"
	touch $@

$(VENV)/.dev: $(VENV)/.coco
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
