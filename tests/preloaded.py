"""Runs commands in forks of this process, which has imported everything: a run starts in milliseconds, not seconds.

Reads jobs from stdin, each a line of JSON (its keys: see `run`), and answers each with a line on stdout: the exit code
of the first rank to fail, or 0. With the key `exit_code`, a file, the command runs in the background: the answer is its
process id, and the file is written when it has ended.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

from nemo_disco.runtime.logs import setup_logging

HEAVY = (
    "nemo_disco.commands.train",
    "nemo_disco.algorithms.gradient_check",
    "nemo_disco.evaluation.report",
    "nemo_disco.evaluation.table",
    "transformers.models.qwen2.modeling_qwen2",  # transformers imports a model when it is first used
)


def main() -> None:
    setup_logging()  # before the imports, during which the libraries warn
    for name in HEAVY:
        importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if "exit_code" in job:
            print(run_in_background(job, port), flush=True)
            continue
        children = {fork(job, rank, port) for rank in range(job.get("ranks", 1))}
        print(wait_for_all(children), flush=True)


def fork(job: dict[str, Any], rank: int, port: int) -> int:
    """Start a rank of the job. Returns its process id."""
    pid = os.fork()
    if pid == 0:
        run(job, rank, port)
    return pid


def run_in_background(job: dict[str, Any], port: int) -> int:
    """Start the job on one rank, and a process that writes its exit code when it has ended. Returns its process id."""
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        pid = fork(job, 0, port)
        os.write(write_end, f"{pid}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        file = Path(job["exit_code"])
        file.with_suffix(".part").write_text(str(code))
        file.with_suffix(".part").rename(file)
        os._exit(0)
    os.close(write_end)
    with open(read_end) as pipe:
        return int(pipe.readline())


def run(job: dict[str, Any], rank: int, port: int) -> NoReturn:
    """Run a rank of the job in this process, to its end.

    The job's keys: arguments; stdout and stderr, existing files. Optional: environment, further variables; directory,
    to work in; ranks, the number of processes, whose variables are those of torchrun; life, the seconds after which the
    process is killed. port: where the ranks meet.
    """
    from nemo_disco.cli import main

    environment, ranks, life = job.get("environment", {}), job.get("ranks", 1), job.get("life")
    os.chdir(job.get("directory", "."))
    os.environ.update(environment)
    if ranks > 1:
        size = str(ranks)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    if path := environment.get("PYTHONPATH"):  # a new interpreter would read it, and import sitecustomize
        sys.path[:0] = path.split(os.pathsep)
        sys.modules.pop("sitecustomize", None)
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module("sitecustomize")
    for descriptor, path in ((1, job["stdout"]), (2, job["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if life is not None:
        timer = threading.Timer(life, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True  # a command that ends earlier does not wait for it
        timer.start()
    sys.exit(main(job["arguments"]))


def wait_for_all(children: set[int]) -> int:
    """The exit code of the first child to fail, whereupon the others are killed, or 0."""
    first = 0
    while children:
        pid, status = os.wait()
        children.discard(pid)
        code = os.waitstatus_to_exitcode(status)
        if code and not first:
            first = code
            for other in children:
                os.kill(other, signal.SIGKILL)
    return first


if __name__ == "__main__":
    main()
