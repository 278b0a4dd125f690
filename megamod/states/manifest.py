"""Manifests of checkpoint and model folders: written, and compared with the files.

    step-N/manifest.json    {"files": {NAME: {"bytes": ..., "sha256": ...}}}, written last

Importing this needs no torch.
"""

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from pydantic import Field, field_validator

from megamod.errors import UserError, shorten
from megamod.files import hash_file, write_json
from megamod.schemas import Schema, read_checked_file
from megamod.states.weight_files import ADAPTER_CONFIG

MANIFEST, STATE = "manifest.json", "state.json"
THREADS = 8  # that compute digests; they wait for the disk, not for each other


class _FileEntry(Schema):
    """Schema of a file's entry: its size and digest."""

    bytes: int
    sha256: str


class _Manifest(Schema):
    """Schema of manifest.json: entries by path in the folder."""

    files: dict[str, _FileEntry] = Field(min_length=1)

    @field_validator("files")
    @classmethod
    def _check_names(cls, files: dict[str, _FileEntry]) -> dict[str, _FileEntry]:
        """Return the entries. Raise ValueError for a name that is no path below the folder."""
        for name in files:
            path = PurePosixPath(name)
            if str(path) != name or path.is_absolute() or ".." in path.parts or "\0" in name:
                raise ValueError(f"{shorten(name)} is not the path of a file below the folder")
        return files


def find_file_faults(path: Path, check_digests: bool = True) -> list[str]:
    """List the faults of the files in a checkpoint or model folder, against its manifest.

    A folder without a manifest has this one fault. Of the files that the manifest does not list,
    weights, optimizer states and state.json are faults: without a digest nobody may read them.

    Args:
        path: the folder.
        check_digests: compare SHA-256 digests too, not only names and sizes.
    Returns:
        one sentence per missing or changed file; empty if all are as they were written.
    """
    file = path / MANIFEST
    if not file.exists():
        return [f"{file} is missing"]
    try:
        listed = read_checked_file(file, _Manifest).files
    except UserError as error:
        return [str(error)]

    unlisted = [
        f"{file} is not in {MANIFEST}, so it has no digest"
        for file in sorted(path.rglob("*"))
        if (file.suffix == ".safetensors" or file.name == STATE)
        and str(file.relative_to(path)) not in listed
        and (file.parent == path or not (file.parent / MANIFEST).exists())
    ]

    def find_fault(name: str) -> str | None:
        """Describe the first fault of the file `name`, listed in the manifest; None without one."""
        file, size, digest = path / name, listed[name].bytes, listed[name].sha256
        if not os.path.isfile(file):  # False for a name that is too long
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size} bytes, not {size}"
        if check_digests and hash_file(file) != digest:
            return f"{file} does not have the SHA-256 digest of its manifest"
        return None

    with ThreadPoolExecutor(THREADS) as pool:
        return [text for text in pool.map(find_fault, listed) if text is not None] + unlisted


def make_digest_entry(file: Path, digest: str | None = None) -> dict[str, object]:
    """Make the entry of a file in the manifest: its size in bytes and its SHA-256.

    Args:
        digest: the SHA-256, if it is known; None: computed from the file.
    """
    return {"bytes": file.stat().st_size, "sha256": digest or hash_file(file)}


def write_manifest(folder: Path, entries: Mapping[str, Mapping[str, object]]) -> None:
    """Write manifest.json into the folder of a checkpoint or model, atomically.

    Args:
        entries: by path below `folder`, see `make_digest_entry`.
    """
    write_json(folder / MANIFEST, {"files": dict(sorted(entries.items()))})


def make_digest_entries(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, object]]:
    """Make the manifest entries of files in a folder, by relative path."""
    return {str(file.relative_to(folder)): make_digest_entry(file) for file in files}


def write_model_manifests(folder: Path) -> None:
    """Write a manifest into every model folder at or below `folder`, replacing those that exist.

    It lists all files of the folder but adapter_config.json, where a user may have to change the
    path of the seed.
    """
    names = ("config.json", ADAPTER_CONFIG)
    for model in sorted({config.parent for name in names for config in folder.rglob(name)}):
        skipped_names = (MANIFEST, ADAPTER_CONFIG)
        files = (f for f in model.iterdir() if f.is_file() and f.name not in skipped_names)
        write_manifest(model, make_digest_entries(model, files))
