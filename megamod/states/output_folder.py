"""New output folders, created atomically: complete or absent."""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from megamod.errors import UserError
from megamod.files import create_folder_atomically, sync_file
from megamod.folder_lock import delete_leftovers, lock_folder_name
from megamod.states.manifest import write_model_manifests


def check_new_folder(path: Path) -> None:
    """Check that `create_new_folder` can create the folder `path`.

    Nothing is written. Of a folder that is complete already the lock of a killed process is
    deleted. Messages name it as the value of --output_dir.

    Raises:
        UserError: if it exists and is not an empty folder, or lies where nothing can be written.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        delete_leftovers(path)
        raise UserError(f"--output_dir {path}: exists already; name a new or an empty folder")
    parent = _find_existing_parent(path)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(
            f"--output_dir {path}: cannot be written: {parent} is not a writable folder"
        )


def check_disk_space(output: Path, size: int) -> None:
    """Refuse to write `size` bytes on a disk that has fewer left.

    Args:
        output: folder to write; it need not exist.
    Raises:
        UserError: naming --output_dir and both numbers.
    """
    free = shutil.disk_usage(_find_existing_parent(Path(output))).free
    if free < size:
        raise UserError(
            f"--output_dir {output}: the weights need {size:,} bytes, and {free:,} are free"
        )


def _find_existing_parent(path: Path) -> Path:
    """Return the nearest folder above `path` that exists."""
    return next(folder for folder in path.absolute().parents if folder.exists())


@contextmanager
def create_new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to `path` if the block succeeds, else removed.

    An empty folder at `path` is replaced. Every model folder in it gets a manifest with the digests
    of its files.

    Raises:
        UserError: if `path` exists and is not an empty folder, cannot be written, or another
            process is writing it; also in place of an OSError of the block.
    """
    path = Path(path)
    check_new_folder(path)
    try:
        with lock_folder_name(path), create_folder_atomically(path) as folder:
            yield folder
            files = [file for file in folder.rglob("*") if file.is_file()]
            with ThreadPoolExecutor(1) as pool:  # the disk writes while the processor hashes
                synced = [pool.submit(sync_file, file) for file in files]
                write_model_manifests(folder)
            for result in synced:
                result.result()
            if path.exists():
                path.rmdir()
    except OSError as error:
        raise UserError(f"--output_dir {path}: cannot be written: {error}") from error
