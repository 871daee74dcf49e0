"""The kernels compile for Hopper as intended: they use the matrix units, pipeline loads and fit into registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.triton


def test_kernels_compile_for_hopper() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    process = subprocess.run([sys.executable, str(script)], check=True, capture_output=True, text=True, env=environment)
    kernels = json.loads(process.stdout.splitlines()[-1])
    for name, kernel in kernels.items():
        assert not {"n", "share"} & set(kernel["specialised"]), "a new number of tokens would need a compilation"
        assert kernel["spilled"] <= 16, f"{name}: the tile does not fit into the registers"
        if name.startswith("targets"):  # it gathers rows, and multiplies no matrices
            continue
        assert kernel["wgmma"] > 0
        assert 2 * 49152 <= kernel["shared"] <= 227 * 1024, "loads are not pipelined, or do not fit"
