"""Packaging: two import packages (megamod, megamod_kernels) from one repository."""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION_FILE = Path("megamod/version.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "(.+)"$', VERSION_FILE, re.M)[1]

CORE = [
    "torch>=2.10",
    "deepspeed>=0.19,<0.20",
    "transformers>=5.17,<6",
    "datasets>=5.2,<6",
    "peft>=0.21,<1",
    "sentencepiece>=0.2",
    "tensorboard>=2.20",
    "safetensors>=0.8",
    "protobuf>=5",
    "pydantic>=2.10",
    "numpy>=2.2",
    "scipy>=1.15",
    "scikit-learn>=1.6",
    "matplotlib>=3.10",
    "pyyaml>=6",
    "tqdm>=4.66",
    "psutil>=6",
    "pyarrow>=20",
    "zstandard>=0.23",
]
TRITON = ["triton>=3.6; platform_system == 'Linux'"]
COMPLETION = ["argcomplete>=3.5,<4"]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings[python]>=1,<2"]
SERVE = ["fastapi>=0.136,<1", "uvicorn>=0.40,<1", "prometheus_client>=0.22,<1"]
WANDB = ["wandb>=0.19,<1"]
EVAL = ["lm-eval>=0.4.13,<0.5", "accelerate>=1.15,<2"]
DEV = [
    "pytest>=9",
    "pytest-timeout>=2.4",
    "pytest-xdist>=3.8",
    "hypothesis>=6.150",
    "httpx>=0.28,<1",
    "selenium>=4.40,<5",
    "trl>=1.16,<2",
    "ruff>=0.14",
    "pre-commit>=4",
    "build>=1.2",
]
# Folders of recipes and DeepSpeed files as packages of data: megamod/shipped_files.py finds them.
FILES = {
    "megamod." + name + "".join(f".{part}" for part in path.relative_to(folder).parts): str(path)
    for folder, name in (("launchers/recipes", "recipes"), ("ds_configs", "ds_configs"))
    for path in (Path(folder), *Path(folder).rglob("*"))
    if path.is_dir()
}

setup(
    name="megamod",
    version=VERSION,
    description="Modular language models on DeepSpeed",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["megamod", "megamod.*"])
    + find_packages("kernels", include=["megamod_kernels*"])
    + list(FILES),
    package_dir={"megamod_kernels": "kernels/megamod_kernels", **FILES},
    package_data={
        "megamod.serving": ["page.html"],
        **{name: ["*.yaml", "*.json", "*.md"] for name in FILES},
    },
    entry_points={"console_scripts": ["megamod = megamod.__main__:run"]},
    install_requires=CORE,
    extras_require={
        "triton": TRITON,
        "eval": EVAL,
        "serve": SERVE,
        "wandb": WANDB,
        "completion": COMPLETION,
        "docs": DOCS,
        "dev": DEV + TRITON + EVAL + SERVE + COMPLETION + DOCS,
    },
)
