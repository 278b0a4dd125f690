"""Groups of N rows that share a forward pass, and the logits of each row."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Layout(NamedTuple):
    """Assignment of n rows to the lines of a batch of whole groups of N.

    Attributes:
        rows: [R] row number of each line; R is a multiple of N, and lines k N to k N + N - 1 share
            a forward pass.
        lines: [n, K] lines of each row, whose logits are averaged; other lines only fill a group.
    """

    rows: np.ndarray
    lines: np.ndarray

    def answers(self, logits: Tensor) -> Tensor:
        """Means of logits over the lines of each row: [R, ...] -> [n, ...]."""
        return logits[torch.from_numpy(self.lines).to(logits.device)].mean(1)


def in_order(count: int, instances: int) -> Layout:
    """Every row once, in order; the first rows fill the last group."""
    full = -(-count // instances) * instances
    return Layout(np.arange(full) % count, np.arange(count)[:, None])


def ensembled(count: int, instances: int, seed: Sequence[int]) -> Layout:
    """Every row `instances` times, on random lines; its logits are the mean of its copies.

    Source: Murahari et al. 2023 (MUX-PLM), ensembling.
    """
    copies = np.repeat(np.arange(count), instances)
    order = np.random.default_rng(list(seed)).permutation(len(copies))
    return Layout(copies[order], np.argsort(order).reshape(count, instances))
