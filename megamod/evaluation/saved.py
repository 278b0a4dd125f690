"""Scores of language models that lie in folders, each read and held one after the other."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from megamod.data.lm.batches import eval_batches
from megamod.data.lm.blocks import TokenBlocks
from megamod.data.lm.databin import DataBin
from megamod.data.lm.pretraining import LmData
from megamod.errors import UserError
from megamod.evaluation.perplexity import (
    DENSE,
    Batch,
    DomainEvaluation,
    Matrix,
    Score,
    with_context,
)
from megamod.models.lm.configuration import (
    DemixConfig,
    LmConfig,
    default_sequence,
    domains_of,
    longest_sequence,
    read_lm_config,
    untie_of,
)
from megamod.models.lm.forest import read_lm
from megamod.states.forest import FILE, open_forest


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
        experts: the experts to score, of models that have several; None: all.
        context_window: tokens of the text before each sequence that are read and not scored;
            sequences hold so many fewer.
        force_domain_token: domain whose token stands in front, whatever the text; None: its own.
    """

    path: str
    domains: Sequence[str]
    split: str
    block_size: int | None
    batch_size: int
    domain_token: str
    own_only: bool
    experts: Sequence[str] | None = None
    context_window: int = 0
    force_domain_token: str | None = None


@dataclass(frozen=True)
class SavedModel:
    """A model folder, found to fit the data.

    Attributes:
        rows: names of its rows in a matrix of scores, and the domain whose expert makes each; None
            where there is nothing to choose.
    """

    folder: Path
    config: LmConfig
    data: LmData
    rows: Mapping[str, str | None]


def find_models(folder: Path, held_out: HeldOut) -> list[SavedModel]:
    """The model in a folder, those that a forest.json lists, or those in its subfolders.

    Independent models in subfolders are named after their domains.

    Raises:
        UserError: if there is none, or one does not fit the data or lacks an expert asked for.
    """
    folder = Path(folder)
    found: dict[Path, dict[str, str | None] | None] = {}
    if folder.is_file() or (folder / FILE).exists():
        for expert in open_forest(folder).experts:
            found.setdefault(expert.path, {})[expert.domain] = expert.member
    elif (folder / "config.json").exists():
        found = {folder: None}
    else:
        places = (path.parent for path in sorted(folder.glob("*/config.json")))
        found = {place: {place.name: None} for place in places}
    if not found:
        raise UserError(f"--model {folder}: holds no config.json, and no folder in it does")
    models = []
    for place, rows in found.items():
        config = read_lm_config(place, "--model")
        if rows is None:
            rows = (
                {d: d for d in domains_of(config)} if untie_of(config) != "none" else {DENSE: None}
            )
        if DENSE in rows and (place != folder or rows[DENSE] is not None):
            raise UserError(
                f"--model {folder}: has an expert named {DENSE!r}, which is the row of models "
                "without experts; give it another name"
            )
        data = open_data(place, config, held_out)
        for domain in held_out.domains:
            held_out_blocks(data, held_out, domain)  # a missing file shows before any score
        models.append(SavedModel(place, config, data, rows))
    return models if held_out.experts is None else _chosen(folder, models, held_out.experts)


def _chosen(folder: Path, models: list[SavedModel], names: Sequence[str]) -> list[SavedModel]:
    """The models with the rows named alone; one without experts as it is."""
    known = [row for saved in models for row in saved.rows]
    if known == [DENSE]:
        return models
    for name in names:
        if name not in known:
            raise UserError(
                f"--experts: {folder} has no expert {name!r}; choose of {', '.join(known)}"
            )
    kept = [replace(m, rows={r: c for r, c in m.rows.items() if r in names}) for m in models]
    return [saved for saved in kept if saved.rows]


def score_models(models: Sequence[SavedModel], held_out: HeldOut, device: torch.device) -> Matrix:
    """Scores of what `find_models` found.

    Returns:
        a row `DENSE` for a dense model; for a model with experts (DEMix) and for independent models
        (Branch-Train-Merge) a row per expert.
    """
    matrix: Matrix = {}
    for saved in models:
        members = [member for member in saved.rows.values() if member is not None]
        # Experts that nobody asked for are not even read.
        model = read_lm(saved.folder, members).to(device)
        for row, member in saved.rows.items():
            if member is not None:
                model.set_domain(member)
            evaluate = DomainEvaluation(
                model=model,
                experts=(row,),
                held=(row,),
                choose=False,
                domains=held_out.domains,
                batches=partial(held_out_batches, saved.data, held_out),
                bytes_of=partial(saved.data.bytes_of, split=held_out.split),
                part=0,
                parts=1,
                device=device,
                reduce=lambda sums: None,
            )
            scores = evaluate(held_out.own_only)
            _check_scored(saved, row, scores[row], held_out)
            matrix |= scores
    return matrix


def _check_scored(
    saved: SavedModel, row: str, scores: Mapping[str, Score], held_out: HeldOut
) -> None:
    """Raise UserError where a model has no score on a text that it was to be scored on."""
    for domain in held_out.domains:
        own = not held_out.own_only or row in (domain, DENSE)
        if own and domain not in scores and len(held_out_blocks(saved.data, held_out, domain)):
            raise UserError(
                f"--model {saved.folder}: gives no token of {domain} a finite log-probability; its "
                "weights may hold values that are not numbers"
            )


def open_data(folder: Path, config: LmConfig, held_out: HeldOut) -> LmData:
    """The data-bin as the model in `folder` reads it, domain tokens included if it has them.

    Raises:
        UserError: if vocabulary, domains or sequence length do not fit.
    """
    block_size = held_out.block_size or default_sequence(config)
    longest = longest_sequence(config)
    if longest is not None and block_size > longest:
        raise UserError(
            f"--max_seq_length {block_size}: the model in {folder} has {longest} positions"
        )
    vocabulary, domains = DataBin(held_out.path).vocab_size, domains_of(config)
    stock = config.model_type != DemixConfig.model_type
    with_tokens = vocabulary + len(domains)
    if stock and config.vocab_size < vocabulary:
        raise UserError(
            f"--model {folder} has a vocabulary of {config.vocab_size}; --data {held_out.path} "
            f"needs {vocabulary}"
        )
    if not stock and config.vocab_size not in (vocabulary, with_tokens):
        raise UserError(
            f"--model {folder} has a vocabulary of {config.vocab_size}; --data {held_out.path} "
            f"needs {vocabulary}, or {with_tokens} with a token for each of the model's "
            f"{len(domains)} domains"
        )
    room = config.vocab_size > vocabulary and not stock
    if held_out.domain_token == "true" and not room:
        raise UserError(
            f"--domain_token true: the model in {folder} has no domain tokens, its vocabulary of "
            f"{config.vocab_size} is that of the data"
        )
    forced = held_out.force_domain_token
    if forced is not None and (not room or held_out.domain_token == "false"):
        why = "--domain_token is false" if room else f"the model in {folder} has no domain tokens"
        raise UserError(f"--force_domain_token {forced}: {why}")
    if forced is not None and forced not in domains:
        raise UserError(
            f"--force_domain_token {forced}: the model in {folder} has tokens for "
            f"{', '.join(domains)}"
        )
    domain_token = room and held_out.domain_token != "false"
    longest = block_size - 1 - domain_token
    if held_out.context_window > longest:
        raise UserError(
            f"--context_window {held_out.context_window}: sequences of {block_size} tokens leave "
            f"room for {longest} at most"
        )
    data = LmData(
        held_out.path,
        # The place of a name among all the domains of the training decides the id of its token.
        domains=domains if domain_token else None,
        block_size=block_size,
        domain_token=domain_token,
    )
    for domain in held_out.domains:
        if domain not in data.bin.domains:
            raise UserError(
                f"--domains: no such data: {domain!r}; choose of {', '.join(data.bin.domains)}"
            )
        if domain_token and forced is None and domain not in data.domains:
            raise UserError(
                f"--domains: the model in {folder} has no token for {domain!r}; choose of "
                f"{', '.join(data.domains)}, or give --force_domain_token"
            )
    return data


def held_out_blocks(data: LmData, held_out: HeldOut, domain: str) -> TokenBlocks:
    """The sequences of a domain's text, what stands before each of them as context left out."""
    token = data.tokens.get(held_out.force_domain_token or domain)
    length = data.block_size - held_out.context_window
    return data.bin.blocks(domain, held_out.split, length, token)


def held_out_batches(data: LmData, held_out: HeldOut, domain: str) -> Iterator[Batch]:
    """The same as batches, in order, each sequence with its context."""
    blocks = held_out_blocks(data, held_out, domain)
    batches = eval_batches(blocks, held_out.batch_size)
    front = int(blocks.domain_token is not None)
    return with_context(batches, held_out.context_window, blocks.pad_id, front)
