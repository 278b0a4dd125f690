"""Methods that add up what models have learned since their common base, and Model Stock."""

from collections.abc import Callable, Iterator
from itertools import combinations

import torch
from torch import Tensor

from megamod.merging import sparsify
from megamod.merging.tensors import Blend, Operand

Thinning = Callable[[Blend, Operand], Callable[[], sparsify.Thin]]


def task_arithmetic(blend: Blend) -> Iterator[Tensor]:
    """The base plus `lambda` times the weighted sum of all task vectors.

    Source: Ilharco et al. 2022 (Editing Models with Task Arithmetic), section 2.
    """
    return _added(blend, None)


def ties(blend: Blend) -> Iterator[Tensor]:
    """Task vectors trimmed to their largest entries, then the mean of those of the elected sign.

    Source: Yadav et al. 2023 (TIES-Merging), section 4.2.
    """
    return _elected(blend, sparsify.trimmed)


def dare_linear(blend: Blend) -> Iterator[Tensor]:
    """Task arithmetic with entries dropped at random.

    Source: Yu et al. 2023 (DARE), section 3.
    """
    return _added(blend, sparsify.dropped)


def dare_ties(blend: Blend) -> Iterator[Tensor]:
    """Entries dropped at random, then signs elected as in TIES.

    Source: Yu et al. 2023 (DARE), section 3.
    """
    return _elected(blend, sparsify.dropped)


def breadcrumbs(blend: Blend) -> Iterator[Tensor]:
    """Task arithmetic without the smallest and the very largest entries.

    Source: Davari and Belilovsky 2023 (Model Breadcrumbs), section 3.
    """
    return _added(blend, sparsify.without_outliers)


def breadcrumbs_ties(blend: Blend) -> Iterator[Tensor]:
    """The same, with signs elected as in TIES.

    Source: Davari and Belilovsky 2023; Yadav et al. 2023.
    """
    return _elected(blend, sparsify.without_outliers)


def della(blend: Blend) -> Iterator[Tensor]:
    """Entries dropped at random, small ones rather than large ones, then signs elected.

    Source: Deep et al. 2024 (DELLA-Merging), section 3.
    """
    return _elected(blend, sparsify.dropped_by_rank)


def della_linear(blend: Blend) -> Iterator[Tensor]:
    """The same without the election.

    Source: Deep et al. 2024 (DELLA-Merging), section 3.
    """
    return _added(blend, sparsify.dropped_by_rank)


def model_stock(blend: Blend) -> Iterator[Tensor]:
    """The mean of the models, pulled towards the base the more, the less they agree.

    Agreement is the mean cosine of two task vectors, of the whole tensor, or with `filter_wise` of
    each of its rows (along the last axis).

    Source: Jang et al. 2024 (Model Stock), section 4.
    """
    width = max(1, blend.shape[-1] if blend.shape else 1)
    if blend.values["filter_wise"]:
        for _, base, deltas in _together(blend, list(blend.row_pieces())):
            rows = deltas.view(len(deltas), -1, width)
            products = torch.einsum("aij,bij->iab", rows.double(), rows.double())
            pull = _agreement(products)
            mean = rows.mean(0).mul_(pull.to(rows.dtype)[:, None])
            yield base.add_(mean.view(-1))
        return
    products = torch.zeros(len(blend.others), len(blend.others), dtype=torch.float64)
    for _, _, deltas in _together(blend, list(blend.pieces())):
        products += deltas @ deltas.T
    pull = float(_agreement(products))
    for _, base, deltas in _together(blend, list(blend.pieces())):
        yield base.add_(deltas.mean(0), alpha=pull)


def _agreement(products: Tensor) -> Tensor:
    """How far from the base to the mean, from the products [..., models, models] of their taus."""
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


def _together(blend: Blend, spans: list[tuple[int, int]]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Start, piece of the base, and pieces [models, n] of all task vectors."""
    longest = max((stop - start for start, stop in spans), default=0)
    others = blend.others
    room = torch.empty((len(others) + 1) * longest, dtype=blend.dtype)
    for start, stop in spans:
        # Cut so that pieces of a shorter last span lie side by side as well.
        whole = room[: (len(others) + 1) * (stop - start)].view(len(others) + 1, -1)
        base, deltas = whole[0], whole[1:]
        blend.base.read_into(start, base)
        for operand, delta in zip(others, deltas, strict=True):
            operand.read_into(start, delta)
            delta.sub_(base)
        yield start, base, deltas


def _prepared(
    blend: Blend, thinning: Thinning | None
) -> tuple[list[tuple[int, int]], list[tuple[Operand, sparsify.Thin, float]]]:
    """The pieces to go through; each model of a weight, what thins it, and its factor."""
    ranked = thinning is sparsify.dropped_by_rank
    spans = list(blend.row_pieces() if ranked else blend.pieces())
    models = []
    for operand in blend.others:
        if operand.values["weight"] == 0:
            continue
        start = thinning(blend, operand) if thinning else lambda: sparsify.keep_all
        scale = 1.0
        if thinning and blend.values["rescale"] and not blend.values["rescale_by_density"]:
            scale = sparsify.scale_of_norm(blend, operand, start, spans)
        models.append((operand, start(), operand.values["weight"] * scale))
    return spans, models


def _added(blend: Blend, thinning: Thinning | None) -> Iterator[Tensor]:
    """The base plus the weighted sum of thinned task vectors."""
    spans, models = _prepared(blend, thinning)
    total = sum(operand.values["weight"] for operand in blend.others)
    factor = blend.values["lambda"]
    if blend.values["normalize"] and abs(total) >= 1e-8:
        factor /= total
    base_room, tau_room, sum_room = blend.buffers(3, max((b - a for a, b in spans), default=0))
    for start, stop in spans:
        base, tau, mixed = (room[: stop - start] for room in (base_room, tau_room, sum_room))
        blend.base.read_into(start, base)
        mixed.zero_()
        for operand, thin, weight in models:
            operand.read_into(start, tau)
            thin(tau.sub_(base))
            mixed.add_(tau, alpha=weight)
        yield base.add_(mixed, alpha=factor)


def _elected(blend: Blend, thinning: Thinning) -> Iterator[Tensor]:
    """The base plus those entries of thinned task vectors that have the sign of their sum.

    A sum of zero counts as positive. With `normalize` they are divided by their weights.
    """
    spans, models = _prepared(blend, thinning)
    longest = max((stop - start for start, stop in spans), default=0)
    rooms = blend.buffers(len(models) + 3, longest)
    for start, stop in spans:
        base, mixed, divisor, *deltas = (room[: stop - start] for room in rooms)
        blend.base.read_into(start, base)
        mixed.zero_()
        for (operand, thin, weight), delta in zip(models, deltas, strict=True):
            operand.read_into(start, delta)
            thin(delta.sub_(base))
            mixed.add_(delta.mul_(weight))
        sign = torch.copysign(torch.ones(()), mixed.add_(0.0))  # -0 + 0 = 0
        mixed.zero_()
        divisor.zero_()
        for (operand, _, _), delta in zip(models, deltas, strict=True):
            delta.mul_(sign).clamp_(min=0)
            mixed.add_(delta)
            if blend.values["normalize"]:
                divisor.add_(delta.sign_(), alpha=operand.values["weight"])
        if blend.values["normalize"]:
            mixed.div_(divisor.add_(divisor == 0))
        yield base.addcmul_(mixed, sign.to(mixed.dtype), value=blend.values["lambda"])
