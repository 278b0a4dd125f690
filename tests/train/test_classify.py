"""The objective of classification against closed forms."""

import math
from types import SimpleNamespace

import pytest
import torch

from megamod.train.objectives import Classify

CPU = torch.device("cpu")
LOGITS = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[0.5, 0.5], [3.0, 0.0]]])


def nll(row: torch.Tensor, label: int) -> float:
    return math.log(sum(math.exp(x) for x in row.tolist())) - float(row[label])


def engine(logits: torch.Tensor):
    def call(input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=logits)

    return call


def test_labels_of_rows_and_of_tokens():
    labels = torch.tensor([[0, -100], [1, 0]])
    expected = nll(LOGITS[0, 0], 0) + nll(LOGITS[1, 0], 1) + nll(LOGITS[1, 1], 0)
    batch = {"input_ids": torch.zeros(2, 2), "labels": labels, "items": 3}
    objective = Classify(("input_ids",), CPU, False)
    assert objective.count(batch) == (3,)
    scored = objective.score(engine(LOGITS), batch, (6.0,))
    assert float(scored.loss) == pytest.approx(expected / 6)
    assert scored.total.tolist() == [pytest.approx(expected)] and scored.items.tolist() == [3.0]
    rows = {"input_ids": torch.zeros(2, 2), "labels": torch.tensor([1, 0]), "items": 2}
    scored = objective.score(engine(LOGITS[0]), rows, (2.0,))
    assert float(scored.loss) == pytest.approx((nll(LOGITS[0, 0], 1) + nll(LOGITS[0, 1], 0)) / 2)


def test_values():
    batch = {"input_ids": torch.zeros(2, 1), "labels": torch.tensor([1.0, 4.0]), "items": 2}
    scored = Classify(("input_ids",), CPU, True).score(
        engine(torch.tensor([[2.0], [1.0]])), batch, (4.0,)
    )
    assert float(scored.loss) == pytest.approx((1 + 9) / 4)
