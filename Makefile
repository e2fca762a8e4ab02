# make install: create the environment .venv. make train: train the digits model. make test: run the test suite.
# make docs: build the site in outputs/site/. make demo: serve the page that runs a model in a browser. make lint: check style.
# Each of them creates .venv if it does not exist.
PYTHON ?= python3
VENV ?= .venv
MODEL ?= model_cards/mnist
INSTALLED = $(VENV)/.installed

.PHONY: install train test docs demo lint clean

install: $(INSTALLED)

train: $(INSTALLED)
	$(VENV)/bin/python training/train.py

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n logical --maxprocesses 8 --dist loadfile

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

demo: $(INSTALLED)
	$(VENV)/bin/python -c 'from ddpm_hf.demo.site import add_runtime, write_site; write_site("$(MODEL)", "outputs/demo"); add_runtime("outputs/demo") or print("npm has no ONNX Runtime for the page, which loads it from a CDN.")'
	$(VENV)/bin/python -m http.server 8000 --bind 127.0.0.1 --directory outputs/demo

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
