"""Configurations that cannot be are refused, with the value that is wrong."""

import pytest

from megamod.models.mux.bert import MuxBertForSequenceClassification
from megamod.models.mux.configuration import (
    MuxBertConfig,
    MuxElectraConfig,
    MuxRobertaConfig,
)
from megamod.models.mux.electra import MuxElectraForSequenceClassification
from megamod.models.presets import PRESETS


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (MuxBertConfig, {"muxing_variant": "gauss"}, "'gauss': choose one of gaussian_hadamard"),
        (MuxBertConfig, {"muxing_variant": "gaussian_attention"}, "'gaussian_attention': choose"),
        (MuxElectraConfig, {"muxing_variant": "gaussian_attention_v2"}, "_v2': choose"),
        (MuxRobertaConfig, {"muxing_variant": "random_ortho_low_rank"}, "_rank': choose"),
        (MuxBertConfig, {"demuxing_variant": "mlp"}, "'mlp': choose one of index_pos, index"),
        (MuxRobertaConfig, {"demuxing_variant": "index_pos"}, "choose one of index, mlp"),
        (MuxBertConfig, {"num_hidden_demux_layers": 1}, "num_hidden_demux_layers 1 must be at"),
        (MuxBertConfig, {"num_instances": 0}, "num_instances 0 must be at least 1"),
        (MuxBertConfig, {"binary_hadamard_epsilon": 1.5}, "epsilon 1.5 must lie between 0 and 1"),
        (MuxBertConfig, {"binary_hadamard_epsilon": -0.1}, "epsilon -0.1 must lie between"),
        (MuxBertConfig, {"retrieval_percentage": 100}, "percentage 100 must lie between 0 and 1"),
        (MuxBertConfig, {"filler": "last"}, "filler 'last': choose one of deterministic, random"),
        (MuxBertConfig, {"hidden_act": "gelu_new"}, "hidden_act 'gelu_new': choose one of gelu"),
        (
            MuxBertConfig,
            {"num_attention_heads": 7},
            "768 is not divisible by num_attention_heads 7",
        ),
        (MuxBertConfig, {"vocab_size": 101}, "cls_token_id 101 is not in the vocabulary of 101"),
        (
            MuxBertConfig,
            {"vocab_size": 680, "demuxing_variant": "index"},
            "prefix_fill_token_id 680 is not in the vocabulary of 680",
        ),
        (
            MuxBertConfig,
            {"num_instances": 3, "prefix_first_token_id": 1, "demuxing_variant": "index"},
            "prefix_first_token_id - num_instances \\+ 1 -1 is not in the vocabulary",
        ),
        (
            MuxElectraConfig,
            {"muxing_variant": "random_ortho", "embedding_size": 128},
            "random_ortho needs embedding_size 128 to be hidden_size 768",
        ),
        (
            MuxElectraConfig,
            {"muxing_variant": "binary_hadamard", "embedding_size": 4, "num_instances": 5},
            "divides embedding_size 4 among the instances; num_instances 5",
        ),
        (
            MuxBertConfig,
            {"muxing_variant": "binary_hadamard", "num_instances": 769},
            "divides hidden_size 768 among the instances; num_instances 769",
        ),
        (MuxElectraConfig, {"generator": "big"}, "generator 'big': choose one of none, plain"),
    ],
)
def test_refused(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_layers_and_prefix_tokens_matter_only_where_they_are_used():
    MuxBertConfig(num_hidden_demux_layers=1, demuxing_variant="index")
    MuxBertConfig(vocab_size=200, demuxing_variant="index_pos")


def test_classes_have_their_multiplexers():
    tiny = dict(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8)
    config = MuxElectraConfig(**tiny, embedding_size=8, muxing_variant="gaussian_attention")
    with pytest.raises(ValueError, match="is not one of MuxElectraForSequenceClassification"):
        MuxElectraForSequenceClassification(config)
    config = MuxBertConfig(**tiny, muxing_variant="gaussian_attention_v2", demuxing_variant="index")
    with pytest.raises(
        ValueError, match="gaussian_attention_v2 needs demuxing_variant 'index_pos'"
    ):
        MuxBertForSequenceClassification(config)


def test_a_generator_differs_where_it_is_told_to():
    config = MuxElectraConfig(generator="plain", generator_config={"num_hidden_layers": 3})
    own_values = config.make_generator_config()
    assert (own_values.num_hidden_layers, own_values.hidden_size, own_values.generator) == (
        3,
        768,
        "none",
    )
    config = MuxElectraConfig(generator="plain", generator_config={"layers": 3})
    with pytest.raises(ValueError, match="generator_config: layers is no field"):
        config.make_generator_config()


@pytest.mark.parametrize("config", [MuxBertConfig, MuxElectraConfig, MuxRobertaConfig])
def test_presets_and_files(config, tmp_path):
    for fields in PRESETS[config.model_type].values():
        built = config(**fields, num_instances=5, learn_muxing=1)
        built.save_pretrained(tmp_path)
        again = config.from_pretrained(tmp_path)
        assert again.to_dict() == built.to_dict() and again.learn_muxing is True
    small = PRESETS["mux_electra"]["small"]
    assert (small["hidden_size"], small["embedding_size"], small["num_hidden_layers"]) == (
        256,
        128,
        12,
    )
