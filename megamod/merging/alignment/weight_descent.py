"""Orthogonal maps and permutations from the weights of two models, starting from any others.

Coordinate descent: with all other groups fixed, the best map of a group is that of the products of
the weights that the group touches. A step is taken only if it raises the inner product of the
weights of the two models, so the sum never falls.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from megamod.merging.alignment.folding import ReadTensor
from megamod.merging.alignment.groups import PermutationGroup, TensorAxis
from megamod.merging.alignment.matching import assign_features
from megamod.merging.alignment.orthogonal import (
    GroupMatch,
    match_heads,
    match_signed_features,
    solve_stream_map,
    split_head_products,
)
from megamod.merging.alignment.permute import AxisChange, apply_changes, make_axis_change

_ENOUGH = 1e-9  # relative gain of a round after which the descent ends
_IMPROVES = 1e-12  # smallest relative gain of a step that is not rounding

Products = dict[tuple[str, int], tuple[TensorAxis, Tensor]]
"""Sums of products of weights by role and number of entries, with an axis of such entries."""


class WeightDescent:
    """Descent over the groups of two models.

    Args:
        first, second: read tensors of the models in float64, norms folded if `folded`.
        units: groups that share a map or a permutation; a group of heads is alone.
        counted: returns True for the names of tensors that count; tied matrices may count once.
        folded: the norms of the models are folded, so they have no weights left to compare.
        keeps_ones: maps of the stream keep the vector of ones.
        kind: kind of maps of queries and keys, see `solve_head_maps`.
        mode: matching mode of heads, see `match_heads`.
    """

    def __init__(
        self,
        first: ReadTensor,
        second: ReadTensor,
        units: Sequence[Sequence[PermutationGroup]],
        counted: Callable[[str], bool],
        *,
        folded: bool,
        keeps_ones: bool,
        kind: str,
        mode: str,
    ):
        self._first, self._second, self._units = first, second, units
        self._folded, self._keeps_ones, self._kind, self._mode = folded, keeps_ones, kind, mode
        self._table_products: dict[TensorAxis, Tensor] = {}
        self._groups_by_tensor: dict[str, list[tuple[TensorAxis, PermutationGroup]]] = {}
        for group in (group for unit in units for group in unit):
            for axis in group.axes:
                if counted(axis.tensor) and not (folded and axis.role in ("gain", "shift")):
                    self._groups_by_tensor.setdefault(axis.tensor, []).append((axis, group))

    def descend_on_weights(
        self, start: Mapping[str, GroupMatch], rounds: int
    ) -> dict[str, GroupMatch]:
        """Improve the matches of all units round by round, until a round gains next to nothing.

        Args:
            start: match of each group by name; not changed.
            rounds: at most; a round solves every unit once.
        Returns:
            match of each group by name; the inner product of the weights is at least that with
            `start`.
        """
        solution = dict(start)
        for _ in range(rounds):
            gained, size = 0.0, 0.0
            for unit in self._units:
                products = self._compute_products(unit, solution)
                before = _compute_inner_product(unit[0], products, solution[unit[0].name])
                match = self._solve_unit(unit[0], products)
                after = _compute_inner_product(unit[0], products, match)
                size += abs(after)
                if after - before > _IMPROVES * max(1.0, abs(before)):
                    gained += after - before
                    solution |= dict.fromkeys((group.name for group in unit), match)
            if gained <= _ENOUGH * size:
                break
        return solution

    def _compute_products(
        self, unit: Sequence[PermutationGroup], solution: Mapping[str, GroupMatch]
    ) -> Products:
        """Compute the inner products of a unit's features in the weights of both models.

        The second model's are mapped by the matches of all other groups in `solution`, so the
        products tell the best match of this unit.
        """
        result: Products = {}
        for axis in dict.fromkeys(axis for group in unit for axis in group.axes):
            entries = self._groups_by_tensor.get(axis.tensor, [])
            if not any(axis == other for other, _ in entries):
                continue
            changes = [
                make_axis_change(group, other, match.permutation, match.maps)
                for other, group in entries
                if other.dim != axis.dim
                for match in [solution[group.name]]
            ]
            summed = self._compute_axis_products(unit[0], axis, changes)
            role = axis.role if axis.role in ("qk", "values", "sign") else ""
            known = result.get((role, len(summed)))
            result[role, len(summed)] = axis, summed if known is None else known[1] + summed
        return result

    def _compute_axis_products(
        self, group: PermutationGroup, axis: TensorAxis, changes: list[AxisChange]
    ) -> Tensor:
        """Compute the inner products [n, n] of a tensor's n entries along one axis in both models.

        Those of tables and output matrices, which no other group changes, are cached: they are the
        largest tensors.

        Args:
            group: any one of those that share the axis.
            changes: of the other axes of the tensor, made in the second model before.
        """
        if axis in self._table_products:
            return self._table_products[axis]
        length = group.count_entries(axis)
        rows, others = (
            tensor.narrow(axis.dim, axis.start, length).movedim(axis.dim, 0).reshape(length, -1)
            for tensor in (
                self._first(axis.tensor),
                apply_changes(self._second(axis.tensor), changes),
            )
        )
        summed = rows @ others.T
        if group.family == "res" and not changes and rows.shape[1] > 1:
            self._table_products[axis] = summed
        return summed

    def _solve_unit(self, group: PermutationGroup, products: Products) -> GroupMatch:
        """Find the match of largest inner product for a unit, from its products.

        Args:
            group: any one of the unit; its kind decides between map, permutation and signs.
        """
        by_part = {key: total for key, (_, total) in products.items()}
        if group.family == "attn":
            few = group.size // group.queries_per_key
            parts = [
                split_head_products(
                    group,
                    by_part[role, group.size],
                    by_part.get((role, few)) if few != group.size else None,
                )
                for role in ("qk", "values")
            ]
            return match_heads(group, *parts, self._kind, self._mode)
        plain = by_part.get(("", group.size))
        signed = by_part.get(("sign", group.size))
        if group.family == "res" and self._folded:
            matrix, value = solve_stream_map(plain, self._keeps_ones)
            return GroupMatch(None, {"stream": matrix[None]}, value)
        if signed is None:
            match = assign_features(plain)
            return GroupMatch(match.permutation, {}, match.value)
        return match_signed_features(signed, plain)


def _compute_inner_product(group: PermutationGroup, products: Products, match: GroupMatch) -> float:
    """Compute the inner product of both models' weights of a unit under a match.

    Args:
        group: one of the unit.
        products: products of the unit, see `WeightDescent._compute_products`.
    """
    total = 0.0
    for axis, summed in products.values():
        change = make_axis_change(group, axis, match.permutation, match.maps)
        moved = summed if change.index is None else summed[:, change.index]
        if change.blocks is None:
            total += float(moved.trace())
            continue
        count, width, _ = change.blocks.shape
        by_block = moved.view(count, width, count, width)
        total += float(by_block.diagonal(dim1=0, dim2=2).permute(2, 0, 1).mul(change.blocks).sum())
    return total


def make_identity_group_match(group: PermutationGroup) -> GroupMatch:
    """Make the match of a group that changes nothing.

    For the residual stream its permutation is None, which also keeps the order: the stream may get
    an orthogonal map instead of a permutation.
    """
    return GroupMatch(None if group.family == "res" else torch.arange(group.size))
