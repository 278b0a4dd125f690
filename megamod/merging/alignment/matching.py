"""Assigning the features of one model to those of another so that the summed similarity is largest.

Permutations are index vectors `col`: feature r of the reference goes with feature `col[r]` of the
other model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

ATTENTION = ("head_perm", "monotonic", "ignore_heads")
"""Heads are matched and then features within; heads stay in order; features of all heads mix (which
changes what the model computes)."""


@dataclass(frozen=True)
class Match:
    """A permutation.

    Attributes:
        permutation: [C] int64.
        value: summed similarity of what is matched.
        heads: [H] int64, which head goes to which; None if heads were not told apart.
    """

    permutation: Tensor
    value: float
    heads: Tensor | None = None


def assign(similarity: Tensor) -> Match:
    """The best permutation for a matrix [C, C], by the Hungarian method (exact)."""
    matrix = similarity.numpy()
    rows, columns = linear_sum_assignment(matrix, maximize=True)
    return Match(torch.from_numpy(columns.astype(np.int64)), float(matrix[rows, columns].sum()))


def assign_heads(
    similarities: Sequence[Tensor], heads: int, mode: str, order: Tensor | None = None
) -> list[Match]:
    """The best permutations of features within heads, for matrices that share the order of heads.

    Args:
        similarities: [C, C] each; more than one where groups have their own features but the same
            heads.
        heads: number of heads; head j has features j * C / heads and following.
        mode: one of `ATTENTION`.
        order: [H], a given order of heads, with `head_perm`; None to find the best.
    Returns:
        one match per matrix.
    Source: Verma and Elbayad 2024, section 3.3.
    """
    if mode == "ignore_heads":
        return [assign(similarity) for similarity in similarities]
    size = len(similarities[0]) // heads
    if mode == "monotonic":
        order = torch.arange(heads)
    pairs = (
        [(j, k) for j in range(heads) for k in range(heads)]
        if order is None
        else list(enumerate(order.tolist()))
    )
    inner = [
        {(j, k): assign(_block(similarity, j, k, size)) for j, k in pairs}
        for similarity in similarities
    ]
    if order is None:
        values = torch.zeros(heads, heads, dtype=torch.float64)
        for j, k in pairs:
            values[j, k] = sum(found[j, k].value for found in inner)
        order = assign(values).permutation
    chosen = list(enumerate(order.tolist()))
    return [
        Match(
            torch.cat([k * size + found[j, k].permutation for j, k in chosen]),
            sum(found[j, k].value for j, k in chosen),
            order,
        )
        for found in inner
    ]


def _block(similarity: Tensor, j: int, k: int, size: int) -> Tensor:
    return similarity[j * size : (j + 1) * size, k * size : (k + 1) * size]


def identity(similarity: Tensor) -> Match:
    """Everything stays where it is."""
    return Match(torch.arange(len(similarity)), float(similarity.trace()))


def inverse(permutation: Tensor) -> Tensor:
    """The permutation that undoes one."""
    return torch.argsort(permutation)
