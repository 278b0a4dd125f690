"""Launchers in children of a warm process, which are killed or run out of disk at will.

The warm process has imported everything, so a launcher starts in a moment. A child can be killed,
or its disk fail, before its N-th call that changes the disk below its folder (a site): opening a
file to write, fsync, rename, link, unlink, mkdir.

    python tests/drills/warm.py SOCKET     serves connections until standard input ends

Workers of pytest share one warm process. It forks a session for every connection, which reads
requests, one JSON object a line.
"""

import builtins
import errno
import fcntl
import importlib
import io
import json
import os
import pkgutil
import resource
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHERS = REPOSITORY / "launchers"
KILLED = -signal.SIGKILL
HUNG = "hung"
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
MEMORY = 6 * 2**30  # bytes of address space that a child may add
SITES = (
    *((os, name) for name in ("fsync", "replace", "rename", "link", "unlink", "mkdir", "rmdir")),
    (shutil, "rmtree"),
    (builtins, "open"),
    (io, "open"),
)


@dataclass(frozen=True)
class Command:
    """A launcher's command line.

    Attributes:
        words: the launcher's name and its arguments.
        folder: working directory.
        site: number of the call before which something happens, from 0; None: nothing does.
        event: "kill", "stop" (by SIGSTOP), "exit" or "error" (that nobody foresees); "full" or
            "read-only": this call and all later ones fail.
        variables: added to the environment.
        separate: whether standard error is apart from standard output.
    """

    words: Sequence[str]
    folder: str
    site: int | None = None
    event: str = "kill"
    variables: dict[str, str] = field(default_factory=dict)
    separate: bool = False


@dataclass(frozen=True)
class Outcome:
    """End of a child.

    Attributes:
        code: exit code, `-signal`, or `HUNG`.
        text: what it printed.
        sites: calls that changed the disk, as far as it came.
        errors: what it printed on standard error, if that is separate.
    """

    code: int | str
    text: str
    sites: int
    errors: str = ""

    @property
    def is_clean(self) -> bool:
        """True if it did not end by an error that nobody foresaw."""
        return self.code in (0, 2, 3, 130) and "Traceback" not in self.text


class Warm:
    """A session of the warm process."""

    def __init__(self, connection: socket.socket):
        self._stream = connection.makefile("rw")
        connection.close()  # the stream keeps it open

    def close(self) -> None:
        """End the session; its children end with it."""
        self._stream.close()

    def start(self, command: Command) -> int:
        """Start a child; returns its process number."""
        return self._ask({"do": "start", **asdict(command)})

    def wait(self, pid: int, seconds: float = 60) -> Outcome:
        """Wait for the end of a child; kill it if it takes longer."""
        return Outcome(*self._ask({"do": "wait", "pid": pid, "seconds": seconds}))

    @staticmethod
    def kill(pid: int) -> None:
        """Kill a child and its children."""
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)

    def run(self, command: Command, seconds: float = 120) -> Outcome:
        """Start a child and wait for its end."""
        return self.wait(self.start(command), seconds)

    def _ask(self, request: dict[str, object]) -> object:
        self._stream.write(json.dumps(request) + "\n")
        self._stream.flush()
        return json.loads(self._stream.readline())


@contextmanager
def open_session(folder: Path) -> Iterator[Warm]:
    """Yield a session of the warm process of a folder, which is started if there is none.

    Args:
        folder: exists and is one for all workers.
    """
    address = str(folder / "warm.socket")
    process, connection = None, socket.socket(socket.AF_UNIX)
    with hold(folder / "warm.lock"):
        try:
            connection.connect(address)
        except OSError:
            Path(address).unlink(missing_ok=True)  # of a process that has ended
            process = _start_warm_process(address)
            connection.connect(address)
    session = Warm(connection)
    try:
        yield session
    finally:
        session.close()
        if process is not None:  # it goes on for the sessions of other workers
            process.stdin.close()


@contextmanager
def hold(lock: Path) -> Iterator[None]:
    """Hold a lock that all workers share."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _start_warm_process(address: str) -> subprocess.Popen:
    """Start a warm process; return when it listens at `address`."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__, address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path[:1] + _paths())},
    )
    assert process.stdout.readline(), "the warm process has ended"
    return process


def _paths() -> list[str]:
    return [str(REPOSITORY), str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH", "")]


def serve(address: str) -> None:
    """Fork a session for every connection to a socket, until standard input ends."""
    _import_everything()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for sessions
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        os.dup2(2, 1)  # from here on, what children print
        while sys.stdin.fileno() not in (ready := select.select([listener, 0], [], [])[0]):
            connection, _ = ready[0].accept()
            with connection:
                if os.fork() == 0:
                    listener.close()
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    _serve_session(connection)
                    os._exit(0)


def _serve_session(connection: socket.socket) -> None:
    """Answer the requests of a connection until it is closed; its children end then."""
    children: set[int] = set()
    with connection.makefile("rw") as stream:
        for line in stream:
            request = json.loads(line)
            if request.pop("do") == "start":
                pid = os.fork()
                if pid == 0:
                    connection.close()
                    _be_child(Command(**request))
                children.add(pid)
                reply: object = pid
            else:
                reply = _wait(request["pid"], request["seconds"])
                children.discard(request["pid"])
            stream.write(json.dumps(reply) + "\n")
            stream.flush()
    for pid in children:
        os.killpg(pid, signal.SIGKILL)


def _import_everything() -> None:
    import deepspeed  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import megamod.btm.branch
    import megamod.commands
    import megamod.convert
    import megamod.data.corpus.binarize
    import megamod.merging.merge
    import megamod.runs.finetune.run
    import megamod.runs.pretrain.causal_lm
    import megamod.runs.pretrain.encoder_lm

    for module in pkgutil.iter_modules(megamod.commands.__path__):
        importlib.import_module(f"megamod.commands.{module.name}")

    torch.set_num_threads(1)


def _wait(pid: int, seconds: float) -> tuple[int | str, str, int, str]:
    """Wait for a child; returns the fields of its `Outcome`."""
    descriptor = os.pidfd_open(pid)
    hung = not select.select([descriptor], [], [], seconds)[0]
    os.close(descriptor)
    if hung:
        os.killpg(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    sites, text, errors = (file.read_bytes() if file.exists() else b"" for file in _files_of(pid))
    for file in _files_of(pid):
        file.unlink(missing_ok=True)
    texts = [part.decode(errors="replace") for part in (text, errors)]
    return HUNG if hung else code, texts[0], int.from_bytes(sites, "little"), texts[1]


def _files_of(pid: int) -> list[Path]:
    """Files of a child: the number of its sites, standard output and standard error."""
    name = f"megamod-drill-{os.getuid()}-{pid}"
    return [Path(tempfile.gettempdir()) / f"{name}.{kind}" for kind in ("sites", "out", "err")]


def _be_child(command: Command) -> None:
    """Run a command in this process, which ends with it."""
    os.setsid()
    for number, file in enumerate(_files_of(os.getpid())[1:], 1):
        if number == 1 or command.separate:
            log = os.open(file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(log, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin, sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(number, mode, closefd=False), write_through=True)
        for number, mode in ((0, "r"), (1, "w"), (2, "w"))
    )
    code = 70
    try:
        os.chdir(command.folder)
        os.environ |= command.variables
        size = resource.getrlimit(resource.RLIMIT_AS)[1]
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, size))
        name, *words = command.words
        program = str(LAUNCHERS / f"{name}.py")
        sys.argv = [program, *words]
        _watch_sites(Path(command.folder).resolve(), command.site, command.event)
        runpy.run_path(program, run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        os._exit(code)


def _watch_sites(folder: Path, site: int | None, event: str) -> None:
    """Count the calls that change the disk below a folder; do something before one of them."""
    prefix, parent, count = f"{folder}{os.sep}", os.getpid(), [0]
    numbers = {"full": errno.ENOSPC, "read-only": errno.EROFS}
    counter = os.open(_files_of(parent)[0], os.O_CREAT | os.O_WRONLY)

    def pass_site() -> None:
        number, count[0] = count[0], count[0] + 1
        os.pwrite(counter, count[0].to_bytes(8, "little"), 0)
        if site is None or number < site:
            return
        if event in _SIGNALS and number == site:
            os.kill(parent, _SIGNALS[event])
            time.sleep(60)
        if event == "exit":
            os._exit(7)
        if event == "error":
            raise RuntimeError("an error that nobody foresees")
        raise OSError(numbers[event], os.strerror(numbers[event]))

    def guard(name: str, original):
        def call(*arguments, **options):
            if _changes_disk(name, arguments, options, prefix):
                pass_site()
            return original(*arguments, **options)

        return call

    for owner, name in SITES:
        setattr(owner, name, guard(name, getattr(owner, name)))


def _changes_disk(name: str, arguments: tuple, options: dict, prefix: str) -> bool:
    """True if a call may change something below the folder `prefix`."""
    target = arguments[0] if arguments else options.get("file", options.get("path"))
    if name == "open":
        mode = arguments[1] if len(arguments) > 1 else options.get("mode", "r")
        if not set(str(mode)) & set("wax+"):
            return False
    if name == "rmtree" and options.get("ignore_errors"):
        return False
    if name == "fsync":
        try:
            target = os.readlink(f"/proc/self/fd/{target}")
        except OSError:
            return False
    if not isinstance(target, (str, os.PathLike)):
        return False
    return os.path.abspath(os.fspath(target)).startswith(prefix)


if __name__ == "__main__":
    serve(sys.argv[1])
