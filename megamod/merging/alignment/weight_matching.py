"""Permutations from weights alone: those that bring the weights of two models closest.

Coordinate descent over groups: with the others fixed, the best permutation of a group is a linear
assignment.
Source: Ainsworth et al. 2023 (Git Re-Basin), algorithm 1, with heads matched as blocks.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megamod.merging.alignment.groups import Group, Slot
from megamod.merging.alignment.matching import Match, assign, assign_heads, solver_of
from megamod.merging.alignment.options import Options

_IMPROVES = 1e-12  # smallest relative improvement that is not rounding
_ROUNDS = 100


def match_weights(
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    units: Sequence[Sequence[Sequence[Group]]],
    options: Options,
) -> dict[str, Match]:
    """Find the permutations of the groups of the second model.

    Args:
        first, second: weights by name.
        units: sets of classes of groups that are solved together. Groups of a class share one
            permutation; classes of a unit share the order of their heads.
    Returns:
        a match for each group; its value is the inner product of its weights with those of the
        first model.
    """
    classes = [groups for unit in units for groups in unit]
    solution = {
        group.name: Match(torch.arange(group.size), -torch.inf)
        for groups in classes
        for group in groups
    }
    owners: dict[str, list[tuple[Slot, Group]]] = {}
    for groups in classes:
        for group in groups:
            for slot in group.slots:
                owners.setdefault(slot.tensor, []).append((slot, group))
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(_ROUNDS):
        improved = False
        for number in torch.randperm(len(units), generator=generator).tolist():
            unit = units[number]
            similarities = [_similarity(first, second, groups, owners, solution) for groups in unit]
            matches = _solve(similarities, unit, options)
            before = sum(
                float(m.gather_batch(1, solution[groups[0].name].permutation[:, None]).sum())
                for m, groups in zip(similarities, unit, strict=True)
            )
            after = sum(match.value for match in matches)
            better = after - before > _IMPROVES * max(1.0, abs(before))
            improved |= better
            for match, groups in zip(matches, unit, strict=True):
                for group in groups:
                    if better or solution[group.name].value == -torch.inf:
                        solution[group.name] = match
        if not improved:
            break
    return solution


def _solve(
    similarities: Sequence[Tensor], unit: Sequence[Sequence[Group]], options: Options
) -> list[Match]:
    heads = unit[0][0].heads
    if heads is None:
        return [assign(similarity) for similarity in similarities]
    inner = solver_of(unit[0][0].queries, options.attention)
    return assign_heads(similarities, heads, options.attention, solve=inner)


def _similarity(
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    groups: Sequence[Group],
    owners: Mapping[str, Sequence[tuple[Slot, Group]]],
    solution: Mapping[str, Match],
) -> Tensor:
    """[C, C] float64: contribution of each pair of features to the inner product of the weights."""
    size = groups[0].size
    total = torch.zeros(size, size, dtype=torch.float64)
    for slot in dict.fromkeys(slot for group in groups for slot in group.slots):
        if slot.tensor not in first or slot.tensor not in second:
            continue  # a tied matrix that is stored once is counted once
        other, length = second[slot.tensor].float(), groups[0].length(slot)
        for theirs, owner in owners[slot.tensor]:
            if theirs.axis != slot.axis:
                index = torch.arange(other.shape[theirs.axis])
                moved = owner.index(theirs, solution[owner.name].permutation)
                index[theirs.start : theirs.start + len(moved)] = theirs.start + moved
                other = other.index_select(theirs.axis, index)
        rows, other_rows = (
            tensor.narrow(slot.axis, slot.start, length).movedim(slot.axis, 0).reshape(length, -1)
            for tensor in (first[slot.tensor].float(), other)
        )
        total += groups[0].spread(slot, rows @ other_rows.T)
    return total
