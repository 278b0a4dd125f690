"""Answers on a whole split: every row once, groups filled, the same on any number of ranks."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from megamod.data.tasks.classification import EncodedRows, iterate_held_out_rows
from megamod.evaluation.predict import Predictor, select_word_labels


class Mixed(nn.Module):
    """N rows share what they are answered with: logits of a row depend on its whole group."""

    def __init__(self, instances: int, per_token: bool):
        super().__init__()
        self.instances, self.per_token = instances, per_token
        self.register_buffer("weight", torch.arange(30.0).reshape(10, 3).sin())
        self.calls = 0

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        assert len(input_ids) % self.instances == 0 and not self.training
        self.calls += 1
        rows = self.weight[input_ids] * attention_mask[..., None]
        groups = rows.unflatten(0, (-1, self.instances)).mean(1, keepdim=True)
        slots = torch.arange(1, self.instances + 1)[:, None, None]
        logits = (groups * slots).flatten(0, 1)
        return SimpleNamespace(logits=logits if self.per_token else logits.sum(1))


def encoded(rows: int, per_token: bool) -> EncodedRows:
    random = np.random.default_rng(rows)
    lengths = random.integers(2, 7, rows)
    ids = random.integers(1, 10, lengths.sum()).astype(np.int32)
    heads = [np.arange(length) for length in lengths] if per_token else None
    offsets = np.cumsum([0, *lengths])
    return EncodedRows(ids, np.zeros(len(ids), np.int8), offsets, None, heads, 0, 0, 8)


def naive(data: EncodedRows, instances: int, per_token: bool) -> list[list[float]] | list[int]:
    """Group by group; the last one is filled with the rows from the start of its batch."""
    model = Mixed(instances, per_token).eval()
    rows = [torch.from_numpy(data.ids[a:b]) for a, b in pairwise(data.offsets)]
    answers = []
    for start in range(0, len(rows), 2 * instances):
        batch = rows[start : start + 2 * instances]
        filled = [*batch, *(batch * instances)[: -len(batch) % instances]]
        ids = torch.zeros(len(filled), 8, dtype=torch.int64)
        for position, row in zip(ids, filled, strict=True):
            position[: len(row)] = row
        logits = model(ids, (ids > 0).long()).logits
        for row, logit in zip(batch, logits, strict=False):
            answers += logit[: len(row)].argmax(-1).tolist() if per_token else [logit.tolist()]
    return answers


@pytest.mark.parametrize("per_token", [False, True], ids=["rows", "tokens"])
@pytest.mark.parametrize(("rows", "instances"), [(7, 1), (7, 2), (13, 3), (1, 5)])
def test_groups_are_those_of_the_file_on_any_ranks(rows, instances, per_token):
    data = encoded(rows, per_token)
    expected = np.array(naive(data, instances, per_token))
    for parts in (1, 2, 3):
        answers, calls = 0, set()
        for part in range(parts):  # the ranks one after the other, their answers summed
            model = Mixed(instances, per_token).train()
            held = list(iterate_held_out_rows(data, 2 * instances, instances, None))
            names = ("input_ids", "attention_mask")
            predictor = Predictor(model, names, torch.device("cpu"), part, parts)
            answers = answers + predictor(data, held)
            calls.add(model.calls)
            assert model.training
        np.testing.assert_allclose(answers, expected, atol=1e-6)
        assert len(calls) == 1  # ranks of ZeRO 3 run equally often


@pytest.mark.parametrize("per_token", [False, True], ids=["rows", "tokens"])
def test_copies_are_averaged_on_any_ranks(per_token):
    """Against a loop over what the model was fed, in which a row is told by its ids."""
    data, instances = encoded(7, per_token), 3
    rows = [data.ids[a:b].tolist() for a, b in pairwise(data.offsets)]
    assert len({tuple(row) for row in rows}) == 7
    held = list(iterate_held_out_rows(data, 12, instances, None, ensemble=True, seed=1))
    assert [(item.start, item.stop) for item in held] == [(0, 4), (4, 7)]
    model, expected, places = Mixed(instances, per_token).eval(), [], set()
    for number, row in enumerate(rows):
        batch = held[number // 4].batch
        lengths = batch["attention_mask"].sum(1).tolist()
        fed = [ids[:n].tolist() for ids, n in zip(batch["input_ids"], lengths, strict=True)]
        copies = [line for line, ids in enumerate(fed) if ids == row]
        assert len(copies) == instances and len(fed) % instances == 0
        places.add(tuple(line % instances for line in copies))
        logits = model(batch["input_ids"], batch["attention_mask"]).logits
        mean = sum(logits[line] for line in copies) / instances
        expected += mean[: len(row)].argmax(-1).tolist() if per_token else [mean.tolist()]
    assert len(places) > 1
    for parts in (1, 2):
        answers = 0
        for part in range(parts):
            names = ("input_ids", "attention_mask")
            predictor = Predictor(model, names, torch.device("cpu"), part, parts)
            answers = answers + predictor(data, held)
        np.testing.assert_allclose(answers, expected, atol=1e-6)


def test_speed_is_that_of_passes_alone_and_without_the_first(monkeypatch):
    data = encoded(7, False)
    times = iter([0.0, 100.0, 200.0, 200.5, 300.0, 301.0, 400.0, 400.5])  # of 2, 2, 2 and 1 rows
    monkeypatch.setattr("megamod.evaluation.predict.time.perf_counter", lambda: next(times))
    model = Mixed(2, False)
    predictor = Predictor(model, ("input_ids", "attention_mask"), torch.device("cpu"))
    first, *others = iterate_held_out_rows(data, 2, 2, None)
    predictor(data, [first])
    assert predictor.instances_per_second == pytest.approx(2 / 100)
    predictor(data, others)
    assert predictor.instances_per_second == pytest.approx((2 + 2 + 1) / (0.5 + 1.0 + 0.5))


def test_labels_of_words_and_of_those_that_were_cut_off():
    data = EncodedRows(
        np.zeros(7, np.int32), np.zeros(7, np.int8), np.array([0, 4, 7]), None,
        [np.array([1, 2]), np.array([1, -1])], 0, 1, 4,
    )  # fmt: skip
    answers = np.array([0, 2, 1, 0, 0, 1, 0])
    labels = select_word_labels(data, answers, ["B-A", "O", "I-A"])
    assert labels == [["I-A", "O"], ["O", "O"]]
    assert select_word_labels(data, answers, ["X", "Y", "Z"])[1] == ["Y", "X"]
