"""Methods that weigh models by what was measured on data: Fisher information, Gram matrices.

Both read what `megamod.merging.calibrated` writes: a file of safetensors for each model.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from megamod.errors import UserError
from megamod.merging.elementwise import linear
from megamod.merging.tensors import Blend, Operand

INPUT_FIRST = ".T"
"""Ends the name of a Gram matrix whose layer holds its weight as [in, out], as GPT-2's do."""
_RIDGE = 1e-8  # of the mean of the diagonal: what no input ever used is averaged plainly


def fisher(blend: Blend) -> Iterator[Tensor]:
    """The mean of the models, entry by entry weighted with their diagonal Fisher information.

    Information below `floor` counts as `floor`, so entries that matter to no model are averaged
    with the weights alone, as are tensors that no file has.

    Raises:
        UserError: if one file has the tensor and another has not, or of another shape.
    Source: Matena and Raffel 2021 (Merging Models with Fisher-Weighted Averaging), section 3.
    """
    if not _measured(blend, "", None):
        yield from linear(replace(blend, values={"normalize": True}))
        return
    rooms = blend.buffers(4)
    for start, stop in blend.pieces():
        value, information, mixed, total = (room[: stop - start] for room in rooms)
        mixed.zero_()
        total.zero_()
        for operand in blend.operands:
            operand.read_into(start, value)
            Operand(operand.statistics, operand.name, {}).read_into(start, information)
            information.clamp_(min=blend.values["floor"]).mul_(operand.values["weight"])
            mixed.addcmul_(value, information)
            total.add_(information)
        yield mixed.div_(total)


def regmean(blend: Blend) -> Iterator[Tensor]:
    """Linear layers whose outputs are nearest to those of each model on its own inputs.

    With W_i [out, in] and the Gram matrix G_i [in, in] of the inputs of model i, its entries off
    the diagonal times `alpha`: W = (sum w_i W_i G_i) (sum w_i G_i)^-1. Tensors without a Gram
    matrix are averaged with the weights. Holds one layer of one model, in float64.

    Raises:
        UserError: if one file has the matrix and another has not, or of another shape, or if the
            weights leave no sum that can be inverted.
    Source: Jin et al. 2022 (Dataless Knowledge Fusion by Merging Weights), section 3.
    """
    suffix = next((s for s in ("", INPUT_FIRST) if _measured(blend, s, s == "")), None)
    if suffix is None:
        yield from linear(replace(blend, values={"normalize": True}))
        return
    alpha, products, grams = blend.values["alpha"], 0, 0
    for operand in blend.operands:
        gram = operand.statistics.read(operand.name + suffix).double()
        diagonal = gram.diagonal().clone()
        gram.mul_(alpha).diagonal().copy_(diagonal + _RIDGE * (float(diagonal.mean()) or 1.0))
        gram.mul_(operand.values["weight"])
        weight = operand.read().double()
        products = products + (weight.T if suffix else weight) @ gram
        grams = grams + gram
    factor, failed = torch.linalg.cholesky_ex(grams)
    if failed:
        raise UserError(f"{blend.name}: the weighted sum of the Gram matrices is not positive")
    merged = torch.cholesky_solve(products.T, factor)
    yield (merged if suffix else merged.T).contiguous().view(-1)


def _measured(blend: Blend, suffix: str, square: bool | None) -> bool:
    """Whether all models have this statistic of the tensor, and not just some.

    Args:
        square: whether it is a Gram matrix of the last axis, or of the first; None: it has the
            tensor's shape.
    """
    has = []
    for operand in blend.operands:
        key = operand.name + suffix
        where = f"statistics of {operand.source.folder}"
        if operand.statistics is None:
            raise UserError(f"{where}: missing; give `statistics: FILE` beside `model:`")
        found = operand.statistics.tensors.get(key)
        wanted = operand.source.tensors[operand.name].shape
        if square is not None:
            side = wanted[-1 if square else 0] if wanted else 0
            if found is not None and len(wanted) == 2 and operand.rows is not None:
                raise UserError(f"{key}: vocabularies of unequal size have no common statistics")
            wanted = (side, side)
        if found is not None and found.shape != wanted:
            raise UserError(f"{where}: {key} has shape {list(found.shape)}, not {list(wanted)}")
        has.append(found is not None)
    if any(has) and not all(has):
        lacking = blend.operands[has.index(False)]
        raise UserError(f"{lacking.statistics.folder}: has no {lacking.name + suffix}")
    return all(has)
