"""One process at a time writes an output folder: a lock file, seen over shared file systems.

    OUT/.in_use            of a folder that a run continues
    PARENT/.NAME.in_use    of a folder that appears complete, by one rename

The file names its holder by host, process and start time of the process, and the holder touches it
every `BEAT` seconds. On the same machine the holder is looked up. On another one it counts as dead
when the file was not touched for a while. A rank 0 holds the folder for all ranks of its job.
"""

import errno
import json
import logging
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megamod.errors import EXIT_CALLS, DistributedFailure, UserError
from megamod.files import is_temporary_name, list_temporary_folders

logger = logging.getLogger(__name__)

BEAT = 10.0  # seconds
WATCH = 60.0  # seconds that a lock of another machine is watched for a sign of life
STALE = 120.0  # a lock of another machine that is this much older than a new file is not watched

LOCK = ".in_use"

_WITHOUT_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""Errors of a file system that has no hard links."""


@dataclass(frozen=True)
class Holder:
    """Process that holds a folder.

    Attributes:
        host: name of the machine, for messages.
        machine: identifier of a boot of the kernel and of a name space of process numbers, in which
            `pid` is unique.
        pid: number of the process.
        started: start of the process in clock ticks since boot, because numbers of processes are
            reused.
        since: date and time of the lock, for messages.
        token: random text that differs between two locks of one process.
    """

    host: str
    machine: str
    pid: int
    started: int
    since: str
    token: str

    @classmethod
    def make_for_this_process(cls) -> "Holder":
        """Make the holder of a new lock by this process, with its start time and a random token."""
        return cls(
            os.uname().nodename,
            _read_machine_id(),
            os.getpid(),
            _read_process_start(os.getpid()) or 0,
            time.strftime("%Y-%m-%d %H:%M:%S"),
            secrets.token_hex(8),
        )


class FolderLock:
    """Lock file of a folder.

    Args:
        file: the lock file; its folder exists.
        title: names the folder in messages, such as "--output_dir OUT".
    """

    def __init__(self, file: Path, title: str):
        """Make the record of this process; the file is created by `acquire`."""
        self.file, self.title = file, title
        self.holder = Holder.make_for_this_process()
        self._released = threading.Event()

    def acquire(self) -> None:
        """Create the lock file, in place of one whose holder is dead, and start to touch it.

        A thread touches it until `release`. To find out if a holder on another machine is dead may
        take `WATCH` seconds.

        Raises:
            UserError: if another process holds the folder, or the file cannot be created.
        """
        text = json.dumps(asdict(self.holder))
        try:
            while not _create_lock_file(self.file, text):
                self._delete_if_dead()
        except OSError as error:
            raise UserError(f"{self.title}: cannot be written: {error.strerror}") from error
        self._delete_dead_temporaries()
        threading.Thread(
            target=self._touch_until_released, name=f"lock {self.file}", daemon=True
        ).start()

    def release(self) -> None:
        """Stop touching the lock file, and delete it unless another process has taken it over."""
        self._released.set()
        if self.holder.pid == os.getpid() and _read_holder(self.file) == self.holder:
            with suppress(OSError):
                self.file.unlink()

    def _delete_if_dead(self) -> None:
        """Delete the lock file if its holder is dead, with a warning.

        This may take `WATCH` seconds, see `_is_alive`.

        Raises:
            UserError: if the holder is alive.
        """
        holder = _read_holder(self.file)
        if not self.file.exists():
            return
        if self._is_alive(holder):
            raise UserError(
                f"{self.title}: is in use by process {holder.pid} on {holder.host} since "
                f"{holder.since}; wait for its end or name another folder"
                if holder
                else f"{self.title}: is in use, by {self.file}"
            )
        _delete_lock_file(self.file, holder)
        if holder is not None:
            logger.warning(
                "%s: the process %d on %s that held it is dead", self.title, holder.pid, holder.host
            )

    def _is_alive(self, holder: Holder | None) -> bool:
        """Return True if the holder runs: by its process on this machine, else by signs of life.

        A holder on another machine touches its file every `BEAT` seconds, so this may take `WATCH`
        seconds. None is a holder whose lock file is malformed, which is watched in the same way.
        """
        if holder is not None and holder.machine == self.holder.machine:
            return _read_process_start(holder.pid) == holder.started
        first = _read_touch_time(self.file)
        if first is None or _read_file_system_time(self.file) - first > STALE:
            return False
        end = time.monotonic() + WATCH
        while time.monotonic() < end:
            time.sleep(1)
            touched = _read_touch_time(self.file)
            if touched != first:
                return touched is not None and _read_holder(self.file) == holder
        return False

    def _delete_dead_temporaries(self) -> None:
        """Delete temporary siblings of the lock file that processes left that were killed.

        Those of processes that try to lock now are kept: they name a process that is alive, or are
        young.
        """
        for left in _list_lock_temporaries(self.file):
            holder, touched = _read_holder(left), _read_touch_time(left)
            if holder is not None and holder.machine == self.holder.machine:
                dead = _read_process_start(holder.pid) != holder.started
            else:
                dead = touched is not None and _read_file_system_time(self.file) - touched > STALE
            if dead:
                left.unlink(missing_ok=True)

    def _touch_until_released(self) -> None:
        """Touch the lock file every `BEAT` seconds until the lock is released.

        If another process has taken the lock file, print an error and end this process at once.
        """
        while not self._released.wait(BEAT):
            holder = _read_holder(self.file)
            if holder is not None and holder != self.holder and not self._released.is_set():
                print(
                    f"DistributedFailure: {self.title}: process {holder.pid} on {holder.host} took "
                    "it, because this process did not answer; nothing more is written",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(DistributedFailure.exit_code)
            with suppress(OSError):
                os.utime(self.file)


_held: dict[Path, FolderLock] = {}
"""Locks of `lock_folder` in this process, by resolved folder."""


@contextmanager
def lock_folder(folder: Path, title: str | None = None) -> Iterator[None]:
    """Lock a folder that a run continues for the time of the block, by `FOLDER/.in_use`.

    The folder is created if needed, and deleted afterwards if it is new and still empty. Temporary
    files that killed processes left in it, and in its subfolders that have no lock of their own,
    are deleted. If this process holds the folder already, nothing happens.

    Args:
        title: names the folder in messages; None: "--output_dir FOLDER".
    Raises:
        UserError: if another process holds it, or it cannot be written.
    """
    path, title = Path(folder).resolve(), title or f"--output_dir {folder}"
    if path in _held and _held[path].holder.pid == os.getpid():
        yield
        return
    with (
        _create_folder_for_block(path, title),
        _acquire_for_block(path / LOCK, title) as _held[path],
    ):
        delete_temporaries(path)
        try:
            yield
        finally:
            del _held[path]


def delete_temporaries(folder: Path) -> None:
    """Delete the files of `build_temporary_path` in a folder that this process holds, and below.

    Subfolders with a lock of their own are those of other runs, and left out.
    """
    for root, subfolders, files in os.walk(folder):
        if LOCK in files and Path(root) != folder:
            subfolders.clear()
            continue
        for name in files:
            if is_temporary_name(name) and not name.startswith(f"{LOCK}."):
                (Path(root) / name).unlink(missing_ok=True)


@contextmanager
def lock_folder_name(path: Path) -> Iterator[None]:
    """Lock the name of a folder that will appear complete, by `PARENT/.NAME.in_use`, for the block.

    The parent is created if needed, and deleted afterwards if it is new and still empty. Temporary
    siblings of `create_folder_atomically` that killed processes left are deleted.

    Raises:
        UserError: if another process holds it, or its parent cannot be written.
    """
    path, title = Path(path).absolute(), f"--output_dir {path}"
    with (
        _create_folder_for_block(path.parent, title),
        _acquire_for_block(path.with_name(f".{path.name}{LOCK}"), title),
    ):
        for left in list_temporary_folders(path):
            shutil.rmtree(left, ignore_errors=True)
        yield


def delete_leftovers(path: Path, *folders: Path) -> None:
    """Delete what a process left that was killed after the folder `path` was complete.

    That is its lock, temporary siblings, see `lock_folder_name`, and `folders`. Nothing happens
    without a lock, if its holder is alive or on another machine, or where nothing can be written.
    """
    path = Path(path).absolute()
    file = path.with_name(f".{path.name}{LOCK}")
    holders = [_read_holder(left) for left in (file, *_list_lock_temporaries(file))]
    if _read_machine_id() not in [holder.machine for holder in holders if holder is not None]:
        return
    with suppress(UserError), lock_folder_name(path):
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _acquire_for_block(file: Path, title: str) -> Iterator[FolderLock]:
    """Hold a `FolderLock` for the block.

    A rank that ends at once by an error releases it too, through `EXIT_CALLS`.

    Args:
        file: the lock file.
        title: names the folder in messages.
    Raises:
        UserError: if another process holds the lock, or the file cannot be created.
    """
    lock = FolderLock(file, title)
    lock.acquire()
    EXIT_CALLS.append(lock.release)
    try:
        yield lock
    finally:
        lock.release()
        EXIT_CALLS.remove(lock.release)


@contextmanager
def _create_folder_for_block(folder: Path, title: str) -> Iterator[None]:
    """Create a folder and its parents if needed; delete the new ones that are empty after the
    block.

    Args:
        title: names the folder in the message.
    Raises:
        UserError: if it cannot be created.
    """
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{title}: cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        for part in missing:
            with suppress(OSError):
                part.rmdir()


def _build_lock_temporary(file: Path) -> Path:
    """Build the path of a new temporary sibling of a lock file, whose name is hidden already."""
    return file.with_name(f"{file.name}.{secrets.token_hex(4)}.tmp")


def _list_lock_temporaries(file: Path) -> list[Path]:
    """List the temporary siblings of a lock file, which exist while it is created or deleted."""
    return [left for left in file.parent.glob(f"{file.name}.*.tmp") if is_temporary_name(left.name)]


def _create_lock_file(file: Path, text: str) -> bool:
    """Create a file with the content `text` in one step; return False if the file exists.

    The text is written to a temporary sibling, which is then linked to `file`, so that no other
    process sees an incomplete lock file. Raises OSError if it cannot be written.
    """
    temporary = _build_lock_temporary(file)
    try:
        temporary.write_text(text, encoding="utf-8")
        try:
            os.link(temporary, file)
        except FileExistsError:
            return temporary.stat().st_nlink == 2  # NFS may report a link that it made
        except OSError as error:
            if error.errno not in _WITHOUT_LINKS:
                raise
            return _create_without_link(file, text)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _create_without_link(file: Path, text: str) -> bool:
    """Create a file with the content `text` on a file system without hard links.

    The file is empty for an instant. Returns False if it exists already.
    """
    try:
        with open(file, "x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        return False
    return True


def _delete_lock_file(file: Path, holder: Holder | None) -> None:
    """Delete the lock file of a dead holder.

    Another process may have replaced it meanwhile: the file is renamed first and read again, and
    linked back if its holder is not the dead one.

    Args:
        file: the lock file.
        holder: the dead holder; None for a malformed lock file.
    """
    aside = _build_lock_temporary(file)
    try:
        os.rename(file, aside)
    except FileNotFoundError:
        return
    if _read_holder(aside) != holder:
        with suppress(OSError):
            os.link(aside, file)
    aside.unlink(missing_ok=True)


def _read_holder(file: Path) -> Holder | None:
    """Read the holder in a lock file; None if there is no such file, or it is malformed."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return Holder(**{field.name: field.type(record[field.name]) for field in fields(Holder)})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _read_touch_time(file: Path) -> float | None:
    """Read the time at which a file was last touched; None if it cannot be opened.

    It is opened because this makes NFS ask its server.
    """
    try:
        with open(file, "rb") as stream:
            return os.fstat(stream.fileno()).st_mtime
    except OSError:
        return None


def _read_file_system_time(file: Path) -> float:
    """Return the present time of the file system of `file`, by touching a temporary sibling.

    It need not be the time of this machine.
    """
    temporary = _build_lock_temporary(file)
    try:
        temporary.touch()
        return temporary.stat().st_mtime
    finally:
        temporary.unlink(missing_ok=True)


def _read_machine_id() -> str:
    """Return an identifier of this boot of the kernel and the name space of process numbers."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _read_process_start(pid: int) -> int | None:
    """Read the start of a process in clock ticks since boot; None if it is not alive."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    words = text[text.rindex(")") + 2 :].split()  # the name of a program may hold blanks
    # After the name come the state, Z and X for a process that has ended, and 18 other values.
    return None if words[0] in "ZX" else int(words[19])
