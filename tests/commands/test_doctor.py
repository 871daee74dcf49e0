"""`nemo-disco doctor` names parts that are present, missing, of a wrong version or broken, and writes a report."""

import importlib.metadata
import re
import socket
import subprocess
import sys

import pytest

from nemo_disco import __version__, cli
from nemo_disco.commands import doctor
from nemo_disco.commands.doctor import Part
from nemo_disco.config.paths import packaged_directory
from nemo_disco.models.architecture import ARCHITECTURES


@pytest.fixture
def parts():
    """All parts by name, each present: a machine that has everything."""
    engines = (f"{name}'s Python" for name in doctor.engine_pythons())
    names = ("NVIDIA GPU", "torch with CUDA", *doctor.PACKAGES, *engines, "SLURM")
    return {name: Part(name, "1.0") for name in names}


def missing(parts):
    """The missing parts of each feature, as text, by the feature's name; "" if it has all."""
    return {feature.name: feature.missing for feature in doctor.list_features(parts)}


@pytest.fixture
def diagnose(capsys, monkeypatch):
    """A function that runs `nemo-disco doctor ARGUMENTS` and returns (whether its exit code is 0, its output).

    The code is 0 if every part that any run needs is usable.
    """
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments):
        return cli.main(["doctor", *map(str, arguments)]) == 0, capsys.readouterr().out

    return call


def test_this_machine_trains_and_the_versions_are_the_installed_ones(diagnose):
    healthy, text = diagnose()
    assert healthy
    for name in ("torch", "megatron-core", "math-verify"):
        assert importlib.metadata.version(name) in text
    assert "train on the CPU" in text


def test_a_machine_with_everything_can_do_everything(parts):
    assert set(missing(parts).values()) == {""}


@pytest.mark.parametrize(
    ("part", "feature"),
    [
        ("psutil", "train on the CPU (gloo)"),
        ("megatron-core", "engine megatron"),
        ("NVIDIA GPU", "parts for training on GPUs (NCCL, BF16)"),
        ("torch with CUDA", "parts for training on GPUs (NCCL, BF16)"),
        ("antlr4-python3-runtime", "grade mathematics"),
        ("pyarrow", "Parquet question files"),
        ("wandb", "Weights & Biases"),
        ("SLURM", "several nodes under SLURM"),
        ("vllm's Python", "engine vllm"),
        ("tensorrt_llm's Python", "engine tensorrt_llm"),
    ],
)
def test_a_missing_part_is_named_for_the_feature_that_needs_it(parts, part, feature):
    parts[part] = Part(part, None)
    assert missing(parts)[feature] == part


def test_either_of_two_parts_suffices_for_fused_kernels(parts):
    parts["apex"] = Part("apex", None)
    assert missing(parts)["fused optimizer and norms"] == ""
    parts["transformer-engine"] = Part("transformer-engine", "2.10", "does not import")
    assert missing(parts)["fused optimizer and norms"] == "transformer-engine or apex; torch's own are used"


def test_a_wrong_version_is_a_problem(monkeypatch, diagnose):
    monkeypatch.setitem(doctor.PACKAGES, "transformers", ("99", "100"))
    healthy, text = diagnose()
    assert not healthy
    assert "works with >= 99, < 100" in text and "no: transformers (works with" in text


@pytest.mark.parametrize(
    ("version", "healthy", "warning"),
    [
        ("2.13.0+cpu", True, ""),
        ("2.11.0+cu130", True, "expected to work; tested with >= 2.13, < 2.14"),
        ("2.10.0", False, "works with >= 2.11, < 2.14"),
        ("2.14.0", False, "works with >= 2.11, < 2.14"),
    ],
)
def test_a_torch_that_the_tests_did_not_run_with_is_a_warning(monkeypatch, diagnose, version, healthy, warning):
    """A GPU machine may have torch 2.11, whose functions are inspected for the arguments that they accept."""
    real = importlib.metadata.version
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: version if name == "torch" else real(name))
    part = doctor.examine()["torch"]
    assert part.usable == healthy and (part.problem or part.note) == warning
    assert diagnose()[0] == healthy


def test_a_transformer_engine_that_raises_runtime_error_is_a_problem(tmp_path, monkeypatch, diagnose):
    """Its core wheel raises RuntimeError without cuDNN; megatron-core expects ImportError and crashes."""
    broken = tmp_path / "transformer_engine"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('libcudnn.so not found in [/usr/lib]')\n")
    (broken / "pytorch.py").write_text("")
    metadata = tmp_path / "transformer_engine-2.10.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: transformer-engine\nVersion: 2.10.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    part = doctor.examine()["transformer-engine"]
    assert part.detail == "2.10.0" and not part.usable
    assert "RuntimeError: libcudnn.so not found" in part.problem and "megatron-core fails with it" in part.problem
    assert "in [/usr/lib])" in diagnose()[1]  # the brackets are not taken for markup
    (broken / "__init__.py").write_text("")
    assert doctor.examine()["transformer-engine"].usable


def test_examining_the_parts_imports_none_of_them():
    heavy = ("torch", "transformers", "megatron", "math_verify", "pyarrow", "tensorboard")
    code = (
        "import sys; from nemo_disco.commands.doctor import examine; examine(); "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_engines_and_models_are_those_of_the_package(parts):
    assert set(doctor.engine_pythons()) == {"vllm", "tensorrt_llm"}
    assert "models: " + ", ".join(ARCHITECTURES) in missing(parts)


def test_a_report_is_markdown_with_versions_parts_and_missing_parts(diagnose):
    healthy, text = diagnose("--report")
    assert healthy and "\x1b" not in text
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, re.MULTILINE))
    assert rows["nemo_disco"].startswith(__version__) and rows["torch"] == importlib.metadata.version("torch")
    assert rows["Python"] == sys.version.split()[0] and "Linux" in rows["operating system"] and "cores" in rows["CPU"]
    assert {part.name for part in doctor.examine().values()} < set(rows)
    for feature in doctor.list_features(doctor.examine()):
        assert rows[feature.name] == (f"no: {feature.missing}" if feature.missing else "yes")


def test_a_report_names_the_commit_of_a_checkout(diagnose):
    git = ("git", "-C", packaged_directory("conf").parent, "rev-parse", "HEAD")
    done = subprocess.run(git, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this is no checkout")
    assert f", commit {done.stdout[:12]}" in diagnose("--report")[1]


def test_a_report_has_the_variables_that_matter_and_no_secrets_or_names(diagnose, monkeypatch):
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setenv("USER", "alice")
    shown = {
        "CUDA_VISIBLE_DEVICES": ("0,1", "0,1"),
        "NCCL_TOPO_FILE": ("/home/alice/topo.xml", "~/topo.xml"),
        "LD_LIBRARY_PATH": ("/scratch/alice/lib:/scratch/malice", "/scratch/USER/lib:/scratch/malice"),
        "NCCL_HOSTID": (f"{socket.gethostname()}|0", "HOST\\|0"),
        "SLURM_NTASKS": ("16", "16"),
        "OMP_NUM_THREADS": ("1", "1"),
    }
    hidden = (
        "SLURM_JWT",
        "WANDB_API_KEY",
        "HF_TOKEN",
        "VLLM_API_KEY",
        "SLURM_JOB_NODELIST",
        "MLFLOW_TRACKING_PASSWORD",
    )
    for name, (value, _) in shown.items():
        monkeypatch.setenv(name, value)
    for name in hidden:
        monkeypatch.setenv(name, "private-value")
    text = diagnose("--report")[1]
    for name, (_, value) in shown.items():
        assert f"| {name} | {value} |" in text
    assert "private-value" not in text and "/alice" not in text and not any(name in text for name in hidden)


def test_a_report_ends_with_a_runs_settings_and_last_metrics(diagnose, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 1\n")
    assert "no step is finished" in diagnose("--report", run)[1]
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "reward/mean": 0.5}\n')
    text = diagnose("--report", run)[1]
    assert "seed: 1" in text and '{"step": 2, "reward/mean": 0.5}' in text and '{"step": 1}' not in text
    assert cli.main(["doctor", "--report", str(tmp_path / "missing")]) == 2
    assert "missing/config.yaml: is missing" in capsys.readouterr().err
