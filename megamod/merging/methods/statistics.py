"""Methods that weight models by statistics of data: Fisher information and Gram matrices.

Both read the files that `megamod.merging.statistics` writes, one safetensors file per model.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from megamod.errors import UserError
from megamod.merging.methods.linear import linear
from megamod.merging.methods.table import method
from megamod.merging.tensors import MergeTensor, ModelTensor

INPUT_FIRST = ".T"
"""Suffix of a Gram matrix whose layer stores its weight as [in, out], as in GPT-2."""
_RIDGE = 1e-8  # of the mean diagonal: inputs that were never used are averaged with the weights


@method("fisher", per_model={"weight": 1.0}, overall={"floor": 1e-8}, base="none")
def fisher(target: MergeTensor) -> Iterator[Tensor]:
    """Average entry by entry, weighted with the diagonal Fisher information of each model.

    Information below `floor` counts as `floor`: entries that matter to no model are averaged with
    the weights alone, as are tensors without statistics.

    Args:
        target: the tensor to merge, as every model has it.
    Raises:
        UserError: if a model has no file, one file has the tensor and another has not, or it has
            another shape.
    Source: Matena and Raffel 2021 (Merging Models with Fisher-Weighted Averaging), section 3.
    """
    if not _has_statistic(target, "", None):
        yield from linear(replace(target, values={"normalize": True}))
        return
    buffers = target.allocate_buffers(4)
    for start, stop in target.iterate_pieces():
        value, information, weighted_sum, information_sum = (
            buffer[: stop - start] for buffer in buffers
        )
        weighted_sum.zero_()
        information_sum.zero_()
        for model in target.models:
            model.read_into(start, value)
            ModelTensor(model.statistics, model.name, {}).read_into(start, information)
            information.clamp_(min=target.values["floor"]).mul_(model.values["weight"])
            weighted_sum.addcmul_(value, information)
            information_sum.add_(information)
        yield weighted_sum.div_(information_sum)


@method("regmean", per_model={"weight": 1.0}, overall={"alpha": 0.9}, base="none")
def regmean(target: MergeTensor) -> Iterator[Tensor]:
    """Solve for linear layers whose outputs are closest to each model's on that model's inputs.

    With W_i [out, in] and the Gram matrix G_i [in, in] of the inputs of model i, its entries off
    the diagonal times `alpha`: W = (sum w_i W_i G_i) (sum w_i G_i)^-1. Tensors without a Gram
    matrix are averaged with the weights. Holds one layer of one model, in float64.

    Args:
        target: the tensor to merge, as every model has it.
    Raises:
        UserError: if a model has no file, one file has the matrix and another has not, it has
            another shape, vocabularies are of unequal size, or the weights leave no sum that can be
            inverted.
    Source: Jin et al. 2022 (Dataless Knowledge Fusion by Merging Weights), section 3.
    """
    suffix = next((s for s in ("", INPUT_FIRST) if _has_statistic(target, s, s == "")), None)
    if suffix is None:
        yield from linear(replace(target, values={"normalize": True}))
        return
    alpha, products, grams = target.values["alpha"], 0, 0
    for model in target.models:
        gram = model.statistics.read(model.name + suffix).double()
        diagonal = gram.diagonal().clone()
        gram.mul_(alpha).diagonal().copy_(diagonal + _RIDGE * (float(diagonal.mean()) or 1.0))
        gram.mul_(model.values["weight"])
        weight = model.read().double()
        products = products + (weight.T if suffix else weight) @ gram
        grams = grams + gram
    factor, failed = torch.linalg.cholesky_ex(grams)
    if failed:
        raise UserError(f"{target.name}: the weighted sum of the Gram matrices is not positive")
    merged = torch.cholesky_solve(products.T, factor)
    yield (merged if suffix else merged.T).contiguous().view(-1)


def _has_statistic(target: MergeTensor, suffix: str, square: bool | None) -> bool:
    """Return True if all models have this statistic of the tensor, False if none has.

    Args:
        target: the tensor to merge, as every model has it.
        suffix: end of the statistic's name, after the name of the tensor.
        square: it is a Gram matrix of the last axis (True) or the first (False); None: it has the
            shape of the tensor.
    Raises:
        UserError: if only some models have it, it has another shape, a model has no file, or a Gram
            matrix is that of a vocabulary that is cut.
    """
    has = []
    for model in target.models:
        key = model.name + suffix
        where = f"statistics of {model.source.folder}"
        if model.statistics is None:
            raise UserError(f"{where}: missing; give `statistics: FILE` with the model")
        stored = model.statistics.tensors.get(key)
        expected = model.source.tensors[model.name].shape
        if square is not None:
            side = expected[-1 if square else 0] if expected else 0
            if stored is not None and len(expected) == 2 and model.rows is not None:
                raise UserError(f"{key}: vocabularies of unequal size have no common statistics")
            expected = (side, side)
        if stored is not None and stored.shape != expected:
            raise UserError(f"{where}: {key} has shape {list(stored.shape)}, not {list(expected)}")
        has.append(stored is not None)
    if any(has) and not all(has):
        lacking = target.models[has.index(False)]
        raise UserError(f"{lacking.statistics.folder}: has no {lacking.name + suffix}")
    return all(has)
