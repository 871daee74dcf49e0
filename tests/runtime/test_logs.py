"""Messages of this package are logged once, and warnings of libraries not at all."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import logging, warnings, io, sys
from nemo_disco.runtime.logs import setup_logging
setup_logging({rank}, {world})
setup_logging({rank}, {world})
log = logging.getLogger("nemo_disco.test")
log.info("an info")
log.warning("a warning")
logging.getLogger("megatron.core").warning("chatter")
logging.getLogger("megatron.core").error("a megatron error")
warnings.warn_explicit("Apex is not installed", UserWarning, "x.py", 1, module="megatron.core.models")
warnings.warn_explicit("a warning of ours", UserWarning, "y.py", 1, module="nemo_disco.policy")
warnings.warn_explicit("a warning of torchlike", UserWarning, "z.py", 1, module="torchlike")
"""


def stderr(rank: int, world: int) -> str:
    """The log of PROGRAM as this rank of `world` ranks."""
    program = PROGRAM.format(rank=rank, world=world)
    process = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert process.stdout == ""
    return process.stderr


def test_rank_zero_logs_each_message_once() -> None:
    log = stderr(0, 2)
    for part in (
        "[rank 0] INFO an info",
        "[rank 0] WARNING a warning",
        "a warning of ours",
        "a warning of torchlike",
        "a megatron error",
    ):
        assert log.count(part) == 1
    assert "chatter" not in log and "Apex" not in log


def test_other_ranks_only_warn() -> None:
    log = stderr(1, 2)
    assert "an info" not in log
    assert "[rank 1] WARNING a warning" in log


def test_one_process_has_no_rank() -> None:
    assert "rank" not in stderr(0, 1)


def test_a_live_display_that_replaces_stderr_gets_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    import logging

    from nemo_disco.runtime.logs import setup_logging

    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        setup_logging()
        logging.getLogger("nemo_disco").warning("seen by the replaced stream")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.captureWarnings(False)
    assert "seen by the replaced stream" in capsys.readouterr().err
