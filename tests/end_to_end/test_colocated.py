"""The order of operations in a run with a colocated engine, as a fake engine in a process of its own records them."""

from __future__ import annotations

from pathlib import Path

from commands import run_directory
from fake_engine import ANY_MISMATCH, fake_python

MODULE = """
from pathlib import Path
from typing import ClassVar
from dataclasses import dataclass
from nemo_disco.algorithms.objectives.disco import DisCO

@dataclass(frozen=True, kw_only=True)
class Noted(DisCO):
    name: ClassVar[str] = "noted"

    def value(self, batch):
        with open("NOTES", "a") as notes:
            notes.write("train\\n")
        return super().value(batch)

def coin(response, answer):
    return float(len(response) % 2)
"""


def test_the_engine_sleeps_while_the_policy_trains(commands, tmp_path: Path) -> None:
    notes, settings_file = tmp_path / "notes", tmp_path / "told"
    (tmp_path / "noted.py").write_text(MODULE.replace("NOTES", str(notes)))
    settings = (
        "generation=vllm",
        *ANY_MISMATCH,
        f"generation.python={fake_python(tmp_path)}",
        f"generation.options={{notes: '{notes}', settings_file: '{settings_file}'}}",
        "algorithm.name=noted:Noted",
        "reward.verifier=noted:coin",
        "reward.require_think=false",
        "trainer.max_steps=2",
        "evaluation.enabled=true",
        "evaluation.samples=1",
    )
    commands("train", *settings, run_directory(tmp_path / "run"), PYTHONPATH=str(tmp_path)).ok()
    assert '"sleeps": true' in settings_file.read_text()
    operations = notes.read_text().split()
    changes = [word for i, word in enumerate(operations) if i == 0 or word != operations[i - 1]]
    probe = ["begin", "commit", "generate", "sleep", "wake"]  # the check of the engine before the first evaluation
    steps = ["begin", "commit", "generate", "sleep", "train", "wake"] * 2
    assert changes == [*probe, *steps, "begin", "commit", "generate"]
