"""Multiplexed models written to folders, and read by the Auto classes."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_mux import batch, build_model

import megamod  # noqa: F401  (makes the models known)
from megamod.convert.datamux import convert, export
from megamod.models.mux.bert import MuxBertForMaskedLM, MuxBertForTokenClassification
from megamod.models.mux.electra import MuxElectraForSequenceClassification

AUTO = {
    "mlm": "AutoModelForMaskedLM",
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "discriminator": "AutoModelForPreTraining",
    "wrapper": "AutoModelForPreTraining",
}
CASES = [
    ("bert", "mlm", "index_pos", "gaussian_hadamard"),
    ("bert", "mlm", "index", "gaussian_attention_v2"),
    ("bert", "sequence", "index_pos", "random_ortho"),
    ("bert", "token", "index", "binary_hadamard"),
    ("electra", "mlm", "index_pos", "gaussian_hadamard"),
    ("electra", "discriminator", "index_pos", "gaussian_attention"),
    ("electra", "wrapper", "index_pos", "gaussian_hadamard"),
    ("electra", "sequence", "index_pos", "random_ortho_low_rank"),
    ("electra", "token", "index", "gaussian_hadamard"),
    ("roberta", "sequence", "index", "gaussian_hadamard"),
    ("roberta", "token", "mlp", "random_ortho"),
]


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_there_and_back(case, learned, tmp_path):
    family, head, demux, mux = case
    generator = {"generator": "plain" if learned else "multiplexed"} if head == "wrapper" else {}
    model = (
        build_model(family, head, demux, mux, {"learn_muxing": learned, **generator}).float().eval()
    )
    model.save_pretrained(tmp_path)
    torch.manual_seed(9)  # not the seed of the first
    again = getattr(transformers, AUTO[head]).from_pretrained(tmp_path)
    assert type(again) is type(model) and not again.training
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    inputs = batch(head, model.config, 4, False)
    outputs = []
    for built in (model, again):
        torch.manual_seed(5)
        outputs.append(built(**inputs))
    # Not bit by bit: tensors of a file may be aligned otherwise, and BLAS then adds in other order.
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, atol=1e-6, rtol=1e-6)
    assert again.instance_embedding.requires_grad == learned
    frozen = [name for name, p in again.named_parameters() if not p.requires_grad]
    assert all(name.endswith("instance_embedding") for name in frozen)
    if family == "bert" and head == "mlm":
        words = again.bert.embeddings.word_embeddings.weight
        assert again.retrieval_head.decoder.weight is words
        assert "retrieval_head.decoder.weight" not in load_file(tmp_path / "model.safetensors")
    if generator == {"generator": "plain"}:
        words = again.electra.embeddings.word_embeddings.weight
        assert again.generator.generator_lm_head.weight is words


def test_new_models_draw_frozen_keys():
    config = build_model("bert", "mlm", "index_pos", "gaussian_hadamard", {}).config
    torch.manual_seed(1)
    first, second = MuxBertForMaskedLM(config), MuxBertForMaskedLM(config)
    assert not first.instance_embedding.requires_grad
    torch.testing.assert_close(first.instance_embedding.norm(dim=1), torch.ones(2))
    assert not torch.equal(first.instance_embedding, second.instance_embedding)
    config.learn_muxing = True
    assert MuxBertForMaskedLM(config).instance_embedding.requires_grad


def test_initial_weights_of_the_release():
    """BERT's normal of 0.02 but for demultiplexer keys (1) and ELECTRA's heads (torch's)."""
    fields = {"initializer_range": 0.02, "hidden_size": 64, "embedding_size": 64}
    config = build_model(
        "electra", "discriminator", "index_pos", "gaussian_hadamard", fields
    ).config
    torch.manual_seed(0)
    model = MuxElectraForSequenceClassification(config)
    assert not model.electra.embeddings.word_embeddings.weight[0].any()
    assert abs(model.demux_module.dense_1.weight.std() - 0.02) < 1e-3
    assert not model.demux_module.dense_1.bias.any()
    assert abs(model.demux_module.demux_instance_embedding.std() - 1) < 0.3
    # torch: uniform in +- 1 / 8, of deviation 1 / 8 / sqrt(3).
    assert abs(model.classifier.dense.weight.std() - 0.0722) < 5e-3
    assert model.classifier.dense.bias.any()


def test_from_pretraining_to_a_task(tmp_path):
    """Common weights are loaded; new ones are drawn as in a new model."""
    model = build_model("bert", "mlm", "index_pos", "gaussian_hadamard", {}).float()
    model.save_pretrained(tmp_path)
    tuned = MuxBertForTokenClassification.from_pretrained(tmp_path, retrieval_loss_coeff=0.0)
    shared = dict(model.named_parameters())
    for name, parameter in tuned.named_parameters():
        if name.startswith(("bert.", "demux_module.", "instance_embedding")):
            assert torch.equal(parameter, shared[name]), name
    assert 0.01 < tuned.demultiplexer.pre_decoder.weight.std() < 0.03
    assert torch.equal(tuned.demultiplexer.pre_decoder_layer_norm.weight, torch.ones(16))
    assert not tuned.instance_embedding.requires_grad


def test_from_the_wrapper_to_a_task(tmp_path):
    model = build_model(
        "electra", "wrapper", "index_pos", "gaussian_hadamard", {"generator": "plain"}
    )
    model.float().save_pretrained(tmp_path)
    tuned, info = MuxElectraForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True, retrieval_loss_coeff=0.0
    )
    assert {key.split(".")[0] for key in info["missing_keys"]} == {"classifier"}
    assert not info["unexpected_keys"]
    assert torch.equal(
        tuned.demultiplexer.pre_decoder.weight, model.demultiplexer.pre_decoder.weight
    )
    assert not tuned.instance_embedding.requires_grad


def test_keys_missing_from_a_file_are_drawn(tmp_path):
    model = build_model("bert", "sequence", "index_pos", "gaussian_hadamard", {}).float()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["instance_embedding"], tensors["demux_module.demux_instance_embedding"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(again.instance_embedding.norm(dim=1), torch.ones(2))
    assert 0.5 < again.demux_module.demux_instance_embedding.std() < 1.5
    assert torch.equal(again.demux_module.dense_1.weight, model.demux_module.dense_1.weight)


@pytest.mark.parametrize("size", [16, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_generators_are_converted_with_their_matrix_of_tokens(tied, size, tmp_path):
    settings = {"tie_word_embeddings": tied, "embedding_size": size}
    fields = {"generator": "plain", "generator_config": settings}
    model = (
        build_model("electra", "wrapper", "index_pos", "gaussian_hadamard", fields).float().eval()
    )
    model.save_pretrained(tmp_path / "ours")
    (tmp_path / "theirs").mkdir()
    export(tmp_path / "ours", tmp_path / "theirs")
    assert "generator.generator_lm_head.weight" in load_file(tmp_path / "theirs/model.safetensors")
    converted = convert(tmp_path / "theirs")
    expected = load_file(tmp_path / "ours" / "model.safetensors")
    assert converted.state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in converted.state.items())
    stored = converted.config["generator_config"]
    assert stored.get("tie_word_embeddings", True) == tied and stored["embedding_size"] == size
