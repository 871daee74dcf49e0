"""The documents' commands train, evaluate and verify run as they are written, with fewer and shorter responses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from blocks import DOCUMENTS, REPO, check_settings, read_blocks, read_commands, split_command
from preloaded_server import CommandResult, Server

# Parts of commands that are not run here but only checked by test_documents.py, with the reason.
NOT_RUN = {
    "recipe/": "a model of 1.5B parameters or more, and eight GPUs",
    "generation=vllm": "vLLM's environment; tests/vllm_engine trains the quickstart with it",
    "sbatch": "SLURM; tests/slurm runs the scripts",
    "make ": "creates environments, then runs commands of the Makefile",
    "benchmarks/gpu/": "a GPU",
    "nemo_disco.convert.": "minutes of time; a slow test of test_documents.py runs them",
    "--watch": "follows a run until it is stopped",
}
# Settings of each run, unless its command has another value.
SHORT = {
    "trainer.max_steps": 1,
    "data.questions_per_step": 4,
    "algorithm.mini_batch_questions": 4,
    "generation.responses_per_question": 2,
    "generation.max_response_length": 16,
    "model.token_budget": 1024,
    "evaluation.samples": 2,
    "evaluation.max_questions": 4,
}


def reason(command: str) -> str:
    """The reason why a command is not run here, or ""."""
    return next((text for part, text in NOT_RUN.items() if part in command), "")


def is_run(command: str) -> bool:
    """True for a call of train, evaluate or verify."""
    program, name, *_ = split_command(command)
    return program == "torchrun" or (program == "nemo-disco" and name in ("train", "evaluate", "verify"))


# The commands of each document that are run here, in their order.
SESSIONS = {d: [c for c in read_commands(d) if is_run(c) and not reason(c)] for d in DOCUMENTS}
SESSIONS = {d: session for d, session in SESSIONS.items() if session}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.mark.parametrize("document", SESSIONS, ids=[d.stem for d in SESSIONS])
def test_the_runs_of_a_document_succeed_one_after_another(document: Path, directory: Path, server: Server) -> None:
    """They run in one directory, as for a reader: a command may use the run directory of an earlier one."""
    snippets = [block.text for block in read_blocks(REPO / "docs/extending.md") if block.language == "python"]
    (directory / "my_objective.py").write_text(next(text for text in snippets if "class Reinforce" in text))
    (directory / "my_signal.py").write_text(next(text for text in snippets if "class Visits" in text))
    (directory / "my_rewards.py").write_text(next(text for text in snippets if "def brief" in text))
    for command in SESSIONS[document]:
        arguments = split_command(command)[1:]
        if split_command(command)[0] == "torchrun":
            arguments = arguments[arguments.index("nemo_disco") + 1 :]
        arguments += [f"{key}={value}" for key, value in SHORT.items() if f"{key}=" not in command]
        config = check_settings(arguments[1:])
        done = run_command(server, arguments, config.trainer.devices * config.trainer.num_nodes, directory).ok()
        if arguments[0] == "train":
            run_directory = directory / config.exp_manager.explicit_log_dir
            assert len((run_directory / "metrics.jsonl").read_text().splitlines()) == 1, command
            assert (run_directory / "export/model.safetensors").exists()
        else:
            assert {"evaluate": "pass@2", "verify": "gradient norm"}[arguments[0]] in done.out


def run_command(server: Server, arguments: list[str], ranks: int, directory: Path) -> CommandResult:
    for name in ("stdout", "stderr"):
        (directory / name).write_text("")
    out, err = directory / "stdout", directory / "stderr"
    code, seconds = server.run(arguments, out, err, ranks=ranks, directory=str(directory))
    return CommandResult(code, out.read_text(), err.read_text(), seconds)


def test_no_two_documented_trainings_share_a_directory() -> None:
    """The second training would resume the first, which is finished."""
    trainings: dict[str, str] = {}
    for command in (c for d in DOCUMENTS for c in read_commands(d) if is_run(c) and "train" in split_command(c)):
        arguments = split_command(command)
        directory = check_settings(arguments[arguments.index("train") + 1 :]).exp_manager.explicit_log_dir
        assert directory not in trainings, f"two commands train in {directory}:\n{trainings[directory]}\n{command}"
        trainings[directory] = command


def test_every_command_is_run_or_has_a_reason_not_to_be() -> None:
    everything = [c for d in DOCUMENTS for c in read_commands(d)]
    others = [c for c in everything if not is_run(c) and not reason(c)]
    assert {tuple(split_command(c)[:1]) for c in others} == {("nemo-disco",)}  # test_documents.py runs them
    assert all(any(part in c for c in everything) for part in NOT_RUN)
