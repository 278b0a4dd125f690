"""A cell of a study of kind `barriers`: it trains models of several seeds and measures barriers.

`megamod study` runs it. Barriers between models that exist already are those of `barrier`, the
command `megamod eval-barrier`.

The seeds of a study form a circle: the cell of seed s aligns the model of the next seed, and the
one after it, to that of s. Models are trained as in `language_models`, and shared by all cells.

Settings are flags of launchers/pretrain.py, and
    circle              number of seeds, from 1 on, of the models
    align_KEY           key of `align:` in a recipe, except its text
    calibration_rows    rows of training text to align on; none: from weights alone
    descent_rounds      with align_method orthogonal: rounds of descent on weights after the text
    held_out_rows       rows of the test split to measure losses on
    points              models evaluated on the line, ends included

Rows of scores, in nats: `barrier`; `average` and `average_of_three`, the loss of the mean of two
and of three models above that of the worst of them; `worst`, that loss of two.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM, PreTrainedModel

from megamod.data.lm.databin import DataBin
from megamod.errors import UserError
from megamod.evaluation.barrier import (
    Losses,
    compute_barrier,
    compute_losses_along_line,
    list_even_weights,
)
from megamod.evaluation.held_out_loss import compute_causal_loss
from megamod.merging.alignment.align import align_models, collect_float_shapes
from megamod.merging.alignment.calibration import CalibrationBatch, iterate_whole_batches
from megamod.merging.alignment.measure import load_model
from megamod.merging.alignment.options import AlignmentOptions
from megamod.merging.alignment.permute import (
    compute_reference_state,
    find_untied_by_alignment,
    interpolate_states,
    permute_state,
    untie_output_matrix,
)
from megamod.merging.alignment.symmetry import find_symmetry
from megamod.runs.studies.language_models import train_unless_done
from megamod.runs.studies.parameter_counts import count_parameters
from megamod.runs.studies.records import Figures
from megamod.runs.studies.study_file import Cell, Study
from megamod.runs.studies.texts import open_study_text

PREFIX = "align_"
SETTINGS = ("circle", "calibration_rows", "descent_rounds", "held_out_rows", "points")
BATCH = 32  # rows of a forward pass
Ends = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Weights by name at the ends of a line: those of the reference, and of the aligned model."""


def run_barrier_cell(
    study: Study, cell: Cell, inputs: Path, work: Path
) -> tuple[Figures, dict[str, object]]:
    """Train the models that are not trained yet, align them, and measure the losses between them.

    Args:
        study: the study of the cell.
        cell: arm, rung and seed, with their settings.
        inputs: folder of the inputs, with a folder `domains`.
        work: folder of the study's data-bins and runs, which stay there for other cells.
    Returns:
        the figures, and the digest of the data.
    Raises:
        UserError: for settings that are missing or not allowed, or too little text.
    """
    text = open_study_text(study.file.text, inputs, work)
    settings = cell.settings
    extras = {name: settings.get(name) for name in SETTINGS}
    for name in ("circle", "held_out_rows", "points"):
        if not isinstance(extras[name], int) or extras[name] < 2:
            raise UserError(f"{study.name}: {name} is {extras[name]!r}, not a number from 2 on")
    fields = {k.removeprefix(PREFIX): v for k, v in settings.items() if k.startswith(PREFIX)}
    options = AlignmentOptions(**fields)
    flags = {k: v for k, v in settings.items() if k not in SETTINGS and not k.startswith(PREFIX)}
    seeds = [(cell.seed - 1 + step) % extras["circle"] + 1 for step in range(3)]
    folders = [
        train_unless_done({**flags, "seed": seed}, text.training_bin, work) / "model"
        for seed in dict.fromkeys(seeds)
    ]
    models = [load_model(str(folder), AutoModelForCausalLM).eval() for folder in folders]
    length = flags["max_seq_length"]
    databin = DataBin(text.training_bin)
    batches = None
    if extras["calibration_rows"] is not None:
        rows = _read_evenly_spaced_rows(databin, "train", extras["calibration_rows"], length)
        batches = list(iterate_whole_batches(rows.tolist(), BATCH))
    held_out = _read_evenly_spaced_rows(databin, "test", extras["held_out_rows"], length)
    started = time.process_time()
    pairs = [
        _align_models(models[0], m, batches, options, extras["descent_rounds"]) for m in models[1:]
    ]
    seconds = (time.process_time() - started) / len(pairs)
    scores, curve = _measure_barriers(models, pairs, held_out, extras["points"])
    details = {
        "curve": curve,
        "seeds": seeds,
        "cosine_of_matrices": _compute_cosines(*pairs[0][0]),
        "alignment_processor_seconds": round(seconds, 1),
        "parameters": count_parameters(folders[:1]),
        "tokens": flags["max_steps"] * flags["per_device_train_batch_size"] * length,
    }
    figures = Figures({row: {"nats": value} for row, value in scores.items()}, details)
    return figures, {"text": text.digest}


def _align_models(
    first: PreTrainedModel,
    second: PreTrainedModel,
    batches: Sequence[CalibrationBatch] | None,
    options: AlignmentOptions,
    descent_rounds: int | None,
) -> tuple[Ends, bool]:
    """Align the second model to the first.

    Args:
        first: the reference; its weights are not changed.
        second: the model to align; its weights are not changed.
        batches: calibration text; None: weights alone decide.
        options: options of the alignment.
        descent_rounds: see `align_models`; None: its default.
    Returns:
        copies of the weights of the reference and of the aligned model, and True if the output
        matrix is no longer tied to the embedding.
    """
    more = {} if descent_rounds is None else {"descent_rounds": descent_rounds}
    alignment = align_models(first, second, batches, options, **more)
    state = first.state_dict()
    symmetry = find_symmetry(first.config.to_dict(), collect_float_shapes(state), qk=options.qk)
    ends = (
        compute_reference_state(state, symmetry, alignment),
        permute_state(second.state_dict(), symmetry, alignment),
    )
    copies = tuple({name: tensor.clone() for name, tensor in end.items()} for end in ends)
    return copies, bool(find_untied_by_alignment(symmetry, alignment))


def _measure_barriers(
    models: Sequence[PreTrainedModel],
    pairs: Sequence[tuple[Ends, bool]],
    held_out: np.ndarray,
    points: int,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Measure barriers and other scores, in nats per token, and the curve between two models.

    Args:
        models: the reference and one or two others. The weights of the second one are overwritten,
            and its output matrix is untied if its pair says so.
        pairs: result of `_align_models` for each model after the first.
        held_out: token ids [rows, length].
        points: models evaluated on the line, ends included.
    Returns:
        scores by name ("barrier"; "worst", the larger loss of the first two models; "average", that
            of their mean minus "worst"; "average_of_three" if there are three), and the weights (of
            the reference) and losses of the curve.
    """

    def compute_losses(model: torch.nn.Module) -> dict[str, float]:
        """Compute the held-out loss of a model, in nats per token."""
        return {"loss": compute_causal_loss(model, held_out, BATCH)}

    alone = [compute_losses(model)["loss"] for model in models]
    probe, (ends, untied) = models[1], pairs[0]
    if untied:
        untie_output_matrix(probe)
    weights = list_even_weights(points)
    curve = compute_losses_along_line(probe, *ends, weights, compute_losses)["loss"]
    middle = _compute_loss_of_mean(probe, [ends[0], ends[1]], compute_losses)
    scores = {
        "barrier": compute_barrier(weights, curve),
        "average": middle - max(alone[:2]),
        "worst": max(alone[:2]),
    }
    if len(pairs) > 1:
        states = [ends[0], *(other for (_, other), _ in pairs)]
        scores["average_of_three"] = _compute_loss_of_mean(probe, states, compute_losses) - max(
            alone
        )
    return scores, {"weights": weights, "losses": curve}


def _compute_cosines(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, float]:
    """Compute the cosine between the matrices of equal name in two models, flattened.

    Args:
        first, second: tensors by name; those that are no matrices are skipped.
    Returns:
        cosines by name, rounded to three decimals.
    """
    return {
        name: round(float(cosine_similarity(tensor.flatten(), second[name].flatten(), 0)), 3)
        for name, tensor in first.items()
        if tensor.dim() == 2
    }


def _compute_loss_of_mean(
    probe: PreTrainedModel, states: Sequence[dict[str, Tensor]], losses: Losses
) -> float:
    """Compute the loss of the mean of several models' weights, in nats per token.

    Args:
        probe: model that the mean is loaded into.
        states: weights by name of two models or more.
        losses: computes the losses of a model, of which "loss" is used.
    """
    mean = states[0]
    for count, state in enumerate(states[1:], start=1):
        mean = interpolate_states(mean, state, count / (count + 1))
    probe.load_state_dict(mean)
    return losses(probe)["loss"]


def _read_evenly_spaced_rows(databin: DataBin, split: str, count: int, length: int) -> np.ndarray:
    """Read rows [count, length] int64 of a split, spread evenly over the text of each domain.

    Domains have equally many rows, up to one.

    Args:
        databin: the text.
        split: name of the split.
        count: number of rows of all domains together.
        length: tokens of a row.
    Raises:
        UserError: if the text of a domain is shorter than its rows.
    """
    domains, rows = databin.domains, []
    for number, domain in enumerate(domains):
        share = (number + 1) * count // len(domains) - number * count // len(domains)
        tokens = databin.open_split(domain, split).tokens
        if share * length > len(tokens):
            raise UserError(
                f"{share} rows of {length} tokens: the {split} text of {domain} has {len(tokens)} "
                "tokens"
            )
        starts = [index * (len(tokens) - length) // max(1, share) for index in range(share)]
        rows += [tokens[start : start + length].astype(np.int64) for start in starts]
    return np.stack(rows)
