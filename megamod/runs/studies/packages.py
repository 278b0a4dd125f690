"""Folders inside installed Python packages, which bring model weights or tokenizers."""

import importlib.util
from pathlib import Path

from megamod.errors import UserError

PACKAGE = "package:"
"""Prefix of a path inside an installed package, as in `package:NAME/FOLDER`."""


def resolve_package_path(text: str) -> str:
    """Return the folder that `package:NAME/FOLDER` names; any other text is returned unchanged.

    Raises:
        UserError: if the package is not installed or has no such folder.
    """
    if not text.startswith(PACKAGE):
        return text
    name, _, inside = text.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pip = name.replace("_", "-")
        raise UserError(f"{text}: the Python package {name} is not installed; pip install {pip}")
    folder = Path(spec.origin).parent / inside
    if not folder.is_dir():
        raise UserError(f"{text}: there is no folder {inside} in the package {name}")
    return str(folder)
