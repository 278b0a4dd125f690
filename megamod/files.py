"""Durable files: written whole or not at all, on disk before they are named, with digests.

A kill -9 at any instant leaves either the old content or the new. Files of tensors are opened by
`write_tensors` of `megamod.states.weights` and `write_streamed_tensors` of `megamod.states.stream`,
inside a folder of `create_folder_atomically` or before a rename; logs and metrics grow in place.
"""

import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TEMPORARY_FILE = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


def build_temporary_path(path: Path) -> Path:
    """Build the path of a new hidden sibling of the file `path`, to write and then rename to it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def is_temporary_name(name: str) -> bool:
    """Return True for a name of `build_temporary_path`, which a killed process may have left."""
    return _TEMPORARY_FILE.fullmatch(name) is not None


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` by a temporary sibling, fsync, rename and fsync of the folder.

    An existing file is replaced as a whole. If that fails, it does not change.

    Raises:
        OSError: if the file cannot be written.
    """
    path = Path(path)
    temporary = build_temporary_path(path)
    data = content.encode() if isinstance(content, str) else content
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, see `format_json` and `write_atomic`."""
    write_atomic(path, format_json(value, indent=2) + "\n")


def format_json(value: object, indent: int | None = None) -> str:
    """Format a value as JSON text, with null for numbers that are not finite.

    JSON has no word for them, and other readers refuse Python's spelling (`Infinity`, `NaN`). Text
    that UTF-8 cannot hold, half of a surrogate pair, is escaped.

    Args:
        indent: blanks per level of nesting; None: all on one line.
    """
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        value = _replace_non_finite(value)
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent, allow_nan=False)
    return text


def _replace_non_finite(value: object) -> object:
    """Replace numbers that are not finite by None, in nested lists and dictionaries."""
    if isinstance(value, dict):
        return {key: _replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def create_folder_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder, which is renamed to `path` if the block succeeds.

    Before that its content is synced. If the block raises, the folder is removed. Missing parent
    folders are created, and stay.

    Raises:
        FileExistsError: if `path` exists already when the block ends.
        OSError: if a folder cannot be created, synced or renamed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            raise FileExistsError(f"{path} exists already")
        sync_tree(temporary)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def list_temporary_folders(path: Path) -> list[Path]:
    """List the siblings of `path` that killed processes left in `create_folder_atomically`."""
    pattern = re.compile(rf"\.tmp-{re.escape(path.name)}-[0-9a-f]{{8}}")
    return [left for left in path.parent.glob(".tmp-*") if pattern.fullmatch(left.name)]


def sync_file(path: Path) -> None:
    """Wait until the content of a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


sync_folder = sync_file  # the same call syncs the entries of a folder


def sync_tree(root: Path) -> None:
    """Sync every file and folder below `root`, and `root` itself."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            sync_file(Path(folder, name))
        sync_folder(Path(folder))


def hash_file(path: Path) -> str:
    """Compute the hexadecimal SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link_file(source: Path, target: Path) -> None:
    """Create `target` as a hard link to `source`, or as a copy where links are not possible.

    For files that are not changed in place. An existing `target` is overwritten by a copy. Raises
    OSError if `target` cannot be written.
    """
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
