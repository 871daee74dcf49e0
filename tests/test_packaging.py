"""The package, built as an sdist and then as a wheel, is complete and works when installed in a new environment."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.metadata import Metadata

import nemo_disco

REPOSITORY = Path(__file__).resolve().parent.parent
INSTALLED = {"nemo_disco": "nemo_disco", "conf": "nemo_disco/conf", "assets": "nemo_disco/assets",
             "tools/convert": "nemo_disco/convert"}  # fmt: skip
# Only git and CI use these; the sdist has every other file.
OMITTED = (".ci/", ".gitignore")
# Files of the sdist that the build writes.
GENERATED = {"PKG-INFO", "setup.cfg"}
BUILD = "import sys, setuptools.build_meta as b; [getattr(b, 'build_' + kind)('dist') for kind in sys.argv[1:]]"


def run(*command, cwd):
    """The stdout of a command, run without PYTHONPATH; fails if the command does."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def files():
    """The paths of the repository's files: those in git and new ones that git does not ignore."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("git lists the files to compare with, and this is no checkout")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=REPOSITORY)
    return {name for name in listed.split("\0") if name and (REPOSITORY / name).is_file()}


@pytest.fixture(scope="module")
def sources(files, tmp_path_factory):
    """A copy of the repository (the build must not write into the working tree), with its wheel and sdist in dist/."""
    directory = tmp_path_factory.mktemp("sources")
    for name in files:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, directory / name)
    run(sys.executable, "-c", BUILD, "wheel", "sdist", cwd=directory)
    return directory


@pytest.fixture(scope="module")
def unpacked(sources, tmp_path_factory):
    """The unpacked sdist, with the wheel that is built from it in dist/."""
    directory = tmp_path_factory.mktemp("sdist")
    [archive] = (sources / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(directory, filter="data")
    [root] = directory.iterdir()
    assert root.name == archive.name.removesuffix(".tar.gz") == f"nemo_disco-{nemo_disco.__version__}"
    run(sys.executable, "-c", BUILD, "wheel", cwd=root)
    return root


@pytest.fixture(scope="module")
def wheel(unpacked):
    """The wheel that is built from the sdist."""
    [file] = (unpacked / "dist").glob("*.whl")
    return file


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


def test_the_sdist_has_every_file_of_the_repository(files, unpacked):
    inside = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    inside = {name for name in inside if not name.startswith(("dist/", "build/", "nemo_disco.egg-info/"))}
    assert inside - GENERATED == {name for name in files if not name.startswith(OMITTED)}


def test_the_sdist_and_the_repository_give_the_same_wheel(sources, wheel):
    [direct] = (sources / "dist").glob("*.whl")
    with zipfile.ZipFile(direct) as from_repository, zipfile.ZipFile(wheel) as from_sdist:
        names = from_repository.namelist()
        assert sorted(names) == sorted(from_sdist.namelist())
        assert [name for name in names if from_repository.read(name) != from_sdist.read(name)] == []


def test_the_wheel_has_every_file_of_the_repository_that_is_needed(files, wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    for source, target in INSTALLED.items():
        expected = {target + name.removeprefix(source) for name in files if name.startswith(f"{source}/")}
        assert expected and expected <= inside, f"the wheel lacks {sorted(expected - inside)}"
    assert {name.split("/")[0] for name in inside} == {"nemo_disco", f"nemo_disco-{nemo_disco.__version__}.dist-info"}


def test_the_metadata_is_valid_and_the_same_in_sdist_and_wheel(unpacked, wheel):
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        text = archive.read(name)
        license_text = archive.read(name.replace("METADATA", "licenses/LICENSE"))
    assert (unpacked / "PKG-INFO").read_bytes() == text
    metadata = Metadata.from_email(text, validate=True)
    assert metadata.license_expression == "Apache-2.0" and metadata.license_files == ["LICENSE"]
    assert license_text == (REPOSITORY / "LICENSE").read_bytes() and b"Version 2.0, January 2004" in license_text
    assert metadata.description.strip() == (REPOSITORY / "README.md").read_text().strip()
    assert metadata.description_content_type.startswith("text/markdown")
    assert metadata.summary and metadata.keywords and metadata.classifiers and metadata.author
    assert "3.11" in metadata.requires_python and "3.10" not in metadata.requires_python


def test_changelog_and_citation_are_of_this_version():
    heading = re.search(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading.group(1) == nemo_disco.__version__
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == nemo_disco.__version__ and citation["license"] == "Apache-2.0"
    for paper in citation["references"]:
        assert paper["url"].rpartition("/")[2] in paper["identifiers"][0]["value"]


def test_the_quickstart_is_planned_in_an_empty_directory(installed, tmp_path):
    imported = run(installed / "python", "-c", "import nemo_disco; print(nemo_disco.__file__)", cwd=tmp_path)
    assert Path(imported.strip()).is_relative_to(installed.parent)
    text = run(installed / "nemo-disco", "plan", "--config-name", "quickstart", cwd=tmp_path)
    assert "mini-batches per step" in text and "optimizer state" in text
    assert "mini-batches per step" in run(installed / "nemo-disco", "plan", "-cn", "recipe/disco_logl_7b", cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command_the_module_and_the_converters_are_installed(installed, tmp_path):
    assert run(installed / "nemo-disco", "--version", cwd=tmp_path) == run(
        installed / "python", "-m", "nemo_disco", "--version", cwd=tmp_path
    )
    run(installed / "python", "-c", "import nemo_disco.convert", cwd=tmp_path)
