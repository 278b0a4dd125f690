"""Recipes and DeepSpeed files that come with the package, by their paths in the repository."""

from pathlib import Path

FOLDERS = {"launchers/recipes": "recipes", "ds_configs": "ds_configs"}
"""Folders of the repository and their names inside the installed package (see setup.py)."""


def find_shipped_folder(folder: str) -> Path:
    """Find a folder of `FOLDERS`, by its path in the repository, on this machine.

    It is in the installed package, or else in the repository around it.
    """
    package = Path(__file__).resolve().parent
    installed = package / FOLDERS[folder]
    return installed if installed.is_dir() else package.parent / folder


def list_shipped_files() -> dict[str, Path]:
    """List all shipped files, sorted: path in the repository -> path on this machine."""
    return {
        f"{folder}/{path.relative_to(find_shipped_folder(folder)).as_posix()}": path
        for folder in FOLDERS
        for path in sorted(find_shipped_folder(folder).rglob("*"))
        if path.suffix in (".yaml", ".json", ".md")
    }
