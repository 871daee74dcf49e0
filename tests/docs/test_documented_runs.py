"""Run the documents' train, evaluate and verify commands as they stand, with fewer and shorter responses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from blocks import DOCUMENTS, REPO, blocks, commands, settings, words
from preloaded_server import Done, Server

# Parts of commands that test_documents.py only composes and checks, and the reason.
NOT_RUN = {
    "recipe/": "a model of 1.5B parameters or more, and eight GPUs",
    "generation=vllm": "vLLM's environment; tests/vllm_engine trains the quickstart with it",
    "sbatch": "SLURM; tests/slurm runs the scripts",
    "make ": "makes environments, then runs what stands in the Makefile",
    "benchmarks/gpu/": "a GPU",
    "nemo_disco.convert.": "minutes; a slow test of test_documents.py runs them",
    "--watch": "follows a run until it is stopped",
}
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
    return next((why for part, why in NOT_RUN.items() if part in command), "")


def trains(command: str) -> bool:
    program, name, *_ = words(command)
    return program == "torchrun" or (program == "nemo-disco" and name in ("train", "evaluate", "verify"))


SESSIONS = {d: [c for c in commands(d) if trains(c) and not reason(c)] for d in DOCUMENTS}
SESSIONS = {d: session for d, session in SESSIONS.items() if session}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


@pytest.mark.parametrize("document", SESSIONS, ids=[d.stem for d in SESSIONS])
def test_the_runs_of_a_document_go_one_after_another(document: Path, place: Path, server: Server) -> None:
    """In one directory, as a reader would run them: a command may use the run of an earlier one."""
    snippets = [block.text for block in blocks(REPO / "docs/extending.md") if block.language == "python"]
    (place / "my_objective.py").write_text(next(text for text in snippets if "class Reinforce" in text))
    (place / "my_signal.py").write_text(next(text for text in snippets if "class Visits" in text))
    (place / "my_rewards.py").write_text(next(text for text in snippets if "def brief" in text))
    for command in SESSIONS[document]:
        arguments = words(command)[1:]
        if words(command)[0] == "torchrun":
            arguments = arguments[arguments.index("nemo_disco") + 1 :]
        arguments += [f"{key}={value}" for key, value in SHORT.items() if f"{key}=" not in command]
        config = settings(arguments[1:])
        done = run(server, arguments, config.trainer.devices * config.trainer.num_nodes, place).ok()
        if arguments[0] == "train":
            directory = place / config.exp_manager.explicit_log_dir
            assert len((directory / "metrics.jsonl").read_text().splitlines()) == 1, command
            assert (directory / "export/model.safetensors").exists()
        else:
            assert {"evaluate": "pass@2", "verify": "gradient norm"}[arguments[0]] in done.out


def run(server: Server, arguments: list[str], ranks: int, place: Path) -> Done:
    for name in ("stdout", "stderr"):
        (place / name).write_text("")
    code, seconds = server.run(arguments, place / "stdout", place / "stderr", ranks=ranks, directory=str(place))
    return Done(code, (place / "stdout").read_text(), (place / "stderr").read_text(), seconds)


def test_no_two_documented_trainings_share_a_directory() -> None:
    """The second would resume the first, which is finished."""
    where: dict[str, str] = {}
    for command in (c for d in DOCUMENTS for c in commands(d) if trains(c) and "train" in words(c)):
        arguments = words(command)
        directory = settings(arguments[arguments.index("train") + 1 :]).exp_manager.explicit_log_dir
        assert directory not in where, f"{command}\n{where[directory]}"
        where[directory] = command


def test_every_command_is_run_or_has_a_reason_not_to_be() -> None:
    everything = [c for d in DOCUMENTS for c in commands(d)]
    others = [c for c in everything if not trains(c) and not reason(c)]
    assert {tuple(words(c)[:1]) for c in others} == {("nemo-disco",)}  # test_documents.py runs them
    assert all(any(part in c for c in everything) for part in NOT_RUN)
