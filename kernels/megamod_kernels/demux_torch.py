"""RSA demultiplexing in plain torch: its definition, and a form of it that keeps little.

The first layer sees [key ; hidden]. Its matrix is split, W = [W_key | W_hidden], so that the hidden
part is computed once per mixed position and the key part once per instance: 2 N times fewer
operations than concatenating, and the concatenation is never built.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from megamod_kernels.norm_linear import Norm, norm_linear


class Pairs(NamedTuple):
    """Positions to demultiplex, each for one instance; all [R] int64.

    Attributes:
        group: which mixed sequence.
        instance: which of its N instances.
        position: which of its positions.
    """

    group: Tensor
    instance: Tensor
    position: Tensor


class Chain(NamedTuple):
    """Weights behind the first layer.

    Attributes:
        dense: (weight [D, D], bias [D]) of each residual layer.
        last: weight [D, D] and bias [D] of the layer before the norm.
        norm: weight [D] and bias [D] of the norm.
        eps: of the norm.
    """

    dense: Sequence[tuple[Tensor, Tensor]]
    last: tuple[Tensor, Tensor]
    norm: tuple[Tensor, Tensor]
    eps: float


def split_projection(
    hidden: Tensor,
    key: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: Norm | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Both parts of a layer over [key ; hidden], each computed once.

    Args:
        hidden: [..., D] mixed states.
        key: [..., N, D] keys.
        weight: [D, 2 D], key columns first.
        bias: [D].
        norm: of the hidden states, if that is still to be done.
        implementation: of the norm and the product behind it, see `norm_linear`.
    Returns:
        hidden part [..., D] and key part, bias included, [..., N, D].
    """
    # Gradients of parts that were split together are put together at once.
    by_key, by_hidden = weight.split(key.shape[-1], 1)
    of_key = F.linear(key, by_key, bias)
    if norm is None:
        return F.linear(hidden, by_hidden), of_key
    return norm_linear(hidden, norm, by_hidden, implementation=implementation), of_key


def add_pairs(hidden: Tensor, key: Tensor, pairs: Pairs | None) -> Tensor:
    """Sum of a hidden and a key part for every instance and position, or for some.

    Args:
        hidden: [B, L, D] of the mixed positions.
        key: [N, D], or [B, N, D] where every group has keys of its own.
        pairs: which ones; None for all.
    Returns:
        [R, D], or [B, N, L, D].
    """
    if pairs is None:
        return hidden[:, None] + key[..., None, :]
    keys = key[pairs.instance] if key.dim() == 2 else key[pairs.group, pairs.instance]
    return hidden[pairs.group, pairs.position] + keys


def rsa_demux_reference(
    hidden: Tensor,
    key: Tensor,
    chain: Chain,
    pairs: Pairs | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The definition; arguments and result as of `rsa_demux`."""
    x = F.dropout(F.gelu(add_pairs(hidden, key, pairs)), dropout)
    for weight, bias in chain.dense:
        x = F.dropout(F.gelu(F.linear(x, weight, bias)), dropout) + x
    last = F.gelu(F.linear(x, *chain.last))
    return F.layer_norm(last, last.shape[-1:], *chain.norm, chain.eps) + x


class RsaDemuxFunction(torch.autograd.Function):
    """Saves both parts of the first layer and what each GELU was given; nothing else.

    Everything between is element-wise and made again in backward. The plain form saves five times
    as much: every GELU's input and output, and the concatenation.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        key: Tensor,
        pairs: Pairs | None,
        dropout: float,
        eps: float,
        *weights: Tensor,
    ) -> Tensor:
        *dense, last, norm = by_two(weights)
        first = add_pairs(hidden, key, pairs)
        masks = [
            torch.empty_like(first, dtype=torch.bool).bernoulli_(1 - dropout) if dropout else None
            for _ in range(len(dense) + 1)
        ]
        x = _drop(F.gelu(first), masks[0], dropout)
        before = []
        for (weight, bias), mask in zip(dense, masks[1:], strict=True):
            before.append(F.linear(x, weight, bias))
            x = _drop(F.gelu(before[-1]), mask, dropout).add_(x)
        before.append(F.linear(x, *last))
        # Not in place: up to torch 2.11 the compiler drops the gradient of such a result.
        output = F.layer_norm(F.gelu(before[-1]), x.shape[-1:], *norm, eps) + x
        ctx.save_for_backward(hidden, key, *(pairs or ()), *weights, *before, *masks)
        ctx.counts = (len(pairs or ()), len(weights), len(before))
        ctx.dropout, ctx.eps = dropout, eps
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, upstream: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, key, *rest = ctx.saved_tensors
        pairs, weights, before, masks = _split(rest, ctx.counts)
        pairs = Pairs(*pairs) if pairs else None
        *dense, last, norm = by_two(weights)
        first = add_pairs(hidden, key, pairs)
        states = [_drop(F.gelu(first), masks[0], ctx.dropout)]
        for given, mask in zip(before[:-1], masks[1:], strict=True):
            states.append(_drop(F.gelu(given), mask, ctx.dropout).add_(states[-1]))

        grad, grad_norm = _norm_backward(upstream, F.gelu(before[-1]), norm, ctx.eps)
        grad = torch.ops.aten.gelu_backward(grad, before[-1])
        grads = [*_weight_grads(grad, states[-1]), *grad_norm]
        grad = (grad @ last[0]).add_(upstream)
        for number in reversed(range(len(dense))):
            inner = _drop(grad, masks[number + 1], ctx.dropout, keep=True)
            inner = torch.ops.aten.gelu_backward(inner, before[number])
            grads[:0] = _weight_grads(inner, states[number])
            grad = grad.add_(inner @ dense[number][0])
        grad = torch.ops.aten.gelu_backward(_drop(grad, masks[0], ctx.dropout), first)
        return *_take_apart(grad, hidden, key, pairs), None, None, None, *grads


def by_two(weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases in pairs."""
    return list(zip(weights[::2], weights[1::2], strict=True))


def _split(tensors: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    parts, start = [], 0
    for count in (*counts, len(tensors) - sum(counts)):
        parts.append(list(tensors[start : start + count]))
        start += count
    return parts


def _drop(x: Tensor, mask: Tensor | None, dropout: float, keep: bool = False) -> Tensor:
    """Dropout by a mask, in place unless x must be kept."""
    if mask is None:
        return x
    return (x * mask if keep else x.mul_(mask)).mul_(1 / (1 - dropout))


def _weight_grads(grad: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    grad, given = grad.flatten(0, -2), given.flatten(0, -2)
    return grad.T @ given, grad.sum(0)


def _norm_backward(
    upstream: Tensor, given: Tensor, norm: tuple[Tensor, Tensor], eps: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    shape = list(given.shape[-1:])
    _, mean, rstd = torch.ops.aten.native_layer_norm(given, shape, *norm, eps)
    grad, *weights = torch.ops.aten.native_layer_norm_backward(
        upstream.contiguous(), given, shape, mean, rstd, *norm, [True, True, True]
    )
    return grad, tuple(weights)


def _take_apart(
    grad: Tensor, hidden: Tensor, key: Tensor, pairs: Pairs | None
) -> tuple[Tensor, Tensor]:
    """Gradients of both summands of `add_pairs`."""
    if pairs is None:
        return grad.sum(1), grad.sum((0, 2))
    place = pairs.group * hidden.shape[1] + pairs.position
    grad_hidden = torch.zeros_like(hidden).flatten(0, 1).index_add_(0, place, grad)
    grad_key = torch.zeros_like(key).index_add_(0, pairs.instance, grad)
    return grad_hidden.view_as(hidden), grad_key
