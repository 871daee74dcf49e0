"""Commands in processes forked from this one, which has imported everything: a run starts in milliseconds, not seconds.

A job is a JSON line on stdin: arguments and the files that take stdout and stderr; where it is not the default,
environment, directory, ranks (processes, told who they are as torchrun tells them), and life, the seconds after which
it is killed. The answer is a line with the exit code: of the first rank that failed, or 0. With `exit_code`, a file,
the command runs in the background: the answer is its process number, and the file is made when it has ended.
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
    "transformers.models.qwen2.modeling_qwen2",  # transformers imports its models when they are asked for
)


def main() -> None:
    setup_logging()  # the libraries warn while they are imported
    for name in HEAVY:
        importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if "exit_code" in job:
            print(in_background(job, port), flush=True)
            continue
        children = {fork(job, rank, port) for rank in range(job.get("ranks", 1))}
        print(wait(children), flush=True)


def fork(job: dict[str, Any], rank: int, port: int) -> int:
    pid = os.fork()
    if pid == 0:
        run(job, rank, port)
    return pid


def in_background(job: dict[str, Any], port: int) -> int:
    """The number of the command's process, whose parent waits for it."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        pid = fork(job, 0, port)
        os.write(writing, f"{pid}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        made = Path(job["exit_code"])
        made.with_suffix(".part").write_text(str(code))
        made.with_suffix(".part").rename(made)
        os._exit(0)
    os.close(writing)
    with open(reading) as file:
        return int(file.readline())


def run(job: dict[str, Any], rank: int, port: int) -> NoReturn:
    from nemo_disco.cli import main

    environment, ranks, life = job.get("environment", {}), job.get("ranks", 1), job.get("life")
    os.chdir(job.get("directory", "."))
    os.environ.update(environment)
    if ranks > 1:
        size = str(ranks)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    if path := environment.get("PYTHONPATH"):  # as a new interpreter takes it
        sys.path[:0] = path.split(os.pathsep)
        sys.modules.pop("sitecustomize", None)
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module("sitecustomize")
    for descriptor, path in ((1, job["stdout"]), (2, job["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if life is not None:
        end = threading.Timer(life, os.kill, (os.getpid(), signal.SIGKILL))
        end.daemon = True  # a command that is done by then is left alone
        end.start()
    sys.exit(main(job["arguments"]))


def wait(children: set[int]) -> int:
    """The exit code of the first to fail (the others are then killed), or 0."""
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
