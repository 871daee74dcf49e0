"""The guards of an algebra process, one by one: sympy's restricted string parser, its errors, and the audit hook."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sympy  # type: ignore[import-untyped]

from nemo_disco.rewards import verdict
from nemo_disco.rewards.math import symbolic
from nemo_disco.rewards.math.algebra_process import refuse_effects


def test_sympys_parser_takes_arithmetic_only() -> None:
    """Another process runs the code, since `restrict_string_parser` cannot be undone. `open` is read as a symbol."""
    code = """
import sympy
from nemo_disco.rewards.math.expressions import restrict_string_parser

restrict_string_parser()
for text in ["12", "1.5e-3", "(14+sqrt(196))/50", "open"]:
    sympy.sympify(text)
for text in ["__import__('os')", "x.__class__", "f(1)", "x+1", "'a'", "[1]", "lambda: 0", "(1).real", "sqrt.x", "é(1)"]:
    try:
        sympy.sympify(text)
    except sympy.SympifyError:
        continue
    raise AssertionError(text)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("error", [RecursionError, MemoryError])
def test_an_error_on_one_gold_answer_hides_no_other(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    compare = symbolic.same_value

    def fail_on_y(gold: Any, answer: Any, digits: int) -> bool:
        if gold.has(sympy.Symbol("y", real=True)):
            raise error
        return compare(gold, answer, digits)

    monkeypatch.setattr(symbolic, "same_value", fail_on_y)
    reason = verdict.NO_MEMORY if error is MemoryError else verdict.UNPARSABLE
    assert symbolic.judge("x+1", ["y+1", "1+x"]) == verdict.CORRECT
    assert symbolic.judge("x+1", ["y+1", "2+x"]) == symbolic.judge("x+1", ["2+x", "y+1"]) == reason


def test_effects_are_refused(tmp_path: Path) -> None:
    for event, arguments in [
        ("os.system", ("ls",)),
        ("subprocess.Popen", ()),
        ("os.fork", ()),
        ("socket.connect", ()),
        ("os.remove", (tmp_path,)),
        ("open", (tmp_path / "x", "w", os.O_WRONLY | os.O_CREAT)),
    ]:
        with pytest.raises(PermissionError, match=event):
            refuse_effects(event, arguments)
    refuse_effects("open", (tmp_path / "x", "r", os.O_RDONLY))
    refuse_effects("import", ("sympy",))


def test_a_child_whose_parent_was_killed_ends_by_itself() -> None:
    """The kernel ends the child when its processor time is used up."""
    code = "from nemo_disco.rewards.math.algebra_process import limit_cpu; limit_cpu(0.1); x = 9 ** 9 ** 9 ** 9"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGXCPU
