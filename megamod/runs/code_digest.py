"""Digest of the code that made a result: our sources and the versions of the main libraries."""

import hashlib
from importlib.util import find_spec
from pathlib import Path

import deepspeed
import torch
import transformers


def compute_code_digest() -> str:
    """Compute a SHA-256 of our sources, kernels included, and versions of the main libraries."""
    versions = (torch.__version__, deepspeed.__version__, transformers.__version__)
    digest = hashlib.sha256(" ".join(versions).encode())
    for name in ("megamod", "megamod_kernels"):
        package = Path(find_spec(name).origin).resolve().parent
        for path in sorted(package.rglob("*.py")):
            digest.update(str(path.relative_to(package)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
