"""Placement of jobs on slots (GPUs): packing, and names for DeepSpeed's launcher.

Source: Li et al. 2022 (Branch-Train-Merge), section 3: experts share nothing while they train, so
each is a separate job, and placement only has to keep its gradients inside one host.
"""

import os
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path

from megamod.dist.hostfile import Host, HostSlots
from megamod.errors import UserError

LOCAL = "localhost"


def list_local_slots(slot_count: int | None) -> HostSlots:
    """List the slots of this machine: its visible GPUs, or slots without a GPU if it has none.

    Args:
        slot_count: number of slots to use; None: all GPUs, or one slot without a GPU.
    Raises:
        UserError: if the machine has fewer GPUs, or as `list_local_gpus`.
    """
    gpus = list_local_gpus()
    if gpus and slot_count is not None and slot_count > len(gpus):
        raise UserError(f"--slots {slot_count}: this machine has {len(gpus)} GPUs")
    ids = gpus[:slot_count] if gpus else tuple(range(slot_count or 1))
    return (Host(LOCAL, ids),)


def list_local_gpus() -> tuple[int, ...]:
    """List the indices of this machine's visible GPUs.

    Empty if DS_ACCELERATOR is "cpu"; else those that CUDA_VISIBLE_DEVICES names; without it all
    devices in /dev.

    Raises:
        UserError: if CUDA_VISIBLE_DEVICES holds anything but indices.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",") if name.strip()]
        if not all(name.isdigit() for name in names):
            raise UserError(f"CUDA_VISIBLE_DEVICES is {visible!r}: give numbers, such as 0,1")
        return tuple(map(int, names))
    devices = Path("/dev").glob("nvidia[0-9]*")
    return tuple(sorted(int(path.name[6:]) for path in devices if path.name[6:].isdigit()))


def check_job_fits(hosts: HostSlots, slot_count: int, flag: str) -> None:
    """Check that a job of `slot_count` slots can run on the hosts once all their slots are free.

    Args:
        flag: option that decides the number of slots, for the message.
    Raises:
        UserError: naming the flag and the slots of each host.
    """
    if allocate_slots(hosts, (), slot_count) is None:
        available = ", ".join(f"{host.name} {len(host.slots)}" for host in hosts)
        raise UserError(
            f"{flag} {slot_count}: does not fit the slots ({available}); a job takes slots of one "
            "host, or whole hosts of equal size"
        )


def allocate_slots(
    hosts: HostSlots, busy_hosts: Iterable[Host], slot_count: int
) -> HostSlots | None:
    """Select free slots for a job; None if there are not enough now.

    A job that fits one host is never split, and goes to the host where it leaves the fewest free
    slots, so that whole hosts stay free for larger jobs. A larger job takes whole hosts of equal
    size.

    Args:
        hosts: hosts with all their slots.
        busy_hosts: hosts with those of their slots that are in use.
        slot_count: slots that the job needs.
    Returns:
        the hosts of the job with the slots it gets.
    """
    busy_slots = {(host.name, slot) for host in busy_hosts for slot in host.slots}
    free = [Host(h.name, tuple(s for s in h.slots if (h.name, s) not in busy_slots)) for h in hosts]
    if slot_count <= max(len(host.slots) for host in hosts):
        fitting_hosts = [host for host in free if len(host.slots) >= slot_count]
        if not fitting_hosts:
            return None
        smallest_host = min(fitting_hosts, key=lambda host: len(host.slots))
        return (Host(smallest_host.name, smallest_host.slots[:slot_count]),)
    free_hosts = [host for host in free if host in hosts]
    for size in sorted({len(host.slots) for host in free_hosts}, reverse=True):
        same = [host for host in free_hosts if len(host.slots) == size]
        if slot_count % size == 0 and len(same) >= slot_count // size:
            return tuple(same[: slot_count // size])
    return None


def format_include(placement: Sequence[Host]) -> str:
    """Format slots for --include of DeepSpeed's launcher: `node-1:0,1@node-2:0,1`."""
    return "@".join(f"{host.name}:{','.join(map(str, host.slots))}" for host in placement)


def parse_include(text: str) -> HostSlots:
    """Parse the output of `format_include`: hosts with their slots; "" has none."""
    parts = [part.partition(":") for part in text.split("@") if part]
    return tuple(Host(name, tuple(map(int, slots.split(",")))) for name, _, slots in parts)


def is_local_host(host: Host) -> bool:
    """Return True if a host has this machine's name, full or short, or the name of localhost."""
    name = os.uname().nodename
    return host.name in (LOCAL, "127.0.0.1", name, name.partition(".")[0])


def find_free_port(used_ports: Iterable[int]) -> int:
    """Return a TCP port of this machine that is free now and not in `used_ports`."""
    used_ports = set(used_ports)
    while True:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        if port not in used_ports:
            return port
