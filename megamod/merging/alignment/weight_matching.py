"""Permutations from weights alone: those that bring the weights of two models closest.

Coordinate descent over groups: with the others fixed, the best permutation of a group is a linear
assignment.
Source: Ainsworth et al. 2023 (Git Re-Basin), algorithm 1, with heads matched as blocks.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megamod.merging.alignment.groups import PermutationGroup, TensorAxis
from megamod.merging.alignment.matching import (
    FeatureMatch,
    assign_features,
    assign_heads,
    select_solver,
)
from megamod.merging.alignment.options import AlignmentOptions

_IMPROVES = 1e-12  # smallest relative improvement that is not rounding
_ROUNDS = 100  # at most; a round without an improvement is the last one


def match_weights(
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    units: Sequence[Sequence[Sequence[PermutationGroup]]],
    options: AlignmentOptions,
) -> dict[str, FeatureMatch]:
    """Find permutations of the second model's features by coordinate descent on the weights.

    Units are solved in random order, round by round, until none improves.

    Args:
        first, second: weights by name, on the CPU; a tied matrix counts if both have it.
        units: sets of classes of groups that are solved together. Groups of a class share one
            permutation; classes of a unit share the order of their heads.
        options: `attention` and `seed` count.
    Returns:
        a match for each group; its value is the inner product of its weights with those of the
        first model.
    """
    classes = [groups for unit in units for groups in unit]
    solution = {
        group.name: FeatureMatch(torch.arange(group.size), -torch.inf)
        for groups in classes
        for group in groups
    }
    groups_by_tensor: dict[str, list[tuple[TensorAxis, PermutationGroup]]] = {}
    for groups in classes:
        for group in groups:
            for axis in group.axes:
                groups_by_tensor.setdefault(axis.tensor, []).append((axis, group))
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(_ROUNDS):
        improved = False
        for number in torch.randperm(len(units), generator=generator).tolist():
            unit = units[number]
            similarities = [
                _compute_weight_similarity(first, second, groups, groups_by_tensor, solution)
                for groups in unit
            ]
            matches = _solve_unit(similarities, unit, options)
            previous_value = sum(
                float(m.gather(1, solution[groups[0].name].permutation[:, None]).sum())
                for m, groups in zip(similarities, unit, strict=True)
            )
            new_value = sum(match.value for match in matches)
            is_better = new_value - previous_value > _IMPROVES * max(1.0, abs(previous_value))
            improved |= is_better
            for match, groups in zip(matches, unit, strict=True):
                for group in groups:
                    if is_better or solution[group.name].value == -torch.inf:
                        solution[group.name] = match
        if not improved:
            break
    return solution


def _solve_unit(
    similarities: Sequence[Tensor],
    unit: Sequence[Sequence[PermutationGroup]],
    options: AlignmentOptions,
) -> list[FeatureMatch]:
    """Find the best match of each class of a unit.

    Args:
        similarities: [C, C] of each class, in the order of the unit.
        options: decide the solver for heads.
    """
    heads = unit[0][0].heads
    if heads is None:
        return [assign_features(similarity) for similarity in similarities]
    inner = select_solver(unit[0][0].queries_per_key, options.attention)
    return assign_heads(similarities, heads, options.attention, solve=inner)


def _compute_weight_similarity(
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    groups: Sequence[PermutationGroup],
    groups_by_tensor: Mapping[str, Sequence[tuple[TensorAxis, PermutationGroup]]],
    solution: Mapping[str, FeatureMatch],
) -> Tensor:
    """Compute the contribution of each pair of features to the inner product of the weights.

    Args:
        groups: a class, whose groups share one permutation.
        groups_by_tensor: axes of each tensor with their groups.
        solution: matches of all groups; the second model is permuted by those of the others.
    Returns:
        [C, C] float64; rows are features of the first model.
    """
    size = groups[0].size
    total = torch.zeros(size, size, dtype=torch.float64)
    for axis in dict.fromkeys(axis for group in groups for axis in group.axes):
        if axis.tensor not in first or axis.tensor not in second:
            continue  # a tied matrix that is stored once is counted once
        other, length = second[axis.tensor].float(), groups[0].count_entries(axis)
        for other_axis, other_group in groups_by_tensor[axis.tensor]:
            if other_axis.dim != axis.dim:
                index = torch.arange(other.shape[other_axis.dim])
                moved = other_group.make_entry_index(
                    other_axis, solution[other_group.name].permutation
                )
                index[other_axis.start : other_axis.start + len(moved)] = other_axis.start + moved
                other = other.index_select(other_axis.dim, index)
        rows, other_rows = (
            tensor.narrow(axis.dim, axis.start, length).movedim(axis.dim, 0).reshape(length, -1)
            for tensor in (first[axis.tensor].float(), other)
        )
        total += groups[0].expand_products_to_features(axis, rows @ other_rows.T)
    return total
