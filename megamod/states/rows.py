"""Rows of a stored tensor in any order, without reading the rest of it."""

from itertools import pairwise
from typing import Protocol

from torch import Tensor


class TensorReader(Protocol):
    """Reader of parts of tensors, such as `ModelFolder`."""

    def read_into(self, name: str, start_element: int, buffer: Tensor) -> None:
        """Fill `buffer` with elements of a tensor, from the flat index `start_element` on."""


def read_tensor_rows(source: TensorReader, name: str, row_indices: Tensor, output: Tensor) -> None:
    """Read rows of a tensor into `output`; consecutive rows in one read.

    Args:
        source: reader of the tensor `name`.
        row_indices: [n] int64, indices along the first axis; any order, repetitions allowed.
        output: [n, elements of a row], contiguous, of the tensor's dtype, on the CPU; overwritten.
    Raises:
        UserError: if the rows cannot be read.
    """
    breaks = (row_indices.diff() != 1).nonzero()[:, 0] + 1
    for begin, end in pairwise([0, *breaks.tolist(), len(row_indices)]):
        if begin < end:
            source.read_into(
                name, int(row_indices[begin]) * output.shape[1], output[begin:end].view(-1)
            )
