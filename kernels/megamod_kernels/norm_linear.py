"""A LayerNorm fused into the linear layer after it; the normed rows are never stored.

The norm of the encoder's last block precedes the demultiplexer. Its moments are computed once, and
the rows are normed in the prologue of the matrix product.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from megamod_kernels.dispatch import uses_own_matmul

ROWS, WIDTH = 4, 256  # tile of the moments kernel; the tuned widths are multiples of WIDTH


class Norm(NamedTuple):
    """A LayerNorm: weight and bias [D], eps."""

    weight: Tensor
    bias: Tensor
    eps: float


def norm_linear_reference(
    x: Tensor, norm: Norm, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Compute LN(x) weight^T + bias, [..., E], in plain torch.

    Args:
        x, norm, weight, bias: as in `norm_linear`.
    """
    return F.linear(F.layer_norm(x, x.shape[-1:], *norm), weight, bias)


@torch.library.custom_op("megamod::norm_linear", mutates_args=())
def _norm_linear(
    x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    """Compute LN(x) weight^T + bias, [..., E], by one kernel for moments and one for products.

    `gain` and `shift` [D] are weight and bias of the norm, `eps` its epsilon; others as in
    `norm_linear`.
    """
    from megamod_kernels import norm_linear_kernels as kernels
    from megamod_kernels.keyed_linear_kernels import select_matmul_tile

    output = x.new_empty(*x.shape[:-1], len(weight))
    if not output.numel():
        return output
    size, outputs = x.shape[-1], len(weight)
    rows = x.numel() // size
    x, gain, shift = x.contiguous(), gain.contiguous(), shift.contiguous()
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    stats = x.new_empty((2, rows), dtype=torch.float32)
    kernels.norm_moments_kernel[(-(-rows // ROWS),)](
        x, stats, rows, size, eps, ROWS=ROWS, WIDTH=WIDTH, num_warps=4
    )
    tile_rows, tile_columns, inner, warps, stages = select_matmul_tile(
        rows, outputs, x.element_size()
    )
    kernels.norm_matmul_kernel[(-(-rows // tile_rows) * -(-outputs // tile_columns),)](
        x, stats, gain, shift, weight, weight if bias is None else bias.contiguous(), output,
        rows, size, outputs, weight.stride(0), ROWS=tile_rows, COLUMNS=tile_columns, INNER=inner,
        BIAS=bias is not None, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return output


@_norm_linear.register_fake
def _(
    x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    """Return an empty result of `_norm_linear`, for tracing by torch.compile."""
    return x.new_empty(*x.shape[:-1], len(weight))


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    """Save in `ctx` what `_backward` reads: the arguments of `_norm_linear` but for the bias."""
    *tensors, _, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(
    ctx: torch.autograd.function.FunctionCtx, upstream: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, gain, shift, weight and bias, None for those not needed.

    `upstream` [..., E] is the gradient of the output; the normed rows are recomputed.
    """
    x, gain, shift, weight = ctx.saved_tensors
    needed = ctx.needs_input_grad
    flat, upstream = x.flatten(0, -2), upstream.flatten(0, -2)
    shape = list(x.shape[-1:])
    normed, mean, rstd = torch.ops.aten.native_layer_norm(flat, shape, gain, shift, ctx.eps)
    grad_weight = upstream.T @ normed if needed[3] else None
    grad_bias = upstream.sum(0) if needed[4] else None
    grads = (None, None, None)
    if any(needed[:3]):
        grads = torch.ops.aten.native_layer_norm_backward(
            upstream @ weight, flat, shape, mean, rstd, gain, shift, list(needed[:3])
        )
    grad_x = grads[0].view_as(x) if needed[0] else None
    return grad_x, *grads[1:], grad_weight, grad_bias, None


_norm_linear.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.megamod.norm_linear)
def _count_flops(
    x: tuple[int, ...],
    gain: object,
    shift: object,
    weight: tuple[int, ...],
    *_: object,
    **__: object,
) -> int:
    """Count the FLOPs of the matrix product, from the shapes of the arguments of `_norm_linear`.

    Those of the norm are not counted.
    """
    rows = 1
    for count in x[:-1]:
        rows *= count
    return 2 * rows * weight[0] * weight[1]


def uses_kernels(implementation: str, x: Tensor) -> bool:
    """Return True if `norm_linear` of x runs its kernels: float64 and autocast never do.

    Args:
        implementation: "auto", "triton" or "reference".
    Raises:
        ValueError: as in `uses_triton`.
    """
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    return uses_own_matmul(implementation, x) and x.dtype != torch.float64 and not autocast


def norm_linear(
    x: Tensor,
    norm: Norm,
    weight: Tensor,
    bias: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Compute LN(x) weight^T + bias.

    Args:
        x: [..., D].
        norm: of the last dimension.
        weight: [E, D], dtype of x; any row stride.
        bias: [E], or None.
        implementation: "auto", "triton" or "reference"; "auto" leaves float32 to the reference,
            because its products are faster than a kernel of our own without tensor cores.
            float64 and autocast are always computed by the reference.
    Returns:
        [..., E], in x's dtype. Differentiable once; backward saves x and the parameters.
    Raises:
        ValueError: if shapes or dtypes do not fit, or the implementation cannot run.
    """
    size = x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != size or norm.weight.shape != (size,):
        raise ValueError(
            f"x {tuple(x.shape)}, norm {tuple(norm.weight.shape)} and weight "
            f"{tuple(weight.shape)} do not fit: expected [..., D], [D] and [E, D]"
        )
    if not uses_kernels(implementation, x):
        return norm_linear_reference(x, norm, weight, bias)
    if x.dtype != weight.dtype:
        raise ValueError(f"x of {x.dtype} and weight of {weight.dtype}: kernels take one dtype")
    return _norm_linear(x, norm.weight, norm.bias, weight, bias, norm.eps)
