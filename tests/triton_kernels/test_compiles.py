"""The kernels compile for Hopper as they were meant: on the matrix units, pipelined, in registers."""

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
    done = subprocess.run([sys.executable, str(script)], check=True, capture_output=True, text=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    for said in found.values():
        assert not {"n", "share"} & set(said["specialised"]), "every number of tokens would be compiled for"
        assert said["wgmma"] > 0
        assert said["spilled"] <= 16, "the tile does not fit into the registers"
        assert 2 * 49152 <= said["shared"] <= 227 * 1024, "loads are not pipelined, or do not fit"
