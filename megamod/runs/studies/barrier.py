"""Studies of barriers: every pair of models, aligned in every way, on every task.

A curve that is finished is not made again. What comes out is a table with both definitions of the
barrier, a plot of the curves per task and one of the barriers.

Source: Verma and Elbayad 2024 (Merging text transformer models from different initializations),
section 5, for what is compared.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from megamod.convert.sources import has_head, open_source
from megamod.data.corpus.tokenizers import load_tokenizer
from megamod.data.lm.masking import Masking
from megamod.data.lm.text_blocks import text_blocks
from megamod.data.tasks.specs import any_task
from megamod.errors import UserError
from megamod.evaluation.barrier import (
    Losses,
    barrier,
    barrier_over_mean,
    losses_along,
    weights_of,
)
from megamod.evaluation.glue import score_table
from megamod.evaluation.held_out_loss import causal_loss, classifier_loss, masked_loss
from megamod.evaluation.plots import plot_barriers, plot_losses_along
from megamod.files import write_json
from megamod.merging.alignment.align import align, places_of, shapes_of
from megamod.merging.alignment.calibration import read_items, whole_batches
from megamod.merging.alignment.measure import load_model
from megamod.merging.alignment.options import BY_TEXT, Options
from megamod.merging.alignment.permute import changes, permuted, reference, untied
from megamod.merging.alignment.record import Alignment
from megamod.merging.alignment.symmetry import symmetry_of
from megamod.models.classifier_inputs import inputs_of
from megamod.runs.finetune.args import RowArgs
from megamod.runs.finetune.one_task import head_class
from megamod.runs.finetune.source import tokenizer_of
from megamod.runs.finetune.tasks import open_task
from megamod.runs.studies.barrier_recipe import CLM, MLM, Study

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

RESULTS = "results.json"
RECORD = "study.json"


HEADS = {MLM: AutoModelForMaskedLM, CLM: AutoModelForCausalLM}
"""Auto class of the models that a task without labels is measured on."""


@dataclass(frozen=True)
class Ground:
    """What the models of a task are told on.

    Attributes:
        losses: from a model to its losses.
        calibration: token ids of the items to compare features on, unless a variant names a file.
        tokenize: from text to ids with special tokens.
        pad_id: of the tokenizer.
    """

    losses: Losses
    calibration: Sequence[Sequence[int]] | None
    tokenize: Callable[[str], Sequence[int]]
    pad_id: int


def run_study(study: Study, output: Path, device: torch.device) -> str:
    """Make what is missing, write OUT/results.json and the plots; the table to print.

    Raises:
        UserError: for models, data or settings that do not fit, or a folder of another study.
    """
    disable_progress_bar()
    told = _checked_record(study, output)
    grounds = {task: ground_of(study, task) for task in study.tasks}
    jobs = [
        (task, name, pair)
        for task in study.tasks
        for name in study.variants
        for pair in study.pairs
    ]
    with tqdm(total=len(jobs) * study.points, unit="point", disable=None) as bar:
        for task, name, pair in jobs:
            path = _file(output, task, name, pair)
            if path.exists():
                bar.update(study.points)
                continue
            tell = partial(bar.update, 1)
            curve = _curve(study, task, study.variants[name], pair, grounds[task], device, tell)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(output / RECORD, told)
            write_json(path, curve)
    return _summarise(study, output)


def _checked_record(study: Study, output: Path) -> dict[str, object]:
    """The study as plain values, if what the folder has already is of the same one."""
    told = json.loads(json.dumps(asdict(study), default=str))
    record = output / RECORD
    if record.exists():
        before = json.loads(record.read_text(encoding="utf-8"))
        # More pairs, tasks and variants may be added; what is there already must mean the same.
        same = [key for key in told if key not in ("models", "pairs", "tasks", "variants")]
        differs = [key for key in same if told[key] != before[key]]
        for key in ("models", "variants"):
            shared = set(told[key]) & set(before[key])
            differs += [f"{key}.{n}" for n in shared if told[key][n] != before[key][n]]
        if differs:
            raise UserError(
                f"{output}: holds a study with another {differs[0]}; remove it or choose another "
                "--output_dir"
            )
    return told


def _file(output: Path, task: str, variant: str, pair: tuple[str, str]) -> Path:
    return output / "curves" / task / variant / f"{pair[0]}-{pair[1]}.json"


def ground_of(study: Study, task: str) -> Ground:
    """Tokenizer and held-out data of a task.

    Raises:
        UserError: for data that are not there or do not fit.
    """
    first = next(iter(study.models.values())).replace("{task}", task)
    if task in (MLM, CLM):
        return _text_ground(study, task, first)
    spec = any_task(task)
    kind = head_class(spec)
    source = open_source(
        first, "models", lambda name: has_head(kind, name), f"a model with a head for {task}"
    )
    tokenizer = tokenizer_of(source.config, first, study.tokenizer)
    limits = RowArgs(max_seq_length=study.max_seq_length, max_eval_samples=study.max_items)
    splits = spec.splits("dev")
    opened = open_task(
        spec, study.data, (*splits, "train"), source.config, tokenizer, limits, trained=True
    )
    train, inputs = opened.encoded["train"], inputs_of(source.config)

    def losses(model: torch.nn.Module) -> dict[str, float]:
        return {
            split: classifier_loss(
                model, opened.encoded[split], inputs, spec.regression, study.batch_size
            )
            for split in splits
        }

    items = [
        train.ids[a:b].tolist() for a, b in zip(train.offsets, train.offsets[1:], strict=False)
    ]
    return Ground(losses, items, _with_specials(tokenizer), train.pad_id)


def _fitting(model: PreTrainedModel, study: Study) -> PreTrainedModel:
    """The model, if it has positions for the blocks of a study."""
    room = places_of(model.config)
    if room is not None and study.max_seq_length > room:
        raise UserError(
            f"max_seq_length {study.max_seq_length}: {model.name_or_path or 'a model'} has {room} "
            "positions; give no more"
        )
    return model


def _text_ground(study: Study, task: str, first: str) -> Ground:
    if study.data is None:
        raise UserError(f"data is missing: give a text file to measure the {task} loss on")
    tokenizer = load_tokenizer(study.tokenizer or first)
    if tokenizer.original is not None:
        tokenize = _with_specials(tokenizer.original)
    else:

        def tokenize(text: str) -> list[int]:
            return [tokenizer.bos_id, *tokenizer.encode_batch([text])[0].tolist()]

    blocks = text_blocks(
        Path(study.data),
        tokenize,
        study.max_seq_length,
        most=study.max_items,
        spaced=study.char_split,
    )
    if task == CLM:
        return Ground(
            lambda model: {"loss": causal_loss(_fitting(model, study), blocks, study.batch_size)},
            None,
            tokenize,
            tokenizer.pad_id,
        )
    original = tokenizer.original
    if original is None or original.mask_token_id is None:
        raise UserError(f"tokenizer {study.tokenizer or first}: has no [MASK], which mlm needs")
    masking = Masking(
        mask_id=original.mask_token_id,
        pad_id=original.pad_token_id,
        special_ids=tuple(original.all_special_ids),
        vocab_size=len(original),
        probability=study.mlm_probability,
    )
    return Ground(
        lambda model: {
            "loss": masked_loss(
                _fitting(model, study), blocks, masking, study.seed, study.batch_size
            ),
        },
        None,
        tokenize,
        original.pad_token_id,
    )


def _with_specials(tokenizer: "PreTrainedTokenizerFast") -> Callable[[str], list[int]]:
    return lambda text: tokenizer(text)["input_ids"]


def _curve(
    study: Study,
    task: str,
    options: Options,
    pair: tuple[str, str],
    ground: Ground,
    device: torch.device,
    tell: Callable[[], object],
) -> dict[str, object]:
    """Losses on the line between two models, the second aligned to the first."""
    first, second = (
        load_model(study.models[name].replace("{task}", task), HEADS.get(task)).to(device)
        for name in pair
    )
    alignment = _aligned(first, second, options, ground, study.max_seq_length)
    config, shapes = first.config.to_dict(), shapes_of(first.state_dict())
    symmetry = symmetry_of(config, shapes, qk=options.qk)
    ends = (
        reference(first.state_dict(), symmetry, alignment),
        permuted(second.state_dict(), symmetry, alignment),
    )
    if untied(symmetry, changes(symmetry, alignment)):
        _untie(second)
    ends = tuple({name: tensor.clone() for name, tensor in state.items()} for state in ends)
    weights = weights_of(study.points)
    losses = losses_along(second, *ends, weights, ground.losses, tell)
    return {
        "weights": weights,
        "losses": losses,
        "barrier": {name: barrier(weights, one) for name, one in losses.items()},
        "barrier_over_mean": {name: barrier_over_mean(one) for name, one in losses.items()},
        "costs": dict(alignment.costs),
    }


def _aligned(
    first: PreTrainedModel,
    second: PreTrainedModel,
    options: Options,
    ground: Ground,
    max_length: int,
) -> Alignment:
    if options.method not in BY_TEXT:
        return align(first, second, None, options)
    chosen, items = options.calibration, ground.calibration
    if chosen.path is not None:
        items = read_items(Path(chosen.path), ground.tokenize, max_length)
    if items is None:
        raise UserError("align.calibration.path is missing: text to compare the models on")
    parts = whole_batches(items, chosen.batch_size, chosen.fraction, pad_id=ground.pad_id)
    return align(first, second, parts, options)


def _untie(model: PreTrainedModel) -> None:
    """Give the output matrix storage of its own."""
    output = model.get_output_embeddings()
    output.weight = torch.nn.Parameter(output.weight.detach().clone())
    model.config.tie_word_embeddings = False


def _summarise(study: Study, output: Path) -> str:
    """results.json and the plots; a table of means over pairs."""
    rows: dict[str, dict[str, str]] = {}
    record: dict[str, dict[str, dict[str, object]]] = {}
    curves: dict[str, dict[str, list[Mapping[str, object]]]] = {}
    for task in study.tasks:
        for name in study.variants:
            found = [
                json.loads(_file(output, task, name, pair).read_text(encoding="utf-8"))
                for pair in study.pairs
            ]
            for split in found[0]["losses"]:
                place = task if len(found[0]["losses"]) == 1 else f"{task}, {split}"
                curves.setdefault(place, {})[name] = [
                    {"weights": one["weights"], "losses": one["losses"][split]} for one in found
                ]
                told: dict[str, object] = {
                    "pairs": {
                        f"{a}-{b}": {k: one[k][split] for k in ("barrier", "barrier_over_mean")}
                        for (a, b), one in zip(study.pairs, found, strict=True)
                    }
                }
                for kind in ("barrier", "barrier_over_mean"):
                    told[kind] = _mean_and_error([one[kind][split] for one in found])
                record.setdefault(place, {})[name] = told
    for place, variants in record.items():
        vanilla = next(
            (n for n in variants if study.variants[n].method == "identity"), next(iter(variants))
        )
        for name, told in variants.items():
            mean, error = told["barrier"]
            before = variants[vanilla]["barrier"][0]
            told["reduction"] = 1 - mean / before if before > 0 else None
            cut = f"{told['reduction']:.1%}" if told["reduction"] is not None else "-"
            over, over_error = told["barrier_over_mean"]
            rows[f"{place}, {name}" if len(record) > 1 else name] = {
                "barrier": f"{mean:.4f} ± {error:.4f}",
                "over the mean": f"{over:.4f} ± {over_error:.4f}",
                f"less than {vanilla}": cut,
            }
    write_json(output / RESULTS, record)
    for place, variants in curves.items():
        plot_losses_along(variants, output / f"{place.replace(', ', '_')}.png", place)
    plot_barriers(
        {p: {n: told["barrier"] for n, told in one.items()} for p, one in record.items()},
        output / "barriers.png",
    )
    pairs = f"{len(study.pairs)} pairs" if len(study.pairs) > 1 else "1 pair"
    table = score_table(rows, f"loss barrier, {pairs}")
    return "\n".join(["", table, "", f"numbers  {output / RESULTS}", f"plots    {output}/*.png"])


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, 0 for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))
