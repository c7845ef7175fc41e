# `make demo` and `make test` install everything into .venv the first time.
PYTHON ?= python3
VENV ?= .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint venv

demo: venv
	$(VENV)/bin/mindrlhf grpo --config examples/grpo/arithmetic.yaml

test: lint
	$(VENV)/bin/pytest -q

lint: venv
	$(VENV)/bin/ruff check

venv: $(INSTALLED)

$(INSTALLED): setup.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null || { \
	  echo "mindrlhf needs Python 3.10, 3.11 or 3.12, and $(PYTHON) is not one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; \
	  exit 1; }
	@echo "installing into $(VENV): 3.5 GB, a few minutes, once"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
