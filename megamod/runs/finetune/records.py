"""Records of a finetuning run about its tasks and scores: evaluations.json, results.json, tables.

A run on one task leaves out the level of tasks: `scores` instead of `tasks` in an evaluation, and
so on. `FinetuneModel.several` decides.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from megamod.data.tasks.specs import GLUE, describe_task
from megamod.evaluation.glue import Scores, average_task_scores, compute_task_score
from megamod.runs.finetune.model import FinetuneModel
from megamod.train.export import Card

AVERAGE = "average"
Record = dict[str, object]
TaskScores = Mapping[str, Mapping[str, Scores]]
"""Scores by task and split."""


def evaluation_record(
    model: FinetuneModel, scores: TaskScores, step: int, instances_per_second: float
) -> Record:
    """Scores of the dev splits after a step."""
    record: Record = {"step": step, **_of_tasks(model, "tasks", "scores", scores)}
    if model.several:
        record["score"] = float(np.mean(list(_task_scores(model, scores).values())))
    return {**record, "instances_per_second": instances_per_second}


def value_of(model: FinetuneModel, evaluation: Record) -> float | None:
    """The number that chooses the best model; None if the evaluation lacks it."""
    if model.several:
        return evaluation.get("score")
    return evaluation["scores"]["dev"].get(model.tasks[0].spec.metrics[0])


def score_of(model: FinetuneModel, evaluation: Record) -> float:
    """The one number of an evaluation: mean over tasks of their scores as GLUE defines them."""
    if model.several:
        return evaluation["score"]
    return compute_task_score(model.tasks[0].spec, evaluation["scores"])


def predictions_record(model: FinetuneModel, scores: TaskScores) -> Record:
    """Scores of predicted splits."""
    return _of_tasks(model, "predicted", "predicted", scores)


def peaks_record(model: FinetuneModel, evaluations: Sequence[Record]) -> Record:
    """With several tasks the best value of each score of each task, and its step."""
    if not model.several:
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
                        at = {"value": value, "step": evaluation["step"]}
                        peaks[task][f"{split} {name}"] = at
    return {"by_task": peaks}


def table_row(model: FinetuneModel, record: Record) -> dict[str, float] | None:
    """Numbers of one seed: each score of a single task, or one of each task; None: no row."""
    if model.several:
        if "best" not in record:
            return None
        scores = _task_scores(model, record["best"]["tasks"])
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


def facts(model: FinetuneModel) -> Record:
    """Tasks and numbers of their rows."""
    rows = {
        task.spec.name: {split: len(encoded) for split, encoded in task.encoded.items()}
        for task in model.tasks
    }
    cut = {
        task.spec.name: {split: encoded.cut for split, encoded in task.encoded.items()}
        for task in model.tasks
    }
    if model.several:
        tasks = [describe_task(task.spec) for task in model.tasks]
        return {"tasks": tasks, "variant": model.config.variant, "rows": rows, "cut_rows": cut}
    spec = model.tasks[0].spec
    return {
        "task": describe_task(spec),
        "num_instances": model.instances,
        "rows": rows[spec.name],
        "cut_rows": cut[spec.name],
    }


def card(model: FinetuneModel) -> Card:
    """The model card."""
    names = [task.spec.name for task in model.tasks]
    tasks = ", ".join(names)
    if model.several:
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


def _of_tasks(model: FinetuneModel, many: str, single: str, scores: TaskScores) -> Record:
    return {many: scores} if model.several else {single: scores[model.tasks[0].spec.name]}


def _task_scores(model: FinetuneModel, scores: TaskScores) -> dict[str, float]:
    specs = [task.spec for task in model.tasks]
    return {spec.name: compute_task_score(spec, scores[spec.name]) for spec in specs}
