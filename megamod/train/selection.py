"""Selection of the rows of many tasks that the model is least certain about.

Source: Pilault et al. 2021 (CA-MTL), section 2.6, and its release, whose rule is the default.
"""

from collections.abc import Sequence

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from megamod.data.tasks.task_mixture import TaskMixture
from megamod.train.objectives import Batch

RULES = ("release", "paper")
REGRESSION_RULES = ("borrow", "mean", "release")
"""Values of `rule` and `regression`, see `score_uncertainty`."""
BORROWER, LENDER = "sts-b", "mrpc"  # of the release: both compare two sentences


def average_entropy_by_task(entropy: Tensor, row_task_ids: Tensor, task_count: int) -> Tensor:
    """Average the entropy [B] of rows over the rows of each task: [T]; 0 for a task without rows.

    `row_task_ids` [B] int64 are the tasks of the rows, numbers below T = `task_count`.
    """
    totals = entropy.new_zeros(task_count).index_add_(0, row_task_ids, entropy)
    counts = entropy.new_zeros(task_count).index_add_(0, row_task_ids, torch.ones_like(entropy))
    return totals / counts.clamp(min=1)


def score_uncertainty(
    entropy: Tensor,
    row_task_ids: Tensor,
    tasks: Sequence[str],
    kinds: Sequence[str],
    *,
    rule: str = "release",
    regression: str = "borrow",
) -> Tensor:
    """Score each candidate row by its entropy; rows with larger scores are selected.

    Args:
        entropy: [B] float32, see `TaskHeads.compute_entropy`.
        row_task_ids: [B] int64, task of each row.
        tasks, kinds: names and kinds of all tasks.
        rule: "release" multiplies a row's entropy by its task's mean, which also favours uncertain
            tasks; with "paper" the row's entropy decides alone. Both divide by the largest mean of
            a task.
        regression: scores of rows of regressions, which have no entropy. "release": the j-th row of
            STS-B has the score of the j-th row of MRPC if both tasks are present, and all others
            have score 0. "borrow": as "release", but other regressions take scores evenly from all
            rows of classifications, so they are selected as often as an average task. "mean": each
            has the mean score of all classifications, which is rarely selected while some rows
            stand out.
    Returns:
        [B] float32; all 0 if no row has any entropy.
    """
    means = average_entropy_by_task(entropy, row_task_ids, len(tasks))
    largest = means.max()
    factor = means[row_task_ids] if rule == "release" else torch.ones_like(entropy)
    scores = torch.where(largest > 0, entropy * factor / largest.clamp(min=1e-30), 0.0)
    values = torch.tensor([kind == "regression" for kind in kinds], device=entropy.device)
    classified = (~values[row_task_ids]).nonzero()[:, 0]
    if regression == "mean" and len(classified):
        return torch.where(values[row_task_ids], scores[classified].mean(), scores)
    for task in values.nonzero()[:, 0].tolist():
        borrowers, lenders = (row_task_ids == task).nonzero()[:, 0], classified
        if tasks[task] == BORROWER and LENDER in tasks:
            lenders = (row_task_ids == tasks.index(LENDER)).nonzero()[:, 0]
            borrowers = borrowers[: len(lenders)]
            lenders = lenders[: len(borrowers)]
        elif regression == "release" or not len(classified):
            continue
        else:
            evenly = torch.arange(len(borrowers), device=entropy.device) * len(lenders)
            lenders = lenders[evenly // max(1, len(borrowers))]
        scores = scores.index_copy(0, borrowers, scores[lenders])
    return scores


def select_most_uncertain(scores: Tensor, count: int) -> Tensor:
    """Select the indices of the largest scores, descending, ties in order: [count] int64."""
    return scores.argsort(descending=True, stable=True)[:count]


class UncertaintySelector:
    """Selects the most uncertain rows among the candidates of each step.

    With "local" every micro-batch is selected from its candidates, as in the release. With "global"
    the rows of a step are the best of all ranks' candidates, in the same order on any number of
    ranks; ranks exchange only scores and row numbers.

    Args:
        mixture: source of the candidates and of the selected rows.
        inputs: names of the fields of a batch that the model takes.
        tasks, kinds: names and kinds of all tasks, in the order of their numbers.
        device: device of the model.
        scope: "local" or "global".
        dropout: score with dropout, as the release does.
        rule, regression: see `score_uncertainty`.
    """

    def __init__(
        self,
        mixture: TaskMixture,
        inputs: Sequence[str],
        tasks: Sequence[str],
        kinds: Sequence[str],
        device: torch.device,
        *,
        scope: str,
        dropout: bool,
        rule: str,
        regression: str,
    ):
        self.mixture, self.inputs, self.device = mixture, tuple(inputs), device
        self.tasks, self.kinds = tuple(tasks), tuple(kinds)
        self.scope, self.dropout = scope, dropout
        self.rule, self.regression = rule, regression

    def __call__(
        self, engine: deepspeed.DeepSpeedEngine, micro_batches: Sequence[Batch]
    ) -> list[Batch]:
        """Select the micro-batches to train on; collective with "global".

        Args:
            engine: scores the candidates; it is in training mode afterwards.
            micro_batches: candidates, `division.micro_batch` rows of each task.
        Returns:
            as many micro-batches, of `division.micro_batch` rows each.
        """
        entropy = torch.stack([self._compute_entropy(engine, batch) for batch in micro_batches])
        row_task_ids, rows = (
            torch.stack([batch[name] for batch in micro_batches]).to(self.device)
            for name in ("task_ids", "rows")
        )
        division = self.mixture.division
        size = division.micro_batch
        if self.scope == "local":
            selected = [
                (row_task_ids[micro_batch_index][best_rows], rows[micro_batch_index][best_rows])
                for micro_batch_index, scores in enumerate(
                    map(self._score_rows, entropy, row_task_ids)
                )
                for best_rows in [select_most_uncertain(scores, size)]
            ]
        else:
            entropy, row_task_ids, rows = map(
                self._gather_from_ranks, (entropy, row_task_ids, rows)
            )
            best_rows = select_most_uncertain(
                self._score_rows(entropy, row_task_ids), division.global_batch
            )
            local_indices = best_rows[
                division.first_sample : division.first_sample + size * len(micro_batches)
            ].split(size)
            selected = [(row_task_ids[indices], rows[indices]) for indices in local_indices]
        return [
            self.mixture.gather_batch(tasks.cpu().numpy(), numbers.cpu().numpy())
            for tasks, numbers in selected
        ]

    def _score_rows(self, entropy: Tensor, row_task_ids: Tensor) -> Tensor:
        """Score candidates by the rules of this selector; returns [B].

        Args:
            entropy: [B], of the model's predictions.
            row_task_ids: [B], task of each row.
        """
        return score_uncertainty(
            entropy,
            row_task_ids,
            self.tasks,
            self.kinds,
            rule=self.rule,
            regression=self.regression,
        )

    @torch.no_grad()
    def _compute_entropy(self, engine: deepspeed.DeepSpeedEngine, batch: Batch) -> Tensor:
        """Compute the entropy of all candidates in `batch` in one forward pass: [T * rows] float32.

        T tasks have as many candidates each; `engine` has the model.
        """
        names = (*self.inputs, "task_ids", *(("token_labels",) if "token_labels" in batch else ()))
        fields = {name: batch[name].to(self.device, non_blocking=True) for name in names}
        engine.train(self.dropout)
        entropy = engine(**fields).entropy
        engine.train()
        return entropy

    def _gather_from_ranks(self, local_values: Tensor) -> Tensor:
        """Gather values [micro-batches, T * rows] of all ranks into one dimension, for T tasks.

        They are in the order of task, rank and micro-batch. Collective.
        """
        parts = [torch.empty_like(local_values) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local_values.contiguous())
        sizes = (len(self.tasks), self.mixture.division.micro_batch)
        by_task = torch.stack(parts).unflatten(-1, sizes)
        return by_task.movedim(2, 0).flatten()
