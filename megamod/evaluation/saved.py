"""Scores of language models that lie in folders, each read and held one after the other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megamod.data.lm import DataBin
from megamod.data.pretraining import LmData
from megamod.errors import UserError
from megamod.evaluation.perplexity import DENSE, Batch, DomainEvaluation, Matrix
from megamod.models.configuration import DemixConfig
from megamod.models.demix_lm import DemixForCausalLM


@dataclass(frozen=True)
class HeldOut:
    """The text to score: some domains of one split of a data-bin.

    Attributes:
        path: folder of the data-bin.
        domains: names, the columns of a matrix of scores.
        split: "train", "valid" or "test".
        block_size: tokens per sequence; None for the model's longest.
        batch_size: sequences per batch.
        domain_token: whether the token of the domain stands in front; "true", "false", or "auto"
            for whatever the model's vocabulary has room for.
        own_only: score each expert on its own domain only.
    """

    path: str
    domains: Sequence[str]
    split: str
    block_size: int | None
    batch_size: int
    domain_token: str
    own_only: bool


@dataclass(frozen=True)
class SavedModel:
    """A model folder, found to fit the data; `row` names an independent model's row, its domain."""

    folder: Path
    config: DemixConfig
    data: LmData
    row: str | None


def find_models(folder: Path, held_out: HeldOut) -> list[SavedModel]:
    """The model in a folder, or those in its subfolders, named after their domains.

    Raises:
        UserError: if there is none, or one does not fit the data.
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        found = {None: folder}
    else:
        found = {path.parent.name: path.parent for path in sorted(folder.glob("*/config.json"))}
    if not found:
        raise UserError(f"--model {folder}: holds no config.json, and no folder in it does")
    models = []
    for row, place in found.items():
        config = read_config(place)
        models.append(SavedModel(place, config, open_data(place, config, held_out), row))
    return models


def score_models(models: Sequence[SavedModel], held_out: HeldOut, device: torch.device) -> Matrix:
    """Scores of what `find_models` found.

    Returns:
        a row `DENSE` for a dense model; for a model with experts (DEMix) and for independent models
        (Branch-Train-Merge) a row per expert.
    """
    matrix: Matrix = {}
    for saved in models:
        apart = saved.config.untie != "none"
        rows = tuple(saved.config.domains) if apart else (saved.row or DENSE,)
        evaluate = DomainEvaluation(
            model=DemixForCausalLM.from_pretrained(saved.folder).to(device),
            experts=rows,
            held=rows,
            choose=apart,
            domains=held_out.domains,
            batches=partial(_batches, saved.data, held_out),
            bytes_of=partial(saved.data.bytes_of, split=held_out.split),
            part=0,
            parts=1,
            device=device,
            reduce=lambda sums: None,
        )
        matrix |= evaluate(held_out.own_only)
    return matrix


def read_config(folder: Path) -> DemixConfig:
    """Configuration of a model folder.

    Raises:
        UserError: if it is not that of one of our causal language models.
    """
    try:
        fields, _ = DemixConfig.get_config_dict(folder)
        if fields.get("model_type") == DemixConfig.model_type:
            return DemixConfig.from_dict(fields)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--model {folder}: config.json cannot be used: {error}") from error
    raise UserError(
        f"--model {folder}: config.json has model_type {fields.get('model_type')!r}; "
        f"allowed is {DemixConfig.model_type!r}"
    )


def open_data(folder: Path, config: DemixConfig, held_out: HeldOut) -> LmData:
    """The data-bin as the model in `folder` reads it, domain tokens included if it has them.

    Raises:
        UserError: if vocabulary, domains or sequence length do not fit.
    """
    block_size = held_out.block_size or config.max_position_embeddings
    if block_size > config.max_position_embeddings:
        raise UserError(
            f"--max_seq_length {block_size}: the model in {folder} has "
            f"{config.max_position_embeddings} positions"
        )
    vocabulary = DataBin(held_out.path).vocab_size
    with_tokens = vocabulary + len(config.domains)
    if config.vocab_size not in (vocabulary, with_tokens):
        raise UserError(
            f"--model {folder} has a vocabulary of {config.vocab_size}; --data {held_out.path} "
            f"needs {vocabulary}, or {with_tokens} with a token for each of the model's "
            f"{len(config.domains)} domains"
        )
    room = config.vocab_size > vocabulary
    if held_out.domain_token == "true" and not room:
        raise UserError(
            f"--domain_token true: the model in {folder} has no domain tokens, its vocabulary of "
            f"{config.vocab_size} is that of the data"
        )
    domain_token = room and held_out.domain_token != "false"
    data = LmData(
        held_out.path,
        # The place of a name among all the domains of the training decides the id of its token.
        domains=config.domains if domain_token else None,
        block_size=block_size,
        domain_token=domain_token,
    )
    for domain in held_out.domains:
        if domain not in data.domains:
            owner = f"the model in {folder} has no token for" if domain_token else "no such data:"
            raise UserError(f"--domains: {owner} {domain!r}; choose of {', '.join(data.domains)}")
    return data


def _batches(data: LmData, held_out: HeldOut, domain: str) -> Iterator[Batch]:
    return data.eval_batches(domain, held_out.split, held_out.batch_size, max_batches=0)
