"""Assigning the features of one model to those of another so that the summed similarity is largest.

Permutations are index vectors `col`: feature r of the reference goes with feature `col[r]` of the
other model. Soft ones are matrices, whose row r says how much of each feature goes with r.
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
"""Heads are matched and then features within; heads stay in order; features of all heads mix (which
changes what the model computes)."""

_TOLERANCE = 1e-5
_ROUNDS = 20_000


@dataclass(frozen=True)
class Match:
    """A permutation.

    Attributes:
        permutation: [C] int64; if it is soft [C, C] float64 of rows that sum to 1.
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


def transport(similarity: Tensor, regularisation: float) -> Match:
    """The soft assignment of the least cost 1 - similarity less `regularisation` times its entropy.

    Sums of all rows and columns are 1, to within `_TOLERANCE`, before rows are divided by theirs.
    It is found by Sinkhorn's algorithm, on logarithms and in float64. The smaller the
    regularisation, the nearer it is to `assign`, and the longer it takes.

    Args:
        similarity: [C, C].
        regularisation: positive, in units of the similarity.
    Raises:
        UserError: if sums are not that near to 1 after `_ROUNDS` rounds.
    Source: Cuturi 2013 (Sinkhorn distances), algorithm 1; Imfeld et al. 2023 (Transformer fusion
        with optimal transport), section 4, for what it is used for.
    """
    logits = (similarity.double() - 1) / regularisation
    columns = logits.new_zeros(len(logits))
    for _ in range(_ROUNDS):
        rows = -(logits + columns).logsumexp(1)
        before, columns = columns, -(logits + rows[:, None]).logsumexp(0)
        # Columns sum to 1 now; rows are off by what that changed.
        off = float((columns - before).abs().max())
        if off <= _TOLERANCE:
            break
    else:
        raise UserError(
            f"align.regularisation: with {regularisation:g} sums are still off by {off:.2g} after "
            f"{_ROUNDS} rounds; give a larger one"
        )
    plan = (logits + rows[:, None] + columns).softmax(1)
    return Match(plan, float((plan * similarity).sum()))


Solver = Callable[[Tensor], Match]


def assign_heads(
    similarities: Sequence[Tensor],
    heads: int,
    mode: str,
    order: Tensor | None = None,
    solve: Solver = assign,
) -> list[Match]:
    """The best permutations of features within heads, for matrices that share the order of heads.

    Args:
        similarities: [C, C] each; more than one where groups have their own features but the same
            heads.
        heads: number of heads; head j has features j * C / heads and following.
        mode: one of `ATTENTION`.
        order: [H], a given order of heads, with `head_perm`; None to find the best.
        solve: what finds the permutation within a pair of heads.
    Returns:
        one match per matrix.
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
        {(j, k): solve(_block(similarity, j, k, size)) for j, k in pairs}
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


def transport_heads(
    similarity: Tensor,
    heads: int,
    mode: str,
    regularisation: float,
    order: Tensor | None = None,
) -> Match:
    """Soft assignments of features within heads; whole heads are matched by `assign_heads`.

    Args:
        similarity, heads, mode, order: as there; regularisation: as of `transport`.
    Raises:
        UserError: as `transport`.
    """
    if mode == "ignore_heads":
        return transport(similarity, regularisation)
    (hard,) = assign_heads([similarity], heads, mode, order)
    size, value = len(similarity) // heads, 0.0
    whole = torch.zeros(len(similarity), len(similarity), dtype=torch.float64)
    for j, k in enumerate(hard.heads.tolist()):
        soft = transport(_block(similarity, j, k, size), regularisation)
        _block(whole, j, k, size).copy_(soft.permutation)
        value += soft.value
    return Match(whole, value, hard.heads)


def assign_queries(similarity: Tensor, queries: int, mode: str) -> Match:
    """The best permutation where several heads of queries share one of keys and values.

    They may change places, and have one permutation of their features, which are those of the
    values. Each of both is best for the other; they are improved in turn.

    Args:
        similarity: [C, C] of one head of keys with one of the other model, head by head.
        queries: how many heads it has.
        mode: with "monotonic" they stay in order.
    """
    size = len(similarity) // queries
    blocks = similarity.reshape(queries, size, queries, size).transpose(1, 2)
    order = torch.arange(queries)
    if mode != "monotonic":
        best = [[assign(block).value for block in row] for row in blocks]
        order = assign(torch.tensor(best, dtype=torch.float64)).permutation
    places, value = torch.arange(queries), -float("inf")
    while True:
        within = assign(blocks[places, order].sum(0))
        if not within.value > value:
            break
        value, inner, found = within.value, within.permutation, order
        if mode != "monotonic":
            whole = blocks[:, :, torch.arange(size), inner].sum(-1)
            order = assign(whole).permutation
    return Match((found[:, None] * size + inner).flatten(), value, found)


def solver_of(queries: int, mode: str) -> Solver:
    """What finds the permutation within a pair of heads of keys."""
    return assign if queries == 1 else partial(assign_queries, queries=queries, mode=mode)


def _block(similarity: Tensor, j: int, k: int, size: int) -> Tensor:
    return similarity[j * size : (j + 1) * size, k * size : (k + 1) * size]


def identity(similarity: Tensor) -> Match:
    """Everything stays where it is."""
    return Match(torch.arange(len(similarity)), float(similarity.trace()))


def inverse(permutation: Tensor) -> Tensor:
    """The permutation that undoes one."""
    return torch.argsort(permutation)
