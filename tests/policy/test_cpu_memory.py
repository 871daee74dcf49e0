"""Memory of a process on a CPU: freed tensors return to the system, and a run's peak is near the plan's figure."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import save_model

from nemo_disco.config.paths import packaged_directory

# Frees every second block of 4 MiB, after a larger one (which raises glibc's threshold for mapping a block separately),
# and prints how many of the 128 MiB freed were not returned.
HOLES = """
import torch
from nemo_disco.policy import cpu_backend

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

cpu_backend.enable()
cpu_backend.return_freed_memory(weight_bytes=1 << 30)
torch.ones(7 << 20)
before = resident()
blocks = [torch.ones(1 << 20) for _ in range(64)]
kept = blocks[1::2]
del blocks
print((resident() - before >> 20) - 128)
"""
SHAPE_OF_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}


def environment_without_malloc() -> dict[str, str]:
    """This process's environment without its settings of malloc."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}


def build_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "nemo_disco", *arguments]


def test_freed_tensors_are_returned_to_the_system() -> None:
    result = subprocess.run(
        [sys.executable, "-c", HOLES], capture_output=True, text=True, env=environment_without_malloc()
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 16


@pytest.mark.slow
def test_a_runs_peak_is_at_most_a_fifth_above_the_plans_figure(tmp_path: Path) -> None:
    """135M parameters in float32, two steps with saves; the plan's figure excludes libraries and checkpoints."""
    quickstart = packaged_directory("assets") / "quickstart"
    model = save_model(tmp_path / "model", "llama", tied=True, **SHAPE_OF_135M)
    for file in (quickstart / "model").iterdir():
        if "token" in file.name or "template" in file.name:
            shutil.copy(file, model)
    settings = [
        f"model.path={model}",
        f"data.train_files=[{quickstart / 'train.jsonl'}]",
        f"exp_manager.explicit_log_dir={tmp_path / 'run'}",
        "exp_manager.checkpoint_every_n_steps=1",
        "evaluation.enabled=false",
        "trainer.max_steps=2",
        "trainer.precision=32",
        "data.questions_per_step=4",
        "data.max_prompt_length=128",
        "algorithm.mini_batch_questions=4",
        "generation.responses_per_question=4",
        "generation.max_response_length=128",
        "model.token_budget=1024",
    ]
    plan = subprocess.run(build_command("plan", *settings), capture_output=True, text=True, check=True).stdout
    plan_gib = float(re.search(r"training, at its peak\s*│\s*([\d.]+)", plan)[1])  # type: ignore[index]
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(
            build_command("train", *settings), stdout=output, stderr=output, env=environment_without_malloc()
        )
        _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, (tmp_path / "output").read_text()
    peak = usage.ru_maxrss / (1 << 20)
    assert plan_gib == pytest.approx(3.5, abs=0.1)
    assert peak < 1.2 * plan_gib, f"the peak is {peak:.2f} GiB, the plan says {plan_gib}"
