"""A request to stop does not interrupt the present step, however many signals arrive."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from nemo_disco.runtime.stop_signals import STOP_SIGNALS, StopRequest


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_flag_and_nothing_else(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_disco.runtime.stop_signals.is_ignored", lambda _: False)  # it is under nohup
    with StopRequest() as stop:
        assert not stop.number
        os.kill(os.getpid(), number)
        assert stop.number
        assert stop.signal_name == number.name


def test_the_second_signal_loses_nothing() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_name == "SIGUSR1"


def test_earlier_handlers_come_back() -> None:
    def handler(*_: object) -> None:
        raise AssertionError("this test sends no signal")

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with StopRequest():
            assert signal.getsignal(signal.SIGTERM) is not handler
        assert signal.getsignal(signal.SIGTERM) is handler
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


LOOP = """
import time
from nemo_disco.runtime.stop_signals import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    while not stop.number:
        time.sleep(0.01)
    input()  # until all signals are sent
print("saved after", stop.signal_name, flush=True)
"""


def start(program: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_process_finishes_its_step_and_exits_zero() -> None:
    process = start(LOOP)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate("\n", timeout=60)
    assert output == "saved after SIGTERM\n"
    assert process.returncode == 0


def test_a_process_under_nohup_outlives_its_terminal() -> None:
    program = LOOP.replace("import time", "import time, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)", 1)
    process = start(program)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGUSR1)
    assert process.communicate("\n", timeout=60)[0] == "saved after SIGUSR1\n"
