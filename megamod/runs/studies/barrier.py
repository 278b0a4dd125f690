"""`megamod eval-barrier`: loss barriers between existing models, as they are and aligned.

A barrier study, read by `barrier_recipe`, names them; every pair is compared, for every alignment
and task. (`barrier_cell`, of `megamod study`, trains the models that it compares.) Finished curves
are kept. The results are a table with both definitions of the barrier, and plots.

Source: Verma and Elbayad 2024 (Merging text transformer models from different initializations),
section 5, for the comparison.
"""

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from megamod.convert.sources import resolve_model
from megamod.data.corpus.tokenizers import load_tokenizer
from megamod.data.lm.masking import Masking
from megamod.data.lm.text_blocks import read_text_blocks
from megamod.data.tasks.specs import find_any_task
from megamod.errors import UserError
from megamod.evaluation.barrier import (
    Losses,
    compute_barrier,
    compute_barrier_over_mean,
    compute_losses_along_line,
    list_even_weights,
)
from megamod.evaluation.held_out_loss import (
    compute_causal_loss,
    compute_classifier_loss,
    compute_masked_loss,
)
from megamod.evaluation.plots import plot_barriers, plot_losses_along_line
from megamod.files import write_json
from megamod.merging.alignment.align import (
    align_models,
    check_same_architecture,
    collect_float_shapes,
)
from megamod.merging.alignment.calibration import (
    find_position_limit,
    iterate_whole_batches,
    read_token_ids,
)
from megamod.merging.alignment.measure import load_model
from megamod.merging.alignment.permute import apply_alignment
from megamod.merging.alignment.symmetry import find_symmetry
from megamod.merging.compatibility import describe_config_differences, refuse_quantised_model
from megamod.models.auto import has_auto_class
from megamod.models.classifier_inputs import list_input_fields
from megamod.progress import show_progress
from megamod.runs.finetune.args import RowArgs
from megamod.runs.finetune.one_task import select_head_class
from megamod.runs.finetune.source import load_matching_tokenizer
from megamod.runs.finetune.tasks import read_and_encode_task
from megamod.runs.studies.barrier_recipe import (
    CLM,
    MLM,
    RECORD,
    BarrierStudy,
    Curve,
    HeldOutSettings,
    make_study_record,
)
from megamod.schemas import read_checked_file
from megamod.tables import format_score_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

RESULTS = "results.json"  # in OUT

HEADS = {MLM: AutoModelForMaskedLM, CLM: AutoModelForCausalLM}
"""Auto class of the model for each task without labels."""


@dataclass(frozen=True)
class HeldOutTask:
    """Held-out data and loss of one task.

    Attributes:
        losses: computes the held-out losses of a model, in nats (squared errors of a regression),
            by split; of text there is one, "loss".
        calibration: token ids of the training rows, to align on; None: variants name a file.
        tokenize: turns text into ids with special tokens.
        pad_id: padding id of the tokenizer.
    """

    losses: Losses
    calibration: Sequence[Sequence[int]] | None
    tokenize: Callable[[str], Sequence[int]]
    pad_id: int


def run_barrier_study(study: BarrierStudy, output: Path, device: torch.device) -> str:
    """Compute the missing curves of a study; write all results and plots into OUT.

    Args:
        study: models, pairs, tasks and variants.
        output: OUT; it gets study.json, curves/, results.json and PNG files.
        device: device that models run on.
    Returns:
        the table to print.
    Raises:
        UserError: for models, data or settings that do not fit, or a folder of another study.
    """
    disable_progress_bar()
    record = make_study_record(study, output)
    _check_models(study)
    first = next(iter(study.models.values()))
    held_out = {
        task: open_held_out(study, task, first.replace("{task}", task), study.char_split)
        for task in study.tasks
    }
    calibration = {
        (task, name): _read_calibration(study, name, held_out[task])
        for task in study.tasks
        for name in study.variants
    }
    jobs = list(itertools.product(study.tasks, study.variants, study.pairs))
    with show_progress(total=len(jobs) * study.points, unit="point") as bar:
        for number, (task, name, pair) in enumerate(jobs, start=1):
            path = _get_curve_path(output, task, name, pair)
            if path.exists():
                bar.update(study.points)
                continue
            items, step = calibration[task, name], bar.update
            curve = _compute_curve(study, task, name, pair, held_out[task], items, device, step)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(output / RECORD, record)
            write_json(path, curve)
            if bar.disable:  # no terminal
                logger.info("curve %d of %d: %s, %s, %s-%s", number, len(jobs), task, name, *pair)
    return _write_results(study, output)


def _check_models(study: BarrierStudy) -> None:
    """Check the models of all tasks; warn of pairs that compute different functions of weights.

    Raises:
        UserError: for a model that is missing, quantised, or without the head of a task; for pairs
            of different architectures.
    """
    for task in study.tasks:
        head = HEADS.get(task) or select_head_class(find_any_task(task))
        configs: dict[str, dict[str, object]] = {}
        for name, model in study.models.items():
            source = resolve_model(
                model.replace("{task}", task),
                "models",
                partial(has_auto_class, head),
                f"a model with a head for {task}",
            )
            configs[name] = source.config.to_dict()
            refuse_quantised_model(Path(source.name), configs[name])
        for first, second in study.pairs:
            check_same_architecture(configs[first], configs[second])
            if listed := describe_config_differences(configs[first], configs[second]):
                logger.warning(
                    "models %s and %s differ in %s; the curve has the values of the second, so the "
                    "weights of the first are used with settings that they were not trained with",
                    *(first, second, listed),
                )


def _read_calibration(
    study: BarrierStudy, variant: str, held_out: HeldOutTask
) -> Sequence[Sequence[int]] | None:
    """Read the token ids that a variant compares features on; None for methods that need no text.

    Args:
        variant: name of the variant.
        held_out: the task, whose training rows are used if the variant names no file.
    Raises:
        UserError: if there is no text, or the fraction is less than one item.
    """
    options = study.variants[variant]
    if not options.reads_text:
        return None
    calibration, items = options.calibration, held_out.calibration
    try:
        if calibration.path is not None:
            path, length = Path(calibration.path), study.max_seq_length
            items = read_token_ids(path, held_out.tokenize, length)
        if items is None:
            raise UserError("align.calibration.path is missing: text to compare the models on")
        next(iterate_whole_batches(items, calibration.batch_size, calibration.fraction))
    except UserError as error:
        raise UserError(f"variants, {variant}: {error}") from error
    return items


def _get_curve_path(output: Path, task: str, variant: str, pair: tuple[str, str]) -> Path:
    """Return the path of a curve, OUT/curves/TASK/VARIANT/FIRST-SECOND.json; it need not exist."""
    return output / "curves" / task / variant / f"{pair[0]}-{pair[1]}.json"


def open_held_out(
    settings: HeldOutSettings, task: str, first: str, char_split: bool = False
) -> HeldOutTask:
    """Open the tokenizer and the held-out data of a task.

    Args:
        settings: data, tokenizer and sizes.
        task: "mlm", "clm", or the name of a task with labels.
        first: folder or hub name of the first model.
        char_split: see `space_characters` of `read_text_blocks`.
    Raises:
        UserError: for missing data, or data that do not fit the model.
    """
    if task in (MLM, CLM):
        return _open_text_task(settings, task, first, char_split)
    spec = find_any_task(task)
    kind = select_head_class(spec)
    source = resolve_model(
        first, "models", lambda name: has_auto_class(kind, name), f"a model with a head for {task}"
    )
    tokenizer = load_matching_tokenizer(source.config, first, settings.tokenizer)
    limits = RowArgs(max_seq_length=settings.max_seq_length, max_eval_samples=settings.max_items)
    splits = spec.list_splits("dev")
    opened = read_and_encode_task(
        spec, settings.data, (*splits, "train"), source.config, tokenizer, limits, trained=True
    )
    train, inputs = opened.encoded["train"], list_input_fields(source.config)

    def compute_losses(model: torch.nn.Module) -> dict[str, float]:
        """Compute the loss of the model on each dev split."""
        return {
            split: compute_classifier_loss(
                model, opened.encoded[split], inputs, spec.is_regression, settings.batch_size
            )
            for split in splits
        }

    items = [train.ids[a:b].tolist() for a, b in itertools.pairwise(train.offsets)]
    return HeldOutTask(compute_losses, items, _make_tokenize_function(tokenizer), train.pad_id)


def _require_positions(model: PreTrainedModel, settings: HeldOutSettings) -> PreTrainedModel:
    """Return the model; raise UserError if it has too few positions for a block of text."""
    positions = find_position_limit(model.config)
    if positions is not None and settings.max_seq_length > positions:
        raise UserError(
            f"max_seq_length {settings.max_seq_length}: {model.name_or_path or 'a model'} has "
            f"{positions} positions; give {positions} or less"
        )
    return model


def _open_text_task(
    settings: HeldOutSettings, task: str, first: str, char_split: bool
) -> HeldOutTask:
    """Open a text file as blocks of `max_seq_length` tokens for the task mlm or clm.

    Args and errors are those of `open_held_out`, whose helper this is; also refused are no text,
    and for mlm a tokenizer without [MASK].
    """
    if settings.data is None:
        raise UserError(f"data is missing: give a text file to measure the {task} loss on")
    tokenizer = load_tokenizer(settings.tokenizer or first)
    if tokenizer.original is not None:
        tokenize = _make_tokenize_function(tokenizer.original)
    else:

        def tokenize(text: str) -> list[int]:
            """Encode a text as the id of bos and its ids, uncut."""
            return [tokenizer.bos_id, *tokenizer.encode_batch([text])[0].tolist()]

    blocks = read_text_blocks(
        Path(settings.data),
        tokenize,
        settings.max_seq_length,
        max_blocks=settings.max_items,
        space_characters=char_split,
    )
    if task == CLM:
        return HeldOutTask(
            lambda model: {
                "loss": compute_causal_loss(
                    _require_positions(model, settings), blocks, settings.batch_size
                )
            },
            None,
            tokenize,
            tokenizer.pad_id,
        )
    original = tokenizer.original
    if original is None or original.mask_token_id is None:
        raise UserError(
            f"tokenizer {settings.tokenizer or first}: has no [MASK], which the task mlm needs"
        )
    masking = Masking(
        mask_id=original.mask_token_id,
        pad_id=original.pad_token_id,
        special_ids=tuple(original.all_special_ids),
        vocab_size=len(original),
        probability=settings.mlm_probability,
    )
    return HeldOutTask(
        lambda model: {
            "loss": compute_masked_loss(
                _require_positions(model, settings),
                blocks,
                masking,
                settings.seed,
                settings.batch_size,
            ),
        },
        None,
        tokenize,
        original.pad_token_id,
    )


def _make_tokenize_function(tokenizer: "PreTrainedTokenizerFast") -> Callable[[str], list[int]]:
    """Return the function from a text to its ids, special tokens included, uncut."""
    return lambda text: tokenizer(text)["input_ids"]


def _compute_curve(
    study: BarrierStudy,
    task: str,
    variant: str,
    pair: tuple[str, str],
    held_out: HeldOutTask,
    items: Sequence[Sequence[int]] | None,
    device: torch.device,
    advance: Callable[[], object],
) -> dict[str, object]:
    """Compute the content of a curve's file, see `Curve`: losses between two aligned models.

    Args:
        variant: alignment of the second model of the `pair` to its first.
        held_out: data and loss of the `task`.
        items: see `_read_calibration`.
        device: device that both models run on.
        advance: called after every point.
    """
    options = study.variants[variant]
    first, second = (
        load_model(study.models[name].replace("{task}", task), HEADS.get(task)).to(device)
        for name in pair
    )
    batches = None
    if items is not None:
        text = options.calibration
        batches = iterate_whole_batches(
            items, text.batch_size, text.fraction, pad_id=held_out.pad_id
        )
    alignment = align_models(first, second, batches, options)
    config, shapes = first.config.to_dict(), collect_float_shapes(first.state_dict())
    symmetry = find_symmetry(config, shapes, qk=options.qk)
    apply_alignment(first, symmetry, alignment, reference=True)
    apply_alignment(second, symmetry, alignment)
    ends = (first.state_dict(), {n: tensor.clone() for n, tensor in second.state_dict().items()})
    weights = list_even_weights(study.points)
    losses = compute_losses_along_line(second, *ends, weights, held_out.losses, advance)
    return {
        "weights": weights,
        "losses": losses,
        "barrier": {name: compute_barrier(weights, curve) for name, curve in losses.items()},
        "barrier_over_mean": {
            name: compute_barrier_over_mean(curve) for name, curve in losses.items()
        },
        "costs": dict(alignment.costs),
    }


def _write_results(study: BarrierStudy, output: Path) -> str:
    """Write results.json, a plot of the curves for each task, and barriers.png into OUT.

    The entry `reduction` of a variant is relative to the barrier of the first variant that does not
    align (of the first of all if each does); None if that is 0.

    Returns:
        a table of means over pairs.
    """
    rows: dict[str, dict[str, str]] = {}
    record: dict[str, dict[str, dict[str, object]]] = {}
    curves: dict[str, dict[str, list[Mapping[str, object]]]] = {}
    for task in study.tasks:
        for name in study.variants:
            pair_curves = [
                read_checked_file(_get_curve_path(output, task, name, pair), Curve).model_dump()
                for pair in study.pairs
            ]
            splits = list(pair_curves[0]["losses"])
            for split in splits:
                title = task if len(splits) == 1 else f"{task}, {split}"
                curves.setdefault(title, {})[name] = [
                    {"weights": curve["weights"], "losses": curve["losses"][split]}
                    for curve in pair_curves
                ]
                result: dict[str, object] = {
                    "pairs": {
                        f"{a}-{b}": {k: curve[k][split] for k in ("barrier", "barrier_over_mean")}
                        for (a, b), curve in zip(study.pairs, pair_curves, strict=True)
                    }
                }
                for kind in ("barrier", "barrier_over_mean"):
                    result[kind] = _compute_mean_and_error(
                        [curve[kind][split] for curve in pair_curves]
                    )
                record.setdefault(title, {})[name] = result
    shown = "{:.4f} ± {:.4f}" if len(study.pairs) > 1 else "{:.4f}"
    for title, variants in record.items():
        vanilla = next(
            (n for n in variants if study.variants[n].method == "identity"), next(iter(variants))
        )
        baseline = variants[vanilla]["barrier"][0]
        for name, result in variants.items():
            mean = result["barrier"][0]
            reduction = result["reduction"] = 1 - mean / baseline if baseline > 0 else None
            rows[f"{title}, {name}" if len(record) > 1 else name] = {
                "barrier": shown.format(*result["barrier"]),
                "over the mean": shown.format(*result["barrier_over_mean"]),
                f"less than {vanilla}": "-" if reduction is None else f"{reduction:.1%}",
            }
    write_json(output / RESULTS, record)
    for title, variants in curves.items():
        plot_losses_along_line(variants, output / f"{title.replace(', ', '_')}.png", title)
    barriers = {
        title: {name: result["barrier"] for name, result in variants.items()}
        for title, variants in record.items()
    }
    plot_barriers(barriers, output / "barriers.png")
    pairs = f"{len(study.pairs)} pairs" if len(study.pairs) > 1 else "1 pair"
    table = format_score_table(rows, f"loss barrier, {pairs}")
    return "\n".join(["", table, "", f"numbers  {output / RESULTS}", f"plots    {output}/*.png"])


def _compute_mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the standard error of the mean; the error of a single value is 0."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))
