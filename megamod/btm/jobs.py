"""Processes of jobs: start, search, stop and kill.

A job holds a lock file through an inherited descriptor, so a held lock means that the job is alive.
If the driver that started it was killed, the next driver waits instead of starting it twice. All
processes of a job have its mark in their environment, so those that outlive their launcher can be
searched for.
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

from megamod.btm.placement import format_include, is_local_host, list_local_gpus
from megamod.btm.tasks import Stage
from megamod.dist.hostfile import HostSlots

MARK = "BTM_JOB"  # environment variable that holds the mark of a job
TAIL_BYTES = 20_000  # of a log, at most, for a message


def acquire_lock(lock_path: Path) -> int | None:
    """Acquire the lock of a job without waiting, by its file, which is created if missing.

    Returns:
        the descriptor that holds the lock until it and all copies in other processes are closed;
        None if the job runs.
    Raises:
        OSError: if the file cannot be opened.
    """
    descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def write_lock_text(lock_descriptor: int, text: str) -> None:
    """Replace the content of an open lock file; its lock stays held."""
    os.ftruncate(lock_descriptor, 0)
    os.pwrite(lock_descriptor, text.encode(), 0)


def close_lock(lock_descriptor: int) -> None:
    """Close an open lock file, which releases its lock if no other process inherited it."""
    os.close(lock_descriptor)


def build_command(
    stage: Stage,
    placement: HostSlots,
    commands_folder: Path,
    hostfile: str | None,
    port: int,
    hosts: HostSlots,
) -> tuple[list[str], dict[str, str]]:
    """Build the command of a stage on its slots, and its environment variables.

    A stage without ranks, or on one slot of this machine, is started by python alone; any other by
    DeepSpeed's launcher.

    Args:
        commands_folder: folder of the stage's program, `megamod/commands`.
        hostfile: file with the hosts of `placement`; None: they are this machine.
        port: free TCP port for DeepSpeed's launcher.
        hosts: slots of all jobs, which share the cores of this machine.
    Returns:
        the words of the command, and variables to add to its environment.
    """
    program = [str(commands_folder / stage.program), *stage.arguments]
    gpus = sum(len(host.slots) for host in placement)
    cores = make_thread_variables(len(hosts[0].slots)) if hostfile is None else {}
    if not stage.ranks or (hostfile is None and gpus == 1):
        # If the job's slots are on another host, the GPUs of this machine belong to other jobs.
        visible = ",".join(map(str, placement[0].slots)) if is_local_host(placement[0]) else ""
        devices = {"CUDA_VISIBLE_DEVICES": visible} if list_local_gpus() else {}
        return [sys.executable, *program], devices | cores
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(port)]
    if hostfile is not None:
        command += ["--hostfile", hostfile, "--include", format_include(placement)]
        if len(placement) == 1 and not is_local_host(placement[0]):
            # Without this DeepSpeed would start a job of one host here, whatever the host's name.
            command.append("--force_multi")
    elif list_local_gpus():
        command += ["--include", format_include(placement)]
    else:
        command += ["--num_accelerators", str(gpus)]
    return command + program, cores


def make_thread_variables(slots: int) -> dict[str, str]:
    """Make variables that give each slot of this machine threads for its part of the cores.

    Otherwise each process would start a thread for every core, and jobs slow each other down
    several times. With GPUs, or if OMP_NUM_THREADS is set, the result is empty.

    Args:
        slots: of this machine, over all jobs.
    """
    if "OMP_NUM_THREADS" in os.environ or list_local_gpus():
        return {}
    return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // slots))}


def start_process(
    command: Sequence[str],
    variables: dict[str, str],
    lock_descriptor: int,
    process_mark: str,
    log_path: Path,
) -> subprocess.Popen[bytes]:
    """Start a program in a new session; its output is appended to the log after the command itself.

    Args:
        variables: added to a copy of this process's environment without MEGAMOD_ variables.
        lock_descriptor: lock of the job; the program inherits it and it is closed in this process,
            also if the start fails.
        process_mark: value of the variable `MARK`, by which `iterate_processes` knows the job.
        log_path: file in an existing folder, created if needed.
    Raises:
        OSError: if the log cannot be written or the program cannot be started.
    """
    # Variables MEGAMOD_<FLAG> are already in the flags, and some do not exist in this program.
    environment = {
        name: text for name, text in os.environ.items() if not name.startswith("MEGAMOD_")
    }
    try:
        with open(log_path, "ab") as output:
            output.write(f"$ {' '.join(command)}\n".encode())
            output.flush()
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**environment, **variables, MARK: process_mark},
                pass_fds=(lock_descriptor,),
                start_new_session=True,
            )
    finally:
        os.close(lock_descriptor)


def iterate_processes(process_mark: str) -> Iterator[psutil.Process]:
    """Iterate over all processes of a job on this machine, by the mark in their environment.

    Processes whose environment is hidden, as those of other users, are skipped.

    Args:
        process_mark: value of the variable `MARK`, as passed to `start_process`.
    """
    for process in psutil.process_iter():
        # The environment of other users' processes is hidden, and any process may end meanwhile.
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == process_mark:
                yield process


def request_stop(process_mark: str) -> None:
    """Send SIGTERM to the ranks of a job, which then write a checkpoint.

    Their launcher gets no signal, because it would kill ranks before they have saved, unless all
    ranks are on other hosts.

    Args:
        process_mark: mark of the job, see `iterate_processes`.
    """
    processes = {process.pid: process for process in iterate_processes(process_mark)}
    launchers = {pid for pid, process in processes.items() if _is_launcher(process)}
    # Children of a rank are its data workers, needed until the rank ends.
    others = processes.keys() - launchers
    ranks = [pid for pid in others if _get_parent_pid(processes[pid]) not in others]
    for pid in ranks or launchers:
        with contextlib.suppress(psutil.Error):
            processes[pid].send_signal(signal.SIGTERM)


def kill_processes(process_mark: str) -> None:
    """Kill all processes of a job on this machine by SIGKILL, if there are any."""
    for process in iterate_processes(process_mark):
        with contextlib.suppress(psutil.Error):
            process.kill()


def read_log_tail(log_path: Path, first_byte: int, max_lines: int = 12) -> str:
    """Read the end of a log: at most `max_lines` lines that are not blank.

    Args:
        log_path: log that `start_process` writes.
        first_byte: offset of the first byte to read; of a longer text only the last `TAIL_BYTES`
            are read.
    Raises:
        OSError: if there is no such log.
    """
    with open(log_path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(first_byte, size - TAIL_BYTES))
        text = file.read().decode(errors="replace")
    written = [line for line in text.splitlines() if line.strip()]
    return "\n".join(written[-max_lines:])


def _is_launcher(process: psutil.Process) -> bool:
    """Return True for a process of DeepSpeed's launcher; False if the process has ended."""
    try:
        return any("deepspeed.launcher" in word for word in process.cmdline())
    except psutil.Error:
        return False


def _get_parent_pid(process: psutil.Process) -> int:
    """Return the id of the parent process; 0 if the process has ended."""
    try:
        return process.ppid()
    except psutil.Error:
        return 0
