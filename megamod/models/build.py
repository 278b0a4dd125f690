"""Configurations of encoders from flags, and encoders with new weights.

Pretraining and the planner make the same configuration here; the planner builds its model on the
meta device, without storage.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    BertConfig,
    ElectraConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from megamod.errors import UserError
from megamod.models.mux.configuration import MuxBertConfig, MuxElectraConfig
from megamod.models.presets import PRESETS, SHAPE

FAMILIES = {
    "masked_lm": "mux_bert",
    "replaced_token": "mux_electra",
    "distillation": "mux_bert",
}
"""Model type of the multiplexed encoder that each objective trains."""

# Fields of `MuxConfig` that have the name and the value of a flag.
LOSSES = ("task_loss_coeff", "retrieval_loss_coeff", "learn_muxing")
STRUCTURE = (
    *("num_instances", "muxing_variant", "demuxing_variant", "num_hidden_demux_layers"),
    "unmixed_layers",
)
STOCK = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob"),
    *("max_position_embeddings", "type_vocab_size", "initializer_range", "layer_norm_eps"),
    *("pad_token_id", "tie_word_embeddings", "embedding_size"),
)
"""Fields that a multiplexed encoder takes over from the stock encoder it starts from."""

DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
"""Names of the dropout rates in configurations of encoders."""

_AUTO = {
    "masked_lm": AutoModelForMaskedLM,
    "replaced_token": AutoModelForPreTraining,
    "distillation": AutoModel,
}


class EncoderFlags(Protocol):
    """The flags of `megamod.args.MuxArgs` that a model depends on."""

    objective: str
    num_instances: int
    muxing_variant: str
    demuxing_variant: str
    num_hidden_demux_layers: int
    unmixed_layers: int
    learn_muxing: bool
    task_loss_coeff: float
    retrieval_loss_coeff: float
    generator: str
    generator_size: float
    gen_loss_weight: float
    disc_loss_weight: float


class EncoderVocabulary(Protocol):
    """Size and special ids of the data's tokenizer; mask: read for replaced tokens only."""

    size: int
    bos: int
    pad: int

    @property
    def mask(self) -> int:
        """Id of the token that stands for a masked one."""
        ...


def make_encoder_config(
    preset: str,
    changed_fields: Mapping[str, int | None],
    flags: EncoderFlags,
    vocabulary: EncoderVocabulary,
    sequence_length: int,
) -> PreTrainedConfig:
    """Make the configuration of an encoder of a named size, stock if `num_instances` is 1.

    Args:
        preset: a size of the objective's family in `PRESETS`.
        changed_fields: fields of `SHAPE` that replace the preset's, where not None; embeddings are
            never wider than a changed hidden size.
        flags, vocabulary: see the two protocols.
        sequence_length: tokens of a sequence; the model gets at least 512 positions, as BERT has.
    Returns:
        a `BertConfig` or `ElectraConfig` if `num_instances` is 1, else as
        `make_multiplexed_config`.
    Raises:
        UserError: for an unknown size, or fields of a multiplexed encoder that do not fit each
            other.
    """
    sizes = PRESETS[FAMILIES[flags.objective]]
    if preset not in sizes:
        raise UserError(f"--model {preset!r}: is no model folder and none of {', '.join(sizes)}")
    changed_fields = {
        name: changed_fields[name] for name in SHAPE if changed_fields.get(name) is not None
    }
    shape = sizes[preset] | changed_fields | {"vocab_size": vocabulary.size}
    if "hidden_size" in changed_fields and "embedding_size" in shape:
        shape["embedding_size"] = min(shape["embedding_size"], changed_fields["hidden_size"])
    shape |= {"pad_token_id": vocabulary.pad, "max_position_embeddings": max(512, sequence_length)}
    if flags.num_instances == 1:
        return (ElectraConfig if flags.objective == "replaced_token" else BertConfig)(**shape)
    return make_multiplexed_config(shape, flags, vocabulary)


def make_multiplexed_config_from_stock(
    stock: PreTrainedConfig, flags: EncoderFlags, vocabulary: EncoderVocabulary
) -> PreTrainedConfig:
    """Make the configuration of a multiplexed encoder that starts from a stock one.

    Args:
        stock: configuration of the stock encoder, whose fields of `STOCK` are taken over.
        flags: decide about all else: multiplexing, losses and generator.
        vocabulary: source of the cls id, and for replaced tokens of the mask id.
    Returns:
        as `make_multiplexed_config`.
    Raises:
        UserError: for flags that do not fit it.
    """
    shape = {name: getattr(stock, name) for name in STOCK if hasattr(stock, name)}
    return make_multiplexed_config(shape, flags, vocabulary)


def make_multiplexed_config(
    shape: Mapping[str, object], flags: EncoderFlags, vocabulary: EncoderVocabulary
) -> PreTrainedConfig:
    """Make the configuration of a multiplexed encoder.

    Args:
        shape: fields with sizes and constants, under the names of stock encoders.
        flags: decide about all else: multiplexing, losses and generator.
        vocabulary: source of the cls id, and for replaced tokens of the mask id.
    Returns:
        a `MuxElectraConfig` for the objective "replaced_token", else a `MuxBertConfig`.
    Raises:
        UserError: for values that do not fit each other.
    """
    fields = {name: getattr(flags, name) for name in (*LOSSES, *STRUCTURE)}
    fields["cls_token_id"] = vocabulary.bos
    electra = flags.objective == "replaced_token"
    if electra:
        fields |= _make_generator_fields(shape, flags) | {"mask_token_id": vocabulary.mask}
    try:
        return (MuxElectraConfig if electra else MuxBertConfig)(**shape, **fields)
    except ValueError as error:
        raise UserError(str(error)) from error


def _make_generator_fields(shape: Mapping[str, object], flags: EncoderFlags) -> dict[str, object]:
    """Make the fields of `MuxElectraConfig` that describe the source of replaced tokens.

    A generator has the head size of the model, and `generator_size` times its heads (rounded, at
    least 1) and its feed-forward width. With `generator` "none" there is no generator.

    Args:
        shape: sizes of the model, fields of its configuration.
        flags: --generator and its settings.
    """
    names = ("generator", "gen_loss_weight", "disc_loss_weight")
    fields = {name: getattr(flags, name) for name in names}
    if flags.generator != "none":
        heads = max(1, round(shape["num_attention_heads"] * flags.generator_size))
        fields["generator_config"] = dict(
            hidden_size=shape["hidden_size"] // shape["num_attention_heads"] * heads,
            num_attention_heads=heads,
            intermediate_size=max(1, round(shape["intermediate_size"] * flags.generator_size)),
        )
    return fields


def make_bert_config(preset: str, vocab_size: int, **multiplexing: object) -> PreTrainedConfig:
    """Make the configuration of a BERT to finetune from scratch.

    Args:
        preset: a name in `PRESETS["bert"]`.
        vocab_size: number of ids.
        multiplexing: fields of `MuxBertConfig`. Without `num_instances`, or with one instance, the
            result is a stock `BertConfig` and the other fields have no effect.
    Raises:
        UserError: for multiplexing fields that do not fit each other.
    """
    shape = PRESETS["bert"][preset] | {"vocab_size": vocab_size}
    if multiplexing.get("num_instances") in (None, 1):
        return BertConfig(**shape)
    try:
        return MuxBertConfig(**shape, **multiplexing)
    except ValueError as error:
        raise UserError(str(error)) from error


def set_pretraining_architecture(config: PreTrainedConfig) -> None:
    """Set `config.architectures` of a multiplexed ELECTRA; other configurations do not change.

    Its Auto class has two models for pretraining, and builds the one that replaces tokens itself by
    this field.
    """
    if isinstance(config, MuxElectraConfig):
        config.architectures = ["MuxElectraForReplacedTokens"]


def select_pretraining_class(objective: str) -> type:
    """Select the Auto class of the model that an encoder's objective trains, as in `FAMILIES`."""
    return _AUTO[objective]


def build_encoder(
    config: PreTrainedConfig, objective: str, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Build an encoder with new weights, drawn from torch's global generator.

    On the meta device there are no weights. `config.architectures` of a multiplexed ELECTRA is set.

    Args:
        objective: a key of `FAMILIES`.
        dtype: dtype of the weights; None: torch's default.
    """
    set_pretraining_architecture(config)
    return select_pretraining_class(objective).from_config(config, dtype=dtype)


def set_dropout(config: PreTrainedConfig, rate: float | None) -> None:
    """Set all dropout rates of `config` to one rate, in place; None: leave them as they are."""
    if rate is not None:
        for name in DROPOUTS:
            if hasattr(config, name):
                setattr(config, name, rate)
