"""Folders of runs that several cells of a study share, written by one process at a time."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def wait_for_folder_lock(folder: Path) -> Iterator[None]:
    """Hold a lock file beside `folder` for the block, so that one process at a time writes it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
