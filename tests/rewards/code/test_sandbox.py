"""The sandbox refuses every effect of a hostile program: to root and to a plain user, with Landlock and without."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attacks
import pyseccomp
import pytest

import nemo_disco
from nemo_disco.rewards.code import seccomp_filter
from nemo_disco.rewards.code.python_tests import PythonTests
from nemo_disco.rewards.code.sandbox import Limits, Sandbox
from nemo_disco.rewards.code.seccomp_filter import build_filter
from nemo_disco.runtime.errors import UserError

REFUSED = {"EPERM", "ENOSYS", "EACCES", "ENOENT", "ValueError"}  # ValueError: from setrlimit
NOBODY = 65534
SYSTEM_PYTHON = Path("/usr/bin/python3")  # one that every user can run, unlike one under /root


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    sandbox = Sandbox()
    yield sandbox
    sandbox.close()


def assert_refused(outcome: dict[str, Any]) -> None:
    assert outcome["exit_code"] == 0, outcome["stderr"]
    assert len(outcome["results"]) > 120
    assert {name: r for name, r in outcome["results"].items() if r not in REFUSED} == {}
    calls = {r for name, r in outcome["results"].items() if name in attacks.CALLS}
    assert calls == {"EPERM", "ENOSYS"}  # the filter's errors, not those of a missing file or permission
    assert not outcome["harm"] and outcome["signals"] == []


def test_everything_is_refused() -> None:
    assert_refused(attacks.attack(landlock=True))


def _attack_as(folder: Path, landlock: bool, user: int) -> dict[str, Any]:
    """Run the attack as another user with the system's Python, and return its outcome.

    That user cannot read this checkout, so `folder` gets a copy of the modules.
    """
    package = folder / "nemo_disco"
    for part in ("rewards", "runtime"):
        shutil.copytree(Path(nemo_disco.__file__).parent / part, package / part)
    shutil.copy(nemo_disco.__file__, package)
    for file in (attacks.__file__, pyseccomp.__file__):
        shutil.copy(file, folder)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    command = [str(SYSTEM_PYTHON), "-B", str(folder / "attacks.py"), "landlock" if landlock else "none"]
    environment = {"PYTHONPATH": str(folder), "PATH": os.environ["PATH"]}
    run = subprocess.run(command, env=environment, user=user, group=user, extra_groups=[], capture_output=True, cwd="/")
    assert run.returncode == 0, run.stderr.decode()[-2000:]
    outcome: dict[str, Any] = json.loads(run.stdout)
    return outcome


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.skipif(not SYSTEM_PYTHON.exists(), reason="needs a Python that every user can run")
@pytest.mark.parametrize(("landlock", "user"), [(True, NOBODY), (False, NOBODY), (False, 0)])
def test_as_a_plain_user_and_without_landlock(landlock: bool, user: int) -> None:
    folder = Path(f"/tmp/attack-of-nemo-disco-{os.getpid()}")
    folder.mkdir()
    try:
        assert_refused(_attack_as(folder, landlock, user))
    finally:
        shutil.rmtree(folder)


def test_calls_in_another_numbering_end_the_program(sandbox: Sandbox) -> None:
    """An x86-64 kernel also accepts 32-bit calls (int 0x80) and x32 calls, which have other numbers."""
    if os.uname().machine != "x86_64":
        pytest.skip("only x86-64 has other numberings")
    x32 = "import ctypes\nctypes.CDLL(None).syscall(ctypes.c_long(0x40000000 + 39))\nprint('on')"
    machine_code = "b8 14 00 00 00 cd 80 c3"  # mov eax, 20 (getpid); int 0x80; ret
    int80 = (
        "import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7)\n"
        f"m.write(bytes.fromhex('{machine_code}'))\n"
        "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()\nprint('on')"
    )
    for code in (x32, int80):
        outcome = attacks.run(sandbox, code)
        assert (outcome.exit_code, outcome.stdout) == (-31, b"")  # SIGSYS


def test_the_filter_is_built_for_both_architectures_and_a_missing_library_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for architecture in (pyseccomp.Arch.X86_64, pyseccomp.Arch.AARCH64):
        assert len(build_filter(architecture)) > 800
    monkeypatch.delitem(sys.modules, "pyseccomp")
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None if name == "seccomp" else "libc.so.6")
    with pytest.raises(UserError, match="libseccomp2"):
        seccomp_filter.build_filter()


def test_a_kernel_that_does_not_confine_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_disco.rewards.code.sandbox.build_filter", lambda: b"\0" * 8)  # no valid filter
    with pytest.raises(UserError, match="cannot confine"):
        PythonTests()
    allow_all = b"\x06\0\0\0\0\0\xff\x7f"
    monkeypatch.setattr("nemo_disco.rewards.code.sandbox.build_filter", lambda: allow_all)
    with pytest.raises(UserError, match="does not confine programs"):
        PythonTests()


@pytest.mark.skipif(os.getuid() != 0, reason="only root's programs become another user")
def test_a_python_that_the_user_nobody_cannot_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Landlock is off here. The message must not blame seccomp."""
    environment = tmp_path / "root's"
    venv.create(environment, symlinks=True, with_pip=False)
    (environment / "lib").chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(environment / "bin/python"))
    sandbox = Sandbox(landlock=False)
    with pytest.raises(UserError, match=r"the user nobody cannot read .*install Python where every user can") as error:
        attacks.run(sandbox, "print(1)")
    sandbox.close()
    assert "seccomp" not in str(error.value)


FLOODS = {
    "output": "import sys\nwhile True: sys.stdout.write('x' * 65536)",
    "errors": "import sys\nwhile True: sys.stderr.write('x' * 65536)",
    "memory": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "mapped memory": "import mmap\nx = [mmap.mmap(-1, 1 << 26) for _ in range(64)]",
    "forks": "import os\nwhile True: os.fork()",
    "threads": "import threading, time\nthreading.stack_size(1 << 15)\n"
    "for _ in range(20000): threading.Thread(target=time.sleep, args=(60,)).start()",
    "processor": "import threading\ndef f():\n    while True: pass\nthreading.Thread(target=f).start()\nf()",
    "descriptors": "import os\nx = [os.pipe() for _ in range(10000)]",
    "input": "import os\nwhile True: os.write(0, b'x' * 65536)",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
    "sleep": "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nsignal.pause()",
}


@pytest.mark.parametrize("code", FLOODS.values(), ids=FLOODS.keys())
def test_a_program_that_floods_a_resource_is_ended(sandbox: Sandbox, code: str) -> None:
    limits = Limits(cpu_seconds=1.0, sleep_seconds=1.0, memory_bytes=256 << 20, output_bytes=1 << 20)
    began = time.monotonic()
    outcome = sandbox.run(json.dumps([[code], False]).encode() + b"\n", limits, stdin=b"")
    assert outcome.exit_code != 0 and outcome.cpu_seconds < 2.5
    assert time.monotonic() - began < 60  # processor time counts, and this machine may be busy
    for name in ("stdin", "stdout", "stderr"):
        assert os.fstat(sandbox._files[name]).st_size <= 1 << 20
    assert attacks.run(sandbox, "print(1)").stdout == b"1\n"


def test_other_processes_cannot_read_this_one_while_a_program_runs(sandbox: Sandbox) -> None:
    libc = ctypes.CDLL(None)
    dumpable: list[int] = []
    thread = threading.Thread(target=lambda: attacks.run(sandbox, "import time\ntime.sleep(0.3)"))
    thread.start()
    while thread.is_alive():
        dumpable.append(libc.prctl(3, 0, 0, 0, 0))
        time.sleep(0.01)
    assert 0 in dumpable and libc.prctl(3, 0, 0, 0, 0) == 1


def test_root_becomes_nobody_and_reads_only_pythons_files(sandbox: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "answers.json"
    secret.write_text("42")
    code = "import json, os\nfor path in ({paths}):\n    try:\n        open(path).read()\n        print('read', path)\n"
    code = code.format(paths=[str(secret), "/etc/passwd", "/proc/1/cmdline", "/etc/hostname"])
    code += "    except OSError:\n        pass\nprint(os.getuid(), os.getgid(), os.getgroups(), sorted(os.environ))"
    outcome = attacks.run(sandbox, code)
    user = NOBODY if os.getuid() == 0 else os.getuid()
    uid, *_, environment = outcome.stdout.decode().strip().splitlines()[-1].split(maxsplit=3)
    assert uid == str(user) and "PATH" not in environment and "HOME" not in environment
    if ctypes.CDLL(None).syscall(444, 0, 0, 1) > 0:  # the kernel has Landlock
        assert b"read" not in outcome.stdout


SEARCH = """
import gc, os, sys
def texts():
    for fd in range(1024):
        try:
            yield os.pread(fd, 1 << 20, 0).decode(errors="replace")
        except OSError:
            pass
    frame = sys._getframe()
    while frame is not None:
        yield repr(frame.f_locals) + repr(frame.f_globals)
        frame = frame.f_back
    for thing in gc.get_objects():
        if isinstance(thing, (list, tuple, dict)) and thing is not texts:
            yield repr(thing)[:100000]
    yield repr(os.environ) + repr(sys.argv)
def search(*_):
    start = "SEC" + "RET-"
    for text in texts():
        at = text.find(start)
        if at >= 0:
            return text[at:at + 11]
    return "nothing"
"""


@pytest.mark.parametrize(
    "tests",
    [
        json.dumps({"inputs": ["1"], "outputs": ["SECRET-9999"]}),
        json.dumps({"inputs": [[1]], "outputs": ["SECRET-9999"], "fn_name": "search"}),
        "assert search(1) == 'SECRET-9999'",
        "wanted = 'SECRET-9999'\nassert search(1) == wanted",
    ],
    ids=["program", "call", "assertion", "script"],
)
def test_a_program_cannot_find_expected_outputs_in_its_process(tests: str) -> None:
    program = f"{SEARCH}\nif __name__ == '__main__':\n    print(input() and search())"
    with PythonTests(workers=1) as verifier:
        assert verifier.grade([f"```python\n{program}\n```"], [tests]) == [0.0]


def test_the_search_finds_a_secret_that_is_in_the_process() -> None:
    tests = json.dumps({"inputs": [["SECRET-9999"]], "outputs": ["SECRET-9999"], "fn_name": "search"})
    with PythonTests(workers=1) as verifier:
        assert verifier.grade([f"```python\n{SEARCH}\n```"], [tests]) == [1.0]


def test_the_attacks_succeed_outside_the_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside, the same calls change the file and read the memory; so the tests above show that the sandbox refuses."""
    path = tmp_path / "victim"
    path.write_text("kept")
    path.chmod(0o600)
    calls = ["utimes", "utimensat", "lsetxattr", "fremovexattr", "kill", "prlimit64", "chmod"]
    monkeypatch.setattr(attacks, "CALLS", {name: attacks.CALLS[name] for name in calls})
    with subprocess.Popen(["sleep", "60"]) as victim:
        code = attacks.build_program(path, victim.pid)
        # Leave these out: they would end the victim before the later calls, and leave files behind.
        for part in ('os.write(writing, b"x")\n', '"/tmp/x", "/dev/shm/x", '):
            assert part in code
            code = code.replace(part, "")
        command = [sys.executable, "-c", code]
        run = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd=tmp_path, check=True)
        assert victim.wait(10) == -9  # killed by the signal that the pipe sends when it is written to
    successes = {name for name, result in json.loads(run.stdout).items() if result == "got through"}
    assert {"kill", "chmod", "utimensat", "F_SETOWN", "F_SETSIG", "O_ASYNC", f"environ of {victim.pid}"} <= successes
    assert path.stat().st_mode & 0o777 == 0o777
