"""Groups of N rows that share a forward pass, and the logits of each row."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class InstanceLayout(NamedTuple):
    """Assignment of n rows to the lines of a batch of whole groups of N.

    Attributes:
        rows: [R] row number of each line; R is a multiple of N, and lines k N to k N + N - 1 share
            a forward pass.
        lines: [n, K] lines of each row, whose logits are averaged; other lines only fill a group.
    """

    rows: np.ndarray
    lines: np.ndarray

    def average_row_logits(self, logits: Tensor) -> Tensor:
        """Average logits over the lines of each row: [R, ...] -> [n, ...]."""
        return logits[torch.from_numpy(self.lines).to(logits.device)].mean(1)


def arrange_rows_in_order(row_count: int, instances: int) -> InstanceLayout:
    """Arrange every row once, in order, in groups; the first rows, repeated, fill the last group.

    Args:
        row_count: number n of rows.
        instances: N, rows that share a forward pass.
    """
    full = -(-row_count // instances) * instances
    return InstanceLayout(np.arange(full) % row_count, np.arange(row_count)[:, None])


def arrange_rows_for_ensemble(
    row_count: int, instances: int, seed: Sequence[int]
) -> InstanceLayout:
    """Arrange every row on N random lines, to average its logits over these copies.

    Args:
        row_count: number n of rows.
        instances: N, copies of a row, and lines that share a forward pass.
        seed: numbers that seed the draw of the lines.

    Source: Murahari et al. 2023 (MUX-PLM), ensembling.
    """
    copies = np.repeat(np.arange(row_count), instances)
    order = np.random.default_rng(list(seed)).permutation(len(copies))
    return InstanceLayout(copies[order], np.argsort(order).reshape(row_count, instances))
