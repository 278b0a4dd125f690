"""Conventions of stock classes, on every class of ours: outputs, saving, resizing, generation."""

import copy
from importlib import import_module

import pytest
import torch
from saved_models import make_model
from tiny_mux import FIELDS, batch, build_model
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import find_labels

from megamod.errors import UserError
from megamod.models.ca_mtl.configuration import CaMtlConfig
from megamod.models.ca_mtl.model import CaMtlForMultiTask
from megamod.models.lm.configuration import DemixConfig
from megamod.models.lm.demix import DemixForCausalLM
from megamod.models.lm.host import make_dense_class, make_host_classes

MODULES = (
    *("ca_mtl.model", "lm.demix", "lm.demix_model", "lm.forest"),
    *("mux.bert", "mux.electra", "mux.generator", "mux.roberta"),
)
GAUSS = "gaussian_hadamard"
PAD, POSITIONS = 1, 16
GPTS = ("none", "feedforward", "transformer", "transformer_output", "input_output")
MUXES = (
    *("bert-sequence-index_pos", "bert-token-index", "bert-mlm-index_pos", "bert-mlm-index"),
    *("electra-sequence-index_pos", "electra-token-index", "electra-mlm-index_pos"),
    *("electra-discriminator-index_pos", "electra-wrapper-index_pos"),
    *("roberta-sequence-mlp", "roberta-token-index"),
)
OF_EACH_DOMAIN = ("gpt-transformer_output", "gpt-input_output")


def ids_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 23, shape, generator=torch.Generator().manual_seed(seed))


def model_and_batch(kind: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A tiny model without dropout, and a batch with labels."""
    family, _, rest = kind.partition("-")
    torch.manual_seed(0)
    if family == "gpt":
        domains = {"domains": ["law", "med"], "domain": None if rest == "none" else "law"}
        shape = dict(vocab_size=23, hidden_size=12, num_attention_heads=3, num_hidden_layers=2)
        model = DemixForCausalLM(
            DemixConfig(**shape, **domains, untie=rest, max_position_embeddings=POSITIONS)
        )
        return model, {"input_ids": ids_of(3, 7), "labels": ids_of(3, 7)}
    if family == "ca_mtl":
        sizes = {name: FIELDS[name] for name in FIELDS.keys() & CaMtlConfig.__annotations__.keys()}
        config = CaMtlConfig(
            **sizes,
            variant=rest,
            max_seq_length=8,
            classifier_dropout=0.0,
            tasks=["a", "b"],
            task_kinds=["sequence", "token"],
            task_labels=[["x", "y"], ["O", "B", "I"]],
        )
        inputs = {"input_ids": ids_of(4, 8), "task_ids": torch.tensor([0, 1, 0, 1])}
        inputs |= {"labels": torch.tensor([0, 0, 1, 0]), "token_labels": ids_of(4, 8) % 3}
        return CaMtlForMultiTask(config), inputs
    head, demux = rest.split("-")
    model = build_model(family, head, demux, GAUSS, {}).float()
    inputs = batch(head, model.config, 4, False)
    del inputs["position_ids"]
    return model, inputs


def scored(model, inputs):
    torch.manual_seed(1)  # what replaced-token models draw
    return model(**inputs)


@pytest.mark.parametrize(
    "kind", [f"gpt-{untie}" for untie in GPTS] + ["ca_mtl-base", "ca_mtl-large", *MUXES]
)
def test_outputs_files_checkpointing_and_resizing(kind, tmp_path):
    logging.disable_progress_bar()
    model, inputs = model_and_batch(kind)
    expected = scored(model.eval(), inputs)
    torch.manual_seed(1)
    loss, second, *_ = model(**inputs, return_dict=False)
    assert torch.equal(loss, expected.loss)
    if isinstance(second, torch.Tensor) and expected.logits is not None:
        assert torch.equal(second, expected.logits)
    assert torch.equal(expected[0], expected.loss)

    model.save_pretrained(tmp_path / "saved")
    loaded, report = type(model).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(scored(loaded.eval(), inputs).loss, expected.loss)

    gradients = []
    for checkpointing in (False, True):
        trained = copy.deepcopy(model).train()
        if checkpointing:
            trained.gradient_checkpointing_enable()
            assert trained.is_gradient_checkpointing
        scored(trained, inputs).loss.backward()
        gradients.append([parameter.grad for parameter in trained.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert (plain is None) == (recomputed is None)
        if plain is not None:
            torch.testing.assert_close(plain, recomputed)

    rows = model.config.vocab_size + 3
    if kind in OF_EACH_DOMAIN:
        with pytest.raises(ValueError, match="every domain has a vocabulary matrix of its own"):
            model.resize_token_embeddings(rows)
        return
    model.resize_token_embeddings(rows)
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == rows
    resized = scored(model, inputs)
    if isinstance(resized.logits, torch.Tensor) and resized.logits.shape[-1] == rows:
        torch.testing.assert_close(resized.logits[..., : rows - 3], expected.logits)
    model.save_pretrained(tmp_path / "resized")
    loaded = type(model).from_pretrained(tmp_path / "resized").eval()
    torch.testing.assert_close(scored(loaded, inputs).loss, resized.loss)


def every_class() -> list[type[PreTrainedModel]]:
    """Classes of `megamod.models`, and those made from stock ones."""
    modules = [import_module(f"megamod.models.{name}") for name in MODULES]
    classes = {
        member
        for module in modules
        for member in vars(module).values()
        if isinstance(member, type) and issubclass(member, PreTrainedModel)
    }
    classes |= {*make_host_classes("llama")[1:], make_dense_class(LlamaForCausalLM)}
    return sorted(classes, key=lambda model: model.__name__)


@pytest.mark.parametrize("model", every_class(), ids=lambda model: model.__name__)
def test_labels_and_outputs_that_trainer_reads_from_a_class(model):
    """Parameters named after labels are fields that every batch must have."""
    if "forward" in vars(model) or model.forward is not torch.nn.Module.forward:
        assert find_labels(model) in (["labels"], []), model
    assert isinstance(getattr(model.config_class, "keys_to_ignore_at_inference", []), list)


def test_the_bare_model_is_that_of_the_auto_class(tmp_path):
    folder = make_model(tmp_path / "model", max_position_embeddings=POSITIONS)
    bare, whole = AutoModel.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = ids_of(2, 5)
    output = bare(ids, output_hidden_states=True, use_cache=True)
    states = whole(ids, output_hidden_states=True).hidden_states
    assert torch.equal(output.last_hidden_state, states[-1])
    assert all(map(torch.equal, output.hidden_states, states))
    assert output.past_key_values.get_seq_length() == 5
    assert torch.equal(whole(ids).logits, whole.lm_head(states[-1]))
    last = whole(ids, logits_to_keep=torch.tensor([1, 4])).logits
    torch.testing.assert_close(last, whole(ids).logits[:, [1, 4]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("demix") / "model"
    return make_model(path, "feedforward", max_position_embeddings=POSITIONS)


def test_the_domain_of_a_loaded_model(folder, tmp_path):
    ids = ids_of(1, 4)
    model = AutoModelForCausalLM.from_pretrained(folder, domain="code")
    other = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model(ids).logits, other(ids, domain="code").logits)
    model.save_pretrained(tmp_path / "saved")  # the choice is kept
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(ids).logits, model(ids).logits)
    undecided = AutoModelForCausalLM.from_pretrained(folder)
    for call in (undecided, undecided.generate):
        with pytest.raises(UserError, match="choose one of the domains law, code, art"):
            call(ids)
    with pytest.raises(UserError, match="no expert for domain 'x'; there are law, code, art"):
        AutoModelForCausalLM.from_pretrained(folder, domain="x")
    dense = make_model(tmp_path / "dense")
    with pytest.raises(UserError, match="domain 'law': the model is dense and has no experts"):
        AutoModelForCausalLM.from_pretrained(dense, domain="law")


def test_an_expert_that_is_held_alone_is_saved_alone(folder, tmp_path):
    ids = ids_of(1, 4)
    alone = AutoModelForCausalLM.from_pretrained(folder, local_domains=["code"])
    alone.save_pretrained(tmp_path)
    assert alone.config.domains == ["law", "code", "art"]
    loaded, report = type(alone).from_pretrained(tmp_path, output_loading_info=True)
    assert loaded.config.domains == ["code"] and not report["missing_keys"]
    whole = AutoModelForCausalLM.from_pretrained(folder, domain="code")
    assert torch.equal(loaded(ids).logits, whole(ids).logits)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_a_batch_with_padding_writes_what_each_prompt_writes_alone(folder, how):
    model = AutoModelForCausalLM.from_pretrained(folder, domain="law")
    prompts = [ids_of(1, length, seed=length) for length in (3, 7, 5)]
    ids = torch.cat([functional.pad(p, (7 - p.shape[1], 0), value=PAD) for p in prompts])
    how = how | dict(max_new_tokens=5, min_new_tokens=5)
    together = model.generate(ids, attention_mask=(ids != PAD).long(), **how)
    for prompt, written in zip(prompts, together, strict=True):
        assert torch.equal(model.generate(prompt, **how)[0, -5:], written[-5:])


def test_generation_stops_at_the_last_position(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, domain="law")
    more, ids = dict(max_new_tokens=90, min_new_tokens=80), ids_of(1, 3)
    longest = model.generate(ids, **more)
    assert longest.shape == (1, POSITIONS)
    within = dict(max_new_tokens=POSITIONS - 3, min_new_tokens=POSITIONS - 3)
    assert torch.equal(longest, model.generate(ids, **within))
    assert model.generate(ids, num_beams=2, **more).shape[1] == POSITIONS
    rows = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=rows, **more)[0], longest[0, 3:])
    assert model.generate(ids_of(1, POSITIONS), **more).shape[1] == POSITIONS + 1
    sentence = f"{POSITIONS + 1} tokens is longer than the {POSITIONS} positions of the model"
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=sentence):
            call(ids_of(1, POSITIONS + 1))
    with pytest.raises(ValueError, match="StaticCache has a fixed size, which is not supported"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
