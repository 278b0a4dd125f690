"""Permutations carried out on weights, and merging what was aligned.

A permuted model computes what it computed before. Rows of what makes features are reordered, and
columns of what reads them, by plain indexing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megamod.errors import UserError
from megamod.merging.alignment.record import Alignment
from megamod.merging.alignment.symmetry import Symmetry

State = Mapping[str, Tensor]
"""A model's weights by name."""

_SCALE = 2 / (2 + 1e-5)  # what the original program multiplies by, see `Compat.scale`


@dataclass(frozen=True)
class Change:
    """What becomes of part of a tensor: entry i along `axis` is what was entry `index[i]`, both
    counted from `start`. With a matrix it is the sum of entries times its row i."""

    axis: int
    start: int
    index: Tensor

    @property
    def soft(self) -> bool:
        """Whether entries are mixed."""
        return self.index.dim() == 2


def changes(symmetry: Symmetry, alignment: Alignment) -> dict[str, list[Change]]:
    """What becomes of each tensor of the aligned model; what stays as it is has no entry.

    Raises:
        UserError: if the alignment is not one of such a model.
    """
    found: dict[str, list[Change]] = {}
    effective = alignment.in_effect(symmetry)
    for name, index in effective.items():
        if torch.equal(index, torch.arange(len(index))):
            continue
        group = symmetry.groups[name]
        for slot in group.slots:
            change = Change(slot.axis, slot.start, group.index(slot, index))
            found.setdefault(slot.tensor, []).append(change)
    if alignment.options.compat.unmerge and "res.emb" in effective:
        index = effective["res.emb"]
        for alias in _tied_matrices(symmetry):
            found[alias] = [Change(1, 0, index[index])]
    return found


Span = tuple[int, int, int]
"""Axis of a tensor, first entry along it, and number of entries."""


def scaled_features(symmetry: Symmetry, alignment: Alignment) -> dict[str, list[Span]]:
    """Entries of tensors that `Compat.scale` multiplies, in both models; empty without it."""
    found: dict[str, list[Span]] = {}
    for name in alignment.in_effect(symmetry) if alignment.options.compat.scale else ():
        group = symmetry.groups[name]
        for slot in group.out:
            span = (slot.axis, slot.start, group.length(slot))
            found.setdefault(slot.tensor, []).append(span)
    return found


def scale_features(tensor: Tensor, spans: Sequence[Span], first: int = 0) -> Tensor:
    """Multiply entries by the factor of `Compat.scale`; a new tensor unless there is no span.

    Args:
        first: number of the tensor's first row in the whole tensor.
    """
    tensor = tensor.clone() if spans else tensor
    for axis, start, length in spans:
        start = start - first if axis == 0 else start
        stop = min(start + length, tensor.shape[axis])
        if stop > max(start, 0):
            tensor.narrow(axis, max(start, 0), stop - max(start, 0)).mul_(_SCALE)
    return tensor


def untied(symmetry: Symmetry, found: Mapping[str, list[Change]]) -> dict[str, str]:
    """Tied tensors, if they need storage of their own when aligned -> what they were tied to."""

    # A configuration unties all of them or none.
    same = all(
        _equal(found.get(alias, []), found.get(source, []))
        for alias, source in symmetry.tied.items()
    )
    return {} if same else dict(symmetry.tied)


def _equal(first: list[Change], second: list[Change]) -> bool:
    return len(first) == len(second) and all(
        (one.axis, one.start) == (other.axis, other.start) and torch.equal(one.index, other.index)
        for one, other in zip(first, second, strict=True)
    )


def _tied_matrices(symmetry: Symmetry) -> set[str]:
    slots = (slot for group in symmetry.groups.values() for slot in group.slots)
    return {slot.tensor for slot in slots} & symmetry.tied.keys()


def reorder(tensor: Tensor, wanted: list[Change]) -> Tensor:
    """The tensor with its changes made; a new one unless there is none."""
    for change in wanted:
        if change.soft:
            tensor = _mixed(tensor, change)
    for axis in dict.fromkeys(change.axis for change in wanted if not change.soft):
        index = axis_index(tensor.shape[axis], axis, wanted)
        tensor = tensor.index_select(axis, index.to(tensor.device))
    return tensor


def _mixed(tensor: Tensor, change: Change) -> Tensor:
    """The tensor with entries along an axis mixed, in float64.

    What makes features is multiplied by the matrix, and what reads them by its transpose from the
    right: both sums run over the entries that there were.
    """
    part = tensor.narrow(change.axis, change.start, change.index.shape[1])
    matrix = change.index.to(tensor.device, torch.float64)
    whole = tensor.clone()
    whole.narrow(change.axis, change.start, len(matrix)).copy_(
        torch.tensordot(matrix, part.double(), ([1], [change.axis])).movedim(0, change.axis)
    )
    return whole


def axis_index(length: int, axis: int, wanted: list[Change]) -> Tensor:
    """All changes along an axis as one index vector [length]."""
    index = torch.arange(length)
    for change in wanted:
        if change.axis == axis and not change.soft:
            index[change.start : change.start + len(change.index)] = change.start + change.index
    return index


def permuted(state: State, symmetry: Symmetry, alignment: Alignment) -> dict[str, Tensor]:
    """The aligned model's weights in the order of the reference.

    Tied matrices that the state lacks appear where their permutation is not that of what they are
    tied to; the model must then be loaded with `tie_word_embeddings` off.
    """
    found = changes(symmetry, alignment)
    whole = _prepared(state, symmetry, alignment, found)
    return {name: reorder(tensor, found.get(name, [])) for name, tensor in whole.items()}


def reference(state: State, symmetry: Symmetry, alignment: Alignment) -> dict[str, Tensor]:
    """The reference's weights under the same names as those of `permuted`."""
    return _prepared(state, symmetry, alignment, changes(symmetry, alignment))


def interpolate(first: State, second: State, weight: float = 0.5) -> dict[str, Tensor]:
    """weight * first + (1 - weight) * second; integers are those of both.

    Raises:
        UserError: naming a tensor of integers that differ, as those of quantised models do.
    """
    for name, tensor in first.items():
        if not tensor.is_floating_point() and not torch.equal(tensor, second[name]):
            raise UserError(
                f"{name} holds integers that differ between the models, which have no mean; load "
                "models that are not quantised"
            )
    return {
        name: torch.lerp(second[name], tensor, weight) if tensor.is_floating_point() else tensor
        for name, tensor in first.items()
    }


def merge_states(
    first: State, second: State, symmetry: Symmetry, alignment: Alignment
) -> dict[str, Tensor]:
    """The mean of the reference and the aligned model."""
    return interpolate(reference(first, symmetry, alignment), permuted(second, symmetry, alignment))


def merge_keeping_heads(
    first: State, second: State, symmetry: Symmetry, alignment: Alignment
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two merged models: the mean of everything but the output heads, of which each keeps its own.

    A head is all from the last hidden states on: transform, norm, output matrix and biases; pooler
    and classifier. An output matrix that was tied has storage of its own in both.
    """
    pair = (reference(first, symmetry, alignment), permuted(second, symmetry, alignment))
    for state in pair:
        for alias, source in symmetry.tied.items():
            state.setdefault(alias, state[source])
    mean = interpolate(*pair)
    kept = tuple(prefix for head in symmetry.output_heads for prefix in head.whole)
    kept += tuple(symmetry.tied)
    return tuple(
        mean | {name: tensor for name, tensor in state.items() if name.startswith(kept)}
        for state in pair
    )


def _prepared(
    state: State, symmetry: Symmetry, alignment: Alignment, found: Mapping[str, list[Change]]
) -> dict[str, Tensor]:
    """The state before anything moves: scaled if asked for, with every matrix that is needed."""
    prepared = dict(state)
    for name, spans in scaled_features(symmetry, alignment).items():
        prepared[name] = scale_features(prepared[name], spans)
    needed = untied(symmetry, found)
    for alias, source in symmetry.tied.items():
        if alias in prepared or alias in needed:
            prepared[alias] = prepared[source]
    return prepared
