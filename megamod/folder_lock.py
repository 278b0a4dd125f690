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
import re
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

logger = logging.getLogger(__name__)

BEAT = 10.0  # seconds
WATCH = 60.0  # seconds that a lock of another machine is watched for a sign of life
STALE = 120.0  # a lock of another machine that is this much older than a new file is not watched

_WITHOUT_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True)
class Holder:
    """Process that holds a folder.

    Attributes:
        machine: a boot of a kernel, and a name space of process numbers.
        started: start of the process in clock ticks since boot: numbers of processes are reused.
        since: for people.
        token: tells two locks of one process apart.
    """

    host: str
    machine: str
    pid: int
    started: int
    since: str
    token: str

    @classmethod
    def here(cls) -> "Holder":
        """Describe this process as a holder, with a new token."""
        return cls(
            os.uname().nodename,
            _machine(),
            os.getpid(),
            _start_of(os.getpid()) or 0,
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
        self.file, self.title = file, title
        self.holder = Holder.here()
        self._released = threading.Event()

    def acquire(self) -> None:
        """Create the lock file, in place of one whose holder is dead.

        Raises:
            UserError: if another process holds the folder, or the file cannot be created.
        """
        text = json.dumps(asdict(self.holder))
        try:
            while not _create(self.file, text):
                self._judge()
        except OSError as error:
            raise UserError(f"{self.title}: cannot be written: {error.strerror}") from error
        threading.Thread(target=self._beat, name=f"lock {self.file}", daemon=True).start()

    def release(self) -> None:
        """Delete the lock file if it is still that of this process."""
        self._released.set()
        if self.holder.pid == os.getpid() and _read(self.file) == self.holder:
            with suppress(OSError):
                self.file.unlink()

    def _judge(self) -> None:
        """Delete the lock file if its holder is dead.

        Raises:
            UserError: if the holder is alive.
        """
        holder = _read(self.file)
        if not self.file.exists():
            return
        if self._is_alive(holder):
            raise UserError(
                f"{self.title}: is in use by process {holder.pid} on {holder.host} since "
                f"{holder.since}; wait for its end or name another folder"
                if holder
                else f"{self.title}: is in use, by {self.file}"
            )
        _delete(self.file, holder)
        if holder is not None:
            logger.warning(
                "%s: the process %d on %s that held it is dead", self.title, holder.pid, holder.host
            )

    def _is_alive(self, holder: Holder | None) -> bool:
        """Return True if the holder runs: by its process on this machine, else by signs of life.

        A holder on another machine touches its file every few seconds, so this may take `WATCH`
        seconds.
        """
        if holder is not None and holder.machine == self.holder.machine:
            return _start_of(holder.pid) == holder.started
        first = _touched(self.file)
        if first is None or _now(self.file) - first > STALE:
            return False
        end = time.monotonic() + WATCH
        while time.monotonic() < end:
            time.sleep(1)
            touched = _touched(self.file)
            if touched != first:
                return touched is not None and _read(self.file) == holder
        return False

    def _beat(self) -> None:
        """Touch the file until it is released; end the process if somebody else took it."""
        while not self._released.wait(BEAT):
            holder = _read(self.file)
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


@contextmanager
def hold(folder: Path, title: str | None = None) -> Iterator[None]:
    """Hold a folder for the time of the block; inside another such block it does nothing.

    The folder is created if needed, and temporary files that killed processes left are deleted.

    Args:
        title: names the folder in messages; None: "--output_dir FOLDER".
    Raises:
        UserError: if another process holds it, or it cannot be written.
    """
    path, title = Path(folder).resolve(), title or f"--output_dir {folder}"
    if path in _held and _held[path].holder.pid == os.getpid():
        yield
        return
    missing = [part for part in (path, *path.parents) if not part.exists()]
    _make(path, title)
    try:
        with _locked(path / ".in_use", title) as _held[path]:
            for file in path.glob(".*.tmp"):
                if file.is_file() and re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", file.name):
                    file.unlink(missing_ok=True)
            try:
                yield
            finally:
                del _held[path]
    finally:
        for part in missing:  # a run that wrote nothing leaves no empty folder
            with suppress(OSError):
                part.rmdir()


@contextmanager
def hold_name(path: Path) -> Iterator[None]:
    """Hold the name of a folder that will appear complete, for the time of the block.

    Temporary siblings of `create_folder_atomically` that killed processes left are deleted.

    Raises:
        UserError: if another process holds it, or its parent cannot be written.
    """
    path, title = Path(path).absolute(), f"--output_dir {path}"
    _make(path.parent, title)
    with _locked(path.with_name(f".{path.name}.in_use"), title):
        for left in path.parent.glob(".tmp-*"):
            if re.fullmatch(rf"\.tmp-{re.escape(path.name)}-[0-9a-f]{{8}}", left.name):
                shutil.rmtree(left, ignore_errors=True)
        yield


@contextmanager
def _locked(file: Path, title: str) -> Iterator[FolderLock]:
    """Yield a lock, held for a `with` block and released too if the process ends at once."""
    lock = FolderLock(file, title)
    lock.acquire()
    EXIT_CALLS.append(lock.release)
    try:
        yield lock
    finally:
        lock.release()
        EXIT_CALLS.remove(lock.release)


def _make(folder: Path, title: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{title}: cannot be written: {error.strerror}") from error


def _create(file: Path, text: str) -> bool:
    """Create a file with its content in one step; False if it exists."""
    temporary = file.with_name(f"{file.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        try:
            os.link(temporary, file)
        except FileExistsError:
            return temporary.stat().st_nlink == 2  # NFS may report a link that it made
        except OSError as error:
            if error.errno not in _WITHOUT_LINKS:
                raise
            return _create_empty(file, text)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _create_empty(file: Path, text: str) -> bool:
    """Do as `_create`, where a file cannot have two names: it is empty for an instant."""
    try:
        with open(file, "x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        return False
    return True


def _delete(file: Path, holder: Holder | None) -> None:
    """Delete the lock file of a dead holder, and no other that took its place meanwhile."""
    aside = file.with_name(f"{file.name}.{secrets.token_hex(4)}.tmp")
    try:
        os.rename(file, aside)
    except FileNotFoundError:
        return
    if _read(aside) != holder:
        with suppress(OSError):
            os.link(aside, file)
    aside.unlink(missing_ok=True)


def _read(file: Path) -> Holder | None:
    """Read the holder in a lock file; None if there is none, or it is not readable."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return Holder(**{field.name: field.type(record[field.name]) for field in fields(Holder)})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _touched(file: Path) -> float | None:
    """Return the time of the last sign of life; opening the file makes NFS ask its server."""
    try:
        with open(file, "rb") as stream:
            return os.fstat(stream.fileno()).st_mtime
    except OSError:
        return None


def _now(file: Path) -> float:
    """Return the time of the file system, which need not be that of this machine."""
    temporary = file.with_name(f"{file.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch()
        return temporary.stat().st_mtime
    finally:
        temporary.unlink(missing_ok=True)


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _start_of(pid: int) -> int | None:
    """Return the start of a process in clock ticks since boot; None if it is not alive."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    words = text[text.rindex(")") + 2 :].split()  # the name of a program may hold blanks
    return None if words[0] in "ZX" else int(words[19])
