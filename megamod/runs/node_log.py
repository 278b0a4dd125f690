"""Logging of a run: on the console, and in OUT/logs/HOST.log for the first rank of each host."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megamod.dist.process import get_world_size, read_launcher_rank, set_rank_variables

LONGEST = 4000  # characters of a record; a traceback or a table of a large job is cut


def start_logging() -> None:
    """Set up logging on the console: rank 0 at INFO, other ranks and libraries at WARNING.

    Libraries warn on rank 0 alone; on other ranks they log errors. Progress bars of libraries are
    switched off (HF_HUB_DISABLE_PROGRESS_BARS) unless this is rank 0 on a terminal. RANK and its
    like are set first, by `set_rank_variables`, since the rank decides the levels.

    Raises:
        UserError: if variables of srun or mpirun contradict each other, see `set_rank_variables`.
    """
    set_rank_variables()
    logging.basicConfig(
        stream=sys.stderr, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"
    )
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:
            handler.addFilter(is_not_printed)
    first = read_launcher_rank() == 0
    logging.getLogger("megamod").setLevel(logging.INFO if first else logging.WARNING)
    for name in ("DeepSpeed", "deepspeed", "transformers"):
        logging.getLogger(name).setLevel(logging.WARNING if first else logging.ERROR)
    if not first or not sys.stderr.isatty():
        # Of transformers too; read when it is imported.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # DeepSpeed calls collectives by names that torch will retire; users cannot change that.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def is_not_printed(record: logging.LogRecord) -> bool:
    """Return False if a handler of the record's library, such as transformers, prints it already.

    Some of them hand their records on to the root as well.
    """
    logger = logging.getLogger(record.name)
    while logger.parent is not None:
        if any(type(handler) is logging.StreamHandler for handler in logger.handlers):
            return False
        logger = logger.parent
    return True


class NodeLog(logging.Handler):
    """Appends each record to a file in a single write, so that lines of two writers stay whole.

    Args:
        path: file, created if missing, otherwise continued; its folder exists.
    Raises:
        OSError: if it cannot be opened.
    """

    def __init__(self, path: Path):
        """Open the file for appending; see the class for the argument and errors."""
        super().__init__()
        self.path = path
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self.warned = False
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Append a record, cut to `LONGEST` characters.

        The first disk error is reported on the console, and none is raised.
        """
        text = self.format(record)
        if len(text) > LONGEST:
            text = text[:LONGEST] + " ..."
        try:
            os.write(self.file, f"{text}\n".encode())
        except OSError as error:  # the run goes on: the console shows the same lines
            if not self.warned:
                text = f"{self.path}: cannot be written: {error.strerror}"
                print(text, file=sys.stderr, flush=True)
            self.warned = True

    def append_line(self, text: str) -> None:
        """Append a line to the file alone, without showing it on the console."""
        self.emit(logging.LogRecord(__name__, logging.INFO, __file__, 0, text, None, None))

    def close(self) -> None:
        """Close the log file; the handler takes no further records."""
        os.close(self.file)
        super().close()


@contextmanager
def write_node_log(output: Path, table: str, step: int) -> Iterator[None]:
    """Append the log records of a run to OUT/logs/HOST.log for the time of the block.

    Every rank calls it; only the first rank of each host (LOCAL_RANK 0) writes: the start of the
    run, its lines of `logging`, and its end or the error that ended it, which is raised again. If
    the file cannot be written the run goes on without it.

    Args:
        output: OUT, folder of the run.
        table: ranks and groups, written after the line that says that the run begins.
        step: steps that were finished before the block.
    """
    local, rank = os.environ.get("LOCAL_RANK", "0"), os.environ.get("RANK", "0")
    log = _open_log_file(output / "logs" / f"{os.uname().nodename}.log") if local == "0" else None
    if log is None:
        yield
        return
    log.append_line(
        f"rank {rank} of {get_world_size()}, process {os.getpid()}, begins at step {step}\n{table}"
    )
    began = time.monotonic()
    root = logging.getLogger()
    root.addHandler(log)
    try:
        yield
        log.append_line(f"rank {rank} is done after {time.monotonic() - began:.0f} s")
    except BaseException as error:
        seconds = time.monotonic() - began
        log.append_line(f"rank {rank} ended after {seconds:.0f} s: {type(error).__name__}: {error}")
        raise
    finally:
        root.removeHandler(log)
        log.close()


def _open_log_file(path: Path) -> NodeLog | None:
    """Open a log file, whose folder is created if needed; None if that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return NodeLog(path)
    except OSError:
        return None
