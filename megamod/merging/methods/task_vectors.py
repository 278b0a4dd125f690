"""Methods on task vectors (differences of models from their base), and Model Stock."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from megamod.merging.methods import sparsify
from megamod.merging.methods.table import method
from megamod.merging.tensors import MergeTensor, ModelTensor

_method = partial(method, common_rows=False)
# Parameters of each model, and of the whole merge without and with dropping at random.
_TAU = {"weight": None, "density": 1.0}
_SUM = {"normalize": False, "lambda": 1.0, "rescale": False, "rescale_by_density": False}
_DROP = _SUM | {"rescale": True}
Sparsifier = Callable[[MergeTensor, ModelTensor], Callable[[], sparsify.Drop]]
"""Takes the tensor and one of its models; returns a function that starts a pass over the pieces of
the model's task vector."""


@_method("task_arithmetic", per_model={"weight": None}, overall=_SUM)
def task_arithmetic(target: MergeTensor) -> Iterator[Tensor]:
    """Add `lambda` times the weighted sum of all task vectors to the base.

    Args:
        target: the tensor to merge, as every model has it.
    Source: Ilharco et al. 2022 (Editing Models with Task Arithmetic), section 2.
    """
    return _add_task_vectors(target, None)


@_method("ties", per_model=_TAU, overall=_SUM | {"normalize": True})
def ties(target: MergeTensor) -> Iterator[Tensor]:
    """Trim task vectors to their largest entries, elect signs, average the entries that agree.

    Args:
        target: the tensor to merge, as every model has it.
    Source: Yadav et al. 2023 (TIES-Merging), section 4.2.
    """
    return _add_sign_elected_vectors(target, sparsify.keep_largest)


@_method("dare_linear", per_model=_TAU, overall=_DROP)
def dare_linear(target: MergeTensor) -> Iterator[Tensor]:
    """Apply task arithmetic to randomly sparsified task vectors.

    Args:
        target: the tensor to merge, as every model has it.
    Source: Yu et al. 2023 (DARE), section 3.
    """
    return _add_task_vectors(target, sparsify.drop_at_random)


@_method("dare_ties", per_model=_TAU, overall=_DROP)
def dare_ties(target: MergeTensor) -> Iterator[Tensor]:
    """Sparsify task vectors at random, then elect signs as in TIES.

    Args:
        target: the tensor to merge, as every model has it.
    Source: Yu et al. 2023 (DARE), section 3.
    """
    return _add_sign_elected_vectors(target, sparsify.drop_at_random)


@_method("breadcrumbs", per_model=_TAU | {"gamma": 0.01}, overall=_SUM)
def breadcrumbs(target: MergeTensor) -> Iterator[Tensor]:
    """Apply task arithmetic to task vectors without their largest and smallest entries.

    The fraction `gamma` of largest magnitude is dropped, the fraction `density` below it is kept.
    Yields the merged tensor piece by piece.

    Args:
        target: the tensor to merge, as every model has it.
    Source: Davari and Belilovsky 2023 (Model Breadcrumbs), section 3.
    """
    return _add_task_vectors(target, sparsify.drop_outliers)


@_method("breadcrumbs_ties", per_model=_TAU | {"gamma": 0.01}, overall=_SUM)
def breadcrumbs_ties(target: MergeTensor) -> Iterator[Tensor]:
    """Sparsify as `breadcrumbs`, then elect signs as in TIES.

    Args:
        target: the tensor to merge, as every model has it.
    Source: Davari and Belilovsky 2023; Yadav et al. 2023.
    """
    return _add_sign_elected_vectors(target, sparsify.drop_outliers)


@_method("della", per_model=_TAU | {"epsilon": 0.15}, overall=_DROP | {"normalize": True})
def della(target: MergeTensor) -> Iterator[Tensor]:
    """Sparsify at random, preferring large entries, then elect signs as in TIES.

    Args:
        target: the tensor to merge, as every model has it.
    Source: Deep et al. 2024 (DELLA-Merging), section 3.
    """
    return _add_sign_elected_vectors(target, sparsify.drop_by_rank)


@_method("della_linear", per_model=_TAU | {"epsilon": 0.15}, overall=_DROP)
def della_linear(target: MergeTensor) -> Iterator[Tensor]:
    """Apply task arithmetic to randomly sparsified task vectors, preferring large entries.

    Args:
        target: the tensor to merge, as every model has it.
    Source: Deep et al. 2024 (DELLA-Merging), section 3.
    """
    return _add_task_vectors(target, sparsify.drop_by_rank)


@_method("model_stock", overall={"filter_wise": False}, models=(2, 10**6))
def model_stock(target: MergeTensor) -> Iterator[Tensor]:
    """Interpolate between the base and the mean of the models by the agreement of task vectors.

    Agreement is the mean cosine of two task vectors: of the whole tensor, or with `filter_wise` of
    each row (along the last axis).

    Args:
        target: the tensor to merge, as every model has it.
    Source: Jang et al. 2024 (Model Stock), section 4.
    """
    width = max(1, target.shape[-1] if target.shape else 1)
    if target.values["filter_wise"]:
        for _, base, deltas in _iterate_task_vectors(target, list(target.iterate_row_pieces())):
            rows = deltas.view(len(deltas), -1, width)
            products = torch.einsum("aij,bij->iab", rows.double(), rows.double())
            ratio = _compute_interpolation_ratio(products)
            mean = rows.mean(0).mul_(ratio.to(rows.dtype)[:, None])
            yield base.add_(mean.view(-1))
        return
    products = torch.zeros(
        len(target.non_base_models), len(target.non_base_models), dtype=torch.float64
    )
    for _, _, deltas in _iterate_task_vectors(target, list(target.iterate_pieces())):
        products += deltas @ deltas.T
    ratio = float(_compute_interpolation_ratio(products))
    for _, base, deltas in _iterate_task_vectors(target, list(target.iterate_pieces())):
        yield base.add_(deltas.mean(0), alpha=ratio)


def _compute_interpolation_ratio(products: Tensor) -> Tensor:
    """Compute how far to go from the base (0) to the mean of the models (1), by their agreement.

    With the mean cosine c of two of the k task vectors it is k c / (1 + (k - 1) c), and 0 where
    that divisor is.

    Args:
        products: [..., k, k] inner products of task vectors.
    Returns:
        [...]: 1 if all task vectors point the same way, 0 if they are orthogonal.
    """
    count = products.shape[-1]
    norms = products.diagonal(dim1=-2, dim2=-1).sqrt()
    cosines = [
        (products[..., a, b] / (norms[..., a] * norms[..., b]).clamp(min=1e-6)).clamp(-1, 1)
        for a, b in combinations(range(count), 2)
    ]
    cosine = torch.stack(cosines).mean(0)
    divisor = 1 + (count - 1) * cosine
    singular = divisor.abs() < 1e-6
    return torch.where(singular, 0, count * cosine / torch.where(singular, 1, divisor))


def _iterate_task_vectors(
    target: MergeTensor, spans: list[tuple[int, int]]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (first element, piece of the base [n], task vectors [models, n]) of each piece.

    Tensors are overwritten by the next piece.

    Args:
        target: the tensor to merge, as every model has it.
        spans: first element, and that after the last, of each piece.
    """
    longest = max((stop - start for start, stop in spans), default=0)
    models = target.non_base_models
    buffer = torch.empty((len(models) + 1) * longest, dtype=target.dtype)
    for start, stop in spans:
        # One view per span, so that the pieces of a shorter last span are contiguous too.
        whole = buffer[: (len(models) + 1) * (stop - start)].view(len(models) + 1, -1)
        base, deltas = whole[0], whole[1:]
        target.base.read_into(start, base)
        for model, delta in zip(models, deltas, strict=True):
            model.read_into(start, delta)
            delta.sub_(base)
        yield start, base, deltas


def _prepare_sparsifiers(
    target: MergeTensor, sparsifier: Sparsifier | None
) -> tuple[list[tuple[int, int]], list[tuple[ModelTensor, sparsify.Drop, float]]]:
    """Prepare a pass over the pieces of a tensor; sparsifiers read the task vectors here.

    Args:
        target: the tensor to merge, as every model has it.
        sparsifier: None: whole task vectors.
    Returns:
        spans of the pieces, and for each model of non-zero weight (model, started sparsifier,
        factor of its task vector: weight, times that which restores the norm with `rescale`).
    """
    by_row = sparsifier is sparsify.drop_by_rank  # which ranks the entries of whole rows
    spans = list(target.iterate_row_pieces() if by_row else target.iterate_pieces())
    models = []
    for model in target.non_base_models:
        if model.values["weight"] == 0:
            continue
        start = sparsifier(target, model) if sparsifier else lambda: sparsify.keep_all
        scale = 1.0
        if sparsifier and target.values["rescale"] and not target.values["rescale_by_density"]:
            scale = sparsify.compute_norm_scale(target, model, start, spans)
        models.append((model, start(), model.values["weight"] * scale))
    return spans, models


def _add_task_vectors(target: MergeTensor, sparsifier: Sparsifier | None) -> Iterator[Tensor]:
    """Yield the base plus `lambda` times the weighted sum of sparsified task vectors.

    With `normalize` the sum is divided by that of all weights, unless that is next to zero.

    Args:
        target: the tensor to merge, as every model has it.
        sparsifier: None: whole task vectors.
    """
    spans, models = _prepare_sparsifiers(target, sparsifier)
    weight_sum = sum(model.values["weight"] for model in target.non_base_models)
    factor = target.values["lambda"]
    if target.values["normalize"] and abs(weight_sum) >= 1e-8:
        factor /= weight_sum
    base_buffer, delta_buffer, sum_buffer = target.allocate_buffers(
        3, max((b - a for a, b in spans), default=0)
    )
    for start, stop in spans:
        base, delta, total = (
            buffer[: stop - start] for buffer in (base_buffer, delta_buffer, sum_buffer)
        )
        target.base.read_into(start, base)
        total.zero_()
        for model, drop, weight in models:
            model.read_into(start, delta)
            drop(delta.sub_(base))
            total.add_(delta, alpha=weight)
        yield base.add_(total, alpha=factor)


def _add_sign_elected_vectors(target: MergeTensor, sparsifier: Sparsifier) -> Iterator[Tensor]:
    """Yield the base plus `lambda` times the entries of task vectors that have the elected sign.

    The elected sign of an entry is that of the weighted sum over the sparsified task vectors; a sum
    of zero counts as positive. With `normalize` each entry is divided by the sum of the weights of
    the models that contribute to it.

    Args:
        target: the tensor to merge, as every model has it.
        sparsifier: selects entries of each task vector.
    """
    spans, models = _prepare_sparsifiers(target, sparsifier)
    longest = max((stop - start for start, stop in spans), default=0)
    buffers = target.allocate_buffers(len(models) + 3, longest)
    for start, stop in spans:
        base, total, divisor, *deltas = (buffer[: stop - start] for buffer in buffers)
        target.base.read_into(start, base)
        total.zero_()
        for (model, drop, weight), delta in zip(models, deltas, strict=True):
            model.read_into(start, delta)
            drop(delta.sub_(base))
            total.add_(delta.mul_(weight))
        sign = torch.copysign(torch.ones(()), total.add_(0.0))  # -0 + 0 = 0
        total.zero_()
        divisor.zero_()
        for (model, _, _), delta in zip(models, deltas, strict=True):
            delta.mul_(sign).clamp_(min=0)
            total.add_(delta)
            if target.values["normalize"]:
                divisor.add_(delta.sign_(), alpha=model.values["weight"])
        if target.values["normalize"]:
            total.div_(divisor.add_(divisor == 0))
        yield base.addcmul_(total, sign.to(total.dtype), value=target.values["lambda"])
