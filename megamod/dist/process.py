"""Process group of a run, under a launcher or alone, and small collectives."""

import atexit
import os
import traceback
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed

from megamod.dist.watch import start_heartbeat, stop_heartbeat, watch_launcher
from megamod.errors import (
    DistributedFailure,
    PeerError,
    UserError,
    is_distributed_failure,
    is_user_fixable,
)


@dataclass(frozen=True)
class _ProcessStarter:
    """A program that starts ranks, and the environment variables that it sets.

    Attributes:
        name: its name in messages.
        presence_variable: is set if the program started this process.
        rank_variable, world_size_variable, local_rank_variable: hold the rank, the number of ranks
            and the rank on the host.
    """

    name: str
    presence_variable: str
    rank_variable: str
    world_size_variable: str
    local_rank_variable: str


_LAUNCHER = _ProcessStarter("the launcher", "RANK", "RANK", "WORLD_SIZE", "LOCAL_RANK")
_MPI = (
    _ProcessStarter(
        "Open MPI",
        *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ),
    _ProcessStarter("MPICH", "MPI_LOCALRANKID", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)
_SLURM = _ProcessStarter("srun", "SLURM_PROCID", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
_RENUMBERING = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")
"""Set by torchrun and DeepSpeed, which may start several ranks in one task of srun or mpirun."""


def set_rank_variables() -> None:
    """Set RANK, WORLD_SIZE and LOCAL_RANK from the variables of srun or mpirun.

    MASTER_PORT becomes 29500 then, if it is missing. Nothing is set if torchrun or DeepSpeed has
    set them, which may run inside tasks of the others, and for a process that is alone: without
    srun and mpirun, or as their only task. mpirun takes precedence over srun, which it may use.

    Raises:
        UserError: for variables that are incomplete, not numbers, or contradict each other, and if
            MASTER_ADDR is not set.
    """
    launcher_numbers = _read_rank_numbers(_LAUNCHER)
    # A batch script also has the variables of task 0; only processes of srun have a step.
    in_script = "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" not in os.environ
    starters = (*_MPI, *(() if in_script else (_SLURM,)))
    active = [(starter, _read_rank_numbers(starter)) for starter in starters]
    active = [(starter, numbers) for starter, numbers in active if numbers and numbers[1] > 1]
    if not active:
        return
    starter, (rank_, world, local) = active[0]
    values = (
        f"{starter.rank_variable}={rank_} and {starter.world_size_variable}={world} "
        f"of {starter.name}"
    )
    if launcher_numbers is None:
        if "MASTER_ADDR" not in os.environ:
            raise UserError(
                f"{values}, but MASTER_ADDR is not set: give all ranks the name of the first "
                "host in it, and a free port of it in MASTER_PORT (29500 if there is none)"
            )
        os.environ |= dict(RANK=str(rank_), WORLD_SIZE=str(world), LOCAL_RANK=str(local))
        os.environ.setdefault("MASTER_PORT", "29500")
        return
    renumbered = any(name in os.environ for name in _RENUMBERING)
    if not renumbered and launcher_numbers[:2] != (rank_, world):
        raise UserError(
            f"RANK={launcher_numbers[0]} and WORLD_SIZE={launcher_numbers[1]} contradict "
            f"{values}: leave RANK and WORLD_SIZE unset"
        )


def _read_rank_numbers(starter: _ProcessStarter) -> tuple[int, int, int] | None:
    """Read rank, world size and local rank from the environment variables of a program.

    `starter` names the variables of one program that starts ranks. Return None if that program is
    not active; raise UserError for numbers that are missing or wrong. LOCAL_RANK alone may be
    missing and counts as 0.
    """
    if starter.presence_variable not in os.environ:
        return None
    numbers = []
    for name in (starter.rank_variable, starter.world_size_variable, starter.local_rank_variable):
        text = os.environ.get(name, "0" if name == _LAUNCHER.local_rank_variable else "")
        if not text.isdecimal():
            value = repr(text) if text else "not set"
            raise UserError(
                f"{starter.presence_variable} is set by {starter.name}, but {name} is {value}"
            )
        numbers.append(int(text))
    rank_, world, local = numbers
    if max(rank_, local) >= world:
        raise UserError(
            f"{starter.rank_variable}={rank_} and {starter.local_rank_variable}={local} must be "
            f"below {starter.world_size_variable}={world}"
        )
    return rank_, world, local


def check_launcher_variables() -> None:
    """Refuse a process that would be alone among several, or could not find the other ranks.

    RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and SLURM_NTASKS are read from the environment.

    Raises:
        UserError: if a process without a rank is one of several tasks of Slurm, or one of several
            ranks has no address of the others.
    """
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if "RANK" not in os.environ and tasks != "1":
        raise UserError(
            f"SLURM_NTASKS is {tasks}, but this process was not started by srun, so it would be "
            f"alone: start the ranks as docs/multinode.md says, or `unset SLURM_NTASKS`"
        )
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if "RANK" in os.environ and several and not os.environ.get(name):
            raise UserError(
                f"RANK is {os.environ['RANK']}, but {name} is not set: the meeting point of the "
                "ranks, the same on all of them"
            )


def check_device(local_rank: int, device_count: int) -> None:
    """Check that this host has a device for the rank.

    Args:
        local_rank: rank on the host, from 0.
        device_count: devices that this process sees.
    Raises:
        UserError: if there are not more than `local_rank` devices.
    """
    if local_rank >= device_count:
        raise UserError(
            f"LOCAL_RANK is {local_rank}, but this process on {os.uname().nodename} sees "
            f"{device_count} devices: the hostfile gives it too many slots, or "
            "CUDA_VISIBLE_DEVICES or Slurm's --gpus-per-task leaves out some (use --gpus-per-node)"
        )


def join_process_group(timeout_seconds: float) -> torch.device:
    """Join the process group and return this rank's device, which becomes the current one.

    If no launcher has set RANK, WORLD_SIZE and LOCAL_RANK, they are set in the environment, see
    `set_rank_variables`; a process started by plain `python` is alone in its group. A process with
    a launcher ends after it, and several ranks start their signs of life, see `megamod.dist.watch`.
    The group is left at exit. Every rank must call it.

    Args:
        timeout_seconds: seconds after which a collective without an answer fails, in groups that
            are created later, too.
    Raises:
        UserError: if the launcher's variables are wrong, or the host has no such GPU.
        RuntimeError: if the other ranks do not join in time, see `is_distributed_failure`.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    set_rank_variables()
    check_launcher_variables()
    alone = os.environ.get("WORLD_SIZE", "1") == "1" and "MASTER_ADDR" not in os.environ
    if alone:
        os.environ |= dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    else:
        watch_launcher(timeout_seconds)
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # DeepSpeed would compile a shared-memory collective; a process killed during that build
        # leaves a lock on which all later runs of the account wait forever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if accelerator.device_name() != "cpu":
        check_device(local_rank, accelerator.device_count())
    accelerator.set_device(local_rank)
    # DeepSpeed creates further groups without a timeout; torch's default is half an hour, too long
    # to notice a frozen host.
    timeout = timedelta(seconds=timeout_seconds)
    torch.distributed.distributed_c10d.default_pg_timeout = timeout
    torch.distributed.distributed_c10d.default_pg_nccl_timeout = timeout
    on_cpu = accelerator.device_name() == "cpu"
    backend = "gloo" if on_cpu else accelerator.communication_backend_name()
    if not torch.distributed.is_initialized():
        rank, world = read_launcher_rank(), read_launcher_world_size()
        # A store in memory: runs that start together cannot compete for a port.
        store = torch.distributed.HashStore() if alone else _connect_store(rank, world, timeout)
        # Before the ranks meet, so that one that is lost in between is named.
        start_heartbeat(store, rank, world, timeout_seconds)
        torch.distributed.init_process_group(
            backend,
            store=torch.distributed.PrefixStore("default_pg", store),  # as torch names it
            **dict(rank=rank, world_size=world, timeout=timeout),
        )
    deepspeed.init_distributed(
        dist_backend=backend,
        auto_mpi_discovery=False,
        timeout=timeout,
        verbose=False,
    )
    # Otherwise threads of gloo may outlive the interpreter, which aborts the process.
    atexit.register(_destroy_process_group)
    return torch.device(accelerator.device_name(local_rank))


def _connect_store(rank: int, world: int, timeout: timedelta) -> torch.distributed.Store:
    """Connect to the store where the ranks meet, at MASTER_ADDR and MASTER_PORT.

    It is in the process of rank 0, or of torchrun's agent. It is opened as torch's rendezvous does,
    except that nobody waits there for the others: ranks that do not come could not be named.

    Raises:
        DistributedFailure: if there is no answer within `timeout`; it names rank 0.
        RuntimeError: on rank 0, if it cannot listen.
    """
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and not has_agent
    try:
        return torch.distributed.TCPStore(
            **dict(host_name=address, port=port, world_size=world, is_master=serves),
            **dict(timeout=timeout, wait_for_workers=False, multi_tenant=not has_agent),
        )
    except torch.distributed.DistNetworkError as error:
        if serves:
            raise
        raise DistributedFailure(
            f"no answer from {'the agent of ' if has_agent else ''}rank 0 on {address}, port "
            f"{port}, within {timeout.total_seconds():.0f} s"
        ) from error


def make_tensor_for_collectives(values: Sequence[float]) -> torch.Tensor:
    """Make a float64 tensor [len(values)] on the device of collectives, the GPU or else the CPU."""
    from deepspeed.accelerator import get_accelerator

    return torch.tensor(values, dtype=torch.float64, device=get_accelerator().current_device_name())


def is_true_on_all_ranks(condition: bool) -> bool:
    """Return True on every rank if `condition` is true on all of them, else False; collective."""
    flag = make_tensor_for_collectives([float(condition)])
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
    return bool(flag.item())


def broadcast_from_rank_0(number: int) -> int:
    """Return rank 0's `number` on every rank; collective. Exact up to 2^53: a float64 is sent."""
    tensor = make_tensor_for_collectives([number])
    torch.distributed.broadcast(tensor, 0)
    return int(tensor.item())


@contextmanager
def fail_together(exchange_errors: bool = True) -> Iterator[None]:
    """Make an error on one rank end the block on every rank; collective.

    No rank is left waiting for one that failed if each collective inside the block follows
    `check_peers` or is `sum_over_ranks`. Afterwards collectives work as before. The frames of an
    error's traceback are cleared of their variables.

    Args:
        exchange_errors: False where the block has other collectives (a forward pass with ZeRO 3).
            An error is then raised on its own rank alone, and ends the others when that rank exits.
    Raises:
        UserError: on every rank, for an error that the user can mend.
        PeerError: on the other ranks, for any other error; its own rank raises the error itself.
        RuntimeError: of a collective that lost a peer, unchanged, see `is_distributed_failure`.
    """
    error, failed = None, False
    try:
        yield
        check_peers()
    except _PeerFailed:
        failed = True
    except Exception as caught:
        if not exchange_errors or (
            isinstance(caught, RuntimeError) and is_distributed_failure(caught)
        ):
            raise
        error, failed = caught, True
        traceback.clear_frames(caught.__traceback__)  # they may hold most of the memory
        is_true_on_all_ranks(False)
    if not failed:
        return
    mendable = error is not None and is_user_fixable(error)
    text = "" if error is None else f"{mendable:d}{_describe_error(error)}"
    texts = dict(enumerate(gather_texts(text, 1023)))
    first = min(number for number, text in texts.items() if text)
    if error is not None and not mendable:
        raise error
    where = f"rank {first}: " if get_world_size() > 1 else ""
    kind = UserError if texts[first][0] == "1" else PeerError
    raise kind(where + texts[first][1:]) from error


def check_peers() -> None:
    """Leave the surrounding `fail_together` block if another rank failed in it; collective.

    It raises an exception that `fail_together` catches and that no other code should.
    """
    if not is_true_on_all_ranks(True):
        raise _PeerFailed


def sum_over_ranks(tensor: torch.Tensor) -> None:
    """Sum a tensor over all ranks in place, inside a `fail_together` block; collective.

    If another rank failed, the block is left instead, see `check_peers`.

    Args:
        tensor: has the same shape and dtype on every rank, on the device of collectives.
    """
    check_peers()
    torch.distributed.all_reduce(tensor)


class _PeerFailed(Exception):
    """Another rank has failed in the `fail_together` block."""


def _describe_error(error: Exception) -> str:
    """Return the text of a UserError; of any other error, its type and text."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def gather_texts(text: str, max_bytes: int = 255) -> list[str]:
    """Gather the texts of all ranks in the order of ranks; collective.

    Args:
        text: text of this rank.
        max_bytes: bytes of UTF-8 after which a text is cut; the same on all ranks.
    """
    data = text.encode()[:max_bytes]
    encoded_text = make_tensor_for_collectives([len(data), *data, *[0] * (max_bytes - len(data))])
    rows = [torch.empty_like(encoded_text) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(rows, encoded_text)
    return [
        bytes(map(int, row[1 : 1 + int(row[0])].tolist())).decode(errors="replace") for row in rows
    ]


def check_ranks_agree(texts_by_name: Mapping[str, str]) -> None:
    """Check that texts are equal on all ranks, by their CRC-32; collective.

    Args:
        texts_by_name: texts such as the recipe or digests of data, by name; the same names on all
            ranks.
    Raises:
        UserError: on every rank, with the names of the texts that differ.
    """
    digests = make_tensor_for_collectives(
        [float(zlib.crc32(text.encode())) for text in texts_by_name.values()]
    )
    lowest, highest = digests.clone(), digests.clone()
    torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
    differing = [
        name
        for name, low, high in zip(texts_by_name, lowest.tolist(), highest.tolist(), strict=True)
        if low != high
    ]
    if differing:
        raise UserError(
            f"the ranks disagree about {', '.join(differing)}: start all of them with the same "
            "recipe, flags, code and data"
        )


def _destroy_process_group() -> None:
    """Stop the signs of life, and destroy the process group if there is one."""
    stop_heartbeat()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def get_rank() -> int:
    """Return the rank of this process; 0 before a process group exists."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def get_world_size() -> int:
    """Return the number of ranks; 1 before a process group exists."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def read_launcher_world_size() -> int:
    """Read the number of ranks that the launcher set in WORLD_SIZE; 1 for plain `python`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def read_launcher_rank() -> int:
    """Read the rank that the launcher set in RANK; 0 for plain `python`."""
    return int(os.environ.get("RANK", "0"))
