"""Compile both kernels for sm_90 (no GPU is needed for that) and print what ptxas says of each, as JSON.

A process of its own: under TRITON_INTERPRET there is nothing to compile.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nemo_disco.policy import log_probs_kernel as kernels

DEVICE = {"hidden": "*bf16", "weight": "*bf16", "targets": "*i64", "scale": "fp32"}
DEVICE |= dict.fromkeys(("n", "size", "share"), "i32")


def report(kernel: Any, launch: dict[str, int], pointers: dict[str, str], **constants: Any) -> dict[str, Any]:
    """Registers a thread, bytes spilled, shared memory, how many wgmma instructions there are, and which arguments are
    compiled in or specialised (each new value of such a one may be a compilation)."""
    blocks = {name: size for name, size in launch.items() if name.startswith("BLOCK")}
    constants |= {"WIDTH": 1536, "ENTROPIES": True, **blocks}
    types = {name: {**DEVICE, **pointers}.get(name, "constexpr") for name in kernel.arg_names}
    # As a launch finds it: pointers are aligned, and so is the size of a vocabulary.
    aligned = [i for i, name in enumerate(kernel.arg_names) if types[name].startswith("*") or name == "size"]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {name: launch[name] for name in ("num_warps", "num_stages")}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    said = ptxas(compiled.asm["ptx"])
    return {
        "registers": int(re.findall(r"Used (\d+) registers", said)[0]),
        "spilled": int(re.findall(r"(\d+) bytes spill stores", said)[0]),
        "shared": compiled.metadata.shared,
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
        "specialised": [p.name for p in kernel.params if p.is_constexpr or not p.do_not_specialize],
    }


def ptxas(ptx: str) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "kernel.ptx"
        file.write_text(ptx)
        command = [str(program), "-v", "--gpu-name=sm_90a", str(file), "-o", str(file.with_suffix(".cubin"))]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


if __name__ == "__main__":
    numbers = dict.fromkeys(("log_norm", "grad_log_probs", "grad_entropy", "entropy"), "*fp32")
    forward = report(kernels._statistics, kernels.FORWARD, {"out": "*fp32"}, SPLITS_FIRST=True)
    launches = {"backward": kernels.BACKWARD, "wide_backward": kernels.WIDE_BACKWARD}
    backward = {
        name: report(kernels._gradients, launch, {"out": "*bf16", **numbers}) for name, launch in launches.items()
    }
    print(json.dumps({"forward": forward, **backward}))
