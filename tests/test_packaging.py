"""What pip installs works in an empty directory: sources -> sdist -> wheel -> a fresh environment."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = ("nemo_disco", "conf", "assets", "tools", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md")
INSTALLED = {"nemo_disco": "nemo_disco", "conf": "nemo_disco/conf", "assets": "nemo_disco/assets",
             "tools/convert": "nemo_disco/convert"}  # fmt: skip


def run(*command, cwd):
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing is left in the working tree."""
    place = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, place / name)
    run(sys.executable, "-c", "import setuptools.build_meta as b; b.build_sdist('dist')", cwd=place)
    [archive] = (place / "dist").glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", place / "wheels")
    run(*pip, archive, cwd=place)
    [built] = (place / "wheels").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The bin directory of a new environment with the wheel; its dependencies are this environment's."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment)
    [site] = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel, cwd=environment)
    return environment / "bin"


def test_the_wheel_has_every_file_of_the_repository_that_is_needed(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    for source, target in INSTALLED.items():
        files = [f.relative_to(REPOSITORY / source) for f in (REPOSITORY / source).rglob("*") if f.is_file()]
        wanted = {f"{target}/{f}" for f in files if "__pycache__" not in f.parts}
        assert wanted and wanted <= inside, sorted(wanted - inside)
    assert not [name for name in inside if name.startswith(("tests/", "conf/", "tools/"))]


def test_the_quickstart_is_planned_in_an_empty_directory(installed, tmp_path):
    where = run(installed / "python", "-c", "import nemo_disco; print(nemo_disco.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    text = run(installed / "nemo-disco", "plan", "--config-name", "quickstart", cwd=tmp_path)
    assert "mini-batches a step" in text and "optimizer state" in text
    assert "mini-batches a step" in run(installed / "nemo-disco", "plan", "-cn", "recipe/disco_logl_7b", cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_both_ways_to_call_it_and_the_converters_are_there(installed, tmp_path):
    assert run(installed / "nemo-disco", "--version", cwd=tmp_path) == run(
        installed / "python", "-m", "nemo_disco", "--version", cwd=tmp_path
    )
    run(installed / "python", "-c", "import nemo_disco.convert", cwd=tmp_path)
