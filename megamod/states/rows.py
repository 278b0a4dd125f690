"""Rows of a stored tensor in any order, without reading the rest of it."""

from itertools import pairwise
from typing import Protocol

from torch import Tensor


class TensorReader(Protocol):
    """Reader of tensors with the interface of `ModelFolder`."""

    def read_into(self, name: str, start: int, buffer: Tensor) -> None:
        """Fill a buffer with elements from `start` on."""


def read_tensor_rows(source: TensorReader, name: str, rows: Tensor, out: Tensor) -> None:
    """Read rows of a tensor; consecutive rows in one read.

    Args:
        rows: [n] int64, numbers of the rows.
        out: [n, elements of a row], contiguous and of the tensor's dtype.
    Raises:
        UserError: if they cannot be read.
    """
    breaks = (rows.diff() != 1).nonzero()[:, 0] + 1
    for begin, end in pairwise([0, *breaks.tolist(), len(rows)]):
        if begin < end:
            source.read_into(name, int(rows[begin]) * out.shape[1], out[begin:end].view(-1))
