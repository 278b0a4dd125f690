"""Methods that need one element of each model at a time, and nothing else."""

from collections.abc import Iterator

from torch import Tensor

from megamod.errors import UserError
from megamod.merging.tensors import Blend


def linear(blend: Blend) -> Iterator[Tensor]:
    """Weighted sum of all models, divided by the sum of the weights if `normalize`.

    Models of weight zero are not read.

    Raises:
        UserError: if weights that are to be normalised sum to zero.
    Source: Wortsman et al. 2022 (Model Soups); Li et al. 2022 (Branch-Train-Merge), averaging.
    """
    every = [operand.values["weight"] for operand in blend.operands]
    total = sum(every) if blend.values["normalize"] else 1.0
    if abs(total) < 1e-12:
        raise UserError(f"{blend.name}: the weights sum to zero and cannot be normalised")
    used = [operand for operand in blend.operands if operand.values["weight"] != 0]
    buffers = blend.buffers(2)
    for start, stop in blend.pieces():
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


def passthrough(blend: Blend) -> Iterator[Tensor]:
    """The one model as it is, times `scale`.

    Source: the method of this name in mergekit; Kim et al. 2023 (SOLAR), depth up-scaling.
    """
    (operand,) = blend.operands
    (room,) = blend.buffers(1)
    for start, stop in blend.pieces():
        operand.read_into(start, room[: stop - start])
        scale = operand.values["scale"]
        yield room[: stop - start] if scale == 1 else room[: stop - start].mul_(scale)
