# make install: create the environment .venv. make train: train the digits model. make test: run the test suite.
# make docs: build the site in outputs/site/. make lint: check style. Each of them creates .venv if it does not exist.
PYTHON ?= python3
VENV ?= .venv
INSTALLED = $(VENV)/.installed

.PHONY: install train test docs lint clean

install: $(INSTALLED)

train: $(INSTALLED)
	$(VENV)/bin/python training/train.py

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n logical --maxprocesses 8 --dist loadfile

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

lint: $(INSTALLED)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e ".[dev]"
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV)

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e ".[test]"
	@touch $@
