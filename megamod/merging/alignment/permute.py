"""Permutations and orthogonal maps applied to weights, and averages of aligned models.

Rows of the weights that produce features and columns of those that read them are reordered by
indexing, and multiplied by the same orthogonal matrices. So an aligned model computes the same
function, except with soft assignments (method "ot") or one permutation per norm (residual "sep").
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megamod.errors import UserError
from megamod.merging.alignment.folding import Folding, ReadTensor, find_folding
from megamod.merging.alignment.groups import PermutationGroup, TensorAxis
from megamod.merging.alignment.record import Alignment, Maps
from megamod.merging.alignment.symmetry import Symmetry

State = Mapping[str, Tensor]
"""Weights of a model by name."""

_SCALE = 2 / (2 + 1e-5)  # factor of the original program, see `CompatOptions.scale`


@dataclass(frozen=True)
class AxisChange:
    """New order of some entries of a tensor: entry i along `axis` is the former entry `index[i]`,
    both counted from `start`. With a matrix, entry i is the sum weighted by row i.

    Attributes:
        index: None: the order stays.
        blocks: [m, h, h], matrices that the entries are multiplied by after reordering, h at a
            time; None: no multiplication. They are orthogonal, so weights that read the entries are
            multiplied by the same.
    """

    axis: int
    start: int
    index: Tensor | None
    blocks: Tensor | None = None

    @property
    def is_soft(self) -> bool:
        """True if entries are mixed by a soft assignment."""
        return self.index is not None and self.index.dim() == 2


def compute_axis_changes(symmetry: Symmetry, alignment: Alignment) -> dict[str, list[AxisChange]]:
    """Compute the changes that make each tensor of a model one of the aligned model.

    Unchanged tensors have no entry; those of one tensor are in the order of the groups of
    `symmetry`.

    Raises:
        UserError: if the alignment does not fit the model.
    """
    all_changes: dict[str, list[AxisChange]] = {}
    effective = alignment.find_applied_permutations(symmetry)
    for name, index in effective.items():
        group, maps = symmetry.groups[name], alignment.find_maps(symmetry.groups[name])
        stays = torch.equal(index, torch.arange(len(index)))
        if stays and not maps:
            continue
        for axis in group.axes:
            change = make_axis_change(group, axis, None if stays else index, maps)
            all_changes.setdefault(axis.tensor, []).append(change)
    if alignment.options.compat.unmerge and "res.emb" in effective:
        index = effective["res.emb"]
        for alias in _list_tied_matrices(symmetry):
            all_changes[alias] = [AxisChange(1, 0, index[index])]
    return all_changes


def make_axis_change(
    group: PermutationGroup, axis: TensorAxis, permutation: Tensor | None, maps: Maps
) -> AxisChange:
    """Make the change of a group's entries along one tensor axis.

    Args:
        group: permutation group with the features.
        axis: one of the group's.
        permutation: [C] of the features, or a soft assignment [C, C]; None: they stay in order.
        maps: maps of the group by role; the change has blocks if one has the role of `axis`.
    """
    index = None if permutation is None else group.make_entry_index(axis, permutation)
    blocks = maps.get(axis.role)
    if blocks is not None:
        blocks = group.repeat_blocks_for_entries(axis, blocks)
    return AxisChange(axis.dim, axis.start, index, blocks)


def find_alignment_folding(symmetry: Symmetry, alignment: Alignment) -> Folding | None:
    """Find how norms are folded before the maps of an alignment are applied.

    None if it has no map of the residual stream, so that norms stay as they are. `symmetry`
    describes the model.

    Raises:
        UserError: as `find_folding`.
    """
    streams = (role for maps in alignment.maps.values() for role in maps if role == "stream")
    return find_folding(symmetry) if any(streams) else None


Span = tuple[int, int, int]
"""Axis of a tensor, first entry along it, and number of entries."""


def find_scaled_spans(symmetry: Symmetry, alignment: Alignment) -> dict[str, list[Span]]:
    """Find the spans (axis, first entry, count) that `CompatOptions.scale` multiplies, by tensor.

    They are those of the features of `symmetry` that the alignment permutes, the same in both
    models; without that option there are none.
    """
    spans: dict[str, list[Span]] = {}
    for name in (
        alignment.find_applied_permutations(symmetry) if alignment.options.compat.scale else ()
    ):
        group = symmetry.groups[name]
        for axis in group.producing_axes:
            span = (axis.dim, axis.start, group.count_entries(axis))
            spans.setdefault(axis.tensor, []).append(span)
    return spans


def scale_features(tensor: Tensor, spans: Sequence[Span], first: int = 0) -> Tensor:
    """Return a tensor with entries multiplied by the factor of `CompatOptions.scale`.

    It is a new tensor unless there is no span.

    Args:
        spans: spans of the whole tensor, see `find_scaled_spans`.
        first: number of the tensor's first row in the whole tensor.
    """
    tensor = tensor.clone() if spans else tensor
    for axis, start, length in spans:
        start = start - first if axis == 0 else start
        stop = min(start + length, tensor.shape[axis])
        if stop > max(start, 0):
            tensor.narrow(axis, max(start, 0), stop - max(start, 0)).mul_(_SCALE)
    return tensor


def find_untied_by_changes(
    symmetry: Symmetry, all_changes: Mapping[str, list[AxisChange]], folding: Folding | None
) -> dict[str, str]:
    """Find the tied tensors that a model with these changes must store separately.

    They are all tied tensors or none, as a configuration unties all of them or none: all if one is
    changed in another way than its original, or norms are folded, which makes an output matrix
    differ from the table (unless the gain is 1 and the bias 0).

    Args:
        symmetry: has the tied tensors of the model.
        all_changes: by tensor, of `compute_axis_changes`.
        folding: None: norms stay as they are.
    Returns:
        tied tensor -> original tensor.
    """
    if folding is not None:
        return dict(symmetry.tied)
    same = all(
        _have_equal_changes(all_changes.get(alias, []), all_changes.get(source, []))
        for alias, source in symmetry.tied.items()
    )
    return {} if same else dict(symmetry.tied)


def find_untied_by_alignment(symmetry: Symmetry, alignment: Alignment) -> dict[str, str]:
    """Find the tied tensors of a model that its alignment unties; see `find_untied_by_changes`.

    Raises:
        UserError: if the alignment does not fit the model, which `symmetry` describes.
    """
    folding = find_alignment_folding(symmetry, alignment)
    return find_untied_by_changes(symmetry, compute_axis_changes(symmetry, alignment), folding)


def untie_output_matrix(model: PreTrainedModel) -> None:
    """Untie a model's output matrix from its input embedding, in place; its configuration says so.

    The output matrix gets a copy of the values.
    """
    output = model.get_output_embeddings()
    output.weight = torch.nn.Parameter(output.weight.detach().clone())
    model.config.tie_word_embeddings = False


def _have_equal_changes(first: list[AxisChange], second: list[AxisChange]) -> bool:
    """Return True if the lists `first` and `second` hold the same changes in the same order."""
    return len(first) == len(second) and all(
        (a.axis, a.start) == (b.axis, b.start)
        and _are_equal_tensors(a.index, b.index)
        and _are_equal_tensors(a.blocks, b.blocks)
        for a, b in zip(first, second, strict=True)
    )


def _are_equal_tensors(first: Tensor | None, second: Tensor | None) -> bool:
    """Return True if `first` and `second` are tensors with the same elements, or both None."""
    return first is second or (
        first is not None and second is not None and torch.equal(first, second)
    )


def _list_tied_matrices(symmetry: Symmetry) -> set[str]:
    """List the names of tied tensors that belong to a permutation group."""
    axes = (axis for group in symmetry.groups.values() for axis in group.axes)
    return {axis.tensor for axis in axes} & symmetry.tied.keys()


def apply_changes(tensor: Tensor, tensor_changes: list[AxisChange]) -> Tensor:
    """Return a tensor with its changes applied: soft assignments, then orders, then blocks.

    It is the same tensor if `tensor_changes` is empty; the argument is not changed. Gradients reach
    the tensor and the blocks.
    """
    for change in tensor_changes:
        if change.is_soft:
            tensor = _apply_soft_assignment(tensor, change)
    hard = [c for c in tensor_changes if c.index is not None and not c.is_soft]
    for axis in dict.fromkeys(change.axis for change in hard):
        index = combine_axis_index(tensor.shape[axis], axis, hard)
        tensor = tensor.index_select(axis, index.to(tensor.device))
    for change in tensor_changes:
        if change.blocks is not None:
            tensor = _multiply_by_blocks(tensor, change)
    return tensor


def _multiply_by_blocks(tensor: Tensor, change: AxisChange) -> Tensor:
    """Return a tensor with entries along an axis multiplied by the matrices of a change.

    The dtype is that of the tensor. Entries of no matrix are unchanged; gradients reach tensor and
    matrices.
    """
    blocks = change.blocks.to(tensor)
    count, width, _ = blocks.shape
    moved = tensor.movedim(change.axis, 0)
    before, part, after = moved.tensor_split([change.start, change.start + count * width])
    mixed = torch.bmm(blocks, part.reshape(count, width, -1)).view(part.shape)
    return torch.cat([before, mixed, after]).movedim(0, change.axis)


def compute_aligned_tensor(
    name: str, read: ReadTensor, folding: Folding | None, tensor_changes: list[AxisChange]
) -> Tensor:
    """Compute a tensor of the aligned model, in the dtype of the tensor.

    With folding or maps it is computed in float64. Integers are returned as they are.

    Args:
        name: name of the tensor.
        read: returns a tensor by name, before folding and changes.
        folding: None: norms stay as they are.
        tensor_changes: changes of this tensor.
    """
    tensor = read(name)
    if not tensor.is_floating_point():
        return tensor
    if folding is None and all(change.blocks is None for change in tensor_changes):
        return apply_changes(tensor, tensor_changes)
    whole = tensor.double() if folding is None else folding.compute_folded_tensor(name, read)
    return apply_changes(whole, tensor_changes).to(tensor.dtype).contiguous()


def _apply_soft_assignment(tensor: Tensor, change: AxisChange) -> Tensor:
    """Return a tensor with entries along the axis of a change mixed by its matrix, in float64.

    Weights that produce features are multiplied by the matrix from the left, those that read them
    by its transpose from the right: both sums run over the former entries.
    """
    part = tensor.narrow(change.axis, change.start, change.index.shape[1])
    matrix = change.index.to(tensor.device, torch.float64)
    whole = tensor.clone()
    whole.narrow(change.axis, change.start, len(matrix)).copy_(
        torch.tensordot(matrix, part.double(), ([1], [change.axis])).movedim(0, change.axis)
    )
    return whole


def combine_axis_index(length: int, axis: int, tensor_changes: list[AxisChange]) -> Tensor:
    """Combine the orders of all changes along an axis into one index vector [length].

    Changes of other axes, and soft ones, are skipped; entries of no change stay.

    Args:
        length: entries along the axis.
        tensor_changes: changes of the tensor, see `AxisChange`.
    """
    index = torch.arange(length)
    for change in tensor_changes:
        if change.axis == axis and change.index is not None and not change.is_soft:
            index[change.start : change.start + len(change.index)] = change.start + change.index
    return index


def permute_state(state: State, symmetry: Symmetry, alignment: Alignment) -> dict[str, Tensor]:
    """Compute the weights of the aligned model in the order of the reference.

    Tied matrices are added if the alignment unties them; the model must then be loaded with
    `tie_word_embeddings` off.

    Args:
        state: weights of the model that `alignment` aligns; tensors without changes are in the
            result as they are.
        symmetry: permutation groups of the model.
    Raises:
        UserError: if the alignment does not fit the model.
    """
    all_changes = compute_axis_changes(symmetry, alignment)
    return _compute_transformed_state(state, symmetry, alignment, all_changes, all_changes)


def compute_reference_state(
    state: State, symmetry: Symmetry, alignment: Alignment
) -> dict[str, Tensor]:
    """Compute the reference's weights, ready to be averaged with the result of `permute_state`.

    They have the same names and, if the alignment folds norms, folded norms; nothing is permuted.

    Args:
        state: weights of the reference; not changed.
        symmetry: permutation groups of either model.
    Raises:
        UserError: if the alignment does not fit the model.
    """
    all_changes = compute_axis_changes(symmetry, alignment)
    return _compute_transformed_state(state, symmetry, alignment, all_changes, {})


def apply_alignment(
    model: PreTrainedModel, symmetry: Symmetry, alignment: Alignment, *, reference: bool = False
) -> None:
    """Overwrite the weights of a model in memory by those of the aligned model.

    These are the result of `permute_state`, or with `reference` of `compute_reference_state`.
    An output matrix that the alignment unties becomes one of its own.

    Args:
        model: model that `alignment` aligns; its weights are overwritten.
        symmetry: permutation groups of the model.
        reference: the model is the reference.
    Raises:
        UserError: if the alignment does not fit the model.
    """
    transform = compute_reference_state if reference else permute_state
    state = transform(model.state_dict(), symmetry, alignment)
    if find_untied_by_alignment(symmetry, alignment):
        untie_output_matrix(model)
    model.load_state_dict(state)


def interpolate_states(first: State, second: State, weight: float = 0.5) -> dict[str, Tensor]:
    """Compute weight * first + (1 - weight) * second by name; integers must be equal.

    Args:
        first, second: weights of two models; `second` has all names of `first`.
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
    """Compute the mean of the reference and the aligned model, by name.

    Args:
        first: weights of the reference; `second`: weights of the model that `alignment` aligns.
        symmetry: permutation groups of both models.
    Raises:
        UserError: if the alignment does not fit, or integers differ.
    """
    return interpolate_states(
        compute_reference_state(first, symmetry, alignment),
        permute_state(second, symmetry, alignment),
    )


def merge_keeping_heads(
    first: State, second: State, symmetry: Symmetry, alignment: Alignment
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return two merged models: the mean of all weights, except that each keeps its output heads.

    A head is everything after the last hidden states: transform, norm, output matrix and biases;
    pooler and classifier. An output matrix that was tied gets storage of its own in both.

    Args:
        first, second, symmetry, alignment: see `merge_states`.
    Returns:
        weights with the heads of `first`, and with those of `second`.
    Raises:
        UserError: as `merge_states`.
    """
    pair = (
        compute_reference_state(first, symmetry, alignment),
        permute_state(second, symmetry, alignment),
    )
    for state in pair:
        for alias, source in symmetry.tied.items():
            state.setdefault(alias, state[source])
    mean = interpolate_states(*pair)
    head_prefixes = tuple(prefix for head in symmetry.output_heads for prefix in head.whole)
    head_prefixes += tuple(symmetry.tied)
    return tuple(
        mean | {name: tensor for name, tensor in state.items() if name.startswith(head_prefixes)}
        for state in pair
    )


def _compute_transformed_state(
    state: State,
    symmetry: Symmetry,
    alignment: Alignment,
    all_changes: Mapping[str, list[AxisChange]],
    applied: Mapping[str, list[AxisChange]],
) -> dict[str, Tensor]:
    """Apply `CompatOptions.scale`, add untied matrices and fold norms, then permute and map.

    Args:
        state: weights by name.
        symmetry, alignment: permutation groups of the model, and its alignment.
        all_changes: changes of the aligned model; they decide if matrices are untied.
        applied: the changes to apply, by tensor; none for the reference.
    """
    prepared = dict(state)
    for name, spans in find_scaled_spans(symmetry, alignment).items():
        prepared[name] = scale_features(prepared[name], spans)
    folding = find_alignment_folding(symmetry, alignment)
    needed = find_untied_by_changes(symmetry, all_changes, folding)
    for alias, source in symmetry.tied.items():
        if alias in prepared or alias in needed:
            prepared[alias] = prepared[source]
    return {
        name: compute_aligned_tensor(name, prepared.__getitem__, folding, applied.get(name, []))
        for name in prepared
    }
