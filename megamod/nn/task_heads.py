"""Heads of many tasks in one batch: logits, losses and uncertainty, row by row.

All heads are one tensor, padded to the largest number of labels, so that the same parameters take
part in every batch: the task of a row is an index, never a branch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100


class TaskScores(NamedTuple):
    """Summed losses and numbers of items by task.

    Attributes:
        totals: [T] float32, summed loss of each task: nats, of regressions squared errors.
        items: [T] float32, rows, or labelled tokens.
    """

    totals: Tensor
    items: Tensor


class TaskHeads(nn.Module):
    """A linear layer per task, over the pooled state of a row or over its tokens' states.

    Args:
        size: features D of a state.
        sizes: outputs of each task's head.
        kinds: kind of each task: "sequence", "regression" or "token".
        dropout: dropout rate of the states, in training.
    """

    def __init__(self, size: int, sizes: Sequence[int], kinds: Sequence[str], dropout: float):
        super().__init__()
        self.sizes, self.kinds = tuple(sizes), tuple(kinds)
        max_size = max(sizes, default=1)
        self.weight = nn.Parameter(torch.empty(len(sizes), max_size, size))
        self.bias = nn.Parameter(torch.zeros(len(sizes), max_size))
        self.dropout = nn.Dropout(dropout)

    def initialise(self, std: float) -> None:
        """Draw the weights from a normal distribution of deviation `std` and zero the biases."""
        nn.init.normal_(self.weight, std=std)
        nn.init.zeros_(self.bias)

    def mask_rows_of_kind(self, kind: str, row_task_ids: Tensor) -> Tensor:
        """Return bool [B], True at rows whose task is of a kind; `row_task_ids` is [B]."""
        return torch.tensor([k == kind for k in self.kinds], device=row_task_ids.device)[
            row_task_ids
        ]

    def compute_row_logits(self, pooled: Tensor, row_task_ids: Tensor) -> Tensor:
        """Compute logits of whole rows.

        Args:
            pooled: [B, D], one state per row.
            row_task_ids: [B], task of each row.
        Returns:
            [B, C], C outputs being those of the largest task; outputs that the row's task lacks
            have the dtype's smallest value.
        """
        logits = torch.einsum("bd,bcd->bc", self.dropout(pooled), self.weight[row_task_ids])
        return self._mask_unused_outputs(logits + self.bias[row_task_ids], row_task_ids)

    def compute_token_logits(self, states: Tensor, row_task_ids: Tensor) -> Tensor | None:
        """Compute logits [B, L, C] of token states [B, L, D], padded as by `compute_row_logits`.

        `row_task_ids` [B] is the task of each row. Returns None if there is no token task.
        """
        if "token" not in self.kinds:
            return None
        logits = torch.einsum("bld,bcd->blc", self.dropout(states), self.weight[row_task_ids])
        return self._mask_unused_outputs(logits + self.bias[row_task_ids][:, None], row_task_ids)

    def compute_losses(
        self,
        row_logits: Tensor,
        token_logits: Tensor | None,
        row_task_ids: Tensor,
        labels: Tensor | None,
        token_labels: Tensor | None,
    ) -> TaskScores:
        """Compute the losses by task.

        Args:
            row_logits, token_logits: results of `compute_row_logits`, `compute_token_logits`.
            row_task_ids: [B], task of each row.
            labels: [B] float32, classes or values, of rows of tasks without token labels.
            token_labels: [B, L] int64, -100 where there is none.
        """
        loss = row_logits.new_zeros(len(row_logits), dtype=torch.float32)
        items = torch.zeros_like(loss)
        if labels is not None:
            classes, values = (
                self.mask_rows_of_kind("sequence", row_task_ids),
                self.mask_rows_of_kind("regression", row_task_ids),
            )
            targets = torch.where(classes, labels, 0).long()
            entropy = F.cross_entropy(row_logits.float(), targets, reduction="none")
            error = (row_logits[:, 0].float() - torch.where(values, labels, 0).float()) ** 2
            loss = torch.where(classes, entropy, torch.where(values, error, 0.0))
            items = (classes | values).float()
        if token_logits is not None and token_labels is not None:
            entropy = F.cross_entropy(
                token_logits.float().transpose(1, 2),
                token_labels,
                ignore_index=IGNORED,
                reduction="none",
            )
            of_tokens = self.mask_rows_of_kind("token", row_task_ids)
            loss = torch.where(of_tokens, entropy.sum(1), loss)
            items = torch.where(of_tokens, (token_labels != IGNORED).sum(1).float(), items)
        zeros = loss.new_zeros(len(self.sizes))
        return TaskScores(
            zeros.index_add(0, row_task_ids, loss), zeros.index_add(0, row_task_ids, items)
        )

    @torch.no_grad()
    def compute_entropy(
        self,
        row_logits: Tensor,
        token_logits: Tensor | None,
        row_task_ids: Tensor,
        token_labels: Tensor | None = None,
    ) -> Tensor:
        """Compute the entropy of each row's prediction, divided by the entropy of a uniform one.

        For labels of tokens this is the mean over labelled positions; for a regression it is 0.

        Args:
            row_logits, token_logits: results of `compute_row_logits`, `compute_token_logits`.
            row_task_ids: [B], task of each row.
            token_labels: [B, L], -100 where there is none; None: rows of tasks with labels of
                tokens are scored by `row_logits` like others.
        Returns:
            [B] float32, 0 to 1.
        Source: Pilault et al. 2021, section 2.6; the divisor ln C + 1e-5 is that of the release.
        """
        sizes = torch.tensor(self.sizes, device=row_logits.device, dtype=torch.float32)
        max_entropy = (sizes.log() + 1e-5)[row_task_ids]
        relative = _compute_softmax_entropy(row_logits) / max_entropy
        if token_logits is not None and token_labels is not None:
            labelled = token_labels != IGNORED
            mean = (_compute_softmax_entropy(token_logits) * labelled).sum(1) / labelled.sum(
                1
            ).clamp(min=1)
            relative = torch.where(
                self.mask_rows_of_kind("token", row_task_ids), mean / max_entropy, relative
            )
        return relative

    def _mask_unused_outputs(self, logits: Tensor, row_task_ids: Tensor) -> Tensor:
        """Replace logits [B, ..., C] beyond the labels of a row's task by the dtype's minimum.

        `row_task_ids` [B] is the task of each row.
        """
        sizes = torch.tensor(self.sizes, device=logits.device)[row_task_ids]
        used = torch.arange(logits.shape[-1], device=logits.device) < sizes[:, None]
        if logits.dim() == 3:
            used = used[:, None]
        return logits.masked_fill(~used, torch.finfo(logits.dtype).min)


def _compute_softmax_entropy(logits: Tensor) -> Tensor:
    """Compute the entropy of softmax(logits): [..., C] -> [...], nats, float32."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p.clamp(min=-1e30)).sum(-1)
