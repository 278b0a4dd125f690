"""Run a function on several ranks: processes of this machine, joined by gloo."""

import os
import queue
import socket
import time
import traceback
from collections.abc import Callable

import torch
import torch.multiprocessing

WAIT = 240  # seconds for one test of ordinary size

# Ranks are forked from a process that has imported everything: imports take seconds of each rank.
_CONTEXT = torch.multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["deepspeed", "transformers", "megamod.runs.training"])


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def on_ranks(
    world_size: int, function: Callable[..., object], *args: object, wait: float = WAIT
) -> list[object]:
    """Call function(rank, *args) on every rank and return the results by rank.

    Args:
        wait: seconds until ranks that do not answer are killed.
    Raises:
        AssertionError: with the traceback of the first rank that failed, or naming the silent ones.
    """
    results, port = _CONTEXT.Queue(), free_port()
    environment = dict(os.environ)  # theirs would be that of the day when the first rank was made
    processes = [
        _CONTEXT.Process(
            target=_rank,
            args=(rank, world_size, port, results, environment, function, args),
            daemon=True,
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    answers: dict[int, object] = {}
    deadline = time.monotonic() + wait
    try:
        while len(answers) < world_size and time.monotonic() < deadline:
            try:
                rank, error, value = results.get(timeout=1)
            except queue.Empty:
                dead = [r for r, p in enumerate(processes) if p.exitcode and r not in answers]
                assert not dead, f"ranks {dead} ended without an answer"
                continue
            assert error is None, f"rank {rank} failed:\n{error}"
            answers[rank] = value
        silent = set(range(world_size)) - set(answers)
        assert not silent, f"ranks {sorted(silent)} did not answer in {wait} s"
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    return [answers[rank] for rank in range(world_size)]


def _rank(rank, world_size, port, results, environment, function, args):
    os.environ.clear()
    os.environ |= environment | dict(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        from megamod.dist.process import join_process_group

        join_process_group(timeout_seconds=WAIT)
        value = function(rank, *args)
        torch.distributed.barrier()
        results.put((rank, None, value))
        torch.distributed.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
