# make train: a fresh machine to a trained digit generator. make test: the test suite. Both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
INSTALLED = $(VENV)/.installed

.PHONY: train test lint clean

train: $(INSTALLED)
	$(VENV)/bin/accelerate launch training/train.py

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n logical --maxprocesses 8 --dist loadfile

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
