"""Inputs of a classifier, from its configuration: fields, instances per pass, length."""

from transformers import PreTrainedConfig

OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "longformer")
"""Model types whose first position is one after that of padding."""


def list_input_fields(config: PreTrainedConfig) -> tuple[str, ...]:
    """List the fields of a batch that a classifier with this configuration takes.

    They are ids and attention mask, and token types if `type_vocab_size` is above 1.
    """
    types = getattr(config, "type_vocab_size", 0) > 1
    return ("input_ids", "attention_mask", *(("token_type_ids",) if types else ()))


def needs_fixed_length(config: PreTrainedConfig) -> bool:
    """Return True for a multiplexed model: its rows must be padded to the length of training.

    Unless its configuration has `mask_padding`, padding is attended to and changes the states.
    """
    return hasattr(config, "muxing_variant")


def compute_max_row_tokens(config: PreTrainedConfig) -> int:
    """Compute how many tokens of a row a model has positions for, special ones included.

    Positions of padding (RoBERTa) and of a multiplexing prefix are not for tokens. For a
    configuration without `max_position_embeddings` it is 2 ** 20, more than any row has.
    """
    room = getattr(config, "max_position_embeddings", 1 << 20)
    if config.model_type in OFFSET_POSITIONS:
        room -= config.pad_token_id + 1
    if getattr(config, "demuxing_variant", None) == "index":
        room -= config.num_instances + 1
    return room
