"""Distillation of a stock BERT into a multiplexed one: the loss, a run, and what is refused."""

from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from test_encoder_lm import INSTANCES, LENGTH, SMALL, make_place, results, run, weights
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, BertModel

from megamod.args import ModelArgs, MuxArgs
from megamod.data.lm.databin import DataBin
from megamod.errors import UserError
from megamod.models.mux.bert import MuxBertModel
from megamod.models.mux.configuration import MuxBertConfig
from megamod.runs.pretrain.encoder_lm import build_encoder_config
from megamod.runs.pretrain.encoder_start import load_teacher
from megamod.train.encoder_objective import EncoderObjective, compute_distillation_losses

DISTILL = dict(objective="distillation", model="plain", init_from=None)
SIZES = dict(**SMALL, vocab_size=45, max_position_embeddings=LENGTH, pad_token_id=0)


def alone(rank: int, folder: Path) -> None:
    run(folder, "one", **DISTILL)
    run(folder, "cut", stop=2, **DISTILL)
    run(folder, "cut", **DISTILL)
    after = {**DISTILL, "init_from": str(folder / "one" / "model")}
    run(folder, "after", teacher=str(folder / "plain"), **after)


def together(rank: int, folder: Path) -> None:
    run(folder, "two", **DISTILL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = make_place(tmp_path_factory.mktemp("distilled"))
    on_ranks(1, alone, folder)
    on_ranks(2, together, folder)
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("bare"))


@pytest.mark.slow
def test_runs(folder):
    """Resumed with equal bits, the same on two ranks, nearer to the teacher with more steps."""
    whole, cut, two = (weights(folder, name) for name in ("one", "cut", "two"))
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())
    moved = sum(
        float((whole[f"bert.{n}"] - t.detach()).square().sum())
        for n, t in BertModel.from_pretrained(folder / "plain").named_parameters()
        if f"bert.{n}" in whole
    )
    assert 0 < sum(float((whole[n] - two[n]).square().sum()) for n in whole) < 1e-8 * moved
    scores = [results(folder, name) for name in ("one", "after")]
    assert scores[1]["task_loss"] < scores[0]["task_loss"]
    assert -1 < scores[0]["similarity"] < scores[1]["similarity"] < 1


@pytest.mark.slow
def test_the_model_starts_a_classifier(folder):
    """The demultiplexer that finetuning needs is there, and the model loads as a bare one."""
    path = folder / "one" / "model"
    assert type(AutoModel.from_pretrained(path)) is MuxBertModel
    model, report = AutoModelForSequenceClassification.from_pretrained(
        path, output_loading_info=True
    )
    assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert model.config.num_instances == INSTANCES


def test_the_loss_is_the_distance_to_the_teacher():
    torch.manual_seed(0)
    teacher = BertModel(BertConfig(**SIZES)).eval()
    model = MuxBertModel(MuxBertConfig(**SIZES, num_instances=2, cls_token_id=2)).eval()
    ids = torch.randint(5, 45, (4, LENGTH))
    ids[1, 5:] = 0
    before = ids.clone()
    losses = partial(
        compute_distillation_losses, device=torch.device("cpu"), teacher=teacher, cls_token_id=2
    )
    batch = {"input_ids": ids, "unpadded": int((ids != 0).sum())}
    objective = EncoderObjective(losses, ("unpadded",), "task_loss")
    scored = objective.compute_loss(model, batch, (10.0,))
    # By hand, row by row, the teacher without padding.
    total, similarity = 0.0, 0.0
    states = model(input_ids=ids).last_hidden_state.detach()
    for row in range(4):
        length = 5 if row == 1 else LENGTH
        alone = ids[row : row + 1, :length].clone()
        alone[0, 0] = 2
        target = teacher(input_ids=alone).last_hidden_state[0]
        total += float((states[row, :length] - target).square().mean(-1).sum())
        similarity += float(torch.cosine_similarity(states[row, :length], target, dim=-1).sum())
    assert torch.equal(ids, before)
    assert scored.loss.item() == pytest.approx(total / 10, rel=1e-4)
    assert scored.total.item() == pytest.approx(total, rel=1e-4) and scored.items.tolist() == [29]
    assert scored.further["similarity"].tolist() == pytest.approx([similarity, 29], rel=1e-4)
    scored.loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert model.demultiplexer is not None
    assert all(p.grad is not None for p in model.demultiplexer.parameters())


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("mux", "--teacher .*mux: is a model of type 'mux_bert'"),
        ("wide", "--teacher .*wide: its states have 32 features, the model's 16"),
        ("small", "--teacher small is no folder or hub name of a stock BERT"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(bare, teacher, message):
    if teacher == "wide" and not (bare / teacher).exists():
        BertModel(BertConfig(**{**SIZES, "hidden_size": 32})).save_pretrained(bare / teacher)
    source = teacher if teacher == "small" else str(bare / teacher)
    mux = MuxArgs(objective="distillation", num_instances=INSTANCES, teacher=source)
    model, data = ModelArgs(model=str(bare / "plain")), DataBin(bare / "bin")
    config = build_encoder_config(model, mux, data, LENGTH)
    with pytest.raises(UserError, match=message):
        load_teacher(model, mux, config, data)


def test_one_instance_is_refused():
    with pytest.raises(UserError, match="--objective distillation with --num_instances 1"):
        MuxArgs(objective="distillation")
