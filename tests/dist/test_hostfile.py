"""Hostfiles: reading, faults with their lines, placement of experts, logins by ssh."""

import os
import random
import time

import pytest

from megamod.dist.hostfile import (
    Host,
    HostfileFaults,
    check_hostfile,
    find_groups_on_several_machines,
    read_hostfile,
)
from megamod.dist.scope import Sharing
from megamod.dist.topology import DomainTopology
from megamod.errors import UserError


def write(folder, text):
    """Write a hostfile."""
    file = folder / "hostfile"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def fault_of(file, **more) -> str:
    """Message about a hostfile that is refused, without its name."""
    with pytest.raises(UserError) as error:
        check_hostfile(file, **more)
    return str(error.value).removeprefix(f"hostfile {file}")


def test_machines_in_the_order_of_the_file(tmp_path):
    file = write(tmp_path, "# cluster\n\nnode-2  slots=2 # first\n  node_1.local slots=8\n#a\n")
    assert read_hostfile(file) == (
        Host("node-2", (0, 1)),
        Host("node_1.local", tuple(range(8))),
    )


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "a slots=2\nb slots=2\nA slots=1\n",
            "line 3: 'A' appears again, first in line 1",
        ),
        ("a slots=0\n", "line 1: 'a slots=0' is not `NAME slots=N`"),
        ("\na slots=-3\n", "line 2: 'a slots=-3' is not"),
        ("a slots=8x\n", "line 1: 'a slots=8x' is not"),
        ("a slots=\n", "line 1: 'a slots=' is not"),
        ("a slots=1 slots=2\n", "line 1: 'a slots=1 slots=2' is not"),
        ("a\n", "line 1: 'a' is not"),
        ("slots=4\n", "line 1: 'slots=4' is not"),
        ("a slots=1 max_slots=2\n", "line 1: unknown word 'max_slots=2'"),
        ("a 8\n", "line 1: unknown word '8'"),
        ("a\tslots=1\n", "line 1: has a tab"),
        ("\ufeffa slots=1\n", "line 1: begins with a byte order mark"),
        ("a slots=1\r\n", "line 1: has a carriage return"),
        ("a;reboot slots=1\n", "line 1: 'a;reboot' is no host name"),
        ("a@b@c slots=1\n", "line 1: 'a@b@c' is no host name"),
        ("@b slots=1\n", "line 1: '@b' is no host name"),
        ("-o@b slots=1\n", "line 1: '-o@b' is no host name"),
        ("a@-oProxyCommand=x slots=1\n", "line 1: 'a@-oProxyCommand=x' is no host name"),
        ("[fd00::12] slots=1\n", "line 1: '[fd00::12]' is no host name"),
        ("fd00::12::1 slots=1\n", "line 1: 'fd00::12::1' is no host name"),
        ("host:22 slots=1\n", "line 1: 'host:22' is no host name"),
        ("ada@a slots=1\nbob@A slots=1\n", "line 2: 'bob@A' appears again, first in line 1"),
        ("fd00::12 slots=1\nx@FD00:0::12 slots=1\n", "'x@FD00:0::12' appears again"),
        ("-oProxyCommand=x slots=1\n", "line 1: '-oProxyCommand=x' is no host name"),
        (b"a slots=1\n\xff\xfe slots=1\n", "line 2: is not UTF-8 text"),
        ("# nobody\n", ": names no machine"),
        ("", ": names no machine"),
    ],
)
def test_one_fault(tmp_path, text, fault):
    assert fault in fault_of(write(tmp_path, text))


def test_users_and_ipv6_addresses(tmp_path):
    """DeepSpeed reads the same names and slots."""
    from deepspeed.launcher.runner import fetch_hostfile, parse_node_config_list

    text = "ada@node-1 slots=2\nfd00::12 slots=4\nada_2@fe80::1%eth0 slots=1\nnode-2 slots=3\n"
    file = write(tmp_path, text)
    hosts = read_hostfile(file)
    assert {host.name: len(host.slots) for host in hosts} == dict(fetch_hostfile(str(file)))
    assert [line.partition(":")[0] for line in check_hostfile(file).list_launcher_limits()] == [
        "note"
    ] * 2
    assert "no IPv6 address (fd00::12)" in check_hostfile(file).list_launcher_limits()[0]
    with pytest.raises(UserError, match=r"ada@node-1 cannot be selected by DeepSpeed's --include"):
        read_hostfile(file, require_selectable=True)
    for host in hosts:  # DeepSpeed selects what is said to be selectable, and nothing else
        try:
            chosen = list(parse_node_config_list(f"{host.name}:0"))
        except ValueError:
            chosen = []
        assert (chosen == [host.name]) == (host.name == "node-2")
    plain = write(tmp_path, "node-1 slots=2\nnode_2.local slots=1\n")
    assert not check_hostfile(plain).list_launcher_limits() and read_hostfile(
        plain, require_selectable=True
    )


def test_all_faults_at_once(tmp_path):
    text = "\ufeffa slots=2\r\nb\tslots=0\nc slots=4\na slots=3\n-x slots=1 foo\nd\n"
    with pytest.raises(HostfileFaults) as error:
        check_hostfile(write(tmp_path, text))
    numbers = [int(fault.split()[1].rstrip(":")) for fault in error.value.faults]
    assert numbers == [1, 1, 2, 2, 4, 5, 5, 6]
    lines = str(error.value).splitlines()
    assert len(lines) == 3 and lines[0].endswith(" has 8 faults:")
    assert lines[2].endswith("(and 6 more, which megamod check-hostfile lists)")


def test_a_missing_file(tmp_path):
    assert fault_of(tmp_path / "none") == ": cannot be read: No such file or directory"


@pytest.mark.parametrize(
    ("text", "experts", "fault"),
    [
        ("a slots=4\nb slots=4\n", 5, ": 8 slots cannot give 5 experts as many ranks each; use 5"),
        ("a slots=1\n", 3, None),  # one rank holds all three
        ("a slots=2\n", 3, ": 2 slots cannot give 3 experts as many ranks each; use 1 or 3"),
        ("a slots=3\n\nb slots=5\n", 4, ", line 1: expert 1 has ranks 2-3, on a and b"),
        ("a slots=2\nb slots=6\n", 4, None),
        ("a slots=3\nb slots=5\n", 8, None),
        ("a slots=2\nb slots=2\n", 1, None),  # no machine could hold all four
        ("a slots=3\nb slots=1\nc slots=4\n", 2, None),  # neither a nor b could hold all four
    ],
)
def test_experts_stay_inside_machines_that_can_hold_them(tmp_path, text, experts, fault):
    file = write(tmp_path, text)
    if fault is None:
        check_hostfile(file, experts=experts)
    else:
        assert fault_of(file, experts=experts).startswith(fault)


def test_ranks_of_experts_are_those_of_a_run(tmp_path):
    for experts, slots in [(4, (4, 4)), (4, (1, 1)), (8, (2, 2)), (2, (1, 1)), (3, (2, 4))]:
        text = "".join(f"n{k} slots={size}\n" for k, size in enumerate(slots))
        names = tuple(map(str, range(experts)))
        run = DomainTopology(sum(slots), names, Sharing.DEMIX)
        ranks = check_hostfile(write(tmp_path, text), experts=experts).experts
        assert ranks == {name: run.get_domain_ranks(name) for name in names}


def test_the_table(tmp_path):
    file = write(tmp_path, "node-1 slots=4\nn2 slots=1\nn3 slots=3\n")
    rows = [line.split() for line in check_hostfile(file, experts=8).format_hosts().splitlines()]
    assert rows == [
        ["host", "slots", "ssh", "ranks", "experts"],
        ["node-1", "4", "not", "tried", "0-3", "0-3"],
        ["n2", "1", "not", "tried", "4", "4"],
        ["n3", "3", "not", "tried", "5-7", "5-7"],
    ]
    assert "experts" not in check_hostfile(file).format_hosts()


def test_groups_that_are_split_without_need():
    """Against the definition, on random hosts."""
    draw = random.Random(0)
    for _ in range(200):
        slots = [draw.randint(1, 6) for _ in range(draw.randint(1, 4))]
        hosts = [f"n{k}" for k, size in enumerate(slots) for _ in range(size)]
        size = draw.choice([n for n in range(1, len(hosts) + 1) if len(hosts) % n == 0])
        groups = {str(g): range(g * size, g * size + size) for g in range(len(hosts) // size)}
        naive = {}
        for name, ranks in groups.items():
            touched = [h for k, h in enumerate(f"n{k}" for k in range(4)) if h in hosts]
            touched = [h for h in touched if any(hosts[r] == h for r in ranks)]
            roomy = any(slots[int(h[1:])] >= size for h in touched)
            if len(touched) > 1 and roomy:
                naive[name] = touched
        assert find_groups_on_several_machines(hosts, groups) == naive


SSH = """#!/bin/sh
while [ "$1" != true ]; do last=$2 host=$1; shift; done
case $host in
  slow*) exec sleep 60;;
  shut*) echo "Warning: old" >&2; echo "$host: Permission denied (publickey)." >&2; exit 255;;
  quiet*) exit 1;;
esac
sleep 0.2
echo "$*" >> {log}
"""


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """A program in place of ssh; the last word but `true` is the host."""
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(SSH.format(log=tmp_path / "log"))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "log"


def test_logins_run_at_the_same_time(tmp_path, ssh):
    file = write(tmp_path, "".join(f"n{k} slots=1\n" for k in range(12)))
    began = time.monotonic()
    checked = check_hostfile(file, ssh=True)
    assert time.monotonic() - began < 12 * 0.2
    assert all(0.2 < seconds < 2 for seconds in checked.ssh_seconds)
    assert len(ssh.read_text().splitlines()) == 12


def test_machines_that_do_not_answer(tmp_path, ssh, monkeypatch):
    monkeypatch.setattr("megamod.dist.hostfile.SSH_SECONDS", 1)
    file = write(tmp_path, "slow slots=1\nfine slots=1\nshut slots=0\nquiet slots=1\n")
    with pytest.raises(HostfileFaults) as error:
        check_hostfile(file, ssh=True, port=2222)
    assert error.value.faults == (
        "line 1: slow: no answer by ssh within 1 s",
        "line 3: 'shut slots=0' is not `NAME slots=N` with N of 1 or more, given once",
        "line 3: shut: ssh says 'shut: Permission denied (publickey).'",
        "line 4: quiet: ssh says 'exit code 1'",
    )


def test_without_ssh_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    fault = fault_of(write(tmp_path, "a slots=1\n"), ssh=True)
    assert fault == ", line 1: a: ssh cannot be run: No such file or directory"
