"""Validate folders of checkpoints and models: their files against the manifest.

    step-N/manifest.json    {"files": {NAME: {"bytes": ..., "sha256": ...}}}, written last

`megamod.train.checkpoint` writes checkpoints, `megamod.states.checkpoint_folder` manifests; here
they are checked without DeepSpeed.
"""

import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from pydantic import Field, field_validator

from megamod.errors import UserError, shorten
from megamod.files import hash_file
from megamod.schemas import Schema, read_checked_file

logger = logging.getLogger(__name__)

MANIFEST, STATE = "manifest.json", "state.json"
FULL_CHECK_BYTES = 10**11  # above this, opening a checkpoint checks sizes only; `verify` checks all
_CHECKPOINT_NAME = re.compile("step-(0|[1-9][0-9]*)")
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


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints step-N in `folder` by rising step, valid or not."""
    folders = [
        path for path in Path(folder).glob("step-*") if _CHECKPOINT_NAME.fullmatch(path.name)
    ]
    return sorted(folders, key=lambda path: int(path.name[5:]))


def find_checkpoint(folder: Path, choice: str, below: int | None = None) -> Path | None:
    """Find the checkpoint that a value of `--resume` means; None: start from step 0.

    Digests are compared too, with "auto" those of checkpoints of at most `FULL_CHECK_BYTES`. Logs a
    warning for each newer checkpoint that is not valid.

    Args:
        folder: folder of the run's checkpoints.
        choice: "auto", the valid one with the largest step, if there are any; "none"; or the path
            of a checkpoint.
        below: "auto" considers checkpoints of smaller steps only; None: all.
    Raises:
        UserError: if `choice` is a path that is not a valid checkpoint; if it is "auto" and
            checkpoints exist but none is valid; if it is "none" and checkpoints exist.
    """
    if choice not in ("auto", "none"):
        path = Path(choice)
        faults = find_file_faults(path)
        if faults:
            raise UserError(f"--resume {choice}: not a valid checkpoint: {faults[0]}")
        return path
    existing = list_checkpoints(folder)
    if below is not None:
        existing = [path for path in existing if int(path.name[5:]) < below]
    if choice == "none":
        if existing:
            raise UserError(
                f"--resume none: {folder} holds checkpoints already ({existing[-1].name}); "
                "choose another --output_dir or resume"
            )
        return None
    faults: list[str] = []
    for path in reversed(existing):
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        faults = find_file_faults(path, check_digests=size <= FULL_CHECK_BYTES)
        if not faults:
            return path
        logger.warning("checkpoint %s is not valid (%s); trying the one before", path, faults[0])
    if existing:
        raise UserError(
            f"{folder}: none of {len(existing)} checkpoints is valid ({faults[0]}); "
            "remove the folder to start afresh"
        )
    return None


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
