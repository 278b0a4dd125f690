"""Views of model folders in aligned order, so that any merge method can merge them.

Nothing is written: rows are read in their new order, and the columns of a piece are reordered after
it is read. With soft assignments and orthogonal maps each thread holds one whole tensor.
"""

import threading

import torch
from torch import Tensor

from megamod.merging.alignment.permute import (
    AxisChange,
    apply_changes,
    combine_axis_index,
    compute_aligned_tensor,
    compute_axis_changes,
    find_alignment_folding,
    find_scaled_spans,
    find_untied_by_changes,
    scale_features,
)
from megamod.merging.alignment.record import Alignment
from megamod.merging.alignment.symmetry import Symmetry, find_symmetry
from megamod.merging.tensors import TensorSource, TensorView
from megamod.states.forest import read_model_config
from megamod.states.rows import read_tensor_rows
from megamod.states.stream import PIECE


class PermutedFolder(TensorView):
    """A source with its features in the order of the reference.

    If the alignment unties output matrices, they become separate tensors, which the reference and
    the merged model need too.

    Args:
        source: the folder.
        alignment: alignment of its model to the reference.
        reference: this is the reference: permute nothing, only fold norms, scale features
            (`CompatOptions.scale`) and add those matrices.
    Attributes:
        tensors: specification of every tensor.
        config: configuration of a model with these weights.
        alignment, reference: the arguments.
    Raises:
        UserError: if the alignment does not fit the model.
    """

    def __init__(self, source: TensorSource, alignment: Alignment, reference: bool = False):
        super().__init__(source)
        self.alignment, self.reference = alignment, reference
        symmetry = find_folder_symmetry(source, qk=alignment.options.qk)
        all_changes = compute_axis_changes(symmetry, alignment)
        self._folding = find_alignment_folding(symmetry, alignment)
        self._stored = find_untied_by_changes(symmetry, all_changes, self._folding)
        self._changes: dict[str, list[AxisChange]] = {} if reference else all_changes
        self._scaled, self._tied = find_scaled_spans(symmetry, alignment), symmetry.tied
        self._cached = threading.local()
        for alias, original in self._stored.items():
            self.tensors.setdefault(alias, source.tensors[original])
        self.config = read_model_config(source.folder)
        if self._stored:
            self.config |= {"tie_word_embeddings": False}

    def _read_stored_tensor(self, name: str) -> Tensor:
        """Read a whole tensor of the source, before any change; a tied matrix under either name."""
        return self.source.read(name if name in self.source.tensors else self._stored[name])

    def read_into(self, name: str, start: int, buffer: Tensor) -> None:
        """Fill a buffer (1-D, of the tensor's dtype) with elements of the aligned tensor `name`.

        `start` is the flat index of the first.
        """
        tensor_changes = self._changes.get(name, [])
        scaled = self._scaled.get(self._tied.get(name, name), [])
        original = name if name in self.source.tensors else self._stored[name]
        mixed = self._folding is not None or any(
            change.is_soft or change.blocks is not None for change in tensor_changes
        )
        mixed = mixed and self.tensors[name].dtype.is_floating_point
        if not tensor_changes and not scaled and not mixed:
            self.source.read_into(original, start, buffer)
            return
        spec = self.tensors[name]
        if spec.nbytes <= PIECE or mixed:
            if mixed:
                whole = self._compute_aligned_tensor(name)
            else:
                whole = apply_changes(self.source.read(original), tensor_changes)
            whole = scale_features(whole, scaled)
            buffer.copy_(whole.reshape(-1)[start : start + len(buffer)])
            return
        row = spec.numel // spec.shape[0]
        first, last = start // row, (start + len(buffer) - 1) // row
        rows = combine_axis_index(spec.shape[0], 0, tensor_changes)[first : last + 1]
        read = torch.empty(len(rows), row, dtype=spec.dtype)
        read_tensor_rows(self.source, original, rows, read)
        inner = [change for change in tensor_changes if change.axis != 0]
        part = apply_changes(read.view(len(rows), *spec.shape[1:]), inner)
        part = scale_features(part, scaled, first)
        buffer.copy_(part.reshape(-1)[start - first * row :][: len(buffer)])

    def _compute_aligned_tensor(self, name: str) -> Tensor:
        """Read the whole tensor `name` of the aligned model, folded and mapped.

        The last one is cached per thread, as the next piece probably belongs to it.
        """
        cached = getattr(self._cached, "tensor", None)
        if cached is None or cached[0] != name:
            changes = self._changes.get(name, [])
            cached = (
                name,
                compute_aligned_tensor(name, self._read_stored_tensor, self._folding, changes),
            )
            self._cached.tensor = cached
        return cached[1]


def find_folder_symmetry(folder: TensorSource, *, qk: bool = False) -> Symmetry:
    """Find the permutation groups of the model in a folder, from its configuration and headers.

    Args:
        qk: permute queries and keys within heads separately from values.
    Raises:
        UserError: as `find_symmetry`.
    """
    shapes = {
        name: spec.shape for name, spec in folder.tensors.items() if spec.dtype.is_floating_point
    }
    return find_symmetry(read_model_config(folder.folder), shapes, qk=qk)
