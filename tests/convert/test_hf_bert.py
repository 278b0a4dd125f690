"""Published BERTs: old names and shapes of files become stock folders with the same answers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
)

from megamod.convert.hf_bert import convert
from megamod.errors import UserError
from megamod.states.weights import write_weights

SIZE = dict(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
SIZE |= dict(intermediate_size=12, max_position_embeddings=16)
IDS = torch.tensor([[2, 7, 9, 3]])


def published(model, folder, *, old=True, prefix=""):
    """A checkpoint as of old: a pickle, gamma and beta, tied weights twice, position ids."""
    folder.mkdir()
    config = model.config.to_dict() | {"model_type": "bert"}
    (folder / "config.json").write_text(json.dumps(config))
    state = {prefix + key: tensor.clone() for key, tensor in model.state_dict().items()}
    if old:
        state["bert.embeddings.position_ids"] = torch.arange(16)[None]
        names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, was in names.items():
            state = {key.replace(new, was): tensor for key, tensor in state.items()}
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def written(converted, folder):
    """The folder that the command makes."""
    folder.mkdir()
    BertConfig(**{k: v for k, v in converted.config.items() if k != "model_type"}).save_pretrained(
        folder
    )
    write_weights(folder, converted.state, has_experts=False)
    return folder


@pytest.mark.parametrize("old", [True, False])
def test_a_pretrained_seed(tmp_path, old):
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig(**SIZE)).eval()
    converted = convert(published(model, tmp_path / "there", old=old))
    assert converted.config["architectures"] == ["BertForMaskedLM"]
    assert converted.dropped["cls.predictions.decoder.weight"].startswith("the same as bert.")
    assert "cls.seq_relationship.weight" in converted.dropped
    assert "position_ids" in " ".join(converted.dropped) or not old
    ours = BertForMaskedLM.from_pretrained(written(converted, tmp_path / "ours")).eval()
    expected = model(IDS).prediction_logits
    assert torch.allclose(ours(IDS).logits, expected, atol=1e-6)


def test_an_output_matrix_of_its_own_is_kept(tmp_path):
    model = BertForMaskedLM(BertConfig(**SIZE, tie_word_embeddings=False)).eval()
    torch.nn.init.normal_(model.cls.predictions.decoder.weight)
    converted = convert(published(model, tmp_path / "there"))
    assert converted.config["tie_word_embeddings"] is False
    ours = BertForMaskedLM.from_pretrained(written(converted, tmp_path / "ours")).eval()
    assert torch.allclose(ours(IDS).logits, model(IDS).logits, atol=1e-6)


def test_heads_are_read_from_the_weights(tmp_path):
    model = BertForSequenceClassification(BertConfig(**SIZE, num_labels=3)).eval()
    converted = convert(published(model, tmp_path / "cls"))
    assert converted.config["architectures"] == ["BertForSequenceClassification"]
    assert len(converted.config["id2label"]) == 3
    ours = BertForSequenceClassification.from_pretrained(written(converted, tmp_path / "c")).eval()
    assert torch.allclose(ours(IDS).logits, model(IDS).logits, atol=1e-6)
    bare = BertModel(BertConfig(**SIZE)).eval()
    converted = convert(published(bare, tmp_path / "bare", old=False))
    assert converted.config["architectures"] == ["BertModel"] and not converted.dropped
    assert "bert.pooler.dense.weight" in converted.state


def test_what_is_no_bert(tmp_path):
    model = BertModel(BertConfig(**SIZE))
    folder = published(model, tmp_path / "there", old=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 21}))
    with pytest.raises(UserError, match=r"word_embeddings.weight is of shape \(20, 8\)"):
        convert(folder)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(UserError, match="model_type is 'gpt2', not 'bert'"):
        convert(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: cannot be read"):
        convert(folder)


def test_other_models_that_call_themselves_bert(tmp_path):
    folder = published(BertForMaskedLM(BertConfig(**SIZE)), tmp_path / "there", old=False)
    state = load_file(folder / "model.safetensors")
    parts = {f"demux_module.dense_{n}.weight": torch.ones(8, 8) for n in range(4)}
    save_file(state | parts, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"4 of its \d+ tensors, such as demux_module.dense_0"):
        convert(folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["MuxedBertForMaskedLM"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="names the class MuxedBertForMaskedLM; use --format data"):
        convert(folder)


def test_shards(tmp_path):
    model = BertForMaskedLM(BertConfig(**SIZE)).eval()
    model.save_pretrained(tmp_path / "there", max_shard_size="1KB")
    assert not (tmp_path / "there" / "model.safetensors").exists()
    ours = BertForMaskedLM.from_pretrained(written(convert(tmp_path / "there"), tmp_path / "ours"))
    assert torch.equal(ours.eval()(IDS).logits, model(IDS).logits)
