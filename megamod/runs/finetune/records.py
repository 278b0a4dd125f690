"""Records of a finetuning run about its tasks and scores: evaluations.json, results.json, tables.

A run on one task leaves out the level of tasks: `scores` instead of `tasks` in an evaluation, and
so on. `FinetuneModel.has_many_tasks` decides.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megamod.data.tasks.specs import GLUE, describe_task
from megamod.evaluation.glue import Scores, average_task_scores, compute_task_score
from megamod.runs.finetune.model import FinetuneModel
from megamod.schemas import Number, Schema
from megamod.train.export import Card

AVERAGE = "average"
EVALUATIONS, RESULTS = "evaluations.json", "results.json"
Record = dict[str, object]
"""Values for JSON, by key."""
TaskScores = Mapping[str, Mapping[str, Scores]]
"""Scores by task and split."""
_SplitScores = dict[str, dict[str, Any]]


class Evaluation(Schema):
    """An item of evaluations.json: `tasks` and `score` of many tasks, or `scores` of one.

    Attributes:
        step: finished steps.
        tasks: scores by task and split; `scores`: by split.
        score: mean over the tasks of their scores as GLUE defines them.
        instances_per_second: rows per second of rank 0's forward passes.
    """

    step: int
    tasks: dict[str, _SplitScores] | None = None
    scores: _SplitScores | None = None
    score: Number = None
    instances_per_second: Number


class SeedResults(Schema):
    """Results of one seed: its best and last evaluation, peaks of tasks, predicted splits."""

    step: int | None = None
    best: Evaluation | None = None
    last: Evaluation | None = None
    by_task: dict[str, Any] | None = None
    predicted: dict[str, Any] | None = None


class Results(Schema):
    """Content of results.json of a finetuning run.

    Attributes:
        task: task of a run on one; `tasks`, `variant`: those of a run on many.
        num_instances: inputs in a forward pass, of a run on one task.
        rows: number of rows by split, of many tasks by task and split; `cut_rows`: number of those
            that were cut to --max_seq_length.
        model: value of --model or --config_name.
        metric: name of the metric that selects the best model.
        seeds: by seed.
        mean, deviation: over seeds, of each score.
        task_score, instances_per_second: means over seeds; None: nothing was scored.
    """

    task: dict[str, Any] | None = None
    num_instances: int | None = None
    tasks: list[dict[str, Any]] | None = None
    variant: str | None = None
    rows: dict[str, Any]
    cut_rows: dict[str, Any]
    model: str | None
    metric: str | None = None
    seeds: dict[str, SeedResults]
    mean: dict[str, float] | None = None
    deviation: dict[str, float] | None = None
    task_score: float | None = None
    instances_per_second: float | None = None


def make_evaluation_record(
    model: FinetuneModel, scores: TaskScores, step: int, instances_per_second: float
) -> Record:
    """Return the record of an evaluation of the dev splits, an item of evaluations.json.

    Args:
        model: the model and its tasks.
        scores: by task and split, see `score_splits`.
        step: finished steps.
        instances_per_second: rows per second of the forward passes.
    """
    record: Record = {"step": step, **_nest_scores(model, "tasks", "scores", scores)}
    if model.has_many_tasks:
        record["score"] = float(np.mean(list(_compute_task_scores(model, scores).values())))
    return {**record, "instances_per_second": instances_per_second}


def find_selection_value(model: FinetuneModel, evaluation: Record) -> float | None:
    """Return the number of an evaluation that selects the best model, larger is better.

    It is the mean score of many tasks, or the first metric of a single task on the split dev.

    Args:
        evaluation: an item of evaluations.json.
    Returns:
        None if the evaluation lacks it.
    """
    if model.has_many_tasks:
        return evaluation.get("score")
    return evaluation["scores"]["dev"].get(model.tasks[0].spec.metrics[0])


def get_task_score(model: FinetuneModel, evaluation: Record) -> float:
    """Return the task's score in an evaluation as GLUE defines it; of many tasks the mean."""
    if model.has_many_tasks:
        return evaluation["score"]
    return compute_task_score(model.tasks[0].spec, evaluation["scores"])


def make_predictions_record(model: FinetuneModel, scores: TaskScores) -> Record:
    """Make the entry `predicted` of results.json: scores of predicted splits with known labels."""
    return _nest_scores(model, "predicted", "predicted", scores)


def make_peaks_record(model: FinetuneModel, evaluations: Sequence[Record]) -> Record:
    """Make the entry `by_task` of results.json: the best value of each metric, and its step.

    It is by task and "SPLIT METRIC". Losses and values that are no numbers are skipped. The record
    of a model of one task is empty.

    Args:
        evaluations: all evaluations of the run, items of evaluations.json.
    """
    if not model.has_many_tasks:
        return {}
    peaks: dict[str, dict[str, Record]] = {}
    for evaluation in evaluations:
        for task, splits in evaluation["tasks"].items():
            for split, scores in splits.items():
                for name, value in scores.items():
                    if not isinstance(value, float) or name == "loss":
                        continue
                    peak = peaks.setdefault(task, {}).get(f"{split} {name}")
                    if peak is None or value > peak["value"]:
                        new_peak = {"value": value, "step": evaluation["step"]}
                        peaks[task][f"{split} {name}"] = new_peak
    return {"by_task": peaks}


def make_table_row(model: FinetuneModel, record: Record) -> dict[str, float] | None:
    """Make the row of one seed in the printed table: numbers by title of the column; None: no row.

    A single task has all numbers among the scores of its best evaluation and predictions. Many
    tasks have one score each, their mean, and with all of GLUE its average; without an evaluation
    they have no row.

    Args:
        model: the model and its tasks.
        record: entry of the seed in results.json.
    """
    if model.has_many_tasks:
        if "best" not in record:
            return None
        scores = _compute_task_scores(model, record["best"]["tasks"])
        row = {**scores, AVERAGE: record["best"]["score"]}
        if set(GLUE) <= set(scores):
            row["glue_avg"] = average_task_scores({task: scores[task] for task in GLUE})
        return row
    splits = {**record.get("best", {}).get("scores", {}), **record.get("predicted", {})}
    return {
        f"{split} {name}": value
        for split, scores in splits.items()
        for name, value in scores.items()
        if isinstance(value, float)
    }


def make_tasks_record(model: FinetuneModel) -> Record:
    """Make the entries of results.json that do not depend on the training: tasks and their rows.

    Of one task: `task`, `num_instances`, and by split the numbers of `rows` and of `cut_rows`. Of
    many: `tasks`, `variant` of the model, and the numbers of rows by task and split.
    """
    rows = {
        task.spec.name: {split: len(encoded) for split, encoded in task.encoded.items()}
        for task in model.tasks
    }
    cut = {
        task.spec.name: {split: encoded.cut for split, encoded in task.encoded.items()}
        for task in model.tasks
    }
    if model.has_many_tasks:
        tasks = [describe_task(task.spec) for task in model.tasks]
        return {"tasks": tasks, "variant": model.config.variant, "rows": rows, "cut_rows": cut}
    spec = model.tasks[0].spec
    return {
        "task": describe_task(spec),
        "num_instances": model.instances,
        "rows": rows[spec.name],
        "cut_rows": cut[spec.name],
    }


def make_finetuned_card(model: FinetuneModel) -> Card:
    """Make the model card of a finetuned model: tasks, labels in order, and the class to load."""
    names = [task.spec.name for task in model.tasks]
    tasks = ", ".join(names)
    if model.has_many_tasks:
        return Card(
            summary=f"A model of many tasks ({tasks}), trained with megamod.",
            tags=("classification", "multi-task", *names),
            facts={"variant": model.config.variant, "tasks, in the order of their ids": tasks},
            load="AutoModel.from_pretrained(FOLDER)",
        )
    spec = model.tasks[0].spec
    kind = "TokenClassification" if spec.kind == "token" else "SequenceClassification"
    return Card(
        summary=f"A classifier for the task {tasks}, trained with megamod.",
        tags=("classification", tasks),
        facts={
            "labels, in order": ", ".join(spec.labels) or "a number",
            "instances that share a forward pass": str(model.instances),
        },
        load=f"AutoModelFor{kind}.from_pretrained(FOLDER)",
    )


def _nest_scores(model: FinetuneModel, many: str, single: str, scores: TaskScores) -> Record:
    """Return scores under the key of their kind of run, as evaluations.json has them.

    Args:
        many: key of all scores, of a model of many tasks.
        single: key of the only task's scores.
        scores: by task and split.
    """
    return {many: scores} if model.has_many_tasks else {single: scores[model.tasks[0].spec.name]}


def _compute_task_scores(model: FinetuneModel, scores: TaskScores) -> dict[str, float]:
    """Compute the score of each task as GLUE defines it, see `compute_task_score`.

    Args:
        scores: by task and split.
    """
    specs = [task.spec for task in model.tasks]
    return {spec.name: compute_task_score(spec, scores[spec.name]) for spec in specs}
