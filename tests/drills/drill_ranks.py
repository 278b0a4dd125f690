"""D: a rank that dies or stops at any call that changes the disk, and ranks that disagree.

The others end with exit code 4 within the timeout and ten seconds, and name the rank that is lost;
those that wait for one that is stopped print their stacks before. If only rank 0 has something left
to do, tables and pictures beside a published model, the others have ended with 0. No process is
left, and the port where the ranks met can be bound again. The same command goes on to what
undisturbed ranks write.
Ranks that were started with different flags or data all end with exit code 2 before the first step.
"""

import os
import random
import socket
import time
from collections.abc import Collection
from pathlib import Path

import psutil
import pytest
from drills.commands import list_leftovers, make_workplace, read_tree
from drills.sizes import SEED, SIZE, pick, report
from drills.warm import HUNG, Command, Outcome, Warm
from ranks import free_port

DEATHS = pick(1, 50)
DISAGREEMENTS = pick(1, 20)
WORLDS = (2, 4) if SIZE == "nightly" else (2,)
TIMEOUT, GRACE = 10, 10  # seconds
START = 60  # seconds until all ranks have met
SPREAD = 4  # sites that a rank may have fewer than in another run
EVENTS = ("kill", "exit", "error", "stop")
RUN = ("pretrain", "in/lm.yaml", "--output_dir", "out", "--dist_timeout", str(TIMEOUT))
RUN += ("--per_device_train_batch_size", "1")
DIFFERENT = (
    *(
        ("--learning_rate", "0.1"),
        ("--seed", "7"),
        ("--max_steps", "5"),
        ("--untie", "feedforward"),
    ),
    *(("--global_batch_size", "8"), ("--max_seq_length", "8"), ("--data", "in/bin2")),
    *(("--nonfinite", "skip"), ("--save_steps", "1"), ("--domains", "law")),
)


def start_ranks(
    warm: Warm,
    folder: str,
    world: int,
    victim: int = 0,
    further: tuple = (),
    port: int | None = None,
    **event: object,
) -> list[int]:
    """Start the ranks of a run; `further` arguments or an `event` are those of the victim."""
    meet = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port or free_port()))
    meet["WORLD_SIZE"] = str(world)
    return [
        warm.start(
            Command(
                (*RUN, *(further if rank == victim else ())),
                folder,
                variables={**meet, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                **(event if rank == victim else {}),
            )
        )
        for rank in range(world)
    ]


def wait_for_stop(pid: int) -> bool:
    """Wait until a process is stopped; False if it ends first, or nothing happens."""
    deadline = time.monotonic() + START
    while time.monotonic() < deadline:
        status = psutil.Process(pid).status()
        if status in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
            return status == psutil.STATUS_STOPPED
        time.sleep(0.05)
    return False


def lose_rank(
    warm: Warm, folder: Path, world: int, victim: int, site: int, event: str
) -> list[str] | None:
    """Lose a rank; returns descriptions of what is wrong with the end of the others.

    None: the rank ended before it came to the site. How many it passes depends on which rank is the
    first to make a folder.
    """
    port = free_port()
    pids = start_ranks(warm, str(folder), world, victim, port=port, site=site, event=event)
    outcomes: dict[int, tuple[Outcome, float]] = {}
    try:
        if event == "stop":
            is_lost = wait_for_stop(pids[victim])
        else:
            is_lost = warm.wait(pids[victim], START).code != 0
        began = time.monotonic()
        for rank in set(range(world)) - {victim}:
            outcome = warm.wait(pids[rank], TIMEOUT + GRACE + 5)
            outcomes[rank] = outcome, time.monotonic() - began
    finally:
        warm.kill(pids[victim])
        if event == "stop":
            warm.wait(pids[victim])
    if not is_lost:
        return None
    wrong: list[str] = []
    codes = {outcome.code for outcome, _ in outcomes.values()}
    if victim != 0 or codes != {0} or not (folder / "out" / "model").is_dir():
        for rank, (outcome, seconds) in outcomes.items():
            wrong += check_end(outcome, rank, victim, seconds)
            if event == "stop" and not wrong:
                wrong += check_stacks(outcome, rank)
    return wrong + list_remains(pids, port)


def check_stacks(outcome: Outcome, rank: int) -> list[str]:
    """Describe what is wrong if a rank did not print its stacks before it ended for a timeout."""
    before = outcome.text.rpartition("DistributedFailure")[0]
    words = f"rank {rank} on {os.uname().nodename}: no step has ended", "most recent call first"
    missing = [text for text in words if text not in before]
    return [f"rank {rank} printed no stacks ({missing}): {before[-500:]}"] if missing else []


def list_remains(groups: Collection[int], port: int) -> list[str]:
    """Describe processes of the process groups that are left, and the port if it is still held."""
    alive = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) in groups and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process.pid)
        except (OSError, psutil.Error):
            continue
    wrong = [f"processes {alive} are left"] * bool(alive)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen()
        except OSError as error:
            wrong.append(f"port {port} is still held: {error.strerror}")
    return wrong


def check_end(outcome: Outcome, rank: int, victim: int, seconds: float) -> list[str]:
    """Describe what is wrong with the end of a rank that lost another one."""
    # The signs of life are in the process of rank 0: without it, its address is known.
    host = "127.0.0.1" if victim == 0 else os.uname().nodename
    if outcome.code == HUNG or seconds > TIMEOUT + GRACE:
        return [f"rank {rank} took {seconds:.0f} s"]
    if outcome.code != 4:
        return [f"rank {rank} ended with {outcome.code}: {outcome.text[-500:]}"]
    names = (f"rank {victim} on {host}", f"rank {victim}: ", f"rank {victim}, which has not joined")
    if not any(name in outcome.text for name in names):
        return [f"rank {rank} does not name rank {victim}: {outcome.text[-500:]}"]
    return []


@pytest.fixture(scope="module")
def whole(warm, inputs, tmp_path_factory):
    """From a world size to the tree of undisturbed ranks, and the sites of each."""
    results: dict[int, tuple[dict[str, str], list[int]]] = {}

    def run(world: int) -> tuple[dict[str, str], list[int]]:
        if world not in results:
            folder = make_workplace(tmp_path_factory.mktemp("ranks") / "whole", inputs)
            pids = start_ranks(warm, str(folder), world)
            outcomes = [warm.wait(pid, 120) for pid in pids]
            assert [o.code for o in outcomes] == [0] * world, [o.text[-900:] for o in outcomes]
            results[world] = read_tree(folder / "out"), [outcome.sites for outcome in outcomes]
        return results[world]

    return run


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("world", WORLDS)
def test_the_others_end_and_name_the_lost_rank(
    world, warm, inputs, whole, tmp_path, record_property
):
    draw, lost = random.Random(f"{SEED} {world}"), []
    expected, sites = whole(world)
    for number in range(DEATHS // len(WORLDS)):
        victim, event = draw.randrange(world), EVENTS[number % len(EVENTS)]
        # A rank that is alone at its first sites has no peers yet to lose it.
        last = draw.randrange(min(4, sites[victim] - 1), sites[victim])
        for site in range(last, last - SPREAD, -1):
            folder, case = (
                make_workplace(tmp_path / f"{number}-{site}", inputs),
                (victim, site, event),
            )
            wrong = lose_rank(warm, folder, world, *case)
            if wrong is not None:
                break
        assert wrong is not None, f"no loss at the sites {last} to {site} of rank {victim}"
        pids = start_ranks(warm, str(folder), world)
        outcomes = [warm.wait(pid, 120) for pid in pids]
        if any(outcome.code for outcome in outcomes):
            wrong.append(f"again: {[(o.code, o.text[-400:]) for o in outcomes]}")
        else:
            tree, left = read_tree(folder / "out"), list_leftovers(folder)
            different = [key for key in expected | tree if expected.get(key) != tree.get(key)]
            wrong += [f"different: {different}, left: {left}"] * bool(different or left)
        lost += [(case, text) for text in wrong]
    report(record_property, DEATHS // len(WORLDS), len(lost))
    assert lost == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ranks_that_disagree_all_end_at_once(warm, inputs, tmp_path, record_property):
    draw, lost = random.Random(SEED), []
    for number in range(DISAGREEMENTS):
        folder = make_workplace(tmp_path / str(number), inputs)
        victim, further = draw.randrange(2), DIFFERENT[(number + SEED) % len(DIFFERENT)]
        pids = start_ranks(warm, str(folder), 2, victim, further)
        outcomes = [warm.wait(pid, START) for pid in pids]
        if [outcome.code for outcome in outcomes] != [2, 2]:
            lost.append((victim, further, [(o.code, o.text[-500:]) for o in outcomes]))
        elif not any("disagree about" in outcome.text for outcome in outcomes):
            lost.append((victim, further, [o.text[-500:] for o in outcomes]))
        if (folder / "out" / "checkpoints").exists():
            lost.append((victim, further, "wrote a checkpoint"))
    report(record_property, DISAGREEMENTS, len(lost))
    assert lost == []
