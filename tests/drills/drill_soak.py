"""L: a long run of tiny steps takes no more memory or open files at its end than after a while."""

import logging
import os

import psutil
import pytest
from drills.sizes import pick, report
from ranks import on_ranks
from train.tiny_runs import run_tiny

STEPS = pick(300, 20_000)
GROWTH = 0.02


def train(rank: int, root) -> list[tuple[int, int]]:
    """Resident bytes and open files at ten steps of the run."""
    logging.disable(logging.CRITICAL)
    process, seen, calls = psutil.Process(), [], [0]

    class Counting:
        def __init__(self, objective):
            self.objective, self.count_items = objective, objective.count_items

        def compute_loss(self, *arguments):
            calls[0] += 1
            if calls[0] % (STEPS // 10) == 0:
                seen.append((process.memory_info().rss, len(os.listdir("/proc/self/fd"))))
            return self.objective.compute_loss(*arguments)

    options = dict(save_steps=STEPS // 20, keep=2, domains=("law",), per_domain=1)
    run_tiny(root, "none", 1, STEPS, wrap_objective=Counting, **options)
    return seen


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_and_open_files_stay(tmp_path, record_property):
    (seen,) = on_ranks(1, train, tmp_path, wait=3600)
    (first, files), (last, files_at_end) = seen[1], seen[-1]
    record_property("figures", f"RSS {first / 2**20:.0f} to {last / 2**20:.0f} MiB")
    report(record_property, STEPS, int(last > first * (1 + GROWTH)) + (files_at_end > files))
    assert last <= first * (1 + GROWTH) and files_at_end <= files, seen
