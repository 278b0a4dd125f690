"""Ranks end with their launcher, and the message about a lost rank names it."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from ranks import free_port

from megamod.dist import watch
from megamod.dist.watch import Heartbeat, is_launcher


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/venv/bin/python /venv/bin/torchrun --nproc_per_node 2 launchers/pretrain.py", True),
        ("python -u -m deepspeed.launcher.launch --world_info=x launchers/pretrain.py", True),
        ("python -m torch.distributed.run launchers/pretrain.py", True),
        ("/venv/bin/python3 /venv/bin/deepspeed --num_gpus 2 launchers/pretrain.py", True),
        ("python launchers/btm.py r.yaml --deepspeed ds.json", False),
        ("python -m pytest tests/dist", False),
        ("bash -c torchrun", False),
        ("", False),
    ],
)
def test_launchers_are_recognised(command, expected):
    assert is_launcher(command.split()) is expected


LAUNCHER = """
import subprocess, sys
rank = "import time; from megamod.dist.watch import watch_launcher; watch_launcher(30);"
rank += "print('up', flush=True); time.sleep(60)"
subprocess.run([sys.executable, "-c", rank])
"""


@pytest.mark.slow  # imports torch in another process
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_rank_ends_after_its_launcher(tmp_path, number):
    program = tmp_path / "torchrun"
    program.write_text(LAUNCHER)
    launcher = subprocess.Popen(
        [sys.executable, str(program)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert launcher.stdout.readline() == "up\n"
    launcher.send_signal(number)
    began = time.monotonic()
    # The rank holds the other end of the pipe: it ends with the rank.
    assert f"the launcher, process {launcher.pid}, is gone" in launcher.stdout.read()
    assert time.monotonic() - began < 10
    launcher.wait()


RANK = """
import os, signal, sys, torch
from megamod.dist.process import join_process_group
from megamod.errors import run_main
def main():
    join_process_group(float(sys.argv[1]))
    torch.distributed.barrier()
    rank = int(os.environ["RANK"])
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.recv(torch.ones(1), 1 if rank == 0 else 0)
run_main(main)
"""


def run_ranks(ranks, world, timeout):
    """From each of `ranks` of a job of `world` to its process and what it printed of errors."""
    meet = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(world))
    processes = {
        rank: subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RANK, str(timeout)],
            env={**os.environ, **meet, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ranks
    }
    return {
        rank: (process, process.communicate(timeout=120)[1]) for rank, process in processes.items()
    }


@pytest.mark.slow  # starts ranks
def test_a_lost_rank_is_named_with_its_host_also_by_ranks_that_wait_for_others():
    """Rank 2 waits for rank 0, whose process, with the store, has ended when rank 2 notices."""
    ranks = run_ranks(range(3), 3, 60)
    assert [ranks[rank][0].returncode for rank in range(3)] == [4, -signal.SIGKILL, 4]
    name = f"no sign of life of rank 1 on {os.uname().nodename} (process {ranks[1][0].pid})"
    for rank in (0, 2):
        assert f"rank {rank} on {os.uname().nodename} lost its peers; {name}: " in ranks[rank][1]


@pytest.mark.slow  # starts ranks
@pytest.mark.parametrize(
    ("absent", "named"),
    [
        (1, "no sign of life of rank 1, which has not joined"),
        (0, "no answer from rank 0 on 127.0.0.1, port "),
    ],
)
def test_a_rank_that_does_not_come_is_named(absent, named):
    present = 1 - absent
    process, shown = run_ranks([present], 2, 4)[present]
    assert process.returncode == 4 and named in shown


class Store:
    """Stands for a store that all ranks share; those in `beating` send signs of life."""

    def __init__(self, beating):
        self.values, self.beating, self.count = {}, beating, 0

    def clone(self):
        return self

    def set_timeout(self, timeout):
        pass

    def set(self, key, value):
        self.values[key] = value.encode()

    def get(self, key):
        kind, _, rank = key.partition("/")
        if kind == "beat" and int(rank) in self.beating:
            self.count += 1
            self.values[key] = f"{self.count} node{rank} 10{rank}".encode()
        return self.values[key]

    def compare_set(self, key, expected, value):
        assert expected == ""
        self.values.setdefault(key, value.encode())

    def check(self, keys):
        return all(key in self.values for key in keys)


@pytest.fixture
def heartbeat(monkeypatch):
    store = Store({0, 2})
    store.values |= {f"beat/{rank}": b"0 node1 101" for rank in range(4)}
    monkeypatch.setattr(watch, "BEAT", 0.02)
    monkeypatch.setattr(watch, "SILENCE", 0.3)
    beat = Heartbeat(store, rank=0, world=4, timeout=1.0)
    yield beat, store
    beat.stop()


def test_a_rank_whose_store_is_gone_prints_its_stacks(heartbeat, capfd, monkeypatch):
    beat, store = heartbeat
    gone = threading.Event()

    def wait_for_no_answer(key, value):
        gone.set()
        time.sleep(30)  # as long as the process that holds the store is stopped

    monkeypatch.setattr(store, "set", wait_for_no_answer)
    assert gone.wait(1)
    beat.record_step()
    time.sleep(0.95)  # of a timeout of one second
    shown = capfd.readouterr().err
    assert shown.count("no step has ended for") == 1 and "test_watch.py" in shown


def test_a_store_without_an_answer_is_not_waited_for(heartbeat, monkeypatch):
    beat, store = heartbeat
    monkeypatch.setattr(store, "check", lambda keys: time.sleep(30))
    monkeypatch.setenv("MASTER_ADDR", "node0")
    began = time.monotonic()
    assert beat.describe_lost_ranks() == "no answer from rank 0 on node0"
    assert time.monotonic() - began < 5


def test_silent_ranks_are_reported_once_and_stacks_before_the_timeout(heartbeat, capfd):
    beat, store = heartbeat
    store.values["failed/3"] = b"1"  # it ended because another one did
    assert beat.describe_lost_ranks() == "no sign of life of rank 1 on node1 (process 101)"
    time.sleep(1.5)
    beat.record_step()
    beat.stop()
    shown = capfd.readouterr().err
    assert len(re.findall(r"no sign of life of rank 1 on node1 \(process 101\) for", shown)) == 1
    assert "no sign of life of rank 2" not in shown
    assert shown.count("no step has ended for") == 1 and "test_watch.py" in shown
