"""Joining the process group, under a launcher or alone; and small collectives."""

import atexit
import os
import socket
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed

from megamod.errors import UserError


def init_process(timeout: float) -> torch.device:
    """Join the process group and return this rank's device.

    Started by plain `python` (no RANK in the environment) the process is a world of one.

    Args:
        timeout: seconds after which a collective that hears nothing fails.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if "RANK" not in os.environ:
        tasks = os.environ.get("SLURM_NTASKS", "1")
        if tasks != "1":
            raise UserError(
                f"SLURM_NTASKS is {tasks}, but RANK is not set, so these would be {tasks} runs in "
                "one folder: start the ranks as docs/multinode.md says"
            )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= dict(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # DeepSpeed would compile a shared-memory collective; a process killed during that build
        # leaves a lock on which every later run of the account waits for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    accelerator.set_device(local_rank)
    deepspeed.init_distributed(
        dist_backend=accelerator.communication_backend_name()
        if accelerator.device_name() != "cpu"
        else "gloo",
        timeout=timedelta(seconds=timeout),
        verbose=False,
    )
    # Else the threads of gloo may still run when the interpreter is gone, which aborts the process.
    atexit.register(_leave_group)
    return torch.device(accelerator.device_name(local_rank))


def control(values: Sequence[float]) -> torch.Tensor:
    """A small float64 tensor where collectives take it: on the GPU for NCCL, else on the CPU."""
    from deepspeed.accelerator import get_accelerator

    return torch.tensor(
        values, dtype=torch.float64, device=get_accelerator().current_device_name()
    )


def everywhere(fact: bool) -> bool:
    """True if it is true on every rank; collective."""
    flag = control([float(fact)])
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
    return bool(flag.item())


def from_rank_0(number: int) -> int:
    """Rank 0's number (below 2^53), on every rank; collective."""
    tensor = control([number])
    torch.distributed.broadcast(tensor, 0)
    return int(tensor.item())


def gather_text(text: str) -> list[str]:
    """Every rank's short text (up to 255 bytes), by rank; collective."""
    data = text.encode()[:255]
    mine = control([len(data), *data, *[0] * (255 - len(data))])
    rows = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(rows, mine)
    return [
        bytes(map(int, row[1 : 1 + int(row[0])].tolist())).decode(errors="replace") for row in rows
    ]


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def rank() -> int:
    """This process's rank; 0 before a process group exists."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 before a process group exists."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
