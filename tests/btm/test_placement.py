"""Packing of jobs on slots: rules on small clusters, and properties on random ones."""

import random
from pathlib import Path

import pytest

from megamod.btm import jobs
from megamod.btm.placement import (
    allocate_slots,
    check_job_fits,
    find_free_port,
    format_include,
    list_local_slots,
    parse_include,
)
from megamod.btm.tasks import Stage
from megamod.dist.hostfile import Host
from megamod.errors import UserError


def cluster(*sizes: int) -> tuple[Host, ...]:
    return tuple(Host(f"n{k}", tuple(range(size))) for k, size in enumerate(sizes, start=1))


@pytest.mark.parametrize(
    ("sizes", "gpus", "jobs", "placed"),
    [
        ((8,), 2, 5, ["n1:0,1", "n1:2,3", "n1:4,5", "n1:6,7", None]),
        ((4, 4), 3, 3, ["n1:0,1,2", "n2:0,1,2", None]),  # one slot each is left, in two machines
        ((4, 2), 2, 3, ["n2:0,1", "n1:0,1", "n1:2,3"]),  # the tightest fit first
        ((2, 2, 2), 4, 2, ["n1:0,1@n2:0,1", None]),
        ((2, 4, 2), 8, 1, [None]),  # machines of equal size only
        ((2, 4, 4), 8, 1, ["n2:0,1,2,3@n3:0,1,2,3"]),
        ((4, 4), 6, 1, [None]),
    ],
)
def test_packing(sizes, gpus, jobs, placed):
    busy, result = [], []
    for _ in range(jobs):
        folder = allocate_slots(cluster(*sizes), busy, gpus)
        busy += folder or ()
        result.append(format_include(folder) if folder else None)
    assert result == placed


def test_a_whole_machine_stays_free_for_a_job_that_needs_it():
    hosts = cluster(4, 4)
    first = allocate_slots(hosts, (), 1)
    second = allocate_slots(hosts, first, 2)
    assert {host.name for host in (*first, *second)} == {"n1"}
    assert format_include(allocate_slots(hosts, [*first, *second], 4)) == "n2:0,1,2,3"


def test_no_slot_twice_and_no_split_on_random_clusters():
    draw = random.Random(0)
    for _ in range(300):
        hosts = cluster(*(draw.randint(1, 8) for _ in range(draw.randint(1, 4))))
        busy, largest = [], max(len(host.slots) for host in hosts)
        while folder := allocate_slots(hosts, busy, gpus := draw.randint(1, 12)):
            slots = [(host.name, slot) for host in [*busy, *folder] for slot in host.slots]
            assert len(slots) == len(set(slots))
            assert sum(len(host.slots) for host in folder) == gpus
            assert len(folder) == 1 if gpus <= largest else all(host in hosts for host in folder)
            assert parse_include(format_include(folder)) == folder
            busy += folder
            draw.random()


def test_jobs_that_can_never_run_are_refused():
    check_job_fits(cluster(2, 2), 4, "--gpus_per_expert")
    with pytest.raises(UserError, match=r"--gpus_per_expert 3: does not fit the slots \(n1 2, n2"):
        check_job_fits(cluster(2, 2), 3, "--gpus_per_expert")


def test_slots_of_this_machine(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert list_local_slots(None) == (Host("localhost", (0,)),)
    assert list_local_slots(3) == (Host("localhost", (0, 1, 2)),)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6")
    assert list_local_slots(None) == (Host("localhost", (4, 6)),)
    assert list_local_slots(1) == (Host("localhost", (4,)),)
    with pytest.raises(UserError, match="--slots 3: this machine has 2 GPUs"):
        list_local_slots(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1f")
    with pytest.raises(UserError, match="GPU-1f"):
        list_local_slots(None)


def test_jobs_share_the_cores(monkeypatch):
    """Without a number each process would start a thread for every core."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(jobs.os, "sched_getaffinity", lambda process: set(range(8)))
    stage = Stage("train", "pretrain.py", ("recipe.yaml",), done=bool, ranks=True)
    for ranks, slots, threads in ((1, 2, "4"), (2, 2, "4"), (1, 3, "2"), (1, 16, "1")):
        hosts = list_local_slots(slots)
        part = (Host("localhost", tuple(range(ranks))),)
        _, variables = jobs.build_command(stage, part, Path("commands"), None, 29500, hosts)
        assert variables == {"OMP_NUM_THREADS": threads}
    # Other hosts have cores of their own, and a number of the user counts.
    assert jobs.build_command(stage, hosts, Path("commands"), "hostfile", 29500, hosts)[1] == {}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert jobs.build_command(stage, hosts, Path("commands"), None, 29500, hosts)[1] == {}


def test_ports_are_distinct():
    ports: list[int] = []
    for _ in range(20):
        ports.append(find_free_port(ports))
    assert len(set(ports)) == 20
