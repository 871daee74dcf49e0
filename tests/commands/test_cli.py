"""The commands: exit codes, errors of one line for bad input, a fast --help, and the start of a run's processes."""

import errno
import json
import os
import resource
import subprocess
import sys
import types

import pytest

from nemo_disco import cli
from nemo_disco.commands import doctor
from nemo_disco.data import record_files
from nemo_disco.runtime import launch
from nemo_disco.runtime.errors import UserError
from nemo_disco.runtime.saved_files import reading

COMMANDS = ("train", "evaluate", "verify", "plan", "grade", "doctor", "report", "data")


def run(*arguments, **environment):
    """The finished process of `nemo-disco ARGUMENTS`, with these further environment variables."""
    command = [sys.executable, "-m", "nemo_disco", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)


RUNS = ("train", "evaluate", "verify")


@pytest.fixture
def usable(tmp_path):
    """Overrides of the quickstart that name existing files: questions, and a tiny model whose weights file is empty."""
    sizes = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
             "num_key_value_heads": 4, "vocab_size": 300, "max_position_embeddings": 4096}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", **sizes}))
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "questions.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    return [
        "--config-name=quickstart",
        f"model.path={tmp_path}",
        f"data.train_files=[{tmp_path}/questions.jsonl]",
        f"evaluation.files=[{tmp_path}/questions.jsonl]",
        f"exp_manager.explicit_log_dir={tmp_path}/run",
    ]


@pytest.fixture
def configurations(monkeypatch):
    """The configuration of each command that was run, by the command's name. The commands do nothing and return 7."""
    configurations = {}
    for name in RUNS:
        module = types.ModuleType(f"nemo_disco.commands.{name}")
        module.main = lambda config, name=name: configurations.update({name: config}) or 7
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(module.__name__, module, raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(launch, "set_torch_defaults", lambda: None)
    return configurations


@pytest.mark.parametrize("command", RUNS)
def test_with_one_device_the_command_runs_in_this_process(command, configurations, usable):
    assert cli.main([command, "trainer.max_steps=3", *usable, "trainer.devices=1", "seed=5"]) == 7
    config = configurations[command]
    # Overrides before and after the options count.
    assert (config.trainer.max_steps, config.trainer.devices, config.seed) == (3, 1, 5)


def test_several_devices_start_several_processes_of_the_same_command(configurations, usable, monkeypatch):
    started = []
    monkeypatch.setattr(launch, "spawn", lambda count, command: started.append((count, command)) or 0)
    arguments = ["train", *usable, "trainer.devices=2"]
    assert cli.main(arguments) == 0
    assert started == [(2, [sys.executable, "-m", "nemo_disco", *arguments])]
    assert not configurations


def test_under_torchrun_the_rank_runs_in_this_process(configurations, usable, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert cli.main(["train", *usable]) == 7  # the quickstart's default of 2 devices does not count
    assert "train" in configurations
    assert cli.main(["train", *usable, "trainer.devices=2"]) == 2
    assert "makes 2 processes, but the launcher started 3" in capsys.readouterr().err


def test_bad_input_from_every_rank_is_one_line(usable):
    done = run("train", *usable, "trainer.devices=2", "algorithm.tau=0")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "tau must be above 0" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--config-name", "quickstar"],
        ["train", "--config-name", "quickstart", "trainer.max_stepz=1"],
        ["train", "--config-name", "quickstart", "trainer.max_steps=abc"],
        ["train", "--config-name", "quickstart", "model.path=nowhere"],
        ["evaluate", "--config-name", "quickstart", "model.token_budget=1"],
        ["verify", "--config-name", "quickstart", "generation=vllm", "generation.python=nowhere"],
        ["plan", "--config-path", "nowhere"],
        ["grade", "nowhere.jsonl"],
        ["data", "nowhere.jsonl"],
        ["data", "nowhere.jsonl", "--max-tokens", "5"],
        ["report", "nowhere"],
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        *([], ["trane"], ["train", "--nowhere"], ["doctor", "trainer.devices=1"]),
        *(["grade", "a.jsonl", "--workers", "0"], ["grade", "a.jsonl", "--timeout", "nan"]),
        *(["grade", "a.jsonl", "--timeout=-1"], ["data", "a.jsonl", "--max-tokens", "0"]),
    ],
)
def test_a_wrong_command_line_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ending:
        cli.main(arguments)
    assert ending.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_an_interrupt_exits_with_130_and_a_bug_is_not_hidden(monkeypatch):
    def raising(error):
        def command(_):
            raise error

        return command

    monkeypatch.setattr(doctor, "main", raising(KeyboardInterrupt()))
    assert cli.main(["doctor"]) == 130
    monkeypatch.setattr(doctor, "main", raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_a_rank_leaves_its_error_message_for_the_launcher(monkeypatch, tmp_path, capsys):
    def refuse(_):
        raise UserError("a line\nand more")

    monkeypatch.setattr(doctor, "main", refuse)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("NEMO_DISCO_REPORTS", str(tmp_path))
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == ""
    assert json.loads((tmp_path / "1").read_text())["message"] == r"a line\nand more"  # an escaped line break


def test_plan_prints_the_vocabulary_and_the_memory(capsys):
    assert cli.main(["plan", "--config-name", "recipe/disco_logl_1.5b", "trainer.num_nodes=2"]) == 0
    printed = capsys.readouterr().out
    assert "16 = TP 1 x PP 1 x CP 1 x DP 16" in printed and "optimizer state" in printed


def test_grade_prints_a_reward_and_a_reason_a_line(tmp_path, capsys):
    lines = [{"response": r"</think> \boxed{4}", "answer": "4"}, {"response": r"\boxed{5}", "answer": ["4", "6"]}]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli.main(["grade", str(file), "--workers", "1"]) == 0
    graded = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["reward"] for line in graded] == [1.0, 0.0]
    assert all(line["reason"] for line in graded)
    assert cli.main(["grade", str(file), "--workers", "1", "--out", str(tmp_path / "out.jsonl")]) == 0
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == graded


def test_grade_replaces_its_output_when_all_is_graded(tmp_path, capsys, monkeypatch):
    """Earlier output stays if the answers cannot be read, even if reading fails late; the error names the file."""
    file, out = tmp_path / "answers.jsonl", tmp_path / "out.jsonl"
    file.write_text('{"response": "\\\\boxed{4}", "answer": "4"}\n')
    out.write_text("earlier")
    assert cli.main(["grade", str(tmp_path / "none.jsonl"), "--out", str(out)]) == 2
    counter = types.SimpleNamespace(reads=0)

    def read_lines(path):
        counter.reads += 1
        with reading(path):
            if counter.reads == 2:  # the first reading checks all lines
                raise OSError(errno.EIO, "Input/output error")
            yield from record_files.read_lines(path)

    monkeypatch.setattr("nemo_disco.commands.grade.read_lines", read_lines)
    assert cli.main(["grade", str(file), "--out", str(out)]) == 2
    assert f"error: {file}: cannot be read (Input/output error)" in capsys.readouterr().err
    assert out.read_text() == "earlier" and len(list(tmp_path.iterdir())) == 2
    assert cli.main(["grade", str(file), "--out", str(file)]) == 0  # in place
    assert json.loads(file.read_text())["reward"] == 1.0


def test_help_is_fast_and_imports_nothing_heavy():
    heavy = ("torch", "transformers", "hydra", "omegaconf", "pydantic", "megatron", "numpy", "rich", "sympy")
    code = (
        "import sys\nfrom nemo_disco.cli import main\n"
        "try:\n    main(['train', '--help'])\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "--config-name" in done.stdout
    assert done.stderr.strip() == "[]"
    assert fastest("-m", "nemo_disco", "--help") < 1.0
    assert fastest("-c", "import nemo_disco") - fastest("-c", "pass") < 0.2


def fastest(*arguments):
    """Seconds of processor time of the fastest of five runs of Python; other work on the machine only adds time."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as ending:
        cli.main([command, "--help"])
    assert ending.value.code == 0
    assert f"nemo-disco {command}" in capsys.readouterr().out
