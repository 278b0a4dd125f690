"""Who shares a forward pass when N rows do, and which logits answer which row."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Layout(NamedTuple):
    """How some rows are put into whole groups of N.

    Attributes:
        rows: [R] number of the row that each line of the model's batch holds; R is a multiple of N,
            and lines k N to k N + N - 1 share a forward pass.
        lines: [n, K] lines that answer each of the n rows; other lines only fill a group.
    """

    rows: np.ndarray
    lines: np.ndarray

    def answers(self, logits: Tensor) -> Tensor:
        """Logits of lines, [R, ...] -> means over the lines of each row, [n, ...]."""
        return logits[torch.from_numpy(self.lines).to(logits.device)].mean(1)


def in_order(count: int, instances: int) -> Layout:
    """Every row once and in order; rows from the start fill the last group."""
    full = -(-count // instances) * instances
    return Layout(np.arange(full) % count, np.arange(count)[:, None])


def ensembled(count: int, instances: int, seed: Sequence[int]) -> Layout:
    """Every row `instances` times, at random places: it is answered by the mean of its copies.

    Source: Murahari et al. 2023 (MUX-PLM), ensembling.
    """
    copies = np.repeat(np.arange(count), instances)
    order = np.random.default_rng(list(seed)).permutation(len(copies))
    return Layout(copies[order], np.argsort(order).reshape(count, instances))
