"""Model folders read as if they were aligned, so that any merge method can merge them.

Nothing is written: rows are read in their new order, and the columns of a piece are reordered when
it is read. Where features are mixed and not only reordered, one tensor of each thread is held.
"""

import threading

import torch
from torch import Tensor

from megamod.merging.alignment.permute import (
    Change,
    axis_index,
    changes,
    reorder,
    scale_features,
    scaled_features,
    untied,
)
from megamod.merging.alignment.record import Alignment
from megamod.merging.alignment.symmetry import Symmetry, symmetry_of
from megamod.merging.tensors import TensorSource, View
from megamod.states.forest import read_config
from megamod.states.rows import read_rows
from megamod.states.stream import PIECE


class PermutedFolder(View):
    """A source with its features in the order of the reference.

    Where the alignment needs output matrices that are no longer
    tied, it has them as tensors of their own; then so must the reference and the merged model.

    Args:
        source: the folder.
        alignment: of its model to the reference.
        reference: read the folder as it is, only with those output matrices.
    Attributes:
        tensors: specification of every tensor.
        config: the configuration of a model with these weights.
    Raises:
        UserError: if the alignment is not one of such a model.
    """

    def __init__(self, source: TensorSource, alignment: Alignment, reference: bool = False):
        super().__init__(source)
        symmetry = folder_symmetry(source, qk=alignment.options.qk)
        found = changes(symmetry, alignment)
        self._stored = untied(symmetry, found)
        self._changes: dict[str, list[Change]] = {} if reference else found
        self._scaled, self._tied = scaled_features(symmetry, alignment), symmetry.tied
        self._held = threading.local()
        for alias, original in self._stored.items():
            self.tensors.setdefault(alias, source.tensors[original])
        self.config = read_config(source.folder)
        if self._stored:
            self.config |= {"tie_word_embeddings": False}

    def read_into(self, name: str, start: int, buffer: Tensor) -> None:
        """Fill a buffer (1-D, of the tensor's dtype) with elements from `start` on."""
        wanted = self._changes.get(name, [])
        scaled = self._scaled.get(self._tied.get(name, name), [])
        own = name if name in self.source.tensors else self._stored[name]
        if not wanted and not scaled:
            self.source.read_into(own, start, buffer)
            return
        spec = self.tensors[name]
        soft = any(change.soft for change in wanted)
        if spec.nbytes <= PIECE or soft:
            whole = self._mixed(name, own) if soft else reorder(self.source.read(own), wanted)
            whole = scale_features(whole, scaled)
            buffer.copy_(whole.reshape(-1)[start : start + len(buffer)])
            return
        row = spec.numel // spec.shape[0]
        first, last = start // row, (start + len(buffer) - 1) // row
        rows = axis_index(spec.shape[0], 0, wanted)[first : last + 1]
        read = torch.empty(len(rows), row, dtype=spec.dtype)
        read_rows(self.source, own, rows, read)
        inner = [change for change in wanted if change.axis != 0]
        part = reorder(read.view(len(rows), *spec.shape[1:]), inner)
        part = scale_features(part, scaled, first)
        buffer.copy_(part.reshape(-1)[start - first * row :][: len(buffer)])

    def _mixed(self, name: str, own: str) -> Tensor:
        """A whole tensor; the last one is kept, as the next piece that is asked for is of it."""
        held = getattr(self._held, "tensor", None)
        if held is None or held[0] != name:
            held = name, reorder(self.source.read(own), self._changes[name])
            self._held.tensor = held
        return held[1]


def folder_symmetry(folder: TensorSource, *, qk: bool = False) -> Symmetry:
    """The groups of a model in a folder.

    Raises:
        UserError: as `symmetry_of`.
    """
    shapes = {
        name: spec.shape for name, spec in folder.tensors.items() if spec.dtype.is_floating_point
    }
    return symmetry_of(read_config(folder.folder), shapes, qk=qk)
