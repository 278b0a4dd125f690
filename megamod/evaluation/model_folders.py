"""Perplexity of language models in folders, loaded one after the other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from megamod.data.lm.pretraining import LmData
from megamod.errors import UserError
from megamod.evaluation.held_out_data import (
    HeldOut,
    find_document_end_id,
    iterate_held_out_batches,
    open_held_out_blocks,
    open_held_out_data,
)
from megamod.evaluation.perplexity import DENSE, DomainEvaluation, Score, ScoreMatrix
from megamod.models.lm.configuration import LmConfig, get_domains, get_untie, read_lm_config
from megamod.models.lm.forest_experts import ModelReader
from megamod.states.forest import FILE, open_forest
from megamod.states.hub import find_or_download_folder
from megamod.states.model_folder import is_model_folder, list_model_folders


@dataclass(frozen=True)
class SavedModel:
    """A model folder that was checked against the data.

    Attributes:
        folder: folder of the model.
        data: the data-bin as this model reads it.
        rows: name of each row of the score matrix -> domain of the expert that it scores;
            None for a model without experts to select.
        document_end: id at which attention stops; None: at none.
    """

    folder: Path
    config: LmConfig
    data: LmData
    rows: Mapping[str, str | None]
    document_end: int | None = None


def find_saved_models(folder: Path, held_out: HeldOut) -> list[SavedModel]:
    """Find the models of a folder, and check each against the data; weights are not read.

    The first that applies: the experts of `folder` if that is a forest.json or has one; the model
    in it; the models in its subfolders, whose names are then their domains.

    Args:
        folder: folder of a model, a forest or models of one domain each; a forest.json; or a
            repository of the hub.
        held_out: data to check against. Its `experts` select rows; a model without experts ignores
            them.
    Raises:
        UserError: if there is no model, or one does not match the data or lacks a requested expert.
    """
    folder = find_or_download_folder(str(folder), "--model")
    members: dict[Path, dict[str, str | None] | None] = {}
    if folder.is_file() or (folder / FILE).exists():
        for expert in open_forest(folder).experts:
            members.setdefault(expert.path, {})[expert.domain] = expert.member
    elif is_model_folder(folder):
        members = {folder: None}
    else:
        members = {path: {path.name: None} for path in list_model_folders(folder)}
    if not members:
        raise UserError(f"--model {folder}: there is no config.json in it or in its subfolders")
    models = []
    for path, rows in members.items():
        config = read_lm_config(path, "--model")
        if rows is None:
            rows = (
                {d: d for d in get_domains(config)}
                if get_untie(config) != "none"
                else {DENSE: None}
            )
        if DENSE in rows and (path != folder or rows[DENSE] is not None):
            raise UserError(
                f"--model {folder}: has an expert named {DENSE!r}, which is the row of models "
                "without experts; rename it"
            )
        data = open_held_out_data(path, config, held_out)
        for domain in held_out.domains:
            # Raises for a missing file before any scoring.
            open_held_out_blocks(data, held_out, domain)
        end = find_document_end_id(path, config, data, held_out)
        models.append(SavedModel(path, config, data, rows, end))
    return models if held_out.experts is None else _select_experts(folder, models, held_out.experts)


def _select_experts(
    folder: Path, models: list[SavedModel], names: Sequence[str]
) -> list[SavedModel]:
    """Select the models, and their rows, of the experts with these names.

    A single model without experts is returned as it is, whatever the names.

    Args:
        folder: folder of all models, for messages.
        models: models to select from.
        names: names of the experts, values of --experts.
    Raises:
        UserError: if no model has an expert of one of the names.
    """
    known_rows = [row for saved in models for row in saved.rows]
    if known_rows == [DENSE]:
        return models
    for name in names:
        if name not in known_rows:
            raise UserError(
                f"--experts: {folder} has no expert {name!r}; its experts are "
                f"{', '.join(known_rows)}"
            )
    selected = [replace(m, rows={r: c for r, c in m.rows.items() if r in names}) for m in models]
    return [saved for saved in selected if saved.rows]


def score_models(
    models: Sequence[SavedModel], held_out: HeldOut, device: torch.device
) -> ScoreMatrix:
    """Score models from `find_saved_models`, loaded one after the other.

    Args:
        held_out: the settings that `find_saved_models` had.
        device: device that the models run on.
    Returns:
        a matrix with a row `DENSE` for a dense model, or a row per expert for a model with experts
        (DEMix) and for independent models (Branch-Train-Merge).
    Raises:
        UserError: if weights cannot be read, or give no finite log-probability on a text.
    """
    matrix: ScoreMatrix = {}
    reader = ModelReader(device)
    for saved in models:
        members = [member for member in saved.rows.values() if member is not None]
        # Experts that were not requested are not read.
        model = reader.read(saved.folder, members)
        model.document_end = saved.document_end
        for row, member in saved.rows.items():
            if member is not None:
                model.set_domain(member)
            evaluate = DomainEvaluation(
                model=model,
                experts=(row,),
                scorable=(row,),
                takes_domain=False,
                domains=held_out.domains,
                batches=partial(iterate_held_out_batches, saved.data, held_out),
                count_bytes=partial(saved.data.get_text_bytes, split=held_out.split),
                part=0,
                parts=1,
                device=device,
                reduce=lambda sums: None,
            )
            scores = evaluate(held_out.own_only)
            _check_has_scores(saved, row, scores[row], held_out)
            matrix |= scores
    return matrix


def _check_has_scores(
    saved: SavedModel, row: str, scores: Mapping[str, Score], held_out: HeldOut
) -> None:
    """Refuse a model without a score on a text that has sequences.

    Args:
        saved: the model that was scored.
        row: name of the row of the matrix.
        scores: scores of this row, by domain.
        held_out: domains of the texts; with `own_only` each expert needs a score on its own alone.
    Raises:
        UserError: naming the domain: none of its tokens had a finite log-probability.
    """
    for domain in held_out.domains:
        requested = not held_out.own_only or row in (domain, DENSE)
        if (
            requested
            and domain not in scores
            and len(open_held_out_blocks(saved.data, held_out, domain))
        ):
            raise UserError(
                f"--model {saved.folder}: gives no token of {domain} a finite log-probability; its "
                "weights may contain NaN or infinity"
            )
