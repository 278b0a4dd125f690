"""Assignment of the features of one model to those of another, by largest summed similarity.

A permutation is an index vector `col`: feature r of the reference is matched with feature `col[r]`
of the other model. A soft assignment is a matrix; row r holds the share of each feature in r.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from megamod.errors import UserError

ATTENTION = ("head_perm", "monotonic", "ignore_heads")
"""Match heads and features within them; keep the order of heads; mix features of all heads (which
changes the function of the model)."""

_TOLERANCE = 1e-5  # largest error of a sum of a soft assignment
_ROUNDS = 20_000  # most rounds of Sinkhorn's algorithm


@dataclass(frozen=True)
class FeatureMatch:
    """The match of the features of a group.

    Attributes:
        permutation: [C] int64; a soft assignment is [C, C] float64 of rows that sum to 1.
        value: summed similarity of matched features.
        heads: [H] int64, permutation of heads; None if heads were not matched as such.
    """

    permutation: Tensor
    value: float
    heads: Tensor | None = None


def assign_features(similarity: Tensor) -> FeatureMatch:
    """Find the permutation of largest summed similarity (exact linear assignment).

    Args:
        similarity: [C, C] on the CPU; rows are features of the reference.
    """
    matrix = similarity.numpy()
    rows, columns = linear_sum_assignment(matrix, maximize=True)
    return FeatureMatch(
        torch.from_numpy(columns.astype(np.int64)), float(matrix[rows, columns].sum())
    )


def transport_features(similarity: Tensor, regularisation: float) -> FeatureMatch:
    """Find the soft assignment that minimises cost (1 - similarity) - `regularisation` * entropy.

    Sinkhorn's algorithm, on logarithms and in float64. Rows and columns sum to 1 within
    `_TOLERANCE`; at the end rows are normalised exactly. A smaller regularisation is closer to
    `assign_features` and takes longer.

    Args:
        similarity: [C, C].
        regularisation: positive, in units of the similarity.
    Raises:
        UserError: if the sums have not converged after `_ROUNDS` rounds.
    Source: Cuturi 2013 (Sinkhorn distances), algorithm 1; Imfeld et al. 2023 (Transformer fusion
        with optimal transport), section 4, for its use.
    """
    logits = (similarity.double() - 1) / regularisation
    columns = logits.new_zeros(len(logits))
    for _ in range(_ROUNDS):
        rows = -(logits + columns).logsumexp(1)
        previous_columns, columns = columns, -(logits + rows[:, None]).logsumexp(0)
        # Columns sum to 1 now; the change of the factors is the error of the rows.
        error = float((columns - previous_columns).abs().max())
        if error <= _TOLERANCE:
            break
    else:
        raise UserError(
            f"align.regularisation: with {regularisation:g} the sums are off by {error:.2g} "
            f"after {_ROUNDS} rounds; give a larger one"
        )
    plan = (logits + rows[:, None] + columns).softmax(1)
    return FeatureMatch(plan, float((plan * similarity).sum()))


Solver = Callable[[Tensor], FeatureMatch]
"""From the similarity [C, C] of features to their best match."""


def assign_heads(
    similarities: Sequence[Tensor],
    heads: int,
    mode: str,
    order: Tensor | None = None,
    solve: Solver = assign_features,
) -> list[FeatureMatch]:
    """Find the best permutations of features within heads, for groups that share the head order.

    Args:
        similarities: [C, C] each, on the CPU; several where groups have features of their own and
            the same heads.
        heads: number H of heads; head j has C / heads features from j * C / heads on.
        mode: one of `ATTENTION`.
        order: [H], fixed order of heads, with `head_perm`; None: find the best.
        solve: finds the permutation within a pair of heads.
    Returns:
        one match per matrix; its `heads` is the common order, None with "ignore_heads".
    Source: Verma and Elbayad 2024, section 3.3.
    """
    if mode == "ignore_heads":
        return [solve(similarity) for similarity in similarities]
    size = len(similarities[0]) // heads
    if mode == "monotonic":
        order = torch.arange(heads)
    pairs = (
        [(j, k) for j in range(heads) for k in range(heads)]
        if order is None
        else list(enumerate(order.tolist()))
    )
    inner = [
        {(j, k): solve(_select_block(similarity, j, k, size)) for j, k in pairs}
        for similarity in similarities
    ]
    if order is None:
        values = torch.zeros(heads, heads, dtype=torch.float64)
        for j, k in pairs:
            values[j, k] = sum(matches[j, k].value for matches in inner)
        order = assign_features(values).permutation
    matched = list(enumerate(order.tolist()))
    return [
        FeatureMatch(
            torch.cat([k * size + matches[j, k].permutation for j, k in matched]),
            sum(matches[j, k].value for j, k in matched),
            order,
        )
        for matches in inner
    ]


def transport_heads(
    similarity: Tensor,
    heads: int,
    mode: str,
    regularisation: float,
    order: Tensor | None = None,
) -> FeatureMatch:
    """Find soft assignments of features within heads; heads are matched by `assign_heads`.

    With "ignore_heads" it is one soft assignment of all features.

    Args:
        similarity, heads, mode, order: see `assign_heads`.
        regularisation: see `transport_features`.
    Raises:
        UserError: if the iteration does not converge.
    """
    if mode == "ignore_heads":
        return transport_features(similarity, regularisation)
    (hard,) = assign_heads([similarity], heads, mode, order)
    size, value = len(similarity) // heads, 0.0
    whole = torch.zeros(len(similarity), len(similarity), dtype=torch.float64)
    for j, k in enumerate(hard.heads.tolist()):
        soft = transport_features(_select_block(similarity, j, k, size), regularisation)
        _select_block(whole, j, k, size).copy_(soft.permutation)
        value += soft.value
    return FeatureMatch(whole, value, hard.heads)


def assign_query_heads(similarity: Tensor, queries_per_key: int, mode: str) -> FeatureMatch:
    """Find a permutation where several query heads share one key and value head.

    Query heads may be reordered, and all have one permutation of features, that of the values. The
    two are optimised alternately until neither raises the similarity, so the result may be a local
    optimum.

    Args:
        similarity: [C, C] of the query heads of a key head with those of the other model.
        queries_per_key: number of query heads.
        mode: with "monotonic" the query heads stay in order.
    """
    size = len(similarity) // queries_per_key
    blocks = similarity.reshape(queries_per_key, size, queries_per_key, size).transpose(1, 2)
    order = torch.arange(queries_per_key)
    if mode != "monotonic":
        best = [[assign_features(block).value for block in row] for row in blocks]
        order = assign_features(torch.tensor(best, dtype=torch.float64)).permutation
    heads, value = torch.arange(queries_per_key), -float("inf")
    while True:
        within = assign_features(blocks[heads, order].sum(0))
        if not within.value > value:
            break
        value, inner, best_order = within.value, within.permutation, order
        if mode != "monotonic":
            whole = blocks[:, :, torch.arange(size), inner].sum(-1)
            order = assign_features(whole).permutation
    return FeatureMatch((best_order[:, None] * size + inner).flatten(), value, best_order)


def select_solver(queries_per_key: int, mode: str) -> Solver:
    """Return the solver for features within a pair of key heads.

    It is `assign_query_heads` where several query heads share a key head, else `assign_features`.

    Args:
        queries_per_key: query heads that share a key head.
        mode: see `assign_query_heads`.
    """
    return (
        assign_features
        if queries_per_key == 1
        else partial(assign_query_heads, queries_per_key=queries_per_key, mode=mode)
    )


def _select_block(similarity: Tensor, j: int, k: int, size: int) -> Tensor:
    """Select block (j, k) of a matrix in blocks of `size` x `size`, as a view.

    Args:
        similarity: the matrix.
        j, k: row and column of the block, counted in blocks.
    """
    return similarity[j * size : (j + 1) * size, k * size : (k + 1) * size]


def make_identity_feature_match(similarity: Tensor) -> FeatureMatch:
    """Make the match that leaves every feature at its index, with its summed similarity."""
    return FeatureMatch(torch.arange(len(similarity)), float(similarity.trace()))


def invert_permutation(permutation: Tensor) -> Tensor:
    """Return the inverse of a permutation [C]."""
    return torch.argsort(permutation)
