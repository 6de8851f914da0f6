# `make demo` and `make test` need Python 3.10 or newer and nothing else; everything lands in $(VENV).
# OLDEST=1 runs a target with the oldest versions that pyproject.toml claims, without the extra "export", which needs
# a newer torch. It takes an environment of its own.
OLDEST ?=
PYTHON ?= $(if $(OLDEST),python3.10,python3)
# Tests at once, each on one thread.
JOBS ?= 2
VENV ?= $(if $(OLDEST),.venv/oldest,.venv)
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
INSTALL := $(BIN)/python -m pip install --quiet $(if $(OLDEST),--constraint $(VENV)/oldest.txt)

# FINAL=1 is for the day of a release: CHANGELOG.md has to have a heading for the version then.
FINAL ?=

.PHONY: demo test quick slow third-party web lint docs notebook release clean help

demo: $(VENV)/.coco ## Draw scenes, train a teacher and a distilled student on the CPU, compare them (5 to 12 minutes).
	$(BIN)/python examples/coco/demo.py --output runs/demo

test: $(VENV)/.dev ## Run the tests and the examples in docstrings.
	$(PYTEST)

quick: $(VENV)/.dev ## Run the library's own tests: those of examples, benchmarks and experiments are left out.
	$(PYTEST) $(foreach part,examples third_party benchmarks experiments,--ignore=tests/$(part))

# Among these the demo itself and what it promises.
slow: $(VENV)/.dev ## Run the tests that take longer.
	$(PYTEST) -m slow

# ultralytics is AGPL-3.0 and brings OpenCV.
third-party: $(VENV)/.third-party ## Run the tests with detectors and training loops of other packages.
	YOLO_OFFLINE=true YOLO_CONFIG_DIR=$(abspath $(VENV)) $(BIN)/python -m pytest tests/third_party tests/examples/trainers -m "slow or not slow"

web: examples/web/vendor ## Fetch onnxruntime-web from npm for examples/web, whose tests drive a headless Chromium.

examples/web/vendor: examples/web/package-lock.json examples/web/build.mjs
	cd examples/web && npm ci --ignore-scripts --no-audit --no-fund && npm run build
	touch $@

lint: $(VENV)/.dev ## Check style, format and types.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(VENV)/.dev ## Build the site in docs/_build/html; a warning or a link that leads nowhere is an error.
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html

notebook: $(VENV)/.dev ## Run docs/quickstart.ipynb and store what it shows (under three minutes).
	$(BIN)/jupyter execute --inplace docs/quickstart.ipynb

# Each environment takes 6 GB for a few minutes. Nothing is uploaded.
release: $(VENV)/.release ## Build wheel and sdist, check them, install and use the wheel with the oldest and newest Python.
	$(BIN)/python tools/release.py $(if $(FINAL),,--dry-run)

$(VENV)/.coco: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
ifneq ($(OLDEST),)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --python $(BIN)/python --resolution lowest-direct --no-header --no-annotate \
		--extra test --output-file $(VENV)/oldest.txt pyproject.toml
endif
	$(INSTALL) --editable ".[coco]"
	touch $@

$(VENV)/.dev: $(VENV)/.coco
	$(INSTALL) --editable ".[$(if $(OLDEST),test,dev)]"
	touch $@

$(VENV)/.release: $(VENV)/.coco
	$(INSTALL) --editable ".[release]"
	touch $@

$(VENV)/.third-party: $(VENV)/.dev
	$(INSTALL) effdet ultralytics --editable ".[lightning,accelerate]"
	touch $@

clean: ## Remove the environment, what was built, and caches.
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache

help: ## Show this list.
	@echo "make TARGET [PYTHON=python3.12] [VENV=.venv] [JOBS=2] [OLDEST=1] [FINAL=1]"
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
