"""The doctor: what it says of parts that are here, missing, of a wrong version, or broken."""

import importlib.metadata
import io
import subprocess
import sys

import pytest
from rich.console import Console

from nemo_disco.commands import doctor
from nemo_disco.commands.doctor import Part
from nemo_disco.config.paths import packaged


@pytest.fixture
def parts():
    """A machine that has everything."""
    engines = (f"{name}'s Python" for name in doctor.ENGINE_PYTHONS)
    names = ("Python", "CPU cores", "NVIDIA GPU", "torch with CUDA", *doctor.PACKAGES, *engines, "SLURM")
    return {name: Part(name, "1.0") for name in names}


def missing(parts):
    return {feature.name: feature.missing for feature in doctor.features(parts)}


def diagnose():
    console = Console(file=io.StringIO(), width=160)
    return doctor.print_doctor(console), console.file.getvalue()


def test_this_machine_trains_and_the_versions_are_the_installed_ones():
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


def test_either_of_two_parts_will_do_for_fused_kernels(parts):
    parts["apex"] = Part("apex", None)
    assert missing(parts)["fused optimizer and norms"] == ""
    parts["transformer-engine"] = Part("transformer-engine", "2.10", "does not import")
    assert missing(parts)["fused optimizer and norms"] == "transformer-engine or apex; torch's own are used"


def test_a_wrong_version_is_a_problem(monkeypatch):
    monkeypatch.setitem(doctor.PACKAGES, "transformers", ("99", "100"))
    healthy, text = diagnose()
    assert not healthy
    assert "works with >= 99, < 100" in text and "no: transformers (works with" in text


@pytest.mark.parametrize(
    ("version", "healthy", "said"),
    [
        ("2.13.0+cpu", True, ""),
        ("2.11.0+cu130", True, "expected to work; tested with >= 2.13, < 2.14"),
        ("2.10.0", False, "works with >= 2.11, < 2.14"),
        ("2.14.0", False, "works with >= 2.11, < 2.14"),
    ],
)
def test_a_torch_that_the_tests_did_not_run_with_is_a_warning(monkeypatch, version, healthy, said):
    """2.11 is what a GPU machine may have; its varlen_attn and the rest are asked for what they take."""
    known = importlib.metadata.version
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: version if name == "torch" else known(name))
    part = doctor.examine()["torch"]
    assert part.usable == healthy and (part.problem or part.note) == said
    assert diagnose()[0] == healthy


def test_a_transformer_engine_that_raises_runtime_error_is_said_clearly(tmp_path, monkeypatch):
    """Its core wheel without cuDNN; megatron-core expects ImportError and crashes."""
    broken = tmp_path / "transformer_engine"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('libcudnn.so not found')\n")
    (broken / "pytorch.py").write_text("")
    metadata = tmp_path / "transformer_engine-2.10.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: transformer-engine\nVersion: 2.10.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    part = doctor.examine()["transformer-engine"]
    assert part.found == "2.10.0" and not part.usable
    assert "RuntimeError: libcudnn.so not found" in part.problem and "megatron-core fails with it" in part.problem
    (broken / "__init__.py").write_text("")
    assert doctor.examine()["transformer-engine"].usable


def test_nothing_that_is_looked_for_is_imported():
    heavy = ("torch", "transformers", "megatron", "math_verify", "pyarrow", "tensorboard")
    code = (
        "import sys; from nemo_disco.commands.doctor import examine; examine(); "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_engines_are_looked_for_where_their_configs_look():
    for name, path in doctor.ENGINE_PYTHONS.items():
        assert f"\npython: {path}" in (packaged("conf") / f"generation/{name}.yaml").read_text()
