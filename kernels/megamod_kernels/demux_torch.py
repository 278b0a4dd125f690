"""RSA demultiplexing in plain torch: the reference, and a form that saves less for backward.

`demux.py` describes the split of the first layer, whose two parts are computed here.
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
        group: index of the mixed sequence.
        instance: index of the instance, 0 to N - 1.
        position: index of the position.
    """

    group: Tensor
    instance: Tensor
    position: Tensor


class Chain(NamedTuple):
    """Weights of the layers after the first.

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
    """Compute the two parts of a layer over [key ; hidden], each once.

    Args:
        hidden: [..., D] mixed states.
        key: [..., N, D] keys.
        weight: [D, 2 D], key columns first.
        bias: [D].
        norm: LayerNorm to apply to the hidden states first; None: already applied.
        implementation: of the norm and its product, see `norm_linear`.
    Returns:
        hidden part [..., D] and key part, bias included, [..., N, D].
    Raises:
        ValueError: as `norm_linear`, with a norm.
    """
    # One split call, so that autograd joins both gradients in one operation.
    key_weight, hidden_weight = weight.split(key.shape[-1], 1)
    key_part = F.linear(key, key_weight, bias)
    if norm is None:
        return F.linear(hidden, hidden_weight), key_part
    return norm_linear(hidden, norm, hidden_weight, implementation=implementation), key_part


def add_pairs(hidden_part: Tensor, key_part: Tensor, pairs: Pairs | None) -> Tensor:
    """Add hidden and key parts for every instance and position, or for some pairs.

    Args:
        hidden_part: [B, L, D] of the mixed positions.
        key_part: [N, D], or [B, N, D] with separate keys per group.
        pairs: the pairs to compute; None for all.
    Returns:
        [R, D], or [B, N, L, D].
    """
    if pairs is None:
        return hidden_part[:, None] + key_part[..., None, :]
    keys = (
        key_part[pairs.instance] if key_part.dim() == 2 else key_part[pairs.group, pairs.instance]
    )
    return hidden_part[pairs.group, pairs.position] + keys


def rsa_demux_reference(
    hidden_part: Tensor,
    key_part: Tensor,
    chain: Chain,
    pairs: Pairs | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute `rsa_demux` in plain torch; arguments and result as there."""
    x = F.dropout(F.gelu(add_pairs(hidden_part, key_part, pairs)), dropout)
    for weight, bias in chain.dense:
        x = F.dropout(F.gelu(F.linear(x, weight, bias)), dropout) + x
    last = F.gelu(F.linear(x, *chain.last))
    return F.layer_norm(last, last.shape[-1:], *chain.norm, chain.eps) + x


class RsaDemuxFunction(torch.autograd.Function):
    """Autograd function of `rsa_demux` in plain torch that saves little for backward.

    Saved are the two parts, the inputs of later GELUs, and dropout masks. Everything in between is
    element-wise and recomputed in backward. The reference saves five times as much: input and
    output of every GELU, and the concatenation.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden_part: Tensor,
        key_part: Tensor,
        pairs: Pairs | None,
        dropout: float,
        eps: float,
        *weights: Tensor,
    ) -> Tensor:
        """Compute `rsa_demux`, [R, D] or [B, N, L, D].

        Args:
            hidden_part, key_part, pairs, dropout: as in `rsa_demux`.
            eps: of the norm.
            weights: a weight and a bias for each layer of the chain, the norm last.
        """
        *dense, last, norm = pair_weights_with_biases(weights)
        first = add_pairs(hidden_part, key_part, pairs)
        masks = [
            torch.empty_like(first, dtype=torch.bool).bernoulli_(1 - dropout) if dropout else None
            for _ in range(len(dense) + 1)
        ]
        x = _apply_dropout(F.gelu(first), masks[0], dropout)
        pre_gelu = []
        for (weight, bias), mask in zip(dense, masks[1:], strict=True):
            pre_gelu.append(F.linear(x, weight, bias))
            x = _apply_dropout(F.gelu(pre_gelu[-1]), mask, dropout).add_(x)
        pre_gelu.append(F.linear(x, *last))
        # Not in place: up to torch 2.11 the compiler drops the gradient of such a result.
        output = F.layer_norm(F.gelu(pre_gelu[-1]), x.shape[-1:], *norm, eps) + x
        ctx.save_for_backward(hidden_part, key_part, *(pairs or ()), *weights, *pre_gelu, *masks)
        ctx.counts = (len(pairs or ()), len(weights), len(pre_gelu))
        ctx.dropout, ctx.eps = dropout, eps
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, upstream: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of the two parts and of all weights; None for other arguments.

        `upstream` is the gradient of the output, of its shape.
        """
        hidden_part, key_part, *rest = ctx.saved_tensors
        pairs, weights, pre_gelu, masks = _split_by_counts(rest, ctx.counts)
        pairs = Pairs(*pairs) if pairs else None
        *dense, last, norm = pair_weights_with_biases(weights)
        first = add_pairs(hidden_part, key_part, pairs)
        states = [_apply_dropout(F.gelu(first), masks[0], ctx.dropout)]
        for inputs, mask in zip(pre_gelu[:-1], masks[1:], strict=True):
            states.append(_apply_dropout(F.gelu(inputs), mask, ctx.dropout).add_(states[-1]))

        grad, grad_norm = _compute_norm_grads(upstream, F.gelu(pre_gelu[-1]), norm, ctx.eps)
        grad = torch.ops.aten.gelu_backward(grad, pre_gelu[-1])
        grads = [*_compute_linear_grads(grad, states[-1]), *grad_norm]
        grad = (grad @ last[0]).add_(upstream)
        for number in reversed(range(len(dense))):
            inner = _apply_dropout(grad, masks[number + 1], ctx.dropout, keep=True)
            inner = torch.ops.aten.gelu_backward(inner, pre_gelu[number])
            grads[:0] = _compute_linear_grads(inner, states[number])
            grad = grad.add_(inner @ dense[number][0])
        grad = torch.ops.aten.gelu_backward(_apply_dropout(grad, masks[0], ctx.dropout), first)
        return *_split_grad_of_pairs(grad, hidden_part, key_part, pairs), None, None, None, *grads


def pair_weights_with_biases(weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Group a flat list weight, bias, weight, bias, ... into pairs; the norm is the last one."""
    return list(zip(weights[::2], weights[1::2], strict=True))


def _split_by_counts(tensors: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    """Split `tensors` into parts of `counts` tensors, in order, and a last part with the rest."""
    parts, start = [], 0
    for count in (*counts, len(tensors) - sum(counts)):
        parts.append(list(tensors[start : start + count]))
        start += count
    return parts


def _apply_dropout(x: Tensor, mask: Tensor | None, dropout: float, keep: bool = False) -> Tensor:
    """Apply a dropout mask of x's shape, scaled by 1 / (1 - dropout).

    Args:
        mask: True for elements that stay; None: return x.
        keep: leave x as it is; else it is changed in place.
    """
    if mask is None:
        return x
    return (x * mask if keep else x.mul_(mask)).mul_(1 / (1 - dropout))


def _compute_linear_grads(grad: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight [E, D] and bias [E] from that of the output [..., E].

    `inputs` [..., D] are those of the layer; leading axes are summed over.
    """
    grad, inputs = grad.flatten(0, -2), inputs.flatten(0, -2)
    return grad.T @ inputs, grad.sum(0)


def _compute_norm_grads(
    upstream: Tensor, inputs: Tensor, norm: tuple[Tensor, Tensor], eps: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the gradients of a LayerNorm's inputs [..., D], and of its weight and bias [D].

    Args:
        upstream: gradient of the output, [..., D].
        norm, eps: weight and bias [D], epsilon.
    """
    shape = list(inputs.shape[-1:])
    _, mean, rstd = torch.ops.aten.native_layer_norm(inputs, shape, *norm, eps)
    grad, *weights = torch.ops.aten.native_layer_norm_backward(
        upstream.contiguous(), inputs, shape, mean, rstd, *norm, [True, True, True]
    )
    return grad, tuple(weights)


def _split_grad_of_pairs(
    grad: Tensor, hidden_part: Tensor, key_part: Tensor, pairs: Pairs | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of hidden_part and key_part from that of `add_pairs`' result.

    `grad` is [R, D] for pairs, else [B, N, L, D]; other arguments as in `add_pairs`.
    """
    if pairs is None:
        return grad.sum(1), grad.sum((0, 2))
    index = pairs.group * hidden_part.shape[1] + pairs.position
    grad_hidden = torch.zeros_like(hidden_part).flatten(0, 1).index_add_(0, index, grad)
    grad_key = torch.zeros_like(key_part).index_add_(0, pairs.instance, grad)
    return grad_hidden.view_as(hidden_part), grad_key
