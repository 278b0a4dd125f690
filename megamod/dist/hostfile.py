"""Hostfiles: strict reading with all faults, placement of experts, and a check by ssh.

DeepSpeed's own reader makes a byte order mark part of a name, reads "8x" as 8, starts nothing on a
machine with 0 slots, and stops at the first bad line.
"""

import ipaddress
import re
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from megamod.errors import UserError
from megamod.tables import format_table

SSH_SECONDS = 5  # time in which a login by ssh must succeed
# Name of a host or user, which cannot be mistaken for an option of ssh.
NAME = re.compile(r"[A-Za-z0-9._][A-Za-z0-9._-]*")
SEPARATORS = "@:"  # of `--include` in DeepSpeed's launcher, so no part of a name there


@dataclass(frozen=True)
class Host:
    """A machine, and all of its slots or only the slots of a job.

    Attributes:
        name: NAME, USER@NAME or an address, as in the hostfile.
        slots: numbers of the slots, from 0.
    """

    name: str
    slots: tuple[int, ...]


HostSlots = tuple[Host, ...]
"""Slots of several machines; ranks are numbered in this order."""


@dataclass(frozen=True)
class HostfileReport:
    """Content of a hostfile without faults, and results of its check.

    Attributes:
        hosts: its machines.
        ssh_seconds: duration of the login by ssh to each machine; None: not tried.
        experts: ranks of each expert, by its number from 0 as text; None without experts.
    """

    hosts: HostSlots
    ssh_seconds: tuple[float | None, ...]
    experts: dict[str, range] | None

    def list_launcher_limits(self) -> list[str]:
        """List notes on names in the file that pdsh or `--include` cannot use, a line each.

        pdsh starts ranks on other hosts for the launcher of DeepSpeed; the list may be empty.
        """
        names = [host.name for host in self.hosts]
        notes = []
        if addresses := [name for name in names if ":" in name]:
            notes.append(
                f"note: pdsh, which `deepspeed` starts by, takes no IPv6 address ({addresses[0]}): "
                "name the host in ~/.ssh/config, or start with --no_ssh"
            )
        if special := [name for name in names if set(name) & set(SEPARATORS)]:
            notes.append(
                f"note: --include, --exclude and megamod btm cannot select {special[0]}: "
                "name the host, and its user, in ~/.ssh/config"
            )
        return notes

    def format_hosts(self) -> str:
        """Format a table of machines with slots, duration of the ssh login, ranks and experts."""
        rows = [["host", "slots", "ssh", "ranks"] + ["experts"] * (self.experts is not None)]
        ends = list(accumulate(len(host.slots) for host in self.hosts))
        for host, seconds, end in zip(self.hosts, self.ssh_seconds, ends, strict=True):
            host_ranks = range(end - len(host.slots), end)
            ssh = "not tried" if seconds is None else f"{seconds:.2f} s"
            rows.append([host.name, str(len(host_ranks)), ssh, format_range(host_ranks)])
            if self.experts is not None:
                local_experts = [
                    int(e) for e, ranks in self.experts.items() if set(ranks) & set(host_ranks)
                ]
                rows[-1].append(format_range(range(local_experts[0], local_experts[-1] + 1)))
        return format_table(rows)


class HostfileFaults(UserError):
    """All faults of a hostfile; the message shows the first two.

    Attributes:
        faults: all of them, each with its line.
    """

    def __init__(self, path: str | Path, faults: Sequence[str]):
        self.faults = tuple(faults)
        shown = list(faults[:2])
        if len(faults) > 2:
            shown[1] += f" (and {len(faults) - 2} more, which megamod check-hostfile lists)"
        listed = "".join(f"\n  {fault}" for fault in shown)
        super().__init__(f"hostfile {path} has {len(faults)} faults:{listed}")


@dataclass(frozen=True)
class _HostLine:
    """A line that names a machine.

    Attributes:
        number: number of the line, from 1.
        name: see `Host`.
        slots: number of slots; 0 if the line has a fault there.
    """

    number: int
    name: str
    slots: int


def read_hostfile(path: str | Path, *, require_selectable: bool = False) -> HostSlots:
    """Read the machines of a hostfile: lines of `NAME slots=N`, and comments.

    Args:
        require_selectable: refuse names that `--include` of DeepSpeed's launcher cannot select.
    Returns:
        the machines in the order of their lines, with all slots.
    Raises:
        UserError, HostfileFaults: as `check_hostfile`.
        UserError: for a name that cannot be selected.
    """
    hosts = check_hostfile(path).hosts
    for host in hosts if require_selectable else ():
        if set(host.name) & set(SEPARATORS):
            raise UserError(
                f"hostfile {path}: {host.name} cannot be selected by DeepSpeed's --include, which "
                "divides names at @ and :; name the host, and its user, in ~/.ssh/config"
            )
    return hosts


def check_hostfile(
    path: str | Path, *, experts: int | None = None, ssh: bool = False, port: int | None = None
) -> HostfileReport:
    """Read a hostfile and check it for a job on all its slots.

    Args:
        experts: number of experts of a DEMix run; the ranks of an expert must be on one machine if
            they fit on one.
        ssh: log in to all machines at once, without a password.
        port: port of ssh; None: as ssh is configured.
    Returns:
        the machines and the results of the check.
    Raises:
        UserError: if the file cannot be read, or has one fault.
        HostfileFaults: with all faults and their lines, if there are several.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"hostfile {path}: cannot be read: {error.strerror}") from error
    lines, faults = _parse_lines(content)
    groups = None
    if lines and not faults and experts is not None:
        groups, faults = _assign_expert_ranks(lines, experts)
    ssh_seconds: list[float | None] = [None] * len(lines)
    if ssh:
        # The logins wait for the network, but the exchange of keys takes processor time here.
        with ThreadPoolExecutor(min(64, max(1, len(lines)))) as pool:
            probes = list(pool.map(lambda line: _probe_ssh(line.name, port), lines))
        ssh_seconds = [time_ for time_, _ in probes]
        faults += [
            (line.number, f"{line.name}: {fault}")
            for line, (_, fault) in zip(lines, probes, strict=True)
            if fault
        ]
    _raise_faults(path, sorted(faults))
    hosts = tuple(Host(line.name, tuple(range(line.slots))) for line in lines)
    return HostfileReport(hosts, tuple(ssh_seconds), groups)


def find_groups_on_several_machines(
    hosts: Sequence[str], groups: Mapping[str, range]
) -> dict[str, list[str]]:
    """Find groups of ranks on several machines, though one of these could hold the group.

    Args:
        hosts: the machine of each rank.
        groups: ranks of each group, by name.
    Returns:
        machines of each such group, by name.
    """
    ranks_per_host = Counter(hosts)
    hosts_by_group = {
        name: list(dict.fromkeys(hosts[r] for r in ranks)) for name, ranks in groups.items()
    }
    return {
        name: machines
        for name, machines in hosts_by_group.items()
        if len(machines) > 1 and len(groups[name]) <= max(ranks_per_host[host] for host in machines)
    }


def format_range(numbers: range) -> str:
    """Format a range, which must not be empty, as `3` or `3-7`."""
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _parse_lines(content: bytes) -> tuple[list[_HostLine], list[tuple[int, str]]]:
    """Parse the content of a hostfile.

    Returns:
        the first line of each machine; and faults with their line numbers, 0 for the whole file.
    """
    lines: dict[str, _HostLine] = {}
    faults: list[tuple[int, str]] = []
    for number, raw in enumerate(content.split(b"\n"), start=1):
        line, of_line = _parse_line(raw, number)
        if line is not None:
            first = lines.setdefault(_normalise_machine_name(line.name), line)
            if first is not line:
                of_line.append(f"{line.name!r} appears again, first in line {first.number}")
        faults += [(number, fault) for fault in of_line]
    if not lines and not faults:
        faults.append((0, "names no machine"))
    return list(lines.values()), faults


def _parse_line(raw: bytes, number: int) -> tuple[_HostLine | None, list[str]]:
    """Parse a line of a hostfile.

    Args:
        raw: its bytes, without the line feed.
        number: line number, from 1.
    Returns:
        the machine that it names, None for a comment or a name that is wrong; and its faults.
    """
    faults = []
    if number == 1 and raw.startswith(b"\xef\xbb\xbf"):
        raw = raw[3:]
        faults.append("begins with a byte order mark; save it as plain UTF-8")
    if b"\r" in raw:
        raw = raw.replace(b"\r", b"")
        faults.append("has a carriage return; save it with Unix line ends")
    try:
        text = raw.decode().partition("#")[0]
    except UnicodeDecodeError:
        return None, [*faults, "is not UTF-8 text"]
    if "\t" in text:
        faults.append("has a tab; use spaces")
    words = text.split()
    if not words:
        return None, faults
    name, *others = words
    unknown = [word for word in others if not word.startswith("slots=")]
    slots = [word for word in others if word not in unknown]
    if unknown:
        faults.append(f"unknown word {unknown[0]!r}; a line is `NAME slots=N`")
    right = len(slots) == 1 and re.fullmatch(r"slots=([1-9]\d{0,4})", slots[0])
    if not right and (slots or not unknown):
        shown = " ".join([name, *slots])
        faults.append(f"{shown!r} is not `NAME slots=N` with N of 1 or more, given once")
    if not _is_reachable_name(name):
        allowed = (
            "letters, digits, dots, _ and -, or USER@NAME, or an IPv6 address without brackets"
        )
        return None, [*faults, f"{name!r} is no host name: {allowed}"]
    return _HostLine(number, name, int(right[1]) if right else 0), faults


def _is_reachable_name(name: str) -> bool:
    """Return True if ssh accepts `name`: NAME or USER@NAME; NAME may be an IPv6 address."""
    user, _, host = name.rpartition("@")
    if "@" in name and not NAME.fullmatch(user):
        return False
    return bool(NAME.fullmatch(host)) or _normalise_ipv6(host) is not None


def _normalise_ipv6(host: str) -> str | None:
    """Return the shortest form of `host`, an IPv6 address; None for other text."""
    try:
        return str(ipaddress.IPv6Address(host))
    except ValueError:
        return None


def _normalise_machine_name(name: str) -> str:
    """Return the key of a machine: equal for all users and all forms of its address."""
    host = name.rpartition("@")[2]
    return _normalise_ipv6(host) or host.lower()


def _assign_expert_ranks(
    lines: Sequence[_HostLine], experts: int
) -> tuple[dict[str, range] | None, list[tuple[int, str]]]:
    """Assign the ranks of all slots to experts, as `DomainTopology` does.

    Args:
        lines: the machines, without faults.
        experts: number of experts.
    Returns:
        ranks of each expert by its number as text, None if they cannot be divided evenly; and
        faults with their line numbers, such as an expert on two machines where one could hold it.
    """
    machines = [line.name for line in lines for _ in range(line.slots)]
    world = len(machines)
    if world % experts and experts % world:
        allowed_counts = [
            n for n in range(1, 2 * world + experts) if not (n % experts and experts % n)
        ]
        nearest_counts = [
            *[n for n in allowed_counts if n < world][-1:],
            next(n for n in allowed_counts if n > world),
        ]
        possible = " or ".join(map(str, nearest_counts))
        fault = f"{world} slots cannot give {experts} experts as many ranks each; use {possible}"
        return None, [(0, fault)]
    ranks_per_expert, experts_per_rank = max(1, world // experts), max(1, experts // world)
    groups = {
        str(e): range(start, start + ranks_per_expert)
        for e in range(experts)
        for start in [e // experts_per_rank * ranks_per_expert]
    }
    numbers = {line.name: line.number for line in lines}
    faults = []
    for name, split in find_groups_on_several_machines(machines, groups).items():
        fault = (
            f"expert {name} has ranks {format_range(groups[name])}, on {' and '.join(split)}, "
            f"where one machine could hold all; give slots in multiples of {ranks_per_expert}"
        )
        faults.append((numbers[split[0]], fault))
    return groups, faults


def _raise_faults(path: str | Path, faults: Sequence[tuple[int, str]]) -> None:
    """Raise UserError for one fault, HostfileFaults for several; without faults return.

    `faults` are pairs of a line number, 0 for the whole file, and a text.
    """
    listed = [f"line {number}: {fault}" if number else fault for number, fault in faults]
    if len(listed) == 1:
        raise UserError(f"hostfile {path}{', ' if faults[0][0] else ': '}{listed[0]}")
    if listed:
        raise HostfileFaults(path, listed)


def _probe_ssh(name: str, port: int | None) -> tuple[float, str]:
    """Log in to the machine `name` by ssh without a password, and run `true` there.

    Args:
        port: port of ssh; None: as ssh is configured.
    Returns:
        duration in seconds, and the fault as a text, "" without one.
    """
    command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_SECONDS}"]
    command += [] if port is None else ["-p", str(port)]
    start_time = time.monotonic()
    try:
        completed = subprocess.run(
            [*command, name, "true"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SSH_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return SSH_SECONDS, f"no answer by ssh within {SSH_SECONDS} s"
    except OSError as error:
        return 0.0, f"ssh cannot be run: {error.strerror}"
    seconds = time.monotonic() - start_time
    lines = [line.strip() for line in completed.stderr.splitlines() if line.strip()]
    if completed.returncode:
        return seconds, f"ssh says {lines[-1] if lines else f'exit code {completed.returncode}'!r}"
    return seconds, ""
