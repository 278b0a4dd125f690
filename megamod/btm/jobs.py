"""Processes of jobs: started on their slots, found again, asked to stop, cleared away.

A job holds a lock file through a descriptor that it inherits, so that whoever holds it is alive:
the driver that started it may have been killed, and the next one waits instead of starting it a
second time. All processes of a job carry its name in their environment, by which those that outlive
their launcher are found.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from megamod.btm.placement import Place, gpus_here, include, is_here
from megamod.btm.tasks import Stage

MARK = "BTM_JOB"
TAIL_BYTES = 20_000


def take(lock: Path) -> int | None:
    """Take the lock of a job; returns its descriptor, None if the job runs."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def command_of(
    stage: Stage, place: Place, launchers: Path, hostfile: str | None, port: int
) -> tuple[list[str], dict[str, str]]:
    """The command of a stage on its slots, and the variables that it needs.

    One slot of this machine needs no launcher; else it is DeepSpeed's.
    """
    program = [str(launchers / stage.launcher), *stage.arguments]
    gpus = sum(len(host.slots) for host in place)
    if not stage.ranks or (hostfile is None and gpus == 1):
        # Where a job's slots are elsewhere, the GPUs of this machine belong to other jobs.
        slots = ",".join(map(str, place[0].slots)) if is_here(place[0]) else ""
        return [sys.executable, *program], {"CUDA_VISIBLE_DEVICES": slots} if gpus_here() else {}
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(port)]
    if hostfile is not None:
        command += ["--hostfile", hostfile, "--include", include(place)]
        if len(place) == 1 and not is_here(place[0]):
            # Else DeepSpeed would start the job of one machine here, whatever its name.
            command.append("--force_multi")
    elif gpus_here():
        command += ["--include", include(place)]
    else:
        command += ["--num_accelerators", str(gpus)]
    return command + program, {}


def start(
    command: Sequence[str], variables: dict[str, str], lock: int, mark: str, log: Path
) -> subprocess.Popen[bytes]:
    """Start a program that holds `lock`, which is closed here, in a session of its own."""
    # What a variable MEGAMOD_<FLAG> says is in the flags by now, and some are not for this program.
    kept = {name: text for name, text in os.environ.items() if not name.startswith("MEGAMOD_")}
    try:
        with open(log, "ab") as output:
            output.write(f"$ {' '.join(command)}\n".encode())
            output.flush()
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**kept, **variables, MARK: mark},
                pass_fds=(lock,),
                start_new_session=True,
            )
    finally:
        os.close(lock)


def processes_of(mark: str) -> Iterator[psutil.Process]:
    """All processes of a job on this machine."""
    for process in psutil.process_iter():
        # Other people's processes do not show their environment, and any may end meanwhile.
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark:
                yield process


def ask_to_stop(mark: str) -> None:
    """SIGTERM to the ranks of a job, which then write a checkpoint.

    Their launcher is left alone: it would kill ranks that take longer than it likes. It gets the
    signal where all ranks are on other machines.
    """
    found = {process.pid: process for process in processes_of(mark)}
    launchers = {pid for pid, process in found.items() if _is_launcher(process)}
    # A rank's own children read data for it until it is done.
    others = found.keys() - launchers
    ranks = [pid for pid in others if _parent(found[pid]) not in others]
    for pid in ranks or launchers:
        with contextlib.suppress(psutil.Error):
            found[pid].send_signal(signal.SIGTERM)


def clear(mark: str) -> None:
    """Kill what is left of a job."""
    for process in processes_of(mark):
        with contextlib.suppress(psutil.Error):
            process.kill()


def tail(log: Path, begin: int, lines: int = 12) -> str:
    """Last lines that a program wrote to its log after position `begin`."""
    with open(log, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(begin, size - TAIL_BYTES))
        text = file.read().decode(errors="replace")
    kept = [line for line in text.splitlines() if line.strip()]
    return "\n".join(kept[-lines:])


def _is_launcher(process: psutil.Process) -> bool:
    try:
        return any("deepspeed.launcher" in word for word in process.cmdline())
    except psutil.Error:
        return False


def _parent(process: psutil.Process) -> int:
    try:
        return process.ppid()
    except psutil.Error:
        return 0
