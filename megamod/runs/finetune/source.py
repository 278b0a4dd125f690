"""The model that a finetuning run starts from: configuration, source of the weights, tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedConfig

from megamod.convert.sources import may_have_weights, resolve_model
from megamod.data.corpus.tokenizers import load_tokenizer
from megamod.errors import UserError
from megamod.models.presets import PRESETS
from megamod.runs.finetune.args import StageArgs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def read_start_config(
    stage: StageArgs, accepts: Callable[[str], bool], needed: str
) -> tuple[PreTrainedConfig | None, str | None]:
    """Read the configuration that a run starts from, and find the source of its weights.

    Args:
        stage: flags of the model and of the stages.
        accepts: returns True for a model type that the run can train, see `resolve_model`.
        needed: the kind of model that is accepted, for the message.
    Returns:
        the configuration, None for a named size, which needs the size of the vocabulary first; and
        the folder or hub name of the weights, None for new ones.
    Raises:
        UserError: if the model is missing, of another kind, or without weights and not trained.
    """
    if stage.model is None and stage.config_name is None:
        raise UserError(
            "--model is missing: a model folder or name, or --config_name for a new one"
        )
    if stage.model is None and not stage.do_train:
        raise UserError(
            f"--config_name {stage.config_name}: a new model answers at random; give --do_train"
        )
    if stage.config_name in PRESETS["bert"]:
        return None, None
    named, flag = stage.model or stage.config_name, "--model" if stage.model else "--config_name"
    if stage.model is None and not Path(named).exists() and "/" not in named:
        sizes = ", ".join(PRESETS["bert"])
        raise UserError(f"--config_name {named}: is no folder and none of {sizes}")
    source = resolve_model(named, flag, accepts, needed)
    if stage.model is None:
        return source.config, None
    if may_have_weights(source.name):
        return source.config, source.name
    if not stage.do_train:
        raise UserError(f"--model {named}: there are no weights in it, so it must be trained")
    return source.config, None


def load_matching_tokenizer(
    config: PreTrainedConfig | None, model: str | None, tokenizer: str | None
) -> "PreTrainedTokenizerFast":
    """Load the tokenizer of an encoder and check that it fits the encoder.

    Args:
        config: configuration of the model, which must have an embedding for every id; None: it is
            built later, from the size of this vocabulary.
        model: folder or hub name of the model; None: it is built from scratch.
        tokenizer: folder or hub name; None: that of the model.
    Raises:
        UserError: if none is named, it is missing or cannot be read, it is no encoder's (without a
            padding token), or it has more ids than the model.
    """
    name = tokenizer or model
    if name is None:
        raise UserError("--tokenizer_name is missing: a model from scratch has no tokenizer")
    try:
        fast = load_tokenizer(name).original
    except UserError as error:
        if tokenizer is not None:
            raise
        raise UserError(
            f"{name}: its tokenizer cannot be used ({error}); name another (--tokenizer_name, or "
            "`tokenizer` of a study)"
        ) from error
    if fast is None or fast.pad_token_id is None:
        raise UserError(f"{name}: an encoder's tokenizer is needed, which has a padding token")
    if config is not None and len(fast) > config.vocab_size:
        raise UserError(
            f"the tokenizer {name} has {len(fast)} ids, the model {model} {config.vocab_size}: "
            "they do not belong together"
        )
    return fast
