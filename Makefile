# `make demo` and `make test` do everything on a machine that has Python 3.11 or newer and make.
# FILE=recording.wav lets the demonstration detect the sounds of this recording alone; TRANSFORMERS=5.17.0 tests against that release of Transformers, in an environment of its own.
PYTHON ?= python3
TRANSFORMERS ?=
VENV ?= .venv$(TRANSFORMERS)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 2

.PHONY: install demo test lint slow conformance clean

install: $(STAMP)

# A stamp newer than pyproject.toml says that the environment is complete.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]" $(if $(TRANSFORMERS),"transformers==$(TRANSFORMERS)")
	touch $@

demo: install
	$(BIN)/python scripts/demo.py $(if $(FILE),--file "$(FILE)")

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
ifeq ($(TRANSFORMERS),)  # annotations differ between releases of Transformers: the newest one's count
	$(BIN)/mypy
endif

# A file of tests for each process at a time, whose fixtures its tests share. A process has one thread: two of two threads each slow one
# another tenfold on two cores. Three processes fill two cores, because tests also wait: for commands, pages and servers that they start.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

slow: install
	$(BIN)/python -m pytest -m "slow or not slow"

# Transformers' own tests of models, on our classes.
conformance: install
	$(BIN)/python -m pytest -q --disable-warnings --override-ini addopts= tests/conformance/mixins.py

clean:
	rm -rf .venv* build dist runs/demo .pytest_cache .ruff_cache .mypy_cache
