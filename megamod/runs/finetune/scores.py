"""Scores and predictions of the held-out rows of a finetuning run.

All public functions but `make_predictors` are collective.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from megamod.args import RunArgs
from megamod.data.tasks.classification import iterate_held_out_rows
from megamod.dist.process import sum_over_ranks
from megamod.evaluation.glue import (
    Scores,
    compute_accuracy_by_instance,
    format_submission,
    score_sentences,
    select_answers,
)
from megamod.evaluation.ner import (
    compute_word_accuracy_by_instance,
    count_entities,
    format_conll,
    has_plain_tags,
    score_words,
)
from megamod.evaluation.predict import Predictor, select_word_labels
from megamod.files import write_atomic
from megamod.runs.finetune.model import FinetuneModel
from megamod.runs.finetune.records import TaskScores
from megamod.runs.finetune.tasks import FinetuneTask


def make_predictors(
    model: FinetuneModel, module: nn.Module, device: torch.device
) -> list[Predictor]:
    """Make a predictor for each task, which divides the task's rows among all ranks.

    Args:
        module: the model in memory, on `device`.
    """
    ranks = dist.get_rank(), dist.get_world_size(), sum_over_ranks
    return [
        Predictor(classifier, model.inputs, device, *ranks)
        for classifier in model.list_classifiers(module)
    ]


def score_splits(model: FinetuneModel, predictors: Sequence[Predictor], run: RunArgs) -> TaskScores:
    """Score the dev splits of all tasks, whose rows all ranks share; each rank gets all scores.

    Args:
        predictors: one per task, see `make_predictors`.
        run: its batch size of evaluation and its seed are used.
    """
    return {
        task.spec.name: {
            split: score_split(model, task, split, predictor, run)[0]
            for split in task.list_splits("dev")
        }
        for task, predictor in zip(model.tasks, predictors, strict=True)
    }


def score_split(
    model: FinetuneModel, task: FinetuneTask, split: str, predictor: Predictor, run: RunArgs
) -> tuple[Scores | None, np.ndarray | list[list[str]]]:
    """Predict the rows of a split and score the answers; every rank gets all of them.

    Scores of multiplexed models without an ensemble have `accuracy_by_slot`, a list of N, except
    in a regression; those of entities have `by_type`.

    Args:
        split: name of a split of `task`.
        predictor: the predictor of `task`.
        run: its batch size of evaluation and its seed are used.
    Returns:
        scores, None if the labels are hidden; and the logits of rows [R, C] float64, or the labels
        of words of each of R sentences.
    """
    spec, rows, encoded = task.spec, task.sets[split], task.encoded[split]
    batches = list(
        iterate_held_out_rows(
            encoded,
            run.per_device_eval_batch_size,
            model.instances,
            model.pad_to,
            ensemble=model.ensemble,
            seed=run.seed,
        )
    )
    answers = predictor(encoded, batches)
    if encoded.has_token_labels:
        answers = select_word_labels(encoded, answers, spec.labels)
    if rows.labels is None:
        return None, answers
    if encoded.has_token_labels:
        scores = score_words(spec, rows.labels, answers)
        compute_by_instance = partial(compute_word_accuracy_by_instance, rows.labels, answers)
        if "f1" in spec.metrics:
            by_type = count_entities(rows.labels, answers, has_plain_tags(spec))
            scores["by_type"] = {kind: count.compute_scores() for kind, count in by_type.items()}
    else:
        scores = score_sentences(spec, answers, rows.labels)
        compute_by_instance = partial(
            compute_accuracy_by_instance, select_answers(spec, answers), rows.labels
        )
    if model.instances > 1 and not (spec.is_regression or model.ensemble):
        scores["accuracy_by_slot"] = compute_by_instance(model.instances)
    return scores, answers


def predict_splits(
    model: FinetuneModel,
    predictors: Sequence[Predictor],
    run: RunArgs,
    kind: str,
    folder: Path,
) -> TaskScores:
    """Predict the splits of a kind; rank 0 writes the predictions into a folder.

    Args:
        predictors: one per task, see `make_predictors`.
        run: its batch size of evaluation and its seed are used.
        kind: beginning of the splits' names.
        folder: folder of the files, created if needed.
    Returns:
        the scores of the splits whose labels are known, by task.
    """
    scored: dict[str, dict[str, Scores]] = {}
    for task, predictor in zip(model.tasks, predictors, strict=True):
        scored[task.spec.name] = {}
        for split in task.list_splits(kind):
            scores, answers = score_split(model, task, split, predictor, run)
            if scores is not None:
                scored[task.spec.name][split] = scores
            if dist.get_rank() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                _write_predictions(model, task, split, answers, folder)
    return scored


def _write_predictions(
    model: FinetuneModel,
    task: FinetuneTask,
    split: str,
    answers: np.ndarray | list[list[str]],
    folder: Path,
) -> None:
    """Write predictions in the format of a benchmark's server, or labels of words as CoNLL columns.

    For rank 0 alone. A file of sentences has the name that the server expects, else
    TASK_SPLIT.tsv; one of words is SPLIT.txt, or TASK_SPLIT.txt with a model of many tasks.

    Args:
        model: the model, of one task or many.
        task: the task that was predicted.
        split: name of a split of `task`.
        answers: see `score_split`.
        folder: exists.
    """
    spec = task.spec
    if spec.kind == "token":
        rows = task.sets[split]
        text = format_conll(rows.words, answers, rows.labels)
        file = f"{spec.name}_{split}.txt" if model.has_many_tasks else f"{split}.txt"
    else:
        text = format_submission(spec, answers)
        file = spec.submission.get(split, f"{spec.name}_{split}.tsv")
    write_atomic(folder / file, text)
