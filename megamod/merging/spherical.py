"""Interpolation along the arc between two tensors, with two passes over them."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megamod.merging.tensors import Blend, Operand

_STRAIGHT = 0.9995  # cosine beyond which the arc is taken for a straight line
_PARALLEL = 1e-12  # the same for nuslerp, as the square of the sine
_TINY = 1e-8  # a tensor of a smaller norm has no direction


def slerp(blend: Blend) -> Iterator[Tensor]:
    """The point at `t` of the arc from the base, at 0, to the other model, at 1.

    Straight where the two are parallel, or one of them is zero.

    Source: Shoemake 1985 (Animating Rotation with Quaternion Curves), section 3.3.
    """
    (other,), t = blend.others, blend.values["t"]
    first, second = blend.buffers(2)
    squares, other_squares, products = 0.0, 0.0, 0.0
    for start, stop in blend.pieces():
        x, y = first[: stop - start], second[: stop - start]
        blend.base.read_into(start, x)
        other.read_into(start, y)
        squares += float(x @ x)
        other_squares += float(y @ y)
        products += float(x @ y)
    norm, other_norm = math.sqrt(squares), math.sqrt(other_squares)
    norm, other_norm = (n if n > _TINY else 1.0 for n in (norm, other_norm))
    cosine = _bounded(products / norm / other_norm)
    share, other_share = 1 - t, t
    if abs(cosine) <= _STRAIGHT:
        angle = math.acos(cosine)
        share = math.sin((1 - t) * angle) / math.sin(angle)
        other_share = math.sin(t * angle) / math.sin(angle)
    for start, stop in blend.pieces():
        x, y = first[: stop - start], second[: stop - start]
        blend.base.read_into(start, x)
        other.read_into(start, y)
        yield x.mul_(share).add_(y, alpha=other_share)


def nuslerp(blend: Blend) -> Iterator[Tensor]:
    """The same for two models besides the base, whose weights say where between them.

    With a base it is the differences from it that are interpolated, and the base is added again.
    By default a tensor is one vector; without `nuslerp_flatten` every row is, along the last axis,
    and with `nuslerp_row_wise` besides, every vector along the first axis.

    Source: as `slerp`; the weighting is that of the method of this name in mergekit.
    """
    one, other = blend.others
    total = one.values["weight"] + other.values["weight"]
    t = 0.5 if abs(total) < 1e-6 else other.values["weight"] / total
    if blend.values["nuslerp_flatten"] or not blend.shape:
        yield from _along_all(blend, one, other, t)
    elif blend.values["nuslerp_row_wise"]:
        yield from _along_first_axis(blend, one, other, t)
    else:
        yield from _along_rows(blend, one, other, t)


def _along_all(blend: Blend, one: Operand, other: Operand, t: float) -> Iterator[Tensor]:
    first, second, anchor = blend.buffers(3)
    sums = torch.zeros(3, dtype=torch.float64)
    for start, stop in blend.pieces():
        x, y, _ = _differences(blend, one, other, start, first, second, anchor, stop - start)
        wide, other_wide = x.double(), y.double()
        sums += torch.stack((wide @ wide, other_wide @ other_wide, wide @ other_wide))
    share, other_share = (float(value) for value in _shares(*sums, t))
    for start, stop in blend.pieces():
        x, y, base = _differences(blend, one, other, start, first, second, anchor, stop - start)
        x.mul_(share).add_(y, alpha=other_share)
        yield x if base is None else x.add_(base)


def _along_rows(blend: Blend, one: Operand, other: Operand, t: float) -> Iterator[Tensor]:
    step, width = blend.row_step(), max(1, blend.shape[-1])
    first, second, anchor = blend.buffers(3, step)
    for start, stop in blend.row_pieces():
        x, y, base = _differences(blend, one, other, start, first, second, anchor, stop - start)
        x, y = x.view(-1, width), y.view(-1, width)
        squares, other_squares, products = (
            (a.double() * b).sum(1, keepdim=True) for a, b in ((x, x), (y, y), (x, y))
        )
        share, other_share = _shares(squares, other_squares, products, t)
        x.mul_(share).addcmul_(y, other_share.to(y.dtype))
        yield x.view(-1) if base is None else x.view(-1).add_(base)


def _along_first_axis(blend: Blend, one: Operand, other: Operand, t: float) -> Iterator[Tensor]:
    """As `_along_rows`, with sums for each place of a slice along the first axis."""
    width = blend.numel // max(1, blend.shape[0])
    if len(blend.shape) < 2:
        yield from _along_all(blend, one, other, t)
        return
    step = max(1, blend.buffers(1).numel() // max(1, width)) * max(1, width)
    first, second, anchor = blend.buffers(3, step)
    sums = torch.zeros(3, width, dtype=torch.float64)
    spans = [(start, min(start + step, blend.numel)) for start in range(0, blend.numel, step)]
    for start, stop in spans:
        x, y, _ = _differences(blend, one, other, start, first, second, anchor, stop - start)
        x, y = x.view(-1, width), y.view(-1, width)
        for row, (a, b) in enumerate(((x, x), (y, y), (x, y))):
            sums[row] += (a.double() * b).sum(0)
    share, other_share = _shares(*sums, t)
    for start, stop in spans:
        x, y, base = _differences(blend, one, other, start, first, second, anchor, stop - start)
        x.view(-1, width).mul_(share).addcmul_(y.view(-1, width), other_share.to(y.dtype))
        yield x if base is None else x.add_(base)


def _differences(
    blend: Blend,
    one: Operand,
    other: Operand,
    start: int,
    first: Tensor,
    second: Tensor,
    anchor: Tensor,
    count: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A piece of both, less that of the base, and that of the base."""
    x, y = first[:count], second[:count]
    one.read_into(start, x)
    other.read_into(start, y)
    if blend.base is None:
        return x, y, None
    base = anchor[:count]
    blend.base.read_into(start, base)
    return x.sub_(base), y.sub_(base), base


def _shares(
    squares: Tensor, other_squares: Tensor, products: Tensor, t: float
) -> tuple[Tensor, Tensor]:
    """Factors of both vectors, from their squared norms and their product (float64, any shape)."""
    norms = squares.sqrt().clamp(min=1e-7) * other_squares.sqrt().clamp(min=1e-7)
    cosine = (products / norms).clamp(-1, 1)
    straight = 1 - cosine.square() <= _PARALLEL
    angle = torch.acos(torch.where(straight, 0, cosine))
    sine = torch.sin(angle)
    share = torch.where(straight, 1 - t, torch.sin((1 - t) * angle) / sine)
    return share, torch.where(straight, t, torch.sin(t * angle) / sine)


def _bounded(cosine: float) -> float:
    return cosine if math.isnan(cosine) else min(1.0, max(-1.0, cosine))
