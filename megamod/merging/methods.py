"""The arithmetic of merging, tensor by tensor: one function per method, all of them in `METHODS`.

A method is called once for each tensor. It gets that tensor as every model has it, and gives the
elements of the merged one in order, in as many pieces as it likes: a method that needs no more than
one element of each model at a time goes through them in pieces that fit the processor's cache, one
that needs the whole tensor reads it whole and gives it as a single piece.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megamod.errors import UserError
from megamod.states.stream import PIECE, ModelFolder, pieces

Values = Mapping[str, float | bool]
"""Parameters by name, as they are for one tensor."""


@dataclass(frozen=True)
class Operand:
    """One tensor as one model has it.

    Attributes:
        source: the open folder; `name`: what the tensor is called there.
        values: the model's parameters for this tensor.
        cast: dtype that elements are rounded to before anything is computed; None: none.
    """

    source: ModelFolder
    name: str
    values: Values
    cast: torch.dtype | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.source.tensors[self.name].numel

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self.source.tensors[self.name].shape

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: float32, or float64 if that is stored."""
        return torch.promote_types(torch.float32, self.source.tensors[self.name].dtype)

    def read_into(self, start: int, out: Tensor) -> None:
        """Fill `out` (1-D, of `dtype`) with elements from `start` on."""
        stored = self.source.tensors[self.name].dtype
        if stored == out.dtype:
            self.source.read_into(self.name, start, out)
        else:
            raw = torch.empty(len(out), dtype=stored)
            self.source.read_into(self.name, start, raw)
            out.copy_(raw)
        if self.cast not in (None, stored):
            out.copy_(out.to(self.cast))

    def read(self) -> Tensor:
        """The whole tensor, in its shape and in `dtype`."""
        flat = torch.empty(self.numel, dtype=self.dtype)
        self.read_into(0, flat)
        return flat.view(self.shape)


@dataclass(frozen=True)
class Method:
    """A way to merge.

    Attributes:
        function: see the head of this module; its second argument are the overall parameters.
        per_model: names of the parameters that every model has, with their defaults; None: it must
            be given.
        overall: the same for parameters of the whole merge.
    """

    function: Callable[[Sequence[Operand], Values], Iterator[Tensor]]
    per_model: Mapping[str, float | None]
    overall: Mapping[str, float | bool | None]


def linear(operands: Sequence[Operand], values: Values) -> Iterator[Tensor]:
    """Weighted sum of all models, divided by the sum of the weights if `normalize`.

    Models of weight zero are not read.

    Raises:
        UserError: if weights that are to be normalised sum to zero.
    Source: Wortsman et al. 2022 (Model Soups); Li et al. 2022 (Branch-Train-Merge), averaging.
    """
    first = operands[0]
    total = sum(operand.values["weight"] for operand in operands) if values["normalize"] else 1.0
    if abs(total) < 1e-12:
        raise UserError(f"{first.name}: the weights sum to zero and cannot be normalised")
    used = [operand for operand in operands if operand.values["weight"] != 0]
    dtype = max((operand.dtype for operand in operands), key=lambda dtype: dtype.itemsize)
    buffers = torch.empty(2, min(first.numel, PIECE // dtype.itemsize), dtype=dtype)
    for start, stop in pieces(first.numel, dtype.itemsize):
        result, other = buffers[:, : stop - start]
        if not used:
            result.zero_()
        for place, operand in enumerate(used):
            weight = operand.values["weight"]
            if place == 0:
                operand.read_into(start, result)
                result.mul_(weight)
            else:
                operand.read_into(start, other)
                result.add_(other, alpha=weight)
        yield result.div_(total) if total != 1.0 else result


METHODS = {
    "linear": Method(linear, per_model={"weight": None}, overall={"normalize": True}),
}
