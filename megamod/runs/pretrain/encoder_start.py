"""Weights that the pretraining of an encoder starts from, and the teacher of distillation."""

import logging
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from megamod.args import ModelArgs, MuxArgs
from megamod.convert.sources import is_model_source, may_have_weights, resolve_model
from megamod.data.lm.databin import DataBin
from megamod.errors import UserError
from megamod.evaluation.held_out_data import check_tokenizer_matches
from megamod.models import build
from megamod.models.pretrained import load_pretrained

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightSource:
    """Source of the initial weights, a model folder or hub name, and the option that named it."""

    source: str
    flag: str

    def __str__(self) -> str:
        """Return the option and its value, as messages begin."""
        return f"{self.flag} {self.source}"


def find_weight_source(model: ModelArgs, config: PreTrainedConfig) -> WeightSource | None:
    """Find the source of the initial weights: --init_from, or --model with weights.

    With --from_scratch those of --model are not used.

    Args:
        model: flags of the model.
        config: configuration of the model to train.
    Returns:
        None if all weights are new.
    Raises:
        UserError: if they are those of another family or number of instances.
    """
    if model.init_from is not None:
        start = WeightSource(model.init_from, "--init_from")
    elif is_model_source(model.model) and may_have_weights(model.model) and not model.from_scratch:
        start = WeightSource(model.model, "--model")
    else:
        return None
    stock = config.model_type.removeprefix("mux_")
    same = (stock, config.model_type)
    config_of_start = resolve_model(
        *astuple(start), same.__contains__, f"{' or '.join(same)}"
    ).config
    instances = getattr(config_of_start, "num_instances", 1)
    if config_of_start.model_type != stock and instances != getattr(config, "num_instances", 1):
        raise UserError(
            f"{start}: that model has num_instances {instances}, this one "
            f"{getattr(config, 'num_instances', 1)}"
        )
    return start


def load_teacher(
    model: ModelArgs, mux: MuxArgs, config: PreTrainedConfig, data: DataBin
) -> PreTrainedModel | None:
    """Load the stock BERT whose states are distilled, in evaluation mode; None: other objectives.

    Args:
        model: flags of the model, which is its own teacher without --teacher.
        mux: flags of objective and multiplexing.
        config: configuration of the model to train, as wide as the teacher.
        data: data-bin, whose tokenizer must be the teacher's.
    Raises:
        UserError: if there is no such model, or it is of another family, width or vocabulary.
    """
    if mux.objective != "distillation":
        return None
    flag = "--model" if mux.teacher is None else "--teacher"
    source = mux.teacher or model.model
    if not is_model_source(source):
        raise UserError(
            f"--objective distillation: {flag} {source} is no folder or hub name of a stock BERT; "
            "give --teacher"
        )
    stock = config.model_type.removeprefix("mux_")
    reference = resolve_model(source, flag, stock.__eq__, f"{stock!r}, as a teacher is")
    width = reference.config.hidden_size
    if width != config.hidden_size:
        raise UserError(
            f"{flag} {source}: its states have {width} features, the model's {config.hidden_size}"
        )
    if Path(source).is_dir():
        check_tokenizer_matches(Path(source), data, flag)
    teacher, _ = load_pretrained(AutoModel, reference.name, flag)
    return teacher.eval().requires_grad_(False)


def build_initial_encoder(
    config: PreTrainedConfig, seed: int, start: WeightSource | None, objective: str
) -> nn.Module:
    """Build an encoder in float32, with the weights that a source has, and new ones otherwise.

    A stock encoder starts a multiplexed one: its embeddings and layers are kept, multiplexer and
    demultiplexer are new. Tensors that are new or not used are logged.

    Args:
        config: configuration of the encoder.
        seed: seed of the new weights.
        start: source of the weights; None: all are new.
        objective: value of --objective, which selects the class.
    Raises:
        UserError: if a tensor has another shape, or the weights cannot be read.
    """
    torch.manual_seed(seed)
    if start is None:
        logger.info("new weights, drawn with --seed %d", seed)
        return build.build_encoder(config, objective, torch.float32)
    build.set_pretraining_architecture(config)
    model, report = load_pretrained(
        build.select_pretraining_class(objective),
        resolve_model(*astuple(start)).name,
        start.flag,
        config=config,
        ignore_mismatched_sizes=True,
    )
    if report["mismatched_keys"]:
        name, saved, here = min(report["mismatched_keys"])
        raise UserError(f"{start}: {name} has shape {tuple(saved)}, in this model {tuple(here)}")
    logger.info("weights of %s", start)
    for title, names in (("new", "missing_keys"), ("left out", "unexpected_keys")):
        if report[names]:
            logger.info("%s: %s: %s", start.flag, title, ", ".join(sorted(report[names])))
    return model
