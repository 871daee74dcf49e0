# make quickstart: see DisCO raise a model's accuracy in minutes. make test, make lint: what CI runs.
export OMP_NUM_THREADS = 1

BIN := .venv/bin
STAMP := .venv/.installed
# 3.11 first: megatron-core's newest release for it is what is tested. A name on PATH may be a shim that does not run.
CANDIDATES := python3.11 python3.12 python3.13 python3
PYTHON ?= $(shell for p in $(CANDIDATES); do \
	$$p -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: env quickstart test lint

env: $(STAMP)

$(STAMP): setup.py pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed; name one with make PYTHON=..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	# torch by its exact version first: anything looser takes gigabytes of CUDA packages.
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off torch==2.13.0
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -e '.[dev]'
	touch $@

quickstart: env
	$(BIN)/nemo-disco train --config-name quickstart

test: env
	$(BIN)/python -m pytest

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict nemo_disco
