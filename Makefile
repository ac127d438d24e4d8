# Every target installs what it needs into an environment of its own (VENV, default .venv).
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# one torch thread per test process, and two test processes
TEST_FLAGS ?= -n 2
# how many random questions `make fuzz` asks, and the seed of the first
FUZZ ?= 5000
FUZZ_FIRST ?= 0
# about how many calls with bad arguments and damaged folders `make fuzz` makes, and their seed
BAD ?= 20000
BAD_SEED ?= 0
# a folder with the files of more data sets, for `make quality`
DATA ?=
# how many SIGKILLs and SIGINTs `make kills` sends
KILLS ?= 300
INTERRUPTS ?= 500

.DEFAULT_GOAL := help
.PHONY: help demo test quick lint types format docs tutorials bench fuzz kills quality clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# one stamp per extra: installed again when the packaging changes
$(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) -e ".[$*]"
	@touch $@

demo: $(VENV)/.demo  ## train a digit classifier, explain its decisions, find wrong labels
	$(BIN)/python -m influence_kit demo

test: $(VENV)/.test  ## run all tests and the examples in the docstrings
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TEST_FLAGS)

quick: $(VENV)/.test  ## run in under a minute: the contract on one method per family, all layers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TEST_FLAGS) -m quick tests/test_contract.py \
	  tests/gradients/test_layers.py

fuzz: $(VENV)/.test  ## ask FUZZ=5000 random questions whose answers are known; make BAD=20000 bad calls
	PYTHONPATH=tests:. OMP_NUM_THREADS=1 $(BIN)/python -m fuzz --count $(FUZZ) --first $(FUZZ_FIRST)
	PYTHONPATH=tests:. OMP_NUM_THREADS=1 $(BIN)/python -m fuzz.bad_input --calls $(BAD) --seed $(BAD_SEED)

kills: $(VENV)/.test  ## kill and interrupt whatever writes files, KILLS=300 and INTERRUPTS=500 times
	PYTHONPATH=tests:. OMP_NUM_THREADS=1 $(BIN)/python -m kills --kills $(KILLS) --interrupts $(INTERRUPTS)

lint: $(VENV)/.lint  ## check format and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.lint  ## check types
	$(BIN)/mypy

format: $(VENV)/.lint  ## format all code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.docs  ## build the documentation in sphinx/_build/html; a warning is an error
	$(BIN)/sphinx-build -W --keep-going -b html sphinx sphinx/_build/html

tutorials: $(VENV)/.tutorials  ## run all notebooks and keep their outputs
	for notebook in tutorials/*.ipynb; do \
	  $(BIN)/python tutorials/run.py $$notebook || exit 1; done

bench: $(VENV)/.test  ## time the floor, influence_kit and its peers; writes benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.curvature --write
	$(BIN)/python -m benchmarks.projections --write
	$(BIN)/python -m benchmarks.store --write
	$(BIN)/python -m benchmarks.costs --write
	$(BIN)/python -m benchmarks.checks --long --write

quality: $(VENV)/.test  ## judge every method; DATA=folder: on data sets there, too; writes QUALITY.md
	$(BIN)/python -m benchmarks.quality $(if $(DATA),--data $(DATA))

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info sphinx/_build sphinx/tutorials .pytest_cache .mypy_cache .ruff_cache
