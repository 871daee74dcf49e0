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

from nemo_disco.config.paths import packaged

# Frees every second block of 4 MiB, after a larger one (which raises glibc's threshold for mapping a block separately),
# and prints how many of the 128 MiB freed were not returned.
HOLES = """
import torch
from nemo_disco.policy import cpu_backend

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

cpu_backend.enable()
cpu_backend.return_freed_memory(weights=1 << 30)
torch.ones(7 << 20)
before = resident()
blocks = [torch.ones(1 << 20) for _ in range(64)]
kept = blocks[1::2]
del blocks
print((resident() - before >> 20) - 128)
"""
OF_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}


def own_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "nemo_disco", *arguments]


def test_freed_tensors_are_returned_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, env=own_environment())
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16


@pytest.mark.slow
def test_a_runs_peak_is_at_most_a_fifth_above_the_plans_figure(tmp_path: Path) -> None:
    """135M parameters in float32, two steps with saves; the plan's figure excludes libraries and checkpoints."""
    quickstart = packaged("assets") / "quickstart"
    model = save_model(tmp_path / "model", "llama", tied=True, **OF_135M)
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
    plan = subprocess.run(command("plan", *settings), capture_output=True, text=True, check=True).stdout
    planned = float(re.search(r"training, at its peak\s*│\s*([\d.]+)", plan)[1])  # type: ignore[index]
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(command("train", *settings), stdout=output, stderr=output, env=own_environment())
        _, status, used = os.wait4(process.pid, 0)
    assert status == 0, (tmp_path / "output").read_text()
    peak = used.ru_maxrss / (1 << 20)
    assert planned == pytest.approx(3.5, abs=0.1)
    assert peak < 1.2 * planned, f"{peak:.2f} GiB, planned {planned}"
