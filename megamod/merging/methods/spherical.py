"""Spherical interpolation of two tensors, in two passes where a vector is longer than a piece."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megamod.merging.methods.table import method
from megamod.merging.tensors import MergeTensor, ModelTensor

_STRAIGHT = 0.9995  # cosine above which the interpolation is linear
_PARALLEL = 1e-12  # squared sine below which nuslerp is linear
_TINY = 1e-8  # norm up to which a tensor has no direction


@method("slerp", overall={"t": None}, models=(1, 1))
def slerp(target: MergeTensor) -> Iterator[Tensor]:
    """Interpolate spherically from the base (`t` = 0) to the other model (`t` = 1).

    A tensor is one vector. The interpolation is linear if the two are nearly parallel or
    opposite.

    Args:
        target: the tensor to merge, as every model has it.
    Source: Shoemake 1985 (Animating Rotation with Quaternion Curves), section 3.3.
    """
    (other,), t = target.non_base_models, target.values["t"]
    first, second = target.allocate_buffers(2)
    squares, other_squares, products = 0.0, 0.0, 0.0
    for start, stop in target.iterate_pieces():
        x, y = first[: stop - start], second[: stop - start]
        target.base.read_into(start, x)
        other.read_into(start, y)
        squares += float(x @ x)
        other_squares += float(y @ y)
        products += float(x @ y)
    norm, other_norm = math.sqrt(squares), math.sqrt(other_squares)
    norm, other_norm = (n if n > _TINY else 1.0 for n in (norm, other_norm))
    cosine = _clamp_cosine(products / norm / other_norm)
    share, other_share = 1 - t, t
    if abs(cosine) <= _STRAIGHT:
        angle = math.acos(cosine)
        share = math.sin((1 - t) * angle) / math.sin(angle)
        other_share = math.sin(t * angle) / math.sin(angle)
    for start, stop in target.iterate_pieces():
        x, y = first[: stop - start], second[: stop - start]
        target.base.read_into(start, x)
        other.read_into(start, y)
        yield x.mul_(share).add_(y, alpha=other_share)


@method(
    "nuslerp",
    per_model={"weight": None},
    overall={"nuslerp_flatten": True, "nuslerp_row_wise": False},
    base="optional",
    models=(2, 2),
)
def nuslerp(target: MergeTensor) -> Iterator[Tensor]:
    """Interpolate two models spherically; t is the second weight over the sum of weights.

    If that sum is zero, t is 0.5. With a base the differences from it are interpolated, and the
    base is added to the result. A tensor is one vector by default. Without `nuslerp_flatten` each
    row along the last axis is one; with `nuslerp_row_wise` as well, each vector along the first
    axis.

    Args:
        target: the tensor to merge, as every model has it.
    Source: as `slerp`; the weighting is that of the method of this name in mergekit.
    """
    left, right = target.non_base_models
    total = left.values["weight"] + right.values["weight"]
    t = 0.5 if abs(total) < 1e-6 else right.values["weight"] / total
    if target.values["nuslerp_flatten"] or not target.shape:
        yield from _interpolate_whole_tensor(target, left, right, t)
    elif target.values["nuslerp_row_wise"]:
        yield from _interpolate_along_first_axis(target, left, right, t)
    else:
        yield from _interpolate_rows(target, left, right, t)


def _interpolate_whole_tensor(
    target: MergeTensor, left: ModelTensor, right: ModelTensor, t: float
) -> Iterator[Tensor]:
    """Interpolate the tensor as one vector, in two passes over its pieces; see `nuslerp`.

    Args:
        target: the tensor to merge, as every model has it.
        t: share of `right`; 0 gives `left`.
    """
    first, second, base_buffer = target.allocate_buffers(3)
    sums = torch.zeros(3, dtype=torch.float64)
    for start, stop in target.iterate_pieces():
        x, y, _ = _read_differences(
            target, left, right, start, first, second, base_buffer, stop - start
        )
        wide, other_wide = x.double(), y.double()
        sums += torch.stack((wide @ wide, other_wide @ other_wide, wide @ other_wide))
    share, other_share = (float(value) for value in _compute_factors(*sums, t))
    for start, stop in target.iterate_pieces():
        x, y, base = _read_differences(
            target, left, right, start, first, second, base_buffer, stop - start
        )
        x.mul_(share).add_(y, alpha=other_share)
        yield x if base is None else x.add_(base)


def _interpolate_rows(
    target: MergeTensor, left: ModelTensor, right: ModelTensor, t: float
) -> Iterator[Tensor]:
    """Interpolate every row along the last axis, in one pass over whole rows; see `nuslerp`.

    Args:
        target: the tensor to merge, as every model has it.
        t: share of `right`; 0 gives `left`.
    """
    step, width = target.count_row_piece_elements(), max(1, target.shape[-1])
    first, second, base_buffer = target.allocate_buffers(3, step)
    for start, stop in target.iterate_row_pieces():
        x, y, base = _read_differences(
            target, left, right, start, first, second, base_buffer, stop - start
        )
        x, y = x.view(-1, width), y.view(-1, width)
        squares, other_squares, products = (
            (a.double() * b).sum(1, keepdim=True) for a, b in ((x, x), (y, y), (x, y))
        )
        share, other_share = _compute_factors(squares, other_squares, products, t)
        x.mul_(share).addcmul_(y, other_share.to(y.dtype))
        yield x.view(-1) if base is None else x.view(-1).add_(base)


def _interpolate_along_first_axis(
    target: MergeTensor, left: ModelTensor, right: ModelTensor, t: float
) -> Iterator[Tensor]:
    """Interpolate every vector along the first axis, in two passes; a 1-D tensor is one vector.

    Args:
        target: the tensor to merge, as every model has it.
        t: share of `right`; 0 gives `left`.
    """
    width = target.numel // max(1, target.shape[0])
    if len(target.shape) < 2:
        yield from _interpolate_whole_tensor(target, left, right, t)
        return
    step = max(1, target.allocate_buffers(1).numel() // max(1, width)) * max(1, width)
    first, second, base_buffer = target.allocate_buffers(3, step)
    sums = torch.zeros(3, width, dtype=torch.float64)
    spans = [(start, min(start + step, target.numel)) for start in range(0, target.numel, step)]
    for start, stop in spans:
        x, y, _ = _read_differences(
            target, left, right, start, first, second, base_buffer, stop - start
        )
        x, y = x.view(-1, width), y.view(-1, width)
        for row, (a, b) in enumerate(((x, x), (y, y), (x, y))):
            sums[row] += (a.double() * b).sum(0)
    share, other_share = _compute_factors(*sums, t)
    for start, stop in spans:
        x, y, base = _read_differences(
            target, left, right, start, first, second, base_buffer, stop - start
        )
        x.view(-1, width).mul_(share).addcmul_(y.view(-1, width), other_share.to(y.dtype))
        yield x if base is None else x.add_(base)


def _read_differences(
    target: MergeTensor,
    left: ModelTensor,
    right: ModelTensor,
    start: int,
    first: Tensor,
    second: Tensor,
    base_buffer: Tensor,
    count: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Read a piece of the base, and of both models with the base's piece subtracted.

    Args:
        target: the tensor to merge, whose base is read.
        left, right: the two models.
        start, count: elements to read.
        first, second, base_buffer: buffers of at least `count` elements, overwritten.
    Returns:
        views of the buffers; without a base the models as they are, and None.
    """
    x, y = first[:count], second[:count]
    left.read_into(start, x)
    right.read_into(start, y)
    if target.base is None:
        return x, y, None
    base = base_buffer[:count]
    target.base.read_into(start, base)
    return x.sub_(base), y.sub_(base), base


def _compute_factors(
    squares: Tensor, other_squares: Tensor, products: Tensor, t: float
) -> tuple[Tensor, Tensor]:
    """Compute the factors of both vectors in their spherical interpolation.

    They are 1 - t and t where the vectors are parallel.

    Args:
        squares, other_squares, products: squared norms and inner products of pairs of vectors,
            float64 of one shape, that of the results.
        t: share of the second vector.
    """
    norms = squares.sqrt().clamp(min=1e-7) * other_squares.sqrt().clamp(min=1e-7)
    cosine = (products / norms).clamp(-1, 1)
    straight = 1 - cosine.square() <= _PARALLEL
    angle = torch.acos(torch.where(straight, 0, cosine))
    sine = torch.sin(angle)
    share = torch.where(straight, 1 - t, torch.sin((1 - t) * angle) / sine)
    return share, torch.where(straight, t, torch.sin(t * angle) / sine)


def _clamp_cosine(cosine: float) -> float:
    """Clamp a cosine to [-1, 1]; NaN stays NaN, so that it is reported."""
    return cosine if math.isnan(cosine) else min(1.0, max(-1.0, cosine))
