"""CA-MTL against tensors recorded from the original program, and properties of its parts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertModel

from megamod.convert import ConvertOptions
from megamod.convert.ca_mtl import convert, export
from megamod.errors import UserError
from megamod.models.ca_mtl.configuration import CaMtlConfig
from megamod.models.ca_mtl.model import (
    CaMtlForMultiTask,
    SingleTaskModel,
    freeze_blocks,
    load_from_encoder,
)
from megamod.nn.conditioning import Film, compute_block_bias, compute_block_shape
from megamod.states.weights import write_weights

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "camtl"
CASES = sorted(file.parent.name for file in GOLDEN.glob("*/state.safetensors"))
REGRESSION = ("sts-b",)
SMALL = dict(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=16,
    max_seq_length=16,
    tasks=["a", "b", "c"],
    task_kinds=["sequence", "regression", "token"],
    task_labels=[["x", "y", "z"], [], ["O", "B-q", "I-q", "B-r", "I-r"]],
)


def model_of(case: str, tmp_path: Path | None = None) -> CaMtlForMultiTask:
    """The converted model of a recorded case."""
    tasks = json.loads((GOLDEN / case / "config.json").read_text())["tasks"]
    converted = convert(GOLDEN / case, ConvertOptions(domains=tuple(tasks)))
    fields = {k: v for k, v in converted.config.items() if k not in ("model_type", "architectures")}
    model = CaMtlForMultiTask(CaMtlConfig(**fields))
    model.load_state_dict(converted.state)
    return model.eval()


@pytest.fixture(scope="module", params=CASES or ["none recorded"])
def case(request):
    """Name of a recorded case, its model and tensors."""
    if not CASES:
        pytest.skip(f"recorded tensors are not at {GOLDEN}")
    return (
        request.param,
        model_of(request.param),
        load_file(GOLDEN / request.param / "io.safetensors"),
    )


def inputs(io: dict[str, torch.Tensor], batch: str) -> dict[str, torch.Tensor]:
    """Inputs of a recorded batch."""
    rows = {k.split(".in.")[1]: v for k, v in io.items() if k.startswith(f"{batch}.in.")}
    rows["task_ids"] = rows.pop("task_id")
    rows["labels"] = rows["labels"].float()
    return rows


def test_batches_as_recorded(case):
    name, model, io = case
    output = model(**inputs(io, "mixed"))
    assert (output.pooled - io["mixed.mid.pooled"]).abs().max() <= 1e-5
    assert abs(output.loss - io["mixed.out.loss"]) <= 5e-6
    means = output.task_totals / output.task_items.clamp(min=1)
    assert torch.allclose(means, io["mixed.out.loss_per_task"], rtol=5e-6, atol=5e-6)
    assert (output.entropy - io["mixed.out.entropy_per_sample"]).abs().max() <= 1e-6
    for task, logits in enumerate(output.logits):
        recorded = io.get(f"mixed.mid.logits.{task}")
        assert len(logits) == (0 if recorded is None else len(recorded))
        if recorded is not None:
            assert (logits - recorded).abs().max() <= 1e-5, (name, task)
    for batch in sorted({key.split(".")[0] for key in io if key.startswith("task")}):
        output = model(**inputs(io, batch))
        assert (output.pooled - io[f"{batch}.out.pooled"]).abs().max() <= 1e-5
        loss = io[f"{batch}.out.loss"]
        assert abs(output.loss - loss) <= 5e-6 * max(1, loss)
        logits = next(part for part in output.logits if len(part))
        assert (logits - io[f"{batch}.out.logits"]).abs().max() <= 1e-5


def test_gradients_as_recorded(case):
    name, model, io = case
    recorded = load_file(GOLDEN / name / "grads.safetensors")
    model.zero_grad()
    model(**inputs(io, "mixed")).loss.backward()
    ours = dict(model.named_parameters())
    last = model.config.num_hidden_layers - 1
    assert recorded
    for key, expected in recorded.items():
        if key.startswith("decoders."):
            _, task, _, kind = key.split(".")
            gradient = ours[f"heads.{kind}"].grad[int(task), : len(expected)]
        else:
            gradient = ours[key.replace(f"layer.{last}.new_", f"layer.{last}.")].grad
        # The recordings are float32 themselves: computed in float64, ours are as far from them.
        assert (gradient - expected).abs().max() <= 2e-5 * expected.abs().max() + 1e-6, key


def test_there_and_back(case, tmp_path):
    name, model, _ = case
    ours, back = tmp_path / "ours", tmp_path / "back"
    ours.mkdir()
    back.mkdir()
    model.config.save_pretrained(ours)
    state = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    write_weights(ours, state, has_experts=False)
    export(ours, back)
    second, again = (
        load_file(GOLDEN / name / "state.safetensors"),
        load_file(back / "model.safetensors"),
    )
    assert again.keys() == {key for key in second if not key.endswith("position_ids")}
    assert all(torch.equal(again[key], second[key]) for key in again)


def test_a_checkpoint_without_the_matrix_of_its_length_is_refused(tmp_path):
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    names += ("intermediate_size", "max_position_embeddings")
    fields = {name: SMALL[name] for name in names} | {"type_vocab_size": 2}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    tensors = {
        "bert.embeddings.word_embeddings.weight": torch.zeros(50, 32),
        "bert.task_type_embeddings.weight": torch.zeros(1, 32),
        "decoders.0.model.weight": torch.zeros(2, 32),
        "decoders.0.model.bias": torch.zeros(2),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="random_weight_matrix is missing"):
        convert(tmp_path)


@pytest.mark.parametrize(
    ("size", "length"),
    [(768, 128), (1024, 128), (96, 16), (64, 16), (64, 64), (60, 10), (80, 16), (770, 110)],
)
def test_bias_is_the_direct_sum_of_blocks(size, length):
    blocks, width = compute_block_shape(size, length)
    torch.manual_seed(0)
    matrix, factor, shift = torch.randn(length, width), torch.randn(2, width), torch.randn(2, width)
    bias = compute_block_bias(matrix, factor, shift, length)
    for task in range(2):
        modulated = matrix * factor[task] + shift[task]
        parts = modulated.split(width)
        whole = torch.block_diag(*parts)[:length, :length]
        assert torch.equal(bias[task], whole)
    assert torch.equal(compute_block_bias(matrix, factor, shift, 5), bias[:, :5, :5])
    assert blocks * length == size


def test_length_must_divide_the_width():
    with pytest.raises(ValueError, match="max_seq_length 12 does not divide hidden_size 32"):
        CaMtlConfig(**SMALL | dict(max_seq_length=12))


def build_model(variant: str, **changed) -> CaMtlForMultiTask:
    """A small model with random weights, norms and biases too."""
    torch.manual_seed(1)
    model = CaMtlForMultiTask(CaMtlConfig(**SMALL | changed, variant=variant)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch(rows: int = 6, length: int = 11) -> dict[str, torch.Tensor]:
    """Rows of all tasks, right-padded."""
    torch.manual_seed(2)
    lengths = torch.randint(4, length + 1, (rows,))
    lengths[0] = length
    return {
        "input_ids": torch.randint(5, 50, (rows, length)),
        "attention_mask": (torch.arange(length) < lengths[:, None]).long(),
        "token_type_ids": torch.randint(0, 2, (rows, length)),
        "task_ids": torch.tensor([0, 1, 2, 0, 2, 1])[:rows],
        "labels": torch.tensor([1.0, 2.5, 0.0, 2.0, 0.0, -1.0])[:rows],
        "token_labels": torch.where(
            torch.rand(rows, length) < 0.5, torch.randint(0, 5, (rows, length)), -100
        ),
    }


@pytest.mark.parametrize("variant", ["base", "large", "plain"])
def test_rows_are_on_their_own(variant):
    model, rows = build_model(variant), batch()
    whole = model(**rows)
    order = torch.tensor([4, 2, 0, 5, 3, 1])
    permuted = model(**{name: tensor[order] for name, tensor in rows.items()})
    assert torch.allclose(permuted.pooled, whole.pooled[order], atol=1e-5)
    assert torch.allclose(permuted.loss, whole.loss, atol=1e-5)
    for row in range(6):
        single = model(**{name: tensor[row : row + 1] for name, tensor in rows.items()})
        assert torch.allclose(single.pooled[0], whole.pooled[row], atol=1e-5)
    means = whole.task_totals / whole.task_items
    assert torch.allclose(whole.loss, means.mean())
    tokens = rows["token_labels"][rows["task_ids"] == 2]
    logits = whole.logits[2]
    assert logits.shape == (2, 11, 5)
    total = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens.flatten(), reduction="sum"
    )
    assert torch.allclose(whole.task_totals[2], total, rtol=1e-5)
    p = logits.softmax(-1)
    entropy = -(p * p.log()).sum(-1) / (torch.tensor(5.0).log() + 1e-5)
    labelled = tokens != -100
    expected = (entropy * labelled).sum(1) / labelled.sum(1)
    assert torch.allclose(whole.entropy[rows["task_ids"] == 2], expected, atol=1e-6)


@pytest.mark.parametrize("variant", ["base", "large"])
def test_shorter_padding_changes_nothing(variant):
    model, rows = build_model(variant), batch()
    longer = {
        name: torch.nn.functional.pad(tensor, (0, 5), value=-100 if name == "token_labels" else 0)
        if tensor.dim() == 2
        else tensor
        for name, tensor in rows.items()
    }
    assert torch.allclose(model(**longer).pooled, model(**rows).pooled, atol=1e-5)
    assert torch.allclose(model(**longer).loss, model(**rows).loss, atol=1e-5)


def test_plain_is_bert():
    model, rows = build_model("plain"), batch()
    bert = BertModel(
        BertConfig(**{k: SMALL[k] for k in list(SMALL)[:6]}, attn_implementation="eager")
    ).eval()
    state = {k.removeprefix("bert."): v for k, v in model.state_dict().items() if "heads" not in k}
    missing, unexpected = bert.load_state_dict(state, strict=False)
    assert not missing and not unexpected
    names = ("input_ids", "attention_mask", "token_type_ids")
    expected = bert(**{name: rows[name] for name in names}).pooler_output
    assert torch.allclose(model(**rows).pooled, expected, atol=1e-5)


def test_without_modulation_the_blocks_are_those_of_bert():
    model, rows = build_model("large"), batch()
    plain = build_model("plain")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Film):
                module.gb_weights.weight.zero_()
                module.gb_weights.bias.zero_()
        for name, parameter in model.named_parameters():
            if name.endswith("random_weight_matrix"):
                parameter.zero_()
    shared = {k: v for k, v in model.state_dict().items() if k in plain.state_dict()}
    plain.load_state_dict(shared)
    states = []
    for network in (model, plain):
        hook = network.bert.encoder.layer[-1].register_forward_hook(
            lambda module, args, output: states.append(output)
        )
        network(**rows)
        hook.remove()
    assert torch.allclose(states[0], states[1], atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "shape", "expected"),
    [("base", (12, 768, 12, 3072), 128_063_264), ("large", (24, 1024, 16, 4096), 480_334_600)],
)
def test_numbers_of_parameters(variant, shape, expected):
    sizes = (2, 3, 2, 2, 1, 2, 2, 2)  # cola mnli rte qqp sts-b sst-2 qnli mrpc
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    config = CaMtlConfig(
        vocab_size=28996,
        **dict(zip(names, shape, strict=True)),
        variant=variant,
        tasks=[f"t{n}" for n in range(8)],
        task_kinds=["regression" if size == 1 else "sequence" for size in sizes],
        task_labels=[[str(n) for n in range(size)] if size > 1 else [] for size in sizes],
    )
    with torch.device("meta"):
        model = CaMtlForMultiTask(config)
    # The bank is padded to the largest head.
    padding = sum(max(sizes) - size for size in sizes) * (shape[1] + 1)
    assert sum(p.numel() for p in model.parameters()) - padding == expected


def test_trainable_names_as_recorded(case):
    name, model, _ = case
    ranges = json.loads((GOLDEN / name / "config.json").read_text())["trainable_after_freeze"]
    if not ranges or model.config.variant == "plain":
        pytest.skip("the release cannot freeze a plain encoder")
    last = model.config.num_hidden_layers - 1
    for blocks, recorded in ranges.items():
        model.requires_grad_(True)
        first, end = map(int, blocks.split("-"))
        counts = freeze_blocks(model, first, min(end, last), as_released=True)
        ours = {n for n, p in model.named_parameters() if p.requires_grad and "heads" not in n}
        theirs = {
            n.replace(f"layer.{last}.new_", f"layer.{last}.")
            for n in recorded
            if not n.startswith("decoders.")
        }
        assert ours == theirs, blocks
        total = sum(p.numel() for p in model.parameters())
        assert counts["trained"] + counts["frozen"] == total
        freeze_blocks(model, first, min(end, last))
        more = {n for n, p in model.named_parameters() if p.requires_grad} - ours
        biases = {n for n in more if "cond_block_diag_attn" in n}
        assert more - biases == {"heads.weight", "heads.bias"}
        assert len(biases) == 2 * (min(end, last) - first + 1)
    model.requires_grad_(True)


def test_freezing_blocks_of_a_plain_encoder():
    model = build_model("plain")
    counts = freeze_blocks(model, 0, 2)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(n.startswith(("bert.encoder.layer.3.", "bert.pooler", "heads")) for n in trained)
    assert counts["trained"] == sum(p.numel() for n, p in model.named_parameters() if n in trained)
    with pytest.raises(ValueError, match="blocks 3-4: the model has blocks 0-3"):
        freeze_blocks(model, 3, 4)


@pytest.mark.parametrize("top", [True, False])
def test_starting_from_bert(tmp_path, top):
    shape = {k: SMALL[k] for k in list(SMALL)[:6]}
    BertForMaskedLM(BertConfig(**shape)).save_pretrained(tmp_path)
    bert = BertForMaskedLM.from_pretrained(tmp_path).state_dict()
    torch.manual_seed(0)
    tasks = {k: SMALL[k] for k in SMALL if k.startswith("task") or k == "max_seq_length"}
    config = CaMtlConfig.make_from_encoder(BertConfig.from_pretrained(tmp_path), **tasks)
    assert config.hidden_size == 32 and config.variant == "base"
    model, report = load_from_encoder(str(tmp_path), config, load_last_block=top)
    ours = model.state_dict()
    assert all(tensor.isfinite().all() for tensor in ours.values())
    names = [n for n in ours if n in bert and ("layer.3." not in n or top)]
    assert names and all(torch.equal(ours[n], bert[n]) for n in names)
    changed = "bert.encoder.layer.3.intermediate.dense.weight"
    assert torch.equal(ours[changed], bert[changed]) is top
    assert (changed in report["loaded"]) is top and (changed in report["new"]) is not top
    assert set(report["loaded"]) | set(report["new"]) == set(ours)
    # What is new is drawn as the release draws it.
    assert ours["bert.encoder.layer.0.attention.self.random_weight_matrix"].abs().max() == 0
    assert ours["heads.bias"].abs().max() == 0
    norm = "bert.encoder.layer.3.adapter.condlayernorm"
    assert (ours[f"{norm}.weight"] == 1).all() and (ours[f"{norm}.bias"] == 0).all()
    assert 0.01 < ours["bert.encoder.task_transformation.weight"].std() < 0.03


def test_one_task_of_many_is_a_classifier():
    model, rows = build_model("base"), batch()
    fields = {n: rows[n] for n in ("input_ids", "attention_mask", "token_type_ids")}
    for task, shape in ((0, (6, 3)), (1, (6, 1)), (2, (6, 11, 5))):
        logits = SingleTaskModel(model, task)(**fields).logits
        assert logits.shape == shape
        of_task = rows["task_ids"] == task
        assert torch.allclose(logits[of_task], model(**rows).logits[task], atol=1e-5)
