"""The objective of classification against closed forms."""

import math
from types import SimpleNamespace

import pytest
import torch

from megamod.models.mux.bert import MuxBertForSequenceClassification
from megamod.models.mux.configuration import MuxBertConfig
from megamod.train.objectives import ClassificationObjective

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
    objective = ClassificationObjective(("input_ids",), CPU, False)
    assert objective.count_items(batch) == (3,)
    scored = objective.compute_loss(engine(LOGITS), batch, (6.0,))
    assert float(scored.loss) == pytest.approx(expected / 6)
    assert scored.total.tolist() == [pytest.approx(expected)] and scored.items.tolist() == [3.0]
    rows = {"input_ids": torch.zeros(2, 2), "labels": torch.tensor([1, 0]), "items": 2}
    scored = objective.compute_loss(engine(LOGITS[0]), rows, (2.0,))
    assert float(scored.loss) == pytest.approx((nll(LOGITS[0, 0], 1) + nll(LOGITS[0, 1], 0)) / 2)


def test_values():
    batch = {"input_ids": torch.zeros(2, 1), "labels": torch.tensor([1.0, 4.0]), "items": 2}
    scored = ClassificationObjective(("input_ids",), CPU, True).compute_loss(
        engine(torch.tensor([[2.0], [1.0]])), batch, (4.0,)
    )
    assert float(scored.loss) == pytest.approx((1 + 9) / 4)


def test_retrieval_beside_the_task():
    torch.manual_seed(0)
    config = MuxBertConfig(
        vocab_size=120,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
        retrieval_loss_coeff=0.5,
    )
    model = MuxBertForSequenceClassification(config).eval()
    ids = torch.randint(5, 120, (4, 6))
    mask = torch.ones_like(ids)
    ids[1, 4:], mask[1, 4:] = 0, 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2, 1, 0])}
    batch["items"] = 4
    objective = ClassificationObjective(
        ("input_ids", "attention_mask"), CPU, False, retrieved_per_token=0.5
    )
    assert objective.count_items(batch) == (4, 11.0)
    torch.manual_seed(5)
    scored = objective.compute_loss(model, batch, (8.0, 22.0))
    torch.manual_seed(5)
    output = model(ids, attention_mask=mask, labels=batch["labels"])
    count = output.retrieval_count
    expected = output.task_loss / 2 + 0.5 * output.retrieval_loss * count / 22
    assert torch.allclose(scored.loss, expected)
    assert torch.allclose(scored.total, output.task_loss[None] * 4)
    result = scored.further["retrieval_accuracy"]
    assert result.tolist() == [float(output.retrieval_correct), float(count)] and count <= 12
