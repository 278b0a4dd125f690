"""Pretraining of encoders: stages, resuming, ranks, and what is refused."""

import json
import os
import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from failures import failing
from ranks import on_ranks
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
    ElectraConfig,
    ElectraForPreTraining,
)

from megamod.args import DataArgs, ModelArgs, MuxArgs, OptimArgs, RunArgs, SafetyArgs
from megamod.data.corpus.binarize import binarize
from megamod.data.lm.databin import DataBin
from megamod.errors import UserError
from megamod.flags import parse_args
from megamod.models.mux.bert import MuxBertForMaskedLM
from megamod.models.mux.configuration import MuxBertConfig, MuxElectraConfig
from megamod.models.mux.generator import MuxElectraForReplacedTokens
from megamod.runs.pretrain import encoder_lm
from megamod.runs.pretrain.encoder_lm import build_encoder_config, make_loss_function
from megamod.runs.pretrain.encoder_vocabulary import make_masking
from megamod.train.encoder_objective import (
    EncoderObjective,
    compute_masked_lm_losses,
    compute_replaced_token_losses,
)

WORDS = [f"w{number}" for number in range(40)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
LENGTH, INSTANCES = 8, 2
BERT_DATA = dict(vocab_size=30522, pad_id=0, bos_id=101)


def make_place(folder: Path) -> Path:
    """A data-bin of words that follow each other in turn, and models without dropout."""
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]) + "\n")
    BertTokenizerFast(vocab=str(folder / "tokenizer" / "vocab.txt")).save_pretrained(
        folder / "tokenizer"
    )
    source = random.Random(1)
    for split, lines in (("train", 60), ("valid", 12), ("test", 12)):
        starts = [source.randrange(40) for _ in range(lines)]
        text = "\n\n".join(" ".join(WORDS[(s + i) % 40] for i in range(10)) for s in starts)
        (folder / "text").mkdir(exist_ok=True)
        (folder / "text" / f"{split}.txt").write_text(text + "\n")
    binarize({"text": folder / "text"}, str(folder / "tokenizer"), folder / "bin", add_bos=True)
    quiet = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, vocab_size=45)
    quiet |= dict(max_position_embeddings=LENGTH, pad_token_id=0)
    torch.manual_seed(3)
    mux = MuxBertConfig(**SMALL, **quiet, num_instances=INSTANCES, cls_token_id=2)
    MuxBertForMaskedLM(mux).save_pretrained(folder / "mux")
    BertForMaskedLM(BertConfig(**SMALL, **quiet)).save_pretrained(folder / "plain")
    electra = {**SMALL, **quiet, "num_instances": INSTANCES, "cls_token_id": 2, "mask_token_id": 4}
    smaller = dict(hidden_size=8, intermediate_size=16, num_attention_heads=1)
    for name, more in (
        ("electra", {}),
        ("generating", {"generator": "multiplexed", "generator_config": smaller}),
    ):
        config = MuxElectraConfig(**electra, embedding_size=16, **more)
        MuxElectraForReplacedTokens(config).save_pretrained(folder / name)
    plain = ElectraConfig(**SMALL, **quiet, embedding_size=16)
    ElectraForPreTraining(plain).save_pretrained(folder / "plain-electra")
    return folder


def run(folder: Path, output: str, *, model: str = "mux", stop: int = 4, evals: int = 0, **mux):
    """Some steps of 8 rows."""
    from megamod.runs.pretrain.encoder_lm import pretrain_encoder

    pretrain_encoder(
        RunArgs(
            output_dir=str(folder / output),
            max_steps=4,
            stop_step=stop,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            global_batch_size=8,
            logging_steps=2,
            save_steps=2,
            eval_steps=evals,
            report_to="none",
        ),
        SafetyArgs(),
        ModelArgs(model=str(folder / model), init_from=mux.pop("init_from", str(folder / model))),
        OptimArgs(learning_rate=0.01, max_grad_norm=1.0, warmup_ratio=0.0, adam_epsilon=1e-4),
        MuxArgs(**{"objective": "masked_lm", "num_instances": INSTANCES, **mux}),
        DataArgs(data=str(folder / "bin"), max_seq_length=LENGTH),
    )


BOTH = dict(task_loss_coeff=0.5, retrieval_loss_coeff=0.5)
REPLACED = dict(objective="replaced_token", task_loss_coeff=0.5, retrieval_loss_coeff=0.5)
WARM_UP = dict(task_loss_coeff=0.0, retrieval_loss_coeff=1.0)


def fail(folder: Path) -> None:
    """Held-out files that are missing or cut, and a disk that is full in an evaluation."""
    databin = folder / "bin" / "text"
    for name, spoil in (("idx", Path.unlink), ("bin", lambda file: os.truncate(file, 6))):
        file = databin / f"valid_text.{name}"
        content = file.read_bytes()
        spoil(file)
        with pytest.raises(UserError, match=f"valid_text.{name}"):
            run(folder, "never", **BOTH)
        file.write_bytes(content)
    with failing(encoder_lm, "score_encoder"), pytest.raises(UserError, match="after step 1"):
        run(folder, "failed", evals=1, **BOTH)
    assert [p.name for p in (folder / "failed" / "checkpoints").glob("step-*")] == ["step-1"]
    run(folder, "failed", evals=1, **BOTH)


def alone(rank: int, folder: Path) -> None:
    after = str(folder / "electra-warm-up" / "model")
    run(folder, "one", **BOTH)
    run(folder, "cut", stop=2, **BOTH)
    run(folder, "cut", **BOTH)
    fail(folder)
    run(folder, "warm-up", **WARM_UP)
    run(folder, "after", init_from=str(folder / "warm-up" / "model"))
    run(folder, "plain-run", model="plain", num_instances=1)
    run(folder, "electra", model="electra", **REPLACED)
    run(folder, "electra-cut", model="electra", stop=2, **REPLACED)
    run(folder, "electra-cut", model="electra", **REPLACED)
    run(folder, "generated", model="generating", **REPLACED)
    run(folder, "generated-cut", model="generating", stop=2, **REPLACED)
    run(folder, "generated-cut", model="generating", **REPLACED)
    run(folder, "electra-warm-up", model="electra", objective="replaced_token", **WARM_UP)
    run(folder, "electra-after", model="electra", init_from=after, objective="replaced_token")
    run(folder, "electra-plain", model="plain-electra", objective="replaced_token", num_instances=1)


def together(rank: int, folder: Path) -> None:
    run(folder, "two", **BOTH)
    run(folder, "electra-two", model="electra", **REPLACED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = make_place(tmp_path_factory.mktemp("masked"))
    on_ranks(1, alone, folder)
    on_ranks(2, together, folder)
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("bare"))


def weights(folder: Path, output: str) -> dict[str, torch.Tensor]:
    return load_file(folder / output / "model" / "model.safetensors")


def results(folder: Path, output: str) -> dict[str, float]:
    return json.loads((folder / output / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "resumed"),
    [("one", "cut"), ("one", "failed"), ("electra", "electra-cut"), ("generated", "generated-cut")],
)
def test_a_resumed_run_has_equal_bits(folder, run, resumed):
    whole, cut = weights(folder, run), weights(folder, resumed)
    assert whole.keys() == cut.keys()
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())
    assert results(folder, run) == results(folder, resumed)
    assert not (folder / "never").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "alone", "shared"), [("mux", "one", "two"), ("electra", "electra", "electra-two")]
)
def test_two_ranks_make_the_step_of_one(folder, model, alone, shared):
    start = load_file(folder / model / "model.safetensors")
    first, two = weights(folder, alone), weights(folder, shared)
    moved = sum(float((first[n] - t).square().sum()) for n, t in start.items() if n in first)
    apart = sum(float((first[n] - two[n]).square().sum()) for n in first)
    assert moved > 0.01 and apart < 1e-8 * moved
    for name, value in results(folder, alone).items():
        if isinstance(value, float):
            assert results(folder, shared)[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.slow
def test_the_stages_hand_over(folder):
    assert results(folder, "warm-up").keys() >= {"retrieval_accuracy", "retrieval_loss"}
    assert "perplexity" not in results(folder, "warm-up")
    after = results(folder, "after")
    assert after["perplexity"] == pytest.approx(2.718281828 ** after["task_loss"], rel=1e-6)
    start, end = weights(folder, "warm-up"), weights(folder, "after")
    key = "instance_embedding"
    assert torch.equal(start[key], end[key])  # frozen by default
    moved = "retrieval_head.pre_decoder.weight"
    assert not torch.equal(start[moved], end[moved])
    lines = (folder / "one" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert any("retrieval_accuracy" in record and "loss" in record for record in records)


@pytest.mark.slow
def test_one_instance_is_the_stock_model(folder):
    model = AutoModelForMaskedLM.from_pretrained(folder / "plain-run" / "model")
    assert type(model) is BertForMaskedLM
    assert results(folder, "plain-run")["task_loss"] > 0


def batch_of(folder: Path, seed: int = 0) -> dict[str, object]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 45, (4, LENGTH), generator=draw)
    labels = ids.where(torch.rand(ids.shape, generator=draw) < 0.4, torch.tensor(-100))
    slots = torch.randint(INSTANCES, (2, LENGTH), generator=draw)
    masked = int((labels != -100).sum())
    return dict(
        input_ids=ids,
        labels=labels,
        retrieved_instances=slots,
        masked=masked,
        positions=slots.numel(),
    )


def masked(multiplexed: bool) -> EncoderObjective:
    losses = partial(compute_masked_lm_losses, device=torch.device("cpu"), multiplexed=multiplexed)
    return EncoderObjective(losses, ("masked", "positions"), "task_loss")


def test_the_objective_divides_each_sum_by_its_own_items(bare):
    model = AutoModelForMaskedLM.from_pretrained(bare / "mux").eval()
    model.config.task_loss_coeff, model.config.retrieval_loss_coeff = 0.25, 2.0
    batch = batch_of(bare)
    objective = masked(multiplexed=True)
    scored = objective.compute_loss(model, batch, (3.0, 5.0))
    # By hand, from the logits of all positions of each instance.
    logits = model(batch["input_ids"]).logits
    task = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    fed = batch["input_ids"].clone()
    fed[:, 0] = 2
    by_instance = logits.view(2, INSTANCES, LENGTH, -1)
    targets = fed.view(2, INSTANCES, LENGTH).gather(1, batch["retrieved_instances"][:, None])[:, 0]
    chosen = by_instance.gather(
        1, batch["retrieved_instances"][:, None, :, None].expand(-1, 1, -1, 45)
    )[:, 0]
    retrieval = F.cross_entropy(chosen.flatten(0, 1), targets.flatten(), reduction="sum")
    assert scored.loss.item() == pytest.approx(
        0.25 * task.item() / 3 + 2 * retrieval.item() / 5, rel=1e-5
    )
    assert objective.count_items(batch) == (batch["masked"], 16)
    assert scored.total.item() == pytest.approx(task.item(), rel=1e-5)
    assert scored.items.tolist() == [batch["masked"]]
    right, count = scored.further["retrieval_accuracy"].tolist()
    assert (right, count) == (float((chosen.argmax(-1) == targets).sum()), 16.0)
    total, count = scored.further["retrieval_loss"].tolist()
    assert total == pytest.approx(retrieval.item(), rel=1e-5) and count == 16


def test_the_stock_model_is_scored_alike(bare):
    model, batch = AutoModelForMaskedLM.from_pretrained(bare / "plain").eval(), batch_of(bare, 1)
    scored = masked(multiplexed=False).compute_loss(model, batch, (4.0, 1.0))
    mean = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item()
    assert scored.loss.item() == pytest.approx(mean * batch["masked"] / 4, rel=1e-5)
    assert not scored.further


@pytest.mark.parametrize(
    ("model", "mux", "message"),
    [
        ("gone", {}, "none of small, base, large, 1.3b"),
        ("mux", {"num_instances": 5}, "--num_instances 5: the model .* has 2"),
        (
            "mux",
            {"objective": "replaced_token"},
            "is a model of type 'mux_bert'; needed is 'mux_electra' for --objective replaced",
        ),
    ],
)
def test_models_that_do_not_fit_are_refused(bare, model, mux, message):
    data = DataBin(bare / "bin")
    args = ModelArgs(model=str(bare / model) if (bare / model).exists() else model)
    with pytest.raises(UserError, match=message):
        build_encoder_config(
            args,
            MuxArgs(**{"objective": "masked_lm", "num_instances": INSTANCES, **mux}),
            data,
            LENGTH,
        )


def test_positions_and_vocabulary_must_suffice(bare):
    data = DataBin(bare / "bin")
    with pytest.raises(UserError, match="8 positions; the data need 45 and 9"):
        build_encoder_config(
            ModelArgs(model=str(bare / "mux")),
            MuxArgs(objective="masked_lm", num_instances=INSTANCES),
            data,
            9,
        )


def test_named_sizes_take_flags(bare):
    mux = MuxArgs(
        objective="masked_lm", num_instances=5, retrieval_loss_coeff=1.0, task_loss_coeff=0.0
    )
    config = build_encoder_config(
        ModelArgs(model="base", num_hidden_layers=3), mux, DataBin(bare / "bin"), 8
    )
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (3, 768, 45)
    assert (config.num_instances, config.retrieval_loss_coeff) == (5, 1.0)
    masking = make_masking(DataBin(bare / "bin"), mux)
    assert masking.mask_id == 4 and set(masking.special_ids) == {0, 2, 3, 4}


@pytest.mark.slow
def test_electra_hands_over_to_a_classifier(folder):
    message = results(folder, "electra-after")
    assert message.keys() >= {"task_loss", "recall", "precision"} and "perplexity" not in message
    assert results(folder, "electra-warm-up").keys() >= {"retrieval_accuracy", "retrieval_loss"}
    assert results(folder, "generated")["generator_loss"] > 0
    for run in ("electra-after", "generated"):
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder / run / "model", output_loading_info=True
        )
        assert {name.split(".")[0] for name in report["missing_keys"]} == {"classifier"}
        assert not report["unexpected_keys"]
        kept = weights(folder, run)["electra.encoder.layer.0.output.dense.weight"]
        assert torch.equal(model.electra.encoder.layer[0].output["dense"].weight, kept)
    again = AutoModelForPreTraining.from_pretrained(folder / "electra-plain" / "model")
    assert type(again) is ElectraForPreTraining


def test_replaced_tokens_by_hand(bare):
    model = MuxElectraForReplacedTokens.from_pretrained(bare / "electra").eval()
    config = model.config
    config.task_loss_coeff, config.retrieval_loss_coeff, config.disc_loss_weight = 0.5, 2.0, 3.0
    batch = batch_of(bare) | {"tokens": 32, "mask_id": 4}
    batch["input_ids"][batch["labels"] != -100] = 4
    batch["random_ids"] = torch.randint(5, 45, (4, LENGTH))
    losses = partial(compute_replaced_token_losses, device=torch.device("cpu"), config=config)
    objective = EncoderObjective(
        losses, ("tokens", "positions", "masked", "positions"), "task_loss"
    )
    assert objective.count_items(batch) == (32, 16, batch["masked"], 16)
    scored = objective.compute_loss(model, batch, (64.0, 20.0, 7.0, 16.0))
    corrupted = batch["input_ids"] == 4
    replaced = torch.where(corrupted, batch["random_ids"], batch["input_ids"])
    arguments = dict(
        input_ids=replaced,
        labels=corrupted.long(),
        retrieved_instances=batch["retrieved_instances"],
    )
    alone = super(MuxElectraForReplacedTokens, model).forward(**arguments)
    task, retrieval = alone.task_loss.item() * 32, alone.retrieval_loss.item() * 16
    assert scored.loss.item() == pytest.approx(3 * (0.5 * task / 64 + 2 * retrieval / 20), rel=1e-5)
    assert scored.total.item() == pytest.approx(task, rel=1e-5) and scored.items.item() == 32
    output = alone.logits > 0
    assert scored.further["recall"].tolist() == [(output & corrupted).sum(), corrupted.sum()]
    assert scored.further["precision"].tolist() == [(output & corrupted).sum(), output.sum()]


def test_plain_electra_is_scored_alike(bare):
    model = ElectraForPreTraining.from_pretrained(bare / "plain-electra").eval()
    batch = batch_of(bare, 2) | {"tokens": 32, "mask_id": 4}
    batch["input_ids"][batch["labels"] != -100] = 4
    batch["random_ids"] = torch.randint(5, 45, (4, LENGTH))
    result = compute_replaced_token_losses(
        model, batch, (64.0, 1.0, 1.0, 1.0), torch.device("cpu"), model.config
    )
    corrupted = batch["input_ids"] == 4
    replaced = torch.where(corrupted, batch["random_ids"], batch["input_ids"])
    mean = model(input_ids=replaced, labels=corrupted.long()).loss.item()
    assert result["loss"].item() == pytest.approx(mean * 32 / 64, rel=1e-5)
    assert result["task_loss"].tolist() == [pytest.approx(mean * 32, rel=1e-5), 32]
    mux = MuxArgs(objective="replaced_token", disc_loss_weight=3.0)
    weighted = make_loss_function(mux, model.config, torch.device("cpu"))(
        model, batch, (64.0, 1.0, 1.0, 1.0)
    )
    assert weighted["loss"].item() == pytest.approx(3 * mean * 32 / 64, rel=1e-5)
    assert weighted["task_loss"].tolist() == result["task_loss"].tolist()


def test_electra_of_a_named_size(bare):
    data = DataBin(bare / "bin")
    mux = MuxArgs(objective="replaced_token", num_instances=2, generator="plain")
    config = build_encoder_config(ModelArgs(model="small"), mux, data, 8)
    assert (config.hidden_size, config.embedding_size, config.mask_token_id) == (256, 128, 4)
    own_values = config.make_generator_config()
    assert (
        own_values.hidden_size,
        own_values.num_attention_heads,
        own_values.intermediate_size,
    ) == (64, 1, 256)
    masking = make_masking(data, mux)
    assert (masking.masked, masking.random) == (0.85, 0.0)
    with pytest.raises(UserError, match="a prefix for 9 instances takes the place of 10 tokens"):
        mux = MuxArgs(objective="masked_lm", num_instances=9, demuxing_variant="index")
        build_encoder_config(ModelArgs(model="small"), mux, SimpleNamespace(**BERT_DATA), 10)
    with pytest.raises(UserError, match="--generator plain goes with --objective replaced_token"):
        MuxArgs(objective="masked_lm", num_instances=2, generator="plain")


@pytest.mark.parametrize(
    "name", ["bert_base_warmup", "bert_base_mlm", "electra_base_warmup", "electra_base_pretrain"]
)
def test_recipes_are_those_of_the_release(name):
    path = (
        Path(__file__).resolve().parents[2] / "launchers" / "recipes" / "mux" / f"mux_{name}.yaml"
    )
    kinds = (RunArgs, SafetyArgs, ModelArgs, OptimArgs, MuxArgs, DataArgs)
    run, _, model, optim, mux, data = parse_args(*kinds, argv=[str(path)])
    assert run.global_batch_size == 8 * 16 * 5 and run.per_device_train_batch_size == 16 * 5
    assert (run.max_steps, optim.warmup_steps, optim.learning_rate) == (1_000_000, 10_000, 1e-4)
    assert (mux.task_loss_coeff, mux.retrieval_loss_coeff) == (
        (0.0, 1.0) if name.endswith("warmup") else (1.0, 0.0)
    )
    assert data.max_seq_length == 512
    if "electra" in name:
        return
    bert = SimpleNamespace(**BERT_DATA)
    with torch.device("meta"):
        built = MuxBertForMaskedLM(build_encoder_config(model, mux, bert, 512))
    D, V, N = 768, 30522, 5
    layer = 12 * D * D + 13 * D
    demux = N * D + (2 * D * D + D) + 2 * (D * D + D) + 3 * 2 * D
    head = D * D + D + 2 * D + V
    embeddings = (V + 512 + 2) * D + 2 * D + N * D
    assert built.num_parameters() == embeddings + 12 * layer + demux + head
