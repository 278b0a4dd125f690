"""Tensors that are merged: where they are read from, and one tensor as every model has it."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megamod.states.stream import PIECE, ModelFolder, TensorSpec, iterate_pieces

TOWER = re.compile(r"vision|visual|image|audio|speech|projector|merger|connector|perceiver")
"""Part of the names of modules that feed a language model with something other than text."""

Values = Mapping[str, float | bool]
"""Parameters of one tensor by name."""


class TensorSource(Protocol):
    """Tensors by name that are read piece by piece: an open `ModelFolder`, or a view of one.

    It is read by several threads at once.

    Attributes:
        folder: with the model's configuration; `member`: expert of a DEMix folder, None: all.
        tensors: specification of every tensor.
    """

    folder: Path
    member: str | None
    tensors: Mapping[str, TensorSpec]

    def read_into(self, name: str, start: int, buffer: Tensor) -> None:
        """Fill a buffer with elements of the tensor `name` from the flat index `start` on.

        The buffer is 1-D, of the tensor's dtype. Raise UserError if they cannot be read.
        """

    def read(self, name: str) -> Tensor:
        """Read the whole tensor `name` into memory of its own; raises as `read_into`."""

    def compute_digest(self) -> str:
        """Compute a digest of the weights on disk, whatever a view changes; reads all of them."""


class TensorView:
    """Base class of sources that read tensors from another source and change them.

    Args:
        source: the other source, which must stay open; `tensors` starts as a copy of its
            specifications.
    Attributes:
        adapter: folder of the LoRA adapter that is merged into the source; None: no adapter.
    """

    def __init__(self, source: TensorSource):
        self.source, self.folder, self.member = source, source.folder, source.member
        self.adapter: Path | None = getattr(source, "adapter", None)
        self.tensors: dict[str, TensorSpec] = dict(source.tensors)

    def read_into(self, name: str, start: int, buffer: Tensor) -> None:
        """Fill a buffer (1-D, of the tensor's dtype) with elements of `name` from `start` on."""
        self.source.read_into(name, start, buffer)

    def read(self, name: str) -> Tensor:
        """Read the whole tensor `name` into memory of its own."""
        spec = self.tensors[name]
        flat = torch.empty(spec.numel, dtype=spec.dtype)
        self.read_into(name, 0, flat)
        return flat.view(spec.shape)

    def compute_digest(self) -> str:
        """Compute a digest of the weights on disk, whatever the view changes; reads all of them."""
        return self.source.compute_digest()


class RenamedFolder(TensorView):
    """A source under other names; one of its tensors may have several.

    Args:
        names: name -> name in the source. The view has no other tensors.
    """

    def __init__(self, source: TensorSource, names: Mapping[str, str]):
        super().__init__(source)
        self._names = dict(names)
        self.tensors = {name: source.tensors[stored] for name, stored in self._names.items()}

    def read_into(self, name: str, start: int, buffer: Tensor) -> None:
        """Fill a buffer (1-D, of the tensor's dtype) with elements of `name` from `start` on."""
        self.source.read_into(self._names[name], start, buffer)


def describe_source(source: TensorSource) -> str:
    """Format the folder of a source for messages, with its adapter and expert if it has them:
    `FOLDER+ADAPTER (EXPERT)`.
    """
    adapter = getattr(source, "adapter", None)
    text = str(source.folder) if adapter is None else f"{source.folder}+{adapter}"
    return text if source.member is None else f"{text} ({source.member})"


def have_same_bits(first: TensorSource, name: str, second: TensorSource, other_name: str) -> bool:
    """Return True if two tensors have the same dtype, shape and bits; read piece by piece.

    Args:
        name: name of the tensor in `first`; `other_name`: in `second`.
    """
    spec = first.tensors[name]
    if second.tensors[other_name] != spec:
        return False
    buffers = torch.empty(2, PIECE // spec.dtype.itemsize, dtype=spec.dtype)
    for start, stop in iterate_pieces(spec.numel, spec.dtype.itemsize):
        left, right = buffers[:, : stop - start]
        first.read_into(name, start, left)
        second.read_into(other_name, start, right)
        if not torch.equal(left.view(torch.uint8), right.view(torch.uint8)):
            return False
    return True


def iterate_stored_pieces(source: TensorSource, name: str) -> Iterator[Tensor]:
    """Yield the elements of the tensor `name` in order, in pieces that share one buffer."""
    spec = source.tensors[name]
    buffer = torch.empty(PIECE // spec.dtype.itemsize, dtype=spec.dtype)
    for start, stop in iterate_pieces(spec.numel, spec.dtype.itemsize):
        source.read_into(name, start, buffer[: stop - start])
        yield buffer[: stop - start]


@dataclass(frozen=True)
class ModelTensor:
    """One tensor of one model, for a merge method.

    Attributes:
        source: the open folder; `name`: name of the tensor in it.
        values: parameters of the model for this tensor, such as its weight.
        cast: dtype that elements are rounded to before any computation; None: no rounding.
        rows: number of leading rows that take part; None: all.
        number: number of the model in the recipe, for random numbers.
        statistics: open file of statistics of the model; None: there is no file.
    """

    source: TensorSource
    name: str
    values: Values
    cast: torch.dtype | None = None
    rows: int | None = None
    number: int = 0
    statistics: ModelFolder | None = None

    @property
    def numel(self) -> int:
        """Number of elements of the rows that take part."""
        spec = self.source.tensors[self.name]
        return spec.numel if self.rows is None else spec.numel // spec.shape[0] * self.rows

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the rows that take part."""
        shape = self.source.tensors[self.name].shape
        return shape if self.rows is None else (self.rows, *shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of computation: float32, or float64 if that is stored."""
        return torch.promote_types(torch.float32, self.source.tensors[self.name].dtype)

    def read_into(self, start: int, out: Tensor) -> None:
        """Fill `out` with elements from the flat index `start` on, rounded to `cast` if it is set.

        Args:
            out: 1-D, of the dtype of the computation, into which stored elements are converted.
        Raises:
            UserError: if they cannot be read.
        """
        stored = self.source.tensors[self.name].dtype
        if stored == out.dtype:
            self.source.read_into(self.name, start, out)
        else:
            raw = torch.empty(len(out), dtype=stored)
            self.source.read_into(self.name, start, raw)
            out.copy_(raw)
        if self.cast not in (None, stored, out.dtype):
            out.copy_(out.to(self.cast))

    def read(self) -> Tensor:
        """Read the whole tensor (its rows that take part) in `shape` and `dtype`."""
        flat = torch.empty(self.numel, dtype=self.dtype)
        self.read_into(0, flat)
        return flat.view(self.shape)


@dataclass(frozen=True)
class MergeTensor:
    """One tensor of the result: the argument of a merge method.

    Attributes:
        name: name of the tensor in the result.
        models: the tensor of every model, in the order of the recipe.
        base: tensor of the base model; None: the recipe has no base.
        values: parameters of the whole merge for this tensor.
        seed: seed of all random numbers.
    """

    name: str
    models: Sequence[ModelTensor]
    base: ModelTensor | None
    values: Values
    seed: int = 0

    @property
    def non_base_models(self) -> list[ModelTensor]:
        """Tensors of all models except the base; of all models if there is no base."""
        return [model for model in self.models if model is not self.base]

    @property
    def numel(self) -> int:
        """Number of elements of the result."""
        return self.models[0].numel

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        return self.models[0].shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of computation: the widest of the models."""
        return max((model.dtype for model in self.models), key=lambda dtype: dtype.itemsize)

    def allocate_buffers(self, count: int, step: int | None = None) -> Tensor:
        """Allocate `count` buffers of the dtype of computation, uninitialised: [count, elements].

        Args:
            step: elements of each; None: those of a piece. At most those of the tensor.
        """
        step = PIECE // self.dtype.itemsize if step is None else step
        return torch.empty(count, min(self.numel, step), dtype=self.dtype)

    def iterate_pieces(self) -> Iterator[tuple[int, int]]:
        """Yield (first element, that after the last) of the pieces of the tensor, in order."""
        return iterate_pieces(self.numel, self.dtype.itemsize)

    def iterate_row_pieces(self) -> Iterator[tuple[int, int]]:
        """Yield (first element, that after the last) of pieces of whole rows, in order.

        A row runs along the last axis; a piece has at least one. A vector is one row.
        """
        step = self.count_row_piece_elements()
        for start in range(0, self.numel, step):
            yield start, min(start + step, self.numel)

    def count_row_piece_elements(self) -> int:
        """Count the elements of a piece of `iterate_row_pieces`; the last one may have fewer."""
        row = max(1, self.shape[-1] if self.shape else 1)
        return max(1, PIECE // self.dtype.itemsize // row) * row

    def make_generator(self, model: ModelTensor) -> torch.Generator:
        """Make a random generator on the CPU, seeded by (seed, model, tensor).

        So its numbers do not depend on threads or the order of calls; every call restarts them.
        """
        text = f"{self.seed}/{model.number}/{self.name}"
        digest = hashlib.sha256(text.encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
