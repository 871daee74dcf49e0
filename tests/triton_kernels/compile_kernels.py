"""Compile the kernels for sm_90 (this needs no GPU) and print the resources of each as JSON.

Run it without TRITON_INTERPRET, under which Triton compiles nothing.
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


def measure(kernel: Any, launch: dict[str, int], pointers: dict[str, str], **constants: Any) -> dict[str, Any]:
    """Compile a kernel; return its registers per thread, spilled bytes, shared memory in bytes, number of wgmma
    instructions, and the arguments whose new values may need a new compilation."""
    blocks = {name: size for name, size in launch.items() if name.startswith("BLOCK")}
    constants = {"WIDTH": 1536, "ENTROPIES": True, "TARGETS": 1, **blocks, **constants}
    types = {name: {**DEVICE, **pointers}.get(name, "constexpr") for name in kernel.arg_names}
    # As in a real launch, pointers are aligned and the vocabulary's size is a multiple of 16.
    aligned = [i for i, name in enumerate(kernel.arg_names) if types[name].startswith("*") or name == "size"]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(kernel.arg_names.index(k),): v for k, v in constants.items() if k in kernel.arg_names},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {name: launch[name] for name in ("num_warps", "num_stages")}
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptxas_report = run_ptxas(binary.asm["ptx"])
    return {
        "registers": int(re.findall(r"Used (\d+) registers", ptxas_report)[0]),
        "spilled": int(re.findall(r"(\d+) bytes spill stores", ptxas_report)[0]),
        "shared": binary.metadata.shared,
        "wgmma": binary.asm["ptx"].count("wgmma.mma_async"),
        "specialised": [p.name for p in kernel.params if p.is_constexpr or not p.do_not_specialize],
    }


def run_ptxas(ptx: str) -> str:
    """The report of ptxas about the assembly of a kernel."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "kernel.ptx"
        file.write_text(ptx)
        command = [str(program), "-v", "--gpu-name=sm_90a", str(file), "-o", str(file.with_suffix(".cubin"))]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


if __name__ == "__main__":
    numbers = dict.fromkeys(("log_norm", "grad_log_probs", "grad_sum", "grad_entropy", "entropy"), "*fp32")
    report = {}
    for targets in (1, 17):  # the sampled token alone, and with 16 likely tokens beside it
        settings = {"SPLITS_FIRST": True, "TARGETS": targets}
        report[f"forward {targets}"] = measure(kernels._statistics, kernels.FORWARD, {"out": "*fp32"}, **settings)
        report[f"targets {targets}"] = measure(
            kernels._target_logits, kernels.GATHER, {"out": "*fp32"}, TARGETS=targets
        )
        gradients = {"out": "*bf16", **numbers}
        report[f"backward {targets}"] = measure(kernels._gradients, kernels.BACKWARD, gradients, TARGETS=targets)
    # With more targets this variant of the launch does not fit into the registers.
    report["wide_backward 1"] = measure(kernels._gradients, kernels.WIDE_BACKWARD, gradients, TARGETS=1)
    print(json.dumps(report))
