"""Checkpoints of the multiplexed encoders: converted, reported on, and written back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from megamod.convert import ConvertOptions
from megamod.convert.datamux import ORIGINALS, convert, export
from megamod.errors import UserError
from megamod.models.mux import bert, electra, generator, roberta
from megamod.states.weights import write_weights

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "mux"
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"recorded tensors are not at {GOLDEN}"
)
CLASSES = vars(bert) | vars(electra) | vars(generator) | vars(roberta)
FIELDS = dict(
    vocab_size=700,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=9,
    type_vocab_size=2,
    num_instances=2,
    num_labels=3,
    retrieval_loss_coeff=0.5,
)


def original(name: str, folder: Path, **changed) -> dict[str, torch.Tensor]:
    """A checkpoint as the release writes it, with the weights of a model of ours; its tensors."""
    to = ORIGINALS[name]
    demux = "index" if to.model_type == "mux_roberta" else "index_pos"
    fields = {**FIELDS, "demuxing_variant": demux, "muxing_variant": "gaussian_hadamard"}
    fields |= {"num_hidden_demux_layers": 2, **changed}
    ids = dict(cls_token_id=101, mask_token_id=103, prefix_fill_token_id=680)
    width = {"embedding_size": 8} if to.model_type == "mux_electra" else {}
    config = CONFIG_MAPPING[to.model_type](**width | fields, **ids)
    torch.manual_seed(1)
    model = CLASSES[to.ours](config)
    model.apply(lambda module: [p.data.normal_() for p in module.parameters(recurse=False)])
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if to.head == "mlm":  # the release keeps the demultiplexer of tasks
        bare = CLASSES[to.ours.replace("ForMaskedLM", "Model")](config).state_dict()
        tensors |= {key: bare[key] for key in bare if key.startswith("demultiplexer.")}
    tensors = release_names(tensors, to.model_type)
    if to.head == "wrapper":
        tensors = {
            key if key.startswith("generator.") else f"discriminator.{key}": tensor
            for key, tensor in tensors.items()
        }
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    settings = {**fields, "architectures": [name]}
    (folder / "config.json").write_text(json.dumps(settings))
    return tensors


def release_names(tensors: dict[str, torch.Tensor], family: str) -> dict[str, torch.Tensor]:
    """All names that a release stores shared modules under."""
    result = dict(tensors)
    for prefix in ("", "generator."):
        for key, tensor in tensors.items():
            name = key.removeprefix(prefix)
            if not key.startswith(prefix) or (not prefix and key.startswith("generator.")):
                continue
            if name.startswith("demux_module."):
                for module in ("demultiplexer", "retrieval_head"):
                    result[f"{prefix}{module}.{name}"] = tensor.clone()
            if name == "retrieval_head.decoder.bias" and (
                family == "mux_electra" or f"{prefix}demux_module.dense_1.bias" not in tensors
            ):
                result[f"{prefix}retrieval_head.bias"] = tensor.clone()
            if name == "demultiplexer.decoder.bias":
                result["demultiplexer.bias"] = tensor.clone()
    if any(key.startswith("generator.") for key in tensors):
        for key in [key for key in tensors if key.startswith("electra.embeddings.")]:
            result[f"generator.{key}"] = tensors[key].clone()
    return result


def ours(source: Path, folder: Path) -> Path:
    """The converted model as a folder of ours."""
    converted = convert(source)
    folder.mkdir()
    write_weights(folder, converted.state, has_experts=False)
    (folder / "config.json").write_text(json.dumps(converted.config))
    return folder


@needs_golden
@pytest.mark.parametrize(
    "case", sorted(p.name for p in GOLDEN.glob("*")) if GOLDEN.is_dir() else []
)
def test_recorded_checkpoints_there_and_back(case, tmp_path):
    source = GOLDEN / case
    converted = convert(source)
    existing = load_file(source / "state.safetensors")
    assert converted.missing == {}
    assert sorted([*converted.used, *converted.dropped]) == sorted(existing)
    assert set(converted.dropped.values()) - {"counts from 0"} == {
        why for why in converted.dropped.values() if why.startswith("equal to ")
    }
    exported = tmp_path / "back"
    exported.mkdir()
    export(ours(source, tmp_path / "ours"), exported)
    back = load_file(exported / "model.safetensors")
    assert back.keys() == existing.keys()
    assert all(torch.equal(back[key], existing[key]) for key in existing)


@pytest.mark.parametrize("name", ORIGINALS)
@pytest.mark.parametrize("demux", ["index_pos", "index", "mlp"])
def test_every_class_there_and_back(name, demux, tmp_path):
    legacy = name.startswith("Roberta")
    if (demux == "mlp") > legacy or (demux == "index_pos" and legacy):
        pytest.skip("no such model")
    extra = {}
    if name == "ELECTRAModel":
        extra = {"generator": "plain" if demux == "index" else "multiplexed", "embedding_size": 8}
        extra["generator_config"] = {"intermediate_size": 16, "embedding_size": 8}
    tensors = original(name, tmp_path / "theirs", demuxing_variant=demux, **extra)
    (tmp_path / "back").mkdir()
    export(ours(tmp_path / "theirs", tmp_path / "ours"), tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    counts = {key for key in back if key.endswith("position_ids")}
    assert back.keys() - counts == tensors.keys() and len(counts) == 1
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)
    again = json.loads((tmp_path / "back" / "config.json").read_text())
    assert again["architectures"] == [name] and again["demuxing_variant"] == demux


def test_duplicates_may_be_missing_from_either_place(tmp_path):
    tensors = original("MuxedBertForMaskedLM", tmp_path)
    kept = {k: t for k, t in tensors.items() if not k.startswith("demux_module.")}
    kept = {k: t for k, t in kept.items() if not k.startswith("retrieval_head.demux_module.")}
    save_file(kept, tmp_path / "model.safetensors")
    converted = convert(tmp_path)
    assert torch.equal(
        converted.state["demux_module.dense_1.weight"], tensors["demux_module.dense_1.weight"]
    )
    assert "demultiplexer.demux_module.dense_1.weight" in converted.used


def test_report(tmp_path):
    tensors = original("MuxedBertForMaskedLM", tmp_path, head_temperature=1.0)
    kept = {k: t for k, t in tensors.items() if not k.startswith("demultiplexer.pre")}
    kept["bert.pooler.dense.weight"] = torch.ones(8, 8)
    save_file(kept, tmp_path / "model.safetensors")
    converted = convert(tmp_path)
    assert converted.dropped["bert.pooler.dense.weight"] == "no tensor of MuxBertForMaskedLM"
    assert converted.dropped["config.json: head_temperature"] == "without effect"
    assert converted.dropped["retrieval_head.decoder.weight"] == (
        "equal to bert.embeddings.word_embeddings.weight"
    )
    assert set(converted.missing) == {
        f"demultiplexer.pre_decoder{part}.{kind}"
        for part in ("", "_layer_norm")
        for kind in ("weight", "bias")
    }


def test_pickles_of_the_hub_are_read(tmp_path):
    tensors = original("MuxedBertForTokenClassification", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert torch.equal(convert(tmp_path).state["classifier.bias"], tensors["classifier.bias"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t, c: t.pop("classifier.bias"), "classifier.bias is missing"),
        (lambda t, c: t.update({"classifier.bias": torch.ones(4)}), r"shape \(4,\), not \(3,\)"),
        (lambda t, c: t.update({"classifier.bias": torch.ones(3).int()}), "dtype torch.int32"),
        (
            lambda t, c: t["demultiplexer.demux_module.dense_2.bias"].add_(1),
            "demultiplexer.demux_module.dense_2.bias differs from demux_module.dense_2.bias",
        ),
        (lambda t, c: t["retrieval_head.decoder.weight"].add_(1), "differs from bert.embeddings"),
        (lambda t, c: c.update(hidden_act="relu"), "hidden_act is 'relu'; only 'gelu'"),
        (lambda t, c: c.update(num_instances="2"), "num_instances is '2', not a number"),
        (lambda t, c: c.pop("num_instances"), "num_instances is missing"),
        (lambda t, c: c.update(architectures=["BertModel"]), "architectures names BertModel"),
        (lambda t, c: c.pop("architectures"), "does not name the class"),
    ],
)
def test_what_does_not_fit_is_named(spoil, message, tmp_path):
    tensors = original("MuxedBertForSequenceClassification", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    spoil(tensors, config)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        convert(tmp_path)


def test_heads_can_be_told(tmp_path):
    original("MuxedBertForMaskedLM", tmp_path)
    assert (
        convert(tmp_path, ConvertOptions(num_attention_heads=4)).config["num_attention_heads"] == 4
    )


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"has none of model\.safetensors"):
        convert(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["DemixForCausalLM"]}')
    with pytest.raises(UserError, match="is of class 'DemixForCausalLM'"):
        export(tmp_path, tmp_path)
