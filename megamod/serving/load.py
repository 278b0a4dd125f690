"""The model to serve, by its folder: a classifier, or a language model."""

from pathlib import Path

import torch

from megamod.errors import UserError
from megamod.evaluation.generate import find_model_folder, load_text_generator
from megamod.evaluation.mux_pipeline import MuxPipeline, is_classifier
from megamod.run_recipe import read_run_recipe
from megamod.serving.app import Service
from megamod.serving.classification import ClassifierService
from megamod.serving.completion import CompletionService
from megamod.states.config_file import read_config_file

MAX_SEQ_LENGTH = 128
"""Tokens of a classifier's row if no run says otherwise; the default of finetuning."""


def load_service(
    model: str,
    *,
    domain: str | None = None,
    prior: Path | None = None,
    max_tokens: int,
    max_batch: int,
    max_seq_length: int | None = None,
    device: torch.device | str = "cpu",
) -> Service:
    """Load a model to serve.

    Args:
        model: folder or hub name; of a run's folder, its model is meant.
        domain, prior: those of a language model, see `load_text_generator`.
        max_tokens: most tokens that a completion may ask for.
        max_batch: groups of a classifier in a forward pass.
        max_seq_length: tokens of a classifier's row; None: as in the run.yaml of its run, else 128.
        device: device that the model runs on.
    Raises:
        UserError: if there is no such model, or it is of another kind.
    """
    folder = find_model_folder(model)
    if not (folder / "config.json").is_file() or not is_classifier(read_config_file(folder)):
        return CompletionService(
            load_text_generator(model, domain, prior, device), model, max_tokens
        )
    for flag, value in (("--domain", domain), ("--prior", prior)):
        if value is not None:
            raise UserError(f"{flag} {value}: {model} is a classifier, without experts to select")
    if max_seq_length is None:
        max_seq_length = read_run_recipe(folder.parent).get("max_seq_length", MAX_SEQ_LENGTH)
    try:
        pipeline = MuxPipeline.from_pretrained(
            folder, device=device, flag="--model", batch_size=max_batch, max_length=max_seq_length
        )
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"--model {model}, --max_seq_length {max_seq_length}: {error}") from error
    return ClassifierService(pipeline, model)
