"""Rows and tasks of a step on any number of ranks, and the contents of a mixed batch."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megamod.data.batches import BatchDivision
from megamod.data.tasks.classification import EncodedRows
from megamod.data.tasks.task_mixture import SAMPLINGS, TaskMixture
from megamod.errors import UserError

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "camtl"
SIZES = (7, 20, 12)  # classes, values, labels of tokens


def rows_of(task: int, count: int) -> EncodedRows:
    """Row r has 2 + r % 5 tokens, all of them 100 * task + r, and a label that names it."""
    sizes = 2 + np.arange(count) % 5
    ids = np.repeat(100 * task + np.arange(count), sizes).astype(np.int32)
    labels = {
        0: np.arange(count) % 3,
        1: (np.arange(count) + 0.8).astype(np.float32),
        2: np.where(ids % 2 == 0, ids, -100),
    }[task]
    return EncodedRows(
        ids=ids,
        segments=np.ones(len(ids), dtype=np.int8),
        offsets=np.cumsum([0, *sizes], dtype=np.int64),
        labels=labels.astype(np.int64) if task != 1 else labels,
        word_starts=[np.zeros(1, dtype=np.int64)] * count if task == 2 else None,
        pad_id=0,
        cut=0,
        longest=7,
    )


def mixture(sampling: str, *, rank: int = 0, ranks: int = 1, size: int = 4, batch: int = 4):
    return TaskMixture(
        [rows_of(task, count) for task, count in enumerate(SIZES)],
        sampling,
        BatchDivision(size, batch, rank, ranks),
        seed=3,
        alpha=0.5,
    )


def places(mixed: TaskMixture, steps: int) -> list[tuple[int, int]]:
    """(task, row) of all rows of so many micro-batches."""
    parts = [mixed.select_rows(number) for number in range(steps)]
    return [pair for tasks, rows in parts for pair in zip(tasks, rows, strict=True)]


def test_proportional_has_every_row_once_an_epoch():
    mixed = mixture("proportional")
    assert mixed.compute_steps_per_epoch(1.0) == 10
    everything = {(task, row) for task, size in enumerate(SIZES) for row in range(size)}
    result = places(mixed, 39)
    assert len(result) == 4 * sum(SIZES) and Counter(result) == dict.fromkeys(everything, 4)
    assert set(result[:39]) == everything and result[:39] != result[39:78]
    assert len({task for task, _ in result[:4]}) > 1


def test_uniform_gives_each_task_its_turn():
    mixed = mixture("uniform")
    assert mixed.compute_steps_per_epoch(1.0) == 15 and mixed.compute_steps_per_epoch(0.5) == 7
    tasks = [set(mixed.select_rows(step)[0]) for step in range(60)]
    assert all(len(item) == 1 for item in tasks)
    turns = [tuple(min(item) for item in tasks[start : start + 3]) for start in range(0, 60, 3)]
    assert all(sorted(turn) == [0, 1, 2] for turn in turns) and len(set(turns)) > 3
    first = [row for task, row in places(mixed, 60) if task == 1]
    assert [sorted(first[start : start + 20]) for start in (0, 20)] == [[*range(20)]] * 2


def test_sequential_ends_one_task_before_the_next():
    mixed = mixture("sequential")
    assert mixed.compute_steps_per_epoch(1.0) == 2 + 5 + 3
    tasks = [int(mixed.select_rows(step)[0][0]) for step in range(20)]
    assert tasks == ([0] * 2 + [1] * 5 + [2] * 3) * 2
    assert {row for task, row in places(mixed, 10) if task == 0} == set(range(7))


def test_temperature_lies_between():
    mixed = mixture("temperature")
    shares = Counter(task for task, _ in places(mixed, 5000))
    expected = np.sqrt(SIZES) / np.sqrt(SIZES).sum()
    assert np.allclose([shares[task] / 20000 for task in range(3)], expected, atol=0.01)


def test_candidates_are_equally_many_of_each_task():
    mixed = mixture("uncertainty")
    tasks, rows = mixed.select_rows(0)
    assert tasks.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert mixed.compute_steps_per_epoch(1.0) == 15
    own_values = [row for task, row in places(mixed, 5) if task == 1]
    assert sorted(own_values) == [*range(20)]
    assert sorted(row for task, row in places(mixed, 7) if task == 0) == sorted([*range(7)] * 4)
    assert mixed[0]["items"][:2] == [4.0, 4.0] and mixed[0]["rows"].tolist() == rows.tolist()


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_ranks_and_micro_batches_divide_what_one_process_has(sampling):
    whole = mixture(sampling, size=8, batch=8)
    for step in range(6):
        parts = [
            mixture(sampling, rank=rank, ranks=2, size=2, batch=8).select_rows(2 * step + turn)
            for rank in range(2)
            for turn in range(2)
        ]
        result = [pair for part in parts for pair in zip(*part, strict=True)]
        if sampling == "uncertainty":  # by task there, by rank here
            result.sort(key=lambda pair: pair[0])
        assert result == list(zip(*whole.select_rows(step), strict=True))


def test_rows_of_a_mixed_batch_keep_what_they_had():
    tasks, rows = np.array([1, 0, 2, 1, 2]), np.array([3, 6, 4, 19, 1])
    batch = mixture("proportional").gather_batch(tasks, rows)
    assert batch["input_ids"].shape == (5, 7)  # no further than rows may be long
    for position, (task, row) in enumerate(zip(tasks, rows, strict=True)):
        length = 2 + row % 5
        expected = [100 * task + row] * length + [0] * (7 - length)
        assert batch["input_ids"][position].tolist() == expected
        assert batch["attention_mask"][position].sum() == length
    # Values are not cut to whole numbers for standing beside classes.
    assert batch["labels"].tolist() == pytest.approx([3.8, 0.0, 0.0, 19.8, 0.0])
    assert batch["token_labels"][2].tolist() == [204] * 6 + [-100]
    assert (batch["token_labels"][[0, 1, 3, 4]] == -100).all()
    assert batch["items"] == [1.0, 2.0, 6.0]


def test_rows_that_do_not_divide():
    with pytest.raises(
        UserError, match=r"--global_batch_size 6: must be a multiple of 4 = 2 ranks x 2"
    ):
        mixture("proportional", ranks=2, size=2, batch=6)


@pytest.mark.parametrize("case", sorted(p.name for p in GOLDEN.glob("sampler_*")) or ["none"])
def test_epochs_as_recorded(case):
    if case == "none":
        pytest.skip(f"recorded tensors are not at {GOLDEN}")
    config = json.loads((GOLDEN / case / "config.json").read_text())
    mixed = TaskMixture(
        [rows_of(0, size) for size in config["dataset_sizes"]],
        "uncertainty",
        BatchDivision(config["train_batch_size"], config["train_batch_size"], 0, 1),
        seed=1,
        alpha=0.5,
    )
    assert mixed.steps_by_task == config["batches_per_task_loader"]
    assert mixed.compute_steps_per_epoch(1.0) == config["len_uncertainty"]
    assert mixed.compute_steps_per_epoch(0.5) == config["len_uncertainty_pct_0.5"]
