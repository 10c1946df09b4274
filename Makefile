# `make demo` and `make test` need Python 3.10+ and a package index, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint build clean

demo: $(VENV)/.demo
	$(BIN)/reftnoise demo

test: $(VENV)/.test
	$(BIN)/python -m pytest

lint: $(VENV)/.lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# One stamp per set of packages; each is installed again when what it needs changes.
$(VENV)/.demo: EXTRAS =
$(VENV)/.test: EXTRAS = [test]
$(VENV)/.lint: EXTRAS = [test,lint]
$(VENV)/.%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.$(EXTRAS)'
	touch $@

build: $(VENV)/.test
	$(BIN)/python -m build --outdir dist

clean:
	rm -rf $(VENV) build dist *.egg-info
