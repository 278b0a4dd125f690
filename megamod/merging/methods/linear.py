"""Elementwise methods: weighted averages, and copies."""

from collections.abc import Iterator

from torch import Tensor

from megamod.errors import UserError
from megamod.merging.methods.table import method
from megamod.merging.tensors import MergeTensor


@method("linear", per_model={"weight": None}, overall={"normalize": True}, base="none")
def linear(target: MergeTensor) -> Iterator[Tensor]:
    """Compute the weighted sum of the models, divided by the sum of the weights with `normalize`.

    Models of weight zero are not read.

    Args:
        target: the tensor to merge, as every model has it.
    Raises:
        UserError: if weights that are to be normalised sum to zero.
    Source: Wortsman et al. 2022 (Model Soups); Li et al. 2022 (Branch-Train-Merge), averaging.
    """
    weights = [model.values["weight"] for model in target.models]
    total = sum(weights) if target.values["normalize"] else 1.0
    if abs(total) < 1e-12:  # the rounding error of weights such as 0.1, 0.2 and -0.3
        raise UserError(f"{target.name}: the weights sum to zero and cannot be normalised")
    used = [model for model in target.models if model.values["weight"] != 0]
    buffers = target.allocate_buffers(2)
    for start, stop in target.iterate_pieces():
        result, other = buffers[:, : stop - start]
        if not used:
            result.zero_()
        for number, model in enumerate(used):
            weight = model.values["weight"]
            if number == 0:
                model.read_into(start, result)
                result.mul_(weight)
            else:
                model.read_into(start, other)
                result.add_(other, alpha=weight)
        yield result.div_(total) if total != 1.0 else result


@method("passthrough", per_model={"scale": 1.0}, base="none", models=(1, 1))
def passthrough(target: MergeTensor) -> Iterator[Tensor]:
    """Copy the only model, times `scale`.

    Args:
        target: the tensor to merge, as every model has it.
    Source: the method of this name in mergekit; Kim et al. 2023 (SOLAR), depth up-scaling.
    """
    (model,) = target.models
    (buffer,) = target.allocate_buffers(1)
    for start, stop in target.iterate_pieces():
        model.read_into(start, buffer[: stop - start])
        scale = model.values["scale"]
        yield buffer[: stop - start] if scale == 1 else buffer[: stop - start].mul_(scale)
