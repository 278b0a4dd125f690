"""Every row of the table of hosts, against the class of transformers it describes."""

import json

import pytest
import torch
from models.tiny_hosts import LAYERS, LENGTH, VOCAB, tiny_stock, tiny_stock_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from megamod.dist.scope import convert_to_dense_name, parse_expert_domain
from megamod.errors import UserError
from megamod.models.auto import make_lm_config
from megamod.models.lm.configuration import DemixConfig, read_lm_config
from megamod.models.lm.host import make_dense_class, make_host_classes
from megamod.models.lm.hosts import HOSTS, Host
from megamod.models.lm.load import build_lm, load_lm
from megamod.states.weights import extract_expert_weights

DOMAINS = ["law", "med"]
IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
logging.set_verbosity_error()


def demix_of(stock: PreTrainedModel, untie: str = "feedforward") -> PreTrainedModel:
    """The stock model with equal experts, in training mode."""
    kind, model_class = make_host_classes(stock.config.model_type)
    fields = {**stock.config.to_dict(), "domains": DOMAINS, "untie": untie}
    config = kind(**{name: value for name, value in fields.items() if name != "model_type"})
    config._attn_implementation = "eager"
    model = model_class(config, ())
    model.load_state_dict(stock.state_dict())
    model.untie_feed_forwards(DOMAINS)
    return model


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def from_logits(logits: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


@pytest.mark.parametrize("family", HOSTS)
def test_experts_in_place_of_the_feed_forward_change_no_bit(family):
    stock = tiny_stock(family).train()
    model = demix_of(stock).train()
    assert {convert_to_dense_name(name) for name in model.state_dict()} == set(stock.state_dict())
    layers = stock.get_submodule(HOSTS[family].layers)
    assert len(layers) == LAYERS
    inside = {name for name, _ in model.named_parameters() if parse_expert_domain(name) == "med"}
    parts = [layers[0].get_submodule(name) for name in HOSTS[family].feed_forward]
    assert len(inside) == LAYERS * sum(len(list(part.parameters())) for part in parts) > 0
    if HOSTS[family].positions is not None:
        assert len(stock.get_submodule(HOSTS[family].positions).weight) >= LENGTH

    expected = stock(input_ids=IDS).logits
    logits = model(input_ids=IDS, domain="med").logits
    assert torch.equal(logits, expected)
    theirs = gradients(stock, from_logits(expected))
    for name, gradient in gradients(model, from_logits(logits)).items():
        if parse_expert_domain(name) == "law":
            assert not gradient.any()
        elif gradient is not None:
            assert torch.equal(gradient, theirs[convert_to_dense_name(name)])

    # The chunked loss with scale, softcap and bias; every cap is 2 here, so it cannot hide.
    shifted = functional.pad(IDS[:, 1:], (0, 1), value=-100)
    output = model(input_ids=IDS, shift_labels=shifted)
    stock_loss = stock(input_ids=IDS, labels=IDS).loss
    assert output.logits is None
    both = model(input_ids=IDS, labels=IDS)
    assert torch.equal(both.logits, expected) and torch.equal(both.loss, stock_loss)
    torch.testing.assert_close(output.loss, stock_loss, rtol=1e-6, atol=1e-6)
    theirs, ours = gradients(stock, stock_loss), gradients(model, output.loss)
    model.gradient_checkpointing_enable()
    again = gradients(model, model(input_ids=IDS, shift_labels=shifted).loss)
    model.gradient_checkpointing_disable()
    assert all(torch.equal(again[n], g) for n, g in ours.items() if g is not None)
    embeddings = [name for name in ours if "embed" in name or "head" in name or "wte" in name]
    for name in embeddings:
        if ours[name] is not None:
            scale = theirs[name].abs().max()
            torch.testing.assert_close(ours[name] / scale, theirs[name] / scale, rtol=0, atol=2e-6)
    hidden = model.compute_hidden_states(IDS)
    # Another shape of the same product, which BLAS may sum in another order.
    torch.testing.assert_close(model.compute_logits(hidden), expected, rtol=0, atol=1e-6)
    scored = expected.float().log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0]
    torch.testing.assert_close(output.token_log_probs[:, :-1], scored, rtol=1e-5, atol=1e-5)


def packed_and_apart(model: PreTrainedModel) -> None:
    """Log-probabilities of two documents in one row are those of a row each."""
    model.eval().document_end = 2
    first, other = torch.tensor([[2, 5, 9, 33, 7]]), torch.tensor([[2, 8, 30, 4, 4, 12, 6]])
    row = torch.cat([first, other], 1)
    after = functional.pad(row[:, 1:], (0, 1), value=-100)
    apart = [functional.pad(ids[:, 1:], (0, 1), value=-100) for ids in (first, other)]
    after[:, 4] = -100
    expected = [
        model(ids, shift_labels=labels) for ids, labels in zip((first, other), apart, strict=True)
    ]
    scores = torch.cat([output.token_log_probs for output in expected], 1)
    torch.testing.assert_close(
        model(row, shift_labels=after).token_log_probs, scores, rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("family", [None, *HOSTS])
@torch.no_grad()
def test_attention_stops_at_the_ends_of_documents(family):
    if family is None:
        shape = dict(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        config = DemixConfig(**shape, max_position_embeddings=LENGTH)
        packed_and_apart(build_lm(config, seed=1))
        return
    stock = tiny_stock(family)
    model = make_dense_class(type(stock))(stock.config)
    model.load_state_dict(stock.state_dict())
    packed_and_apart(model)


@pytest.mark.parametrize("family", HOSTS)
@torch.no_grad()
def test_saved_with_experts_and_taken_out_again(family, tmp_path):
    stock = tiny_stock(family)
    stock.save_pretrained(tmp_path / "stock")
    config = make_lm_config(
        str(tmp_path / "stock"),
        vocab_size=VOCAB - 1,
        special_ids={"eos_token_id": 2},
        domains=DOMAINS,
        untie="feedforward",
        max_positions=LENGTH,
        attn_implementation="eager",
        overrides={},
    )
    model = build_lm(config, seed=1, init_from=tmp_path / "stock").eval()
    for name, parameter in model.named_parameters():
        if parse_expert_domain(name) == "med":
            parameter += 0.1 * torch.randn(parameter.shape)
    expected = {domain: model(IDS, domain=domain).logits for domain in DOMAINS}
    assert torch.equal(expected["law"], stock(input_ids=IDS).logits)
    assert not torch.equal(expected["law"], expected["med"])

    model.save_pretrained(tmp_path / "demix")
    fields = json.loads((tmp_path / "demix" / "config.json").read_text())
    assert (fields["model_type"], fields["host"]) == ("demix_host", family)
    assert fields["domains"] == DOMAINS and fields["untie"] == "feedforward"
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "demix", attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    loaded.eval()
    for domain in DOMAINS:
        assert torch.equal(loaded(IDS, domain=domain).logits, expected[domain])
    part = load_lm(tmp_path / "demix", local_domains=["med"], attn_implementation="eager").eval()
    assert {parse_expert_domain(name) for name, _ in part.named_parameters()} == {None, "med"}
    assert torch.equal(part(IDS).logits, expected["med"])
    chosen = dict(max_new_tokens=6, do_sample=False)
    cached = part.generate(IDS[:, :4], use_cache=True, **chosen)
    assert torch.equal(cached, part.generate(IDS[:, :4], use_cache=False, **chosen))

    taken = extract_expert_weights(model.state_dict(), "med")
    assert set(taken) == set(stock.state_dict())
    stock.load_state_dict(taken)
    assert torch.equal(stock(input_ids=IDS).logits, expected["med"])
    whole = make_dense_class(type(stock))(read_lm_config(tmp_path / "stock"))
    whole.load_state_dict(taken)
    whole.save_pretrained(tmp_path / "med")
    back, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "med", attn_implementation="eager", output_loading_info=True
    )
    assert type(back) is type(stock) and not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert all(torch.equal(tensor, taken[name]) for name, tensor in back.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_shared_weights_are_drawn_alike_whatever_experts_are_held(family, tmp_path):
    tiny_stock_config(family).save_pretrained(tmp_path)
    arguments = dict(
        vocab_size=VOCAB,
        special_ids={"eos_token_id": 2},
        domains=DOMAINS,
        max_positions=9,
        attn_implementation=None,
        overrides={},
    )
    config = make_lm_config(str(tmp_path), untie="feedforward", **arguments)
    whole = dict(build_lm(config, seed=3).named_parameters())
    plain = make_lm_config(str(tmp_path), untie="all", **arguments)
    dense = dict(build_lm(plain, seed=3).named_parameters())
    for domain in DOMAINS:
        for name, tensor in build_lm(config, seed=3, local_domains=[domain]).named_parameters():
            assert torch.equal(tensor, whole[name])
            assert torch.equal(tensor, dense[convert_to_dense_name(name)])
    other = dict(build_lm(config, seed=4).named_parameters())
    assert any(not torch.equal(whole[name], other[name]) for name in whole)


@pytest.mark.parametrize("untie", ["feedforward_every_other", "feedforward_top"])
def test_some_layers_alone_are_untied(untie):
    model = demix_of(tiny_stock("llama"), untie)
    layers = {
        name.split(".")[2] for name, _ in model.named_parameters() if parse_expert_domain(name)
    }
    assert layers == {"1"}


def test_no_storage_of_a_fake_tensor_is_copied(monkeypatch):
    """Plans build models on fake tensors, whose storages have no memory behind their address."""

    def refuse(*arguments):
        raise AssertionError("a storage is copied")

    monkeypatch.setattr(torch.Tensor, "__deepcopy__", refuse)
    kind, model_class = make_host_classes("llama")
    fields = tiny_stock_config("llama").to_dict() | {"domains": DOMAINS, "untie": "feedforward"}
    config = kind(**{name: value for name, value in fields.items() if name != "model_type"})
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model_class(config)
    law, med = (model.model.layers[0].mlp.experts[name].up_proj.weight for name in DOMAINS)
    assert law is not med and law.shape == med.shape and med.requires_grad


def test_buffers_keep_their_precision():
    model = demix_of(tiny_stock("gemma2")).bfloat16()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} == {torch.float32}
    stock = tiny_stock("gemma2").bfloat16()  # its class rounds the rotary frequencies
    ours = model(input_ids=IDS, labels=IDS, domain="law").loss.float()
    theirs = stock(input_ids=IDS, labels=IDS).loss.float()
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=0)


def test_a_family_without_a_row_is_a_whole_model():
    stock = tiny_stock("mamba", state_size=4, intermediate_size=32)
    model = make_dense_class(type(stock))(stock.config)
    model.load_state_dict(stock.state_dict())
    expected = stock.train()(input_ids=IDS, labels=IDS).loss
    output = model.train()(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=1e-6)
    assert type(model).__name__ == type(stock).__name__


def test_a_new_family_is_one_row(monkeypatch):
    """CONTRIBUTING.md, "Add a host family", with a family of transformers that has no row."""
    assert "bitnet" not in HOSTS
    monkeypatch.setitem(HOSTS, "bitnet", Host())
    test_experts_in_place_of_the_feed_forward_change_no_bit("bitnet")


def test_refusals_name_the_value_and_what_is_allowed(tmp_path):
    def refused(text: str, untie: str = "feedforward", **changes: object) -> None:
        arguments = dict(
            vocab_size=VOCAB,
            special_ids={"eos_token_id": 2},
            domains=DOMAINS,
            untie=untie,
            max_positions=9,
            attn_implementation=None,
            overrides={},
        )
        with pytest.raises(UserError, match=text):
            make_lm_config(str(tmp_path), **(arguments | changes))

    def write(**fields: object) -> None:
        (tmp_path / "config.json").write_text(json.dumps(fields))

    for kind in ("bert", "t5", "bart", "roberta", "gemma3"):
        write(model_type=kind)
        refused(f"model_type '{kind}'; a causal language model is needed", untie="none")
    write(model_type="mine", auto_map={"AutoModelForCausalLM": "mine.Mine"})
    refused("code in folders is never run")
    tiny_stock_config("llama").save_pretrained(tmp_path)
    refused("a vocabulary of 40 and 32 positions; the data need 41", vocab_size=41)
    refused("the data need 40 and 33", max_positions=33)
    refused("with id 2, the data with id 7", special_ids={"eos_token_id": 7})
    refused("--hidden_size cannot change", overrides={"hidden_size": 8})
    for untie in ("transformer", "transformer_output", "input_output"):
        refused(f"--untie {untie}: layers of a llama cannot", untie=untie)
    refused("domain 'items'", domains=["items"])
    fields = json.loads((tmp_path / "config.json").read_text())
    write(**fields, quantization_config={"quant_method": "gptq"})
    refused("is quantised", untie="none")
    write(**fields, model_type_=0)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    with pytest.raises(UserError, match=r"the weight file b\.safetensors is missing"):
        load_lm(tmp_path)
    tiny_stock_config("mixtral").save_pretrained(tmp_path)
    refused("mixture of experts, and has experts of its own")
    tiny_stock_config("mamba").save_pretrained(tmp_path)
    refused("feed-forward layers are not known")
    assert read_lm_config(tmp_path).model_type == "mamba"


def test_a_dense_model_is_saved_as_a_stock_folder(tmp_path):
    stock = tiny_stock("gpt2")
    model = make_dense_class(type(stock))(stock.config)
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert not {"domains", "untie", "host"} & fields.keys()
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(stock) and not report["missing_keys"]
