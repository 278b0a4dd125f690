"""Launchers in children of a warm process, which are killed or run out of disk at will.

The warm process has imported everything, so a launcher starts in a moment. A child can be killed,
or its disk fail, before its N-th call that changes the disk below its folder (a site): opening a
file to write, fsync, rename, link, unlink, mkdir.

    python tests/drills/warm.py     reads requests from standard input, one JSON object each
"""

import builtins
import errno
import io
import json
import os
import resource
import runpy
import select
import shutil
import signal
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
    """

    words: Sequence[str]
    folder: str
    site: int | None = None
    event: str = "kill"
    variables: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """End of a child.

    Attributes:
        code: exit code, `-signal`, or `HUNG`.
        text: what it printed.
        sites: calls that changed the disk, as far as it came.
    """

    code: int | str
    text: str
    sites: int

    @property
    def is_clean(self) -> bool:
        """True if it did not end by an error that nobody foresaw."""
        return self.code in (0, 2, 3, 130) and "Traceback" not in self.text


class Warm:
    """The warm process."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path[:1] + _paths())},
        )

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
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """End the warm process; its children end with it."""
        self.process.stdin.close()
        self.process.wait(30)


@contextmanager
def warm_process() -> Iterator[Warm]:
    """Yield a warm process that lives as long as the block."""
    warm = Warm()
    try:
        yield warm
    finally:
        warm.close()


def _paths() -> list[str]:
    return [str(REPOSITORY), str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH", "")]


def serve() -> None:
    """Answer requests until standard input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _import_everything()
    children: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if request.pop("do") == "start":
            pid = os.fork()
            if pid == 0:
                _be_child(Command(**request))
            children.add(pid)
            reply: object = pid
        else:
            reply = _wait(request["pid"], request["seconds"])
            children.discard(request["pid"])
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
    for pid in children:
        os.killpg(pid, signal.SIGKILL)


def _import_everything() -> None:
    import deepspeed  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import megamod.btm.branch
    import megamod.convert
    import megamod.data.corpus.binarize
    import megamod.merging.merge
    import megamod.runs.finetune.run
    import megamod.runs.pretrain.causal_lm
    import megamod.runs.pretrain.encoder_lm  # noqa: F401

    torch.set_num_threads(1)


def _wait(pid: int, seconds: float) -> tuple[int | str, str, int]:
    """Wait for a child; returns the fields of its `Outcome`."""
    descriptor = os.pidfd_open(pid)
    hung = not select.select([descriptor], [], [], seconds)[0]
    os.close(descriptor)
    if hung:
        os.killpg(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    output, count = _log_of(pid), _count_of(pid)
    text = output.read_text(errors="replace")
    sites = int.from_bytes(count.read_bytes(), "little") if count.exists() else 0
    for file in (output, count):
        file.unlink(missing_ok=True)
    return HUNG if hung else code, text, sites


def _log_of(pid: int) -> Path:
    return Path(tempfile.gettempdir()) / f"megamod-drill-{os.getuid()}-{pid}.log"


def _count_of(pid: int) -> Path:
    return _log_of(pid).with_suffix(".sites")


def _be_child(command: Command) -> None:
    """Run a command in this process, which ends with it."""
    os.setsid()
    log = os.open(_log_of(os.getpid()), os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    for number in (1, 2):
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
    counter = os.open(_count_of(parent), os.O_CREAT | os.O_WRONLY)

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
    serve()
