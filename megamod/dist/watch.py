"""Each rank watches its launcher and tells the others that it is alive.

A rank ends when its launcher has ended, by the signal that makes a run save and stop. Its signs of
life are in the store of the process group, so that a rank that is lost can be named with its host.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import pairwise

import psutil
import torch.distributed as dist

from megamod.errors import LOSS_DESCRIBERS, DistributedFailure

POLL = 1.0  # seconds between two looks at the launcher
BEAT = 2.0  # seconds between two signs of life
REPORT_EVERY = 5  # signs of life between two looks for silent ranks
SILENCE = 30.0  # seconds without one until rank 0 reports a rank
_LOSS = "lost"  # key of the store for the description of the first loss
STALLED = 0.8  # share of the timeout without a step until stacks are printed

# Launchers as programs and as modules of Python.
PROGRAMS = ("deepspeed", "torchrun", "accelerate")
MODULES = (
    *("deepspeed.launcher.runner", "deepspeed.launcher.launch"),
    *("torch.distributed.run", "torch.distributed.launch", "accelerate.commands.launch"),
)


def watch_launcher(grace: float) -> None:
    """Start a thread that ends this process by SIGTERM after its launcher has ended.

    Nothing happens without a launcher, or if the thread runs already. The launchers of DeepSpeed
    and torch leave ranks running when they are killed, and that of DeepSpeed also when it is
    terminated.

    Args:
        grace: seconds from the signal until the process is ended at once.
    """
    title = "launcher"
    if any(thread.name == title for thread in threading.enumerate()):
        return
    with suppress(psutil.Error):
        parents = [p for p in psutil.Process().parents() if is_launcher(p.cmdline())]
        if parents:
            arguments = (parents, grace)
            threading.Thread(
                target=_terminate_after_launcher, args=arguments, name=title, daemon=True
            ).start()


def is_launcher(command: Sequence[str]) -> bool:
    """Return True for the command line, in words, of a program that starts ranks.

    The program or module is among the first five words, after the interpreter and its options.
    """
    words = command[:5]
    modules = [after for word, after in pairwise(words) if word == "-m"]
    names = [os.path.basename(word) for word in words[:2]]
    return bool(set(modules) & set(MODULES) or set(names) & set(PROGRAMS))


def _terminate_after_launcher(parents: Sequence[psutil.Process], grace: float) -> None:
    """Wait until one of `parents` has ended, then end this process: SIGTERM, exit after `grace`."""
    while all(map(_is_alive, parents)):
        time.sleep(POLL)
    gone = next(parent.pid for parent in parents if not _is_alive(parent))
    print(f"the launcher, process {gone}, is gone: this rank ends", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace)
    os._exit(DistributedFailure.exit_code)


def _is_alive(process: psutil.Process) -> bool:
    """Return True if the process runs; False for a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


class Heartbeat:
    """Thread that writes this rank's signs of life (heartbeats) and watches the other ranks'.

    The signs of life are in the store where the ranks meet. Construction starts the thread and
    registers `describe_lost_ranks` for the message of a distributed failure.

    Args:
        store: shared by all ranks; connections of its own are opened.
        rank: this rank.
        world: number of ranks.
        timeout: seconds after which a collective without an answer fails.
    Raises:
        RuntimeError: if the store does not answer.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, timeout: float):
        self.rank, self.world = rank, world
        self.timeout = timeout
        self.last_step = time.monotonic()
        self._loss = ""  # text of the rank that first described one, as far as it is known
        # A store has one connection, on which a waiting call holds up all others.
        self._writer, self._reader = store.clone(), store.clone()
        for connection in (self._writer, self._reader):
            connection.set_timeout(timedelta(seconds=5 * BEAT))
        self._stop = threading.Event()
        self._write_sign_of_life(0)
        self._threads = [
            threading.Thread(target=run, daemon=True)
            for run in (self._run_until_stopped, self._watch_steps)
        ]
        for thread in self._threads:
            thread.start()
        LOSS_DESCRIBERS.append(self.describe_lost_ranks)

    def record_step(self) -> None:
        """Note that a step of the run has ended now: the rank is not stalled."""
        self.last_step = time.monotonic()

    def stop(self) -> None:
        """End the threads, and remove `describe_lost_ranks` from the messages of failures.

        Waits at most two beats for each, so a thread may still end after that.
        """
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * BEAT)
        with suppress(ValueError):
            LOSS_DESCRIBERS.remove(self.describe_lost_ranks)

    def describe_lost_ranks(self) -> str:
        """Describe the ranks without a sign of life, with their hosts, for a message.

        The text says so if there is none, or if the store does not answer. This rank is marked as
        one that ends by itself. Takes some seconds.
        """
        loss: str | None = None
        answered = threading.Event()

        def record_loss() -> None:
            """Set `loss`, and `answered` after the first answer of the store."""
            nonlocal loss
            with suppress(RuntimeError):
                self._reader.set(f"failed/{self.rank}", "1")  # it ends, but it is not the reason
                before = self._read_signs_of_life(range(self.world))
                answered.set()
                if not self._reader.check([_LOSS]):
                    time.sleep(2.5 * BEAT)
                    self._publish_loss(before)
                loss = self._reader.get(_LOSS).decode() if self._reader.check([_LOSS]) else ""

        # A store whose process is stopped accepts a question and never answers: no timeout of the
        # connection covers that.
        thread = threading.Thread(target=record_loss, daemon=True)
        thread.start()
        if answered.wait(2 * BEAT):
            thread.join(4 * BEAT)
        if self.rank == 0:  # the store may end with this process, and others still read from it
            time.sleep(1.5 * BEAT)
        if loss is None:  # the store lies in the process of rank 0 or of its launcher
            return self._loss or f"no answer from rank 0 on {os.environ.get('MASTER_ADDR')}"
        return loss or "all ranks show signs of life"

    def _publish_loss(self, before: Sequence[str]) -> None:
        """Write into the store which ranks are silent, if there is one: the first text stays.

        A rank that ends for a loss ends others, which could not tell whose end came first.

        Args:
            before: signs of life of all ranks some beats ago.
        """
        after = self._read_signs_of_life(range(self.world))
        silent = [
            _format_rank(rank, after[rank])
            for rank in range(self.world)
            if before[rank] == after[rank] and not self._reader.check([f"failed/{rank}"])
        ]
        if silent:
            self._reader.compare_set(_LOSS, "", "no sign of life of " + ", ".join(silent))

    def _write_sign_of_life(self, count: int) -> None:
        """Write this rank's sign of life: `count`, host and process.

        Raise RuntimeError if the store does not answer.
        """
        self._writer.set(f"beat/{self.rank}", f"{count} {os.uname().nodename} {os.getpid()}")

    def _read_signs_of_life(self, ranks: Iterable[int]) -> list[str]:
        """Read the last sign of life of each of `ranks` from the store, a text; "" for none.

        Raise RuntimeError if the store does not answer.
        """
        texts = []
        for rank in ranks:
            key = f"beat/{rank}"
            texts.append(self._reader.get(key).decode() if self._reader.check([key]) else "")
        return texts

    def _run_until_stopped(self) -> None:
        """Run the first thread until `stop`: write signs of life, and report silent ranks.

        Every `BEAT` seconds the sign of life of this rank is written, and a loss that another rank
        has described is read. Rank 0 reports other ranks that are silent, see
        `_report_silent_ranks`. The thread ends without a message when the store is gone.
        """
        count, seen, reported = 0, [("", time.monotonic())] * self.world, set()
        while not self._stop.wait(BEAT):
            count += 1
            try:
                self._write_sign_of_life(count)
                if not self._loss and self._writer.check([_LOSS]):
                    self._loss = self._writer.get(_LOSS).decode()
                if self.rank == 0 and count % REPORT_EVERY == 0:
                    self._report_silent_ranks(seen, reported)
            except RuntimeError:
                return  # the store is gone: collectives fail, and the error there names the loss

    def _watch_steps(self) -> None:
        """Run the second thread until `stop`: print the stacks of this rank if it is stalled.

        They are printed to standard error, once per stall, when no step has ended for the share
        `STALLED` of the timeout: before a collective fails that began after the last step.
        """
        pause, dumped = min(BEAT, (1 - STALLED) * self.timeout / 4), None
        while not self._stop.wait(pause):
            last = self.last_step
            seconds = time.monotonic() - last
            if last != dumped and seconds > STALLED * self.timeout:
                dumped = last
                print(
                    f"rank {self.rank} on {os.uname().nodename}: no step has ended for "
                    f"{seconds:.0f} s; its stacks:",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(all_threads=True)

    def _report_silent_ranks(self, seen: list[tuple[str, float]], reported: set[int]) -> None:
        """Print the ranks without a new sign of life for `SILENCE` seconds, once per silence.

        Args:
            seen: last sign of life of each rank, and the time it was first read; updated in place.
            reported: ranks that are silent and were printed; updated in place.
        """
        now = time.monotonic()
        for rank, text in enumerate(self._read_signs_of_life(range(self.world))):
            if text != seen[rank][0]:
                seen[rank] = text, now
                reported.discard(rank)
            elif now - seen[rank][1] > SILENCE and rank not in reported:
                reported.add(rank)
                name, silence = _format_rank(rank, text), now - seen[rank][1]
                print(f"no sign of life of {name} for {silence:.0f} s", file=sys.stderr, flush=True)


def _format_rank(rank: int, text: str) -> str:
    """Format a rank with host and process from its last sign of life."""
    if not text:
        return f"rank {rank}, which has not joined"
    _, host, process = text.split()
    return f"rank {rank} on {host} (process {process})"


_heartbeat: Heartbeat | None = None


def start_heartbeat(store: dist.Store, rank: int, world: int, timeout: float) -> None:
    """Start the `Heartbeat` of this process, unless it runs or this rank is alone.

    Args:
        store: see `Heartbeat`, and so are the other arguments.
    """
    global _heartbeat
    if world > 1 and _heartbeat is None:
        _heartbeat = Heartbeat(store, rank, world, timeout)


def stop_heartbeat() -> None:
    """Stop the `Heartbeat` of this process, if it runs, before the process group is left."""
    global _heartbeat
    if _heartbeat is not None:
        _heartbeat.stop()
        _heartbeat = None


def record_step() -> None:
    """Tell the `Heartbeat` of this process, if it runs, that a step has ended."""
    if _heartbeat is not None:
        _heartbeat.record_step()
