# `make demo` and `make test` install everything into .venv the first time.
PYTHON ?= python3
VENV ?= .venv
TORCH_VENV ?= .venv-torch
INSTALLED := $(VENV)/.installed

.PHONY: demo rlhf test test-slow lint venv check-export

demo: venv
	$(VENV)/bin/mindrlhf grpo --config examples/grpo/arithmetic.yaml

# Supervised fine-tuning, a reward model, PPO with it, and a table.
rlhf: venv
	PYTHON=$(CURDIR)/$(VENV)/bin/python examples/rlhf/run.sh

test: lint
	$(VENV)/bin/pytest -q -n 2 -m "not slow"

# The examples, each to its end, and what takes longer. A file's tests share what they compile.
test-slow: venv
	$(VENV)/bin/pytest -q -n 2 --dist loadfile -m slow

# What a checkpoint's directory means to torch and transformers; CHECKPOINT= is one that a run has left.
check-export: venv $(if $(TORCH_PYTHON),,$(TORCH_VENV)/.installed)
	@test -n "$(CHECKPOINT)" || { echo "usage: make check-export CHECKPOINT=DIR [TORCH_PYTHON=python]" >&2; exit 2; }
	@answers=$$(mktemp -d) && trap 'rm -r "$$answers"' EXIT && \
	  $(VENV)/bin/python -m mindrlhf generate --model "$(CHECKPOINT)" --output "$$answers/answers.jsonl" \
	    --prompt "12+34=" --prompt "7+8=" --prompt "A hat" sampling.temperature=0 sampling.max_tokens=32 && \
	  $(or $(TORCH_PYTHON),$(TORCH_VENV)/bin/python) tests/export/check_export.py \
	    --checkpoint "$(CHECKPOINT)" --answers "$$answers/answers.jsonl"

lint: venv
	$(VENV)/bin/ruff check
	$(VENV)/bin/shellcheck .ci/run examples/*.sh examples/*/*.sh docker/*.sh
	$(VENV)/bin/hadolint docker/Dockerfile docker/Dockerfile.ascend

venv: $(INSTALLED)

$(INSTALLED): setup.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null || { \
	  echo "mindrlhf needs Python 3.10, 3.11 or 3.12, and $(PYTHON) is not one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; \
	  exit 1; }
	@echo "installing into $(VENV): 3.5 GB, a few minutes, once"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' \
	  --config-settings editable_mode=compat
	@touch $@

$(TORCH_VENV)/.installed:
	@echo "installing torch into $(TORCH_VENV), once"
	@$(PYTHON) -m venv $(TORCH_VENV)
	@$(TORCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==4.57.1
	@touch $@
