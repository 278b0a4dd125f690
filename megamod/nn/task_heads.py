"""Heads of many tasks in one batch: logits, losses and uncertainty, row by row.

All heads lie in one tensor, padded to the largest number of labels, so that the same parameters
take part in every batch. Which task a row belongs to is a number, never a branch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100


class TaskScores(NamedTuple):
    """Sums by task.

    Attributes:
        totals: [T] float32, summed loss of the items of each task, nats (squared error of values).
        items: [T] float32, rows, or labelled tokens.
    """

    totals: Tensor
    items: Tensor


class TaskHeads(nn.Module):
    """A linear layer per task, over the pooled state of a row or over its tokens' states.

    Args:
        sizes: outputs of each task's head.
        kinds: "sequence", "regression" or "token".
    """

    def __init__(self, size: int, sizes: Sequence[int], kinds: Sequence[str], dropout: float):
        super().__init__()
        self.sizes, self.kinds = tuple(sizes), tuple(kinds)
        most = max(sizes, default=1)
        self.weight = nn.Parameter(torch.empty(len(sizes), most, size))
        self.bias = nn.Parameter(torch.zeros(len(sizes), most))
        self.dropout = nn.Dropout(dropout)

    def draw(self, std: float) -> None:
        """New weights, normal; no bias."""
        nn.init.normal_(self.weight, std=std)
        nn.init.zeros_(self.bias)

    def of_kind(self, kind: str, task_of: Tensor) -> Tensor:
        """bool [B], True for rows of tasks of that kind."""
        return torch.tensor([k == kind for k in self.kinds], device=task_of.device)[task_of]

    def row_logits(self, pooled: Tensor, task_of: Tensor) -> Tensor:
        """[B, D] -> [B, C], C of the largest task; what a task has not got is very small."""
        logits = torch.einsum("bd,bcd->bc", self.dropout(pooled), self.weight[task_of])
        return self._only_own(logits + self.bias[task_of], task_of)

    def token_logits(self, states: Tensor, task_of: Tensor) -> Tensor | None:
        """[B, L, D] -> [B, L, C]; None if no task has labels of tokens."""
        if "token" not in self.kinds:
            return None
        logits = torch.einsum("bld,bcd->blc", self.dropout(states), self.weight[task_of])
        return self._only_own(logits + self.bias[task_of][:, None], task_of)

    def scores(
        self,
        rows: Tensor,
        tokens: Tensor | None,
        task_of: Tensor,
        labels: Tensor | None,
        token_labels: Tensor | None,
    ) -> TaskScores:
        """Losses by task.

        Args:
            rows, tokens: logits, see above.
            labels: [B] float32, classes or values, of rows of tasks without token labels.
            token_labels: [B, L] int64, -100 where there is none.
        """
        loss = rows.new_zeros(len(rows), dtype=torch.float32)
        items = torch.zeros_like(loss)
        if labels is not None:
            classes, values = self.of_kind("sequence", task_of), self.of_kind("regression", task_of)
            wanted = torch.where(classes, labels, 0).long()
            entropy = F.cross_entropy(rows.float(), wanted, reduction="none")
            error = (rows[:, 0].float() - torch.where(values, labels, 0).float()) ** 2
            loss = torch.where(classes, entropy, torch.where(values, error, 0.0))
            items = (classes | values).float()
        if tokens is not None and token_labels is not None:
            entropy = F.cross_entropy(
                tokens.float().transpose(1, 2), token_labels, ignore_index=IGNORED, reduction="none"
            )
            of_tokens = self.of_kind("token", task_of)
            loss = torch.where(of_tokens, entropy.sum(1), loss)
            items = torch.where(of_tokens, (token_labels != IGNORED).sum(1).float(), items)
        nothing = loss.new_zeros(len(self.sizes))
        return TaskScores(nothing.index_add(0, task_of, loss), nothing.index_add(0, task_of, items))

    @torch.no_grad()
    def entropy(
        self,
        rows: Tensor,
        tokens: Tensor | None,
        task_of: Tensor,
        token_labels: Tensor | None = None,
    ) -> Tensor:
        """How unsure the model is about each row: its answer's entropy over that of a guess.

        Of labels of tokens it is the mean over labelled positions; of a regression it is 0.

        Returns:
            [B] float32, 0 to 1.
        Source: Pilault et al. 2021, section 2.6; the divisor ln C + 1e-5 is that of the release.
        """
        sizes = torch.tensor(self.sizes, device=rows.device, dtype=torch.float32)
        most = (sizes.log() + 1e-5)[task_of]
        found = _entropy(rows) / most
        if tokens is not None and token_labels is not None:
            there = token_labels != IGNORED
            mean = (_entropy(tokens) * there).sum(1) / there.sum(1).clamp(min=1)
            found = torch.where(self.of_kind("token", task_of), mean / most, found)
        return found

    def _only_own(self, logits: Tensor, task_of: Tensor) -> Tensor:
        sizes = torch.tensor(self.sizes, device=logits.device)[task_of]
        own = torch.arange(logits.shape[-1], device=logits.device) < sizes[:, None]
        if logits.dim() == 3:
            own = own[:, None]
        return logits.masked_fill(~own, torch.finfo(logits.dtype).min)


def _entropy(logits: Tensor) -> Tensor:
    """[..., C] -> [...], nats, float32."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p.clamp(min=-1e30)).sum(-1)
