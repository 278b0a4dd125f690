"""Scores of sentence tasks as GLUE defines them, and files for its server.

Source: Wang et al. 2019 (GLUE), section 3 and appendix: the metrics of each task, and the average.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from megamod.data.tasks.specs import TaskSpec
from megamod.errors import UserError

Scores = dict[str, float]


def score_sentences(task: TaskSpec, logits: np.ndarray, labels: np.ndarray) -> Scores:
    """Compute the task's metrics by name, and "loss", the mean over rows.

    The loss is cross entropy in nats, or squared error for regression.

    Args:
        task: the task, whose `metrics` are computed.
        logits: [n, C] float, C is 1 for regression.
        labels: [n] numbers of labels, or values of a regression.
    Raises:
        UserError: as `compute_metric`.
    """
    answers = select_answers(task, logits)
    scores = {name: compute_metric(name, answers, labels) for name in task.metrics}
    if task.is_regression:
        scores["loss"] = float(np.mean((answers - labels) ** 2))
    else:
        shifted = logits - logits.max(-1, keepdims=True)
        norm = np.log(np.exp(shifted).sum(-1))
        scores["loss"] = float(np.mean(norm - shifted[np.arange(len(labels)), labels]))
    return scores


def select_answers(task: TaskSpec, logits: np.ndarray) -> np.ndarray:
    """Select the answer to each row from its logits.

    Args:
        task: the task, of labels or a regression.
        logits: [n, C] float.
    Returns:
        [n] int64 numbers of the best labels; for a regression the values, the first column.
    """
    return logits[:, 0] if task.is_regression else logits.argmax(-1)


def compute_metric(name: str, answers: np.ndarray, labels: np.ndarray) -> float:
    """Compute one metric of answers; 0 where it is undefined (constant answers).

    F1 is that of label 1 against label 0; macro_f1 weighs all labels alike.

    Args:
        name: accuracy, f1, macro_f1, matthews_correlation, pearson or spearmanr.
        answers, labels: [n] numbers of labels; for correlations values.
    Raises:
        UserError: for f1 of more than two labels, and a metric that is not of sentences.
    """
    if name == "accuracy":
        return float(np.mean(answers == labels))
    if name in ("pearson", "spearmanr"):
        return _compute_correlation(name, answers, labels)
    from sklearn import metrics

    if name == "f1":
        most = max(answers.max(initial=0), labels.max(initial=0))
        if most > 1:
            raise UserError(
                f"metric f1 is for two labels, numbers 0 and 1, and there is label {most}; use "
                "macro_f1"
            )
        return float(metrics.f1_score(labels, answers, zero_division=0))
    if name == "macro_f1":
        return float(metrics.f1_score(labels, answers, average="macro", zero_division=0))
    if name == "matthews_correlation":
        return float(metrics.matthews_corrcoef(labels, answers))
    raise UserError(f"metric {name} is for labels of words, not for this task")


def _compute_correlation(name: str, answers: np.ndarray, labels: np.ndarray) -> float:
    """Compute a correlation; 0 where it is undefined: constant answers or labels, or one row.

    Args:
        name: pearson or spearmanr.
        answers, labels: [n] values.
    """
    from scipy import stats

    if len(labels) < 2 or np.ptp(answers) == 0 or np.ptp(labels) == 0:
        return 0.0
    of = {"pearson": stats.pearsonr, "spearmanr": stats.spearmanr}[name]
    value = float(of(answers, labels).statistic)
    return value if math.isfinite(value) else 0.0


def compute_accuracy_by_instance(
    answers: np.ndarray, labels: np.ndarray, instances: int
) -> list[float]:
    """Compute the accuracy of each of the N instances of a multiplexed model.

    Row r of a split is instance r % N; with fewer rows than N, only as many numbers as rows.

    Args:
        answers, labels: [n] numbers of labels.
        instances: N.
    """
    correct = answers == labels
    return [
        float(np.mean(correct[instance::instances]))
        for instance in range(min(instances, len(correct)))
    ]


def compute_task_score(task: TaskSpec, splits: Mapping[str, Scores]) -> float:
    """Compute the one number of a task in GLUE: the mean of its metrics over its dev splits.

    A task with Matthews correlation (CoLA), or of labels of words, counts with its first metric
    alone.

    Args:
        splits: scores by name of the split; splits whose name does not start with "dev" are
            skipped.
    """
    alone = task.kind == "token" or "matthews_correlation" in task.metrics
    names = task.metrics[:1] if alone else task.metrics
    held = [scores for split, scores in splits.items() if split.startswith("dev")]
    return float(np.mean([scores[name] for scores in held for name in names]))


def average_task_scores(tasks: Mapping[str, float]) -> float:
    """Average the tasks' scores, each with the same weight."""
    return sum(tasks.values()) / len(tasks)


def format_submission(task: TaskSpec, logits: np.ndarray) -> str:
    """Format a prediction file for the GLUE server.

    It has a header and one line per row of the split: index, tab, name of the label; or value of a
    regression, within the bounds of the task.

    Args:
        logits: [n, C], C is 1 for regression.
    """
    answers = select_answers(task, logits)
    if task.is_regression:
        least, most = task.bounds or (-math.inf, math.inf)
        texts: Sequence[str] = [f"{value:.3f}" for value in answers.clip(least, most)]
    else:
        texts = [task.labels[number] for number in answers]
    rows = (f"{index}\t{text}" for index, text in enumerate(texts))
    return "\n".join(["index\tprediction", *rows]) + "\n"
