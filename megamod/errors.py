"""Errors that end a command, and their exit codes.

    0 ok | 2 user error | 3 stopped by policy | 4 distributed failure | 130 interrupted

Every command ends by `run_main(main)`: users read one sentence, and scripts one exit code. A fault
of the program itself has Python's traceback and exit code 1.
"""

import os
import re
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from reprlib import Repr

_LONGEST_REASON = 300  # characters of a library's error in a message
_LONGEST_VALUE = 120  # characters of a value in a message
_LONGEST_WORD = 500  # characters of a word in a message: more than paths usually have
_short = Repr()
_short.maxlevel, _short.maxstring, _short.maxother = 4, 80, 80


class UserError(ValueError):
    """Input the user can mend. The message names the value, its origin and what is allowed."""

    exit_code = 2


class PolicyStop(RuntimeError):
    """The run ended by its policy, such as that for losses that are not finite."""

    exit_code = 3


class DistributedFailure(RuntimeError):
    """Another rank died or stopped answering."""

    exit_code = 4


class PeerError(DistributedFailure):
    """Another rank left a `fail_together` block by an error; collectives work as before."""


class Interrupted(RuntimeError):
    """The run stopped at a signal, such as SIGTERM; the same command continues it."""

    exit_code = 130


@contextmanager
def report_damage(where: str) -> Iterator[None]:
    """Turn any exception of the block into a UserError.

    UserError, KeyboardInterrupt, SystemExit and GeneratorExit pass unchanged. For blocks in which a
    library reads files of others: a fault of the file is no fault of the program, and each library
    has its own kinds of errors for it.

    Args:
        where: beginning of the message: the file and the failed action, such as "FOLDER cannot be
            read as a model".
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # libraries in Rust panic with one that is no Exception
        kind, text = type(error).__name__, _shorten_reason(error)
        if kind == "UnpicklingError":  # its text recommends to run what the file names
            kind, text = (
                "",
                "its pickle names more than tensors, so it is refused and nothing was run",
            )
        plain = isinstance(error, (OSError, ValueError, RuntimeError)) and text
        raise UserError(f"{where}: {text if plain else f'{kind} {text}'.strip()}") from error


@contextmanager
def name_origin(origin: str) -> Iterator[None]:
    """Begin the message of a UserError of the block with `origin`, unless it names that already.

    Args:
        origin: document and place of a value that the block uses, such as a path that it names.
    """
    try:
        yield
    except UserError as error:
        if origin in str(error):
            raise
        raise UserError(f"{origin}: {error}") from error


def shorten(value: object) -> str:
    """Return the representation of a value, cut to a length that fits a message."""
    text = _short.repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _shorten_reason(error: BaseException) -> str:
    """Return the text of an error in one line, cut to a length that fits a message."""
    return " ".join(str(error).split())[:_LONGEST_REASON]


EXIT_CALLS: list[Callable[[], None]] = []
"""Functions to call before a rank ends at once, without unwinding; they need no other rank."""


LOSS_DESCRIBERS: list[Callable[[], str]] = []
"""Functions that name the ranks that are lost, for the message of a distributed failure."""


def run_main(main: Callable[[], None]) -> None:
    """Call `main`; if it raises an expected error, print one sentence and end the process.

    Expected are the errors of this module, Ctrl-C, errors that the user can mend
    (`is_user_fixable`) and lost ranks (`is_distributed_failure`), with the exit codes of the module
    docstring. If the reader of our output has closed the pipe, the process ends with exit code 141
    and no message, except where RANK is set: there BrokenPipeError is raised. Without an error the
    function returns; any other error is raised again. `--traceback` anywhere on the command line
    also prints the traceback of an expected error.
    """
    try:
        main()
        sys.stdout.flush()
    except (UserError, PolicyStop, DistributedFailure, Interrupted) as error:
        if "--traceback" in sys.argv:
            traceback.print_exc()
        _exit_with_message(format_expected_error(error), error.exit_code)
    except BrokenPipeError:
        if "RANK" in os.environ or not _is_stdout_closed():
            raise
        # Who reads our output, such as `head`, has read enough. Nothing may be flushed there now.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        _exit_with_message("Interrupted", Interrupted.exit_code)
    except Exception as error:
        lost = isinstance(error, RuntimeError) and is_distributed_failure(error)
        if not lost and not is_user_fixable(error):
            raise
        if "--traceback" in sys.argv:
            traceback.print_exc()
        if not lost:
            _exit_with_message(format_expected_error(error), UserError.exit_code)
        where = f"rank {os.environ.get('RANK', '0')} on {os.uname().nodename}"
        named = "".join(f"; {describe()}" for describe in LOSS_DESCRIBERS)
        message = f"DistributedFailure: {where} lost its peers{named}: {_shorten_reason(error)}"
        _exit_with_message(message, DistributedFailure.exit_code)


def format_expected_error(error: Exception) -> str:
    """Format the message of an error of this module or one that the user can mend.

    Words of more than `_LONGEST_WORD` characters, such as values of a damaged file, are cut.
    """
    kind, reason = type(error).__name__, _shorten_reason(error)
    if isinstance(error, (UserError, PolicyStop, DistributedFailure, Interrupted)):
        return re.sub(
            rf"\S{{{_LONGEST_WORD},}}", lambda word: f"{word[0][:100]}...", f"{kind}: {error}"
        )
    if not isinstance(error, OSError):
        return f"{kind}: not enough memory: {reason}"
    if not error.strerror:
        return f"{kind}: {reason}"
    # A write to an open file fails without the file's name.
    name = "" if error.filename is None else str(error.filename)
    short = name if len(name) < 200 else f"{name[:100]}..."
    return f"{kind}: {short}{short and ': '}{error.strerror}"


def is_distributed_failure(error: RuntimeError) -> bool:
    """Return True for an error of a collective that lost another rank (gloo, NCCL, store)."""
    from torch.distributed import DistBackendError, DistNetworkError, DistStoreError

    lost_peer_texts = (
        "Connection reset by peer",
        "Connection closed by peer",
        "gloo",
        "NCCL",
        "Timed out",
    )
    return isinstance(error, (DistBackendError, DistNetworkError, DistStoreError)) or any(
        sign in str(error) for sign in lost_peer_texts
    )


def is_user_fixable(error: Exception) -> bool:
    """Return True for errors that the user can mend: wrong input, a full disk, little memory.

    That is any UserError and OSError, and too little memory of the host or a GPU.
    """
    from torch import OutOfMemoryError

    kinds = (UserError, OSError, MemoryError, OutOfMemoryError)
    # torch reports too little memory of the host as a RuntimeError with this text.
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def _is_stdout_closed() -> bool:
    """Return True if standard output is a pipe whose reader has closed it."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _exit_with_message(message: str, exit_code: int) -> None:
    """Print a message to standard error and end the process with `exit_code`.

    A rank above 0 prints three seconds later. A rank of a process group (RANK is set) calls
    `EXIT_CALLS` and exits at once, without unwinding.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        # Most mistakes are seen by all ranks at once: leave time for rank 0 to say it alone and for
        # the launcher to end the others.
        time.sleep(3)
        message = f"rank {rank}: {message}"
    print(message, file=sys.stderr, flush=True)
    if "RANK" in os.environ:
        # Other ranks may be gone: the orderly shutdown of the process group could wait for them.
        for leave in EXIT_CALLS:
            leave()
        sys.stdout.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
