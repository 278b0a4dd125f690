import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

import megamod  # noqa: F401  (makes the models known)
from megamod.errors import UserError
from megamod.models.auto import has_auto_class, make_lm_config
from megamod.models.lm.configuration import DemixConfig
from megamod.models.lm.demix import DemixForCausalLM
from megamod.models.lm.demix_model import DemixModel
from megamod.models.lm.flops import count_active_parameters
from megamod.models.lm.load import build_lm
from megamod.models.presets import PRESETS
from megamod.states.weights import extract_expert_weights, read_weights

SPECIAL = {"bos_token_id": 4, "pad_token_id": 5, "eos_token_id": 6}


def config_of(model: str = "tiny", **changes) -> DemixConfig:
    arguments = dict(
        vocab_size=30,
        special_ids=SPECIAL,
        domains=["law", "med"],
        untie="feedforward",
        max_positions=16,
        attn_implementation="eager",
        overrides={"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": None},
    )
    return make_lm_config(model, **{**arguments, **changes})


def test_model_types_of_an_auto_class():
    assert has_auto_class(AutoModelForSequenceClassification, "mux_bert")
    assert not has_auto_class(AutoModelForSequenceClassification, "demix")
    assert not has_auto_class(AutoModelForSequenceClassification, "unknown")


def test_a_preset_with_what_the_data_say():
    config = config_of()
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (8, 2, 2)
    assert config.intermediate_size == 32 and config.max_position_embeddings == 16
    assert (config.bos_token_id, config.pad_token_id, config.eos_token_id) == (4, 5, 6)
    assert config._attn_implementation == "eager"
    assert config_of(untie="all").untie == "none"


def test_the_shape_of_a_folder(tmp_path):
    config_of(untie="none").save_pretrained(tmp_path)
    config = config_of(str(tmp_path), overrides={"hidden_size": None}, max_positions=9)
    assert (config.hidden_size, config.max_position_embeddings) == (8, 16)
    assert config.untie == "feedforward" and config.domains == ["law", "med"]
    for changes, message in (
        ({}, "--hidden_size cannot change the model in"),
        ({"overrides": {}, "vocab_size": 31}, "has a vocabulary of 30 and 16 positions; the data"),
        ({"overrides": {}, "max_positions": 17}, "the data need 30 and 17"),
    ):
        with pytest.raises(UserError) as caught:
            config_of(str(tmp_path), **changes)
        assert message in str(caught.value)


def test_what_is_no_model_is_told():
    with pytest.raises(UserError, match=r"--model '2b' is .*tiny, 125m"):
        config_of("2b")
    with pytest.raises(UserError, match=r"domain 'a\.b'"):
        config_of(domains=["a.b"])


def test_a_rank_builds_its_experts_with_the_weights_of_the_whole_model():
    config = config_of()
    whole = dict(build_lm(config, seed=3).named_parameters())
    part = dict(build_lm(config, seed=3, local_domains=["med"]).named_parameters())
    assert {name for name in whole if ".law." not in name} == part.keys()
    assert all(torch.equal(parameter, whole[name]) for name, parameter in part.items())
    other = dict(build_lm(config, seed=4).named_parameters())
    table = "model.embeddings.tokens.weight"
    assert not torch.equal(other[table], whole[table])


def test_init_from_a_dense_model_gives_every_expert_the_same_start(tmp_path):
    dense = build_lm(config_of(untie="none", domains=[]), seed=1)
    dense.save_pretrained(tmp_path)
    model = build_lm(config_of(), seed=9, init_from=str(tmp_path))
    for domain in ("law", "med"):
        state = extract_expert_weights(dict(model.named_parameters()), domain)
        assert all(torch.equal(state[name], p) for name, p in dense.named_parameters())
    narrow = config_of(overrides={"hidden_size": 4, "num_attention_heads": 2})
    with pytest.raises(UserError, match=r"has shape \(30, 8\), the model needs \(30, 4\)"):
        build_lm(narrow, seed=9, init_from=str(tmp_path))
    deep = config_of(overrides={"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2})
    with pytest.raises(UserError, match=r"lack model\.layers\.2"):
        build_lm(deep, seed=9, init_from=str(tmp_path))


def test_init_from_a_model_with_experts_takes_those_asked_for(tmp_path):
    whole = build_lm(config_of(), seed=1)
    for number, parameter in enumerate(whole.parameters()):
        parameter.data.add_(number)
    whole.save_pretrained(tmp_path)
    part = build_lm(config_of(), seed=2, init_from=str(tmp_path), local_domains=["med"])
    expected = dict(whole.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in part.named_parameters())
    with pytest.raises(UserError, match="weights lack"):
        build_lm(config_of(domains=["law", "new"]), seed=2, init_from=str(tmp_path))


def test_active_parameters_are_one_expert_without_positions():
    for untie in ("none", "feedforward", "transformer", "input_output", "transformer_output"):
        config = config_of(untie=untie)
        width, inner, vocab = 8, 32, 30
        block = 4 * (width * width + width) + 4 * width + 2 * width * inner + inner + width
        expected = vocab * width * (2 if untie == "transformer_output" else 1)
        model = DemixForCausalLM(config)
        assert count_active_parameters(config, model) == (expected + 2 * block + 2 * width, 0)
        model.model.final_norm.requires_grad_(False)
        assert count_active_parameters(config, model) == (expected + 2 * block, 2 * width)


def test_auto_classes_know_the_models(tmp_path):
    model = build_lm(config_of(), seed=1)
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is DemixConfig
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is DemixForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is DemixModel
    assert read_weights(tmp_path).keys() == dict(model.named_parameters()).keys()
    assert set(PRESETS["demix"]) >= {"tiny"}
