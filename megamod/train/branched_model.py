"""Models of a branch and its parent, compared when the branch starts from a checkpoint."""

from pathlib import Path

from transformers import PreTrainedConfig

from megamod.errors import UserError
from megamod.models.lm.configuration import DemixConfig, read_lm_config

SHARED_GPT_FIELDS = (
    *("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "max_position_embeddings", "tie_word_embeddings", "untie"),
)
"""Fields of the project's GPT that a branch shares with its parent."""

UNSHARED_STOCK_FIELDS = frozenset(
    (
        *("dtype", "use_cache", "transformers_version", "architectures", "domains"),
        *("attn_implementation", "_attn_implementation", "_name_or_path", "_commit_hash"),
    )
)
"""Fields of stock configurations that a branch need not share with its parent."""


def check_branched_model(folder: Path, config: PreTrainedConfig) -> None:
    """Refuse a checkpoint of another run whose weights differ in shape or meaning from this run's.

    Args:
        folder: model folder in the checkpoint of the other run.
        config: configuration of this run's model.
    Raises:
        UserError: with the fields that differ, or if config.json cannot be read.
    """
    saved, current = read_lm_config(folder).to_dict(), config.to_dict()
    names = (
        SHARED_GPT_FIELDS
        if config.model_type == DemixConfig.model_type
        else sorted(saved | current)
    )
    differences = [
        f"{name}: {saved.get(name)!r} there, {current.get(name)!r} now"
        for name in names
        if saved.get(name) != current.get(name) and name not in UNSHARED_STOCK_FIELDS
    ]
    if differences:
        raise UserError(
            f"{folder} branched off another model than this run has; " + "; ".join(differences)
        )
