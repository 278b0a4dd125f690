"""Which slots (GPUs) an expert's job gets: packing, names for DeepSpeed's launcher.

Source: Li et al. 2022 (Branch-Train-Merge), section 3: experts share nothing while they train, so
each is a job of its own, and all that matters is that its gradients stay inside a machine.
"""

import os
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path

from megamod.dist.hostfile import Host, Place
from megamod.errors import UserError

LOCAL = "localhost"


def local_hosts(slots: int | None) -> Place:
    """This machine: its GPUs, those of CUDA_VISIBLE_DEVICES if set; without any, one CPU slot.

    Args:
        slots: how many to use; None: all.
    Raises:
        UserError: if there are fewer GPUs than that.
    """
    found = gpus_here()
    if found and slots is not None and slots > len(found):
        raise UserError(f"--slots {slots}: there are {len(found)} GPUs")
    ids = found[:slots] if found else tuple(range(slots or 1))
    return (Host(LOCAL, ids),)


def gpus_here() -> tuple[int, ...]:
    """Numbers of this machine's GPUs; none where the accelerator is the CPU.

    Raises:
        UserError: if CUDA_VISIBLE_DEVICES names them otherwise.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",") if name.strip()]
        if not all(name.isdigit() for name in names):
            raise UserError(f"CUDA_VISIBLE_DEVICES is {visible!r}: give numbers, such as 0,1")
        return tuple(map(int, names))
    found = Path("/dev").glob("nvidia[0-9]*")
    return tuple(sorted(int(path.name[6:]) for path in found if path.name[6:].isdigit()))


def check_fits(hosts: Place, gpus: int, flag: str) -> None:
    """See that a job of so many slots can run at all.

    Raises:
        UserError: naming the flag and what there is.
    """
    if pack(hosts, (), gpus) is None:
        there = ", ".join(f"{host.name} {len(host.slots)}" for host in hosts)
        raise UserError(
            f"{flag} {gpus}: does not fit the slots ({there}); a job takes slots of one machine, "
            "or machines of equal size as a whole"
        )


def pack(hosts: Place, busy: Iterable[Host], gpus: int) -> Place | None:
    """Free slots for a job; None if it has to wait.

    A job that fits a machine is never spread over two, and goes where it leaves the fewest slots
    free, so that whole machines stay free for jobs that need them. A larger one takes machines of
    one size as a whole.
    """
    taken = {(host.name, slot) for host in busy for slot in host.slots}
    free = [Host(h.name, tuple(s for s in h.slots if (h.name, s) not in taken)) for h in hosts]
    if gpus <= max(len(host.slots) for host in hosts):
        fitting = [host for host in free if len(host.slots) >= gpus]
        if not fitting:
            return None
        best = min(fitting, key=lambda host: len(host.slots))
        return (Host(best.name, best.slots[:gpus]),)
    whole = [host for host in free if host in hosts]
    for size in sorted({len(host.slots) for host in whole}, reverse=True):
        same = [host for host in whole if len(host.slots) == size]
        if gpus % size == 0 and len(same) >= gpus // size:
            return tuple(same[: gpus // size])
    return None


def include(place: Sequence[Host]) -> str:
    """A place as --include of DeepSpeed's launcher: `node-1:0,1@node-2:0,1`."""
    return "@".join(f"{host.name}:{','.join(map(str, host.slots))}" for host in place)


def parse_include(text: str) -> Place:
    """The inverse of `include`."""
    parts = [part.partition(":") for part in text.split("@") if part]
    return tuple(Host(name, tuple(map(int, slots.split(",")))) for name, _, slots in parts)


def is_here(host: Host) -> bool:
    """True if a host is this machine."""
    own = os.uname().nodename
    return host.name in (LOCAL, "127.0.0.1", own, own.partition(".")[0])


def free_port(taken: Iterable[int]) -> int:
    """A TCP port nobody of this machine listens on, and none of `taken`."""
    taken = set(taken)
    while True:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        if port not in taken:
            return port
