"""Folders that hold a model, whole or an adapter. Importing this needs no torch."""

from pathlib import Path

from megamod.states.adapter import is_adapter


def is_model_folder(folder: Path) -> bool:
    """Return True for a folder with config.json, as a whole model has, and for an adapter's folder.

    Weights are not looked for. The folder of a forest.json, whose config.json is that of a forest,
    counts too.
    """
    return (folder / "config.json").is_file() or is_adapter(folder)


def list_model_folders(folder: Path) -> list[Path]:
    """List the subfolders that hold a model, whole or an adapter, in alphabetical order."""
    return sorted(path for path in folder.glob("*") if path.is_dir() and is_model_folder(path))
