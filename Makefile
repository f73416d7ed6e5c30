# Everything from a bare clone: `make demo` runs the main job, `make test` the tests.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WORKERS ?= 2
PACKAGES := pathways datasets workers orchestrator

.PHONY: install wheel demo test test-slow bench check clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# What cluster.yaml and slurm/avflow.def install on other machines; the commit is written into it.
wheel: $(INSTALLED)
	rm -rf dist build
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	cp constraints.txt dist/

demo: $(INSTALLED)
	$(BIN)/avflow sweep configs/demo.yaml --run runs/demo --workers $(WORKERS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow" --durations=10

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow --timeout=1800 --durations=10

# The engine against the plain ways, and discarding, as ratios; `engine.py --quick` takes a minute.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/discard.py

# mypy does not follow the folder mapping of an editable install, so it gets links to follow.
check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf .types && mkdir -p .types/avflow
	ln -s ../../orchestrator/public/__init__.py ../../orchestrator/public/results.py .types/avflow/
	for package in $(PACKAGES); do ln -s ../../$$package .types/avflow/$$package; done
	MYPYPATH=.types $(BIN)/mypy .types/avflow

clean:
	rm -rf .types .pytest_cache .mypy_cache .ruff_cache build *.egg-info
