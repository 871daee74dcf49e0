#!/usr/bin/env bash
# The wheels that a bare GPU machine (Python 3.12, torch 2.11 for CUDA, transformers 5, no network) lacks, into DIR.
# Usage: benchmarks/gpu/carry.sh [DIR=.whl] [PYTHON=.venv/bin/python]
set -euo pipefail
dir=${1:-.whl} python=${2:-.venv/bin/python}
mkdir -p "$dir"
platforms=()
for n in 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${n}_x86_64"); done
fetch() {
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        "${platforms[@]}" --platform manylinux2014_x86_64 -d "$dir" "$@"
}
# The versions of this environment: what the tests ran with.
pinned() { "$python" -c 'import importlib.metadata as m, sys; print(*(f"{n}=={m.version(n)}" for n in sys.argv[1:]))' "$@"; }
# shellcheck disable=SC2046
fetch $(pinned megatron-core mbridge hydra-core omegaconf pydantic pydantic-core annotated-types typing-inspection typing-extensions \
    math-verify latex2sympy2-extended)
# Published as source alone.
"$python" -m pip wheel --quiet --no-deps -w "$dir" "$(pinned antlr4-python3-runtime)"
du -sh "$dir"
