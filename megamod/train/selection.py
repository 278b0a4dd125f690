"""Which rows of many tasks are worth training on: those that the model is least sure about.

Source: Pilault et al. 2021 (CA-MTL), section 2.6, and its release, whose rule is the default.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

RULES = ("release", "paper")
REGRESSION_RULES = ("mean", "release")
BORROWER, LENDER = "sts-b", "mrpc"  # of the release: both compare two sentences


def task_means(entropy: Tensor, task_of: Tensor, tasks: int) -> Tensor:
    """Mean of each task's rows: [B], [B] -> [T]; 0 for a task that has none."""
    totals = entropy.new_zeros(tasks).index_add_(0, task_of, entropy)
    counts = entropy.new_zeros(tasks).index_add_(0, task_of, torch.ones_like(entropy))
    return totals / counts.clamp(min=1)


def uncertainty_scores(
    entropy: Tensor,
    task_of: Tensor,
    tasks: Sequence[str],
    kinds: Sequence[str],
    *,
    rule: str = "release",
    regression: str = "mean",
) -> Tensor:
    """How much each candidate is worth.

    "release" multiplies a row's entropy by its task's mean, so that it favours tasks the model is
    unsure of as well; with "paper" the row's entropy decides alone. Both divide by the largest mean
    of a task.

    A regression has no entropy. By the rule "mean" each of its rows is worth the mean of all other
    candidates; by "release" the j-th row of STS-B is worth as much as the j-th of MRPC if both
    tasks are there, and all else is worth nothing.

    Args:
        entropy: [B] float32, see `TaskHeads.entropy`.
        task_of: [B] int64.
        tasks, kinds: names and kinds of all tasks.
    Returns:
        [B] float32; all 0 if the model is sure of everything.
    """
    means = task_means(entropy, task_of, len(tasks))
    largest = means.max()
    factor = means[task_of] if rule == "release" else torch.ones_like(entropy)
    scores = torch.where(largest > 0, entropy * factor / largest.clamp(min=1e-30), 0.0)
    values = torch.tensor([kind == "regression" for kind in kinds], device=entropy.device)[task_of]
    if regression == "mean":
        others = scores[~values]
        return torch.where(values, others.mean(), scores) if len(others) else scores
    if BORROWER in tasks and LENDER in tasks:
        borrowers = (task_of == tasks.index(BORROWER)).nonzero()[:, 0]
        lenders = (task_of == tasks.index(LENDER)).nonzero()[:, 0]
        count = min(len(borrowers), len(lenders))
        scores = scores.index_copy(0, borrowers[:count], scores[lenders[:count]])
    return scores


def most_uncertain(scores: Tensor, count: int) -> Tensor:
    """Places of the largest scores, the largest first; of equal ones the first: [count] int64."""
    return scores.argsort(descending=True, stable=True)[:count]
