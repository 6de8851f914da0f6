# `make demo` and `make test` need Python 3.10 or newer and nothing else; everything lands in $(VENV).
PYTHON ?= python3
# Tests at once, each on one thread.
JOBS ?= 2
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test slow third-party lint clean

demo: $(VENV)/.coco
	$(BIN)/python examples/coco/demo.py --output runs/demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# The tests that take longer, among them the demo itself and what it promises.
slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m slow

# Detectors of other packages as students and teachers; ultralytics is AGPL-3.0 and brings OpenCV.
third-party: $(VENV)/.third-party
	YOLO_OFFLINE=true YOLO_CONFIG_DIR=$(abspath $(VENV)) $(BIN)/python -m pytest tests/third_party

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

$(VENV)/.third-party: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet effdet ultralytics
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
