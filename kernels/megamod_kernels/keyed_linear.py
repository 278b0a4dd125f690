"""A linear layer over instances multiplied by their keys, fused into one product.

B, N, L, D, E: groups, instances of a group, tokens, columns of the input and of the output. The
product of instances and keys, as large as the instances, exists in registers only. Backward saves
the instances alone: with C_n = dy_n^T x_n over the rows of instance n, the gradient of the weight
is the sum of C_n * key_n over instances, and that of key_n the sum of weight * C_n over the outputs
of the layer.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from megamod_kernels.dispatch import uses_own_matmul

SPLIT_ROWS = 1024  # smallest number of rows of an instance for a separate partial sum


def keyed_linear_reference(
    x: Tensor, key: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Compute (x * key) weight^T + bias, [B, N, L, E], in plain torch.

    Args:
        x, key, weight, bias: [B, N, L, D], [N, D], [E, D] and [E], as in `keyed_linear`.
    """
    return F.linear(x * key[:, None].to(x.dtype), weight, bias)


@torch.library.custom_op("megamod::keyed_linear", mutates_args=())
def _keyed_linear(x: Tensor, key: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `keyed_linear`, [B, N, L, E], with the kernel; arguments as there."""
    output = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)
    _launch_matmul(x, weight, key, bias, output, forward=True)
    return output


@_keyed_linear.register_fake
def _(x: Tensor, key: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return an empty result of `_keyed_linear`, for tracing by torch.compile."""
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)


@torch.library.custom_op("megamod::keyed_linear_grad_input", mutates_args=())
def _compute_input_grad(upstream: Tensor, key: Tensor, weight: Tensor) -> Tensor:
    """Compute the gradient of x, [B, N, L, D], from that of the output, `upstream` [B, N, L, E].

    `key` and `weight` are those of `keyed_linear`.
    """
    output = torch.empty(
        (*upstream.shape[:-1], weight.shape[1]), dtype=upstream.dtype, device=upstream.device
    )
    _launch_matmul(upstream, weight, key, None, output, forward=False)
    return output


@_compute_input_grad.register_fake
def _(upstream: Tensor, key: Tensor, weight: Tensor) -> Tensor:
    """Return an empty result of `_compute_input_grad`, for tracing by torch.compile."""
    shape = (*upstream.shape[:-1], weight.shape[1])
    return torch.empty(shape, dtype=upstream.dtype, device=upstream.device)


@torch.library.custom_op("megamod::keyed_linear_grad_weight", mutates_args=())
def _compute_weight_grads(
    upstream: Tensor, x: Tensor, key: Tensor, weight: Tensor, needs_key: bool
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of the weight [E, D] and of the keys [N, D], empty unless `needs_key`.

    `upstream` [B, N, L, E] is the gradient of the output; other arguments as in `keyed_linear`.
    Positions are split into parts, whose partial sums are added in float32.
    """
    from megamod_kernels import keyed_linear_kernels as kernels

    groups, instances, length, size = x.shape
    outputs = weight.shape[0]
    if x.numel() == 0 or outputs == 0:
        return torch.zeros_like(weight), torch.zeros_like(key if needs_key else key[:0])
    tile_columns, tile_inner, tile_rows, warps, stages = kernels.select_weight_tile(
        x.element_size(), needs_key
    )
    tiles = _ceil_divide(outputs, tile_columns) * _ceil_divide(size, tile_inner)
    positions = groups * length
    parts = max(1, min(_ceil_divide(kernels.PROGRAMS, tiles), positions // SPLIT_ROWS))
    part_positions = _ceil_divide(positions, parts)
    options = {"dtype": torch.float32, "device": x.device}
    weight_partial = torch.empty((parts, outputs, size), **options)
    key_rows = parts * _ceil_divide(outputs, tile_columns) if needs_key else 0
    key_partial = torch.empty((key_rows, instances, size), **options)
    kernels.keyed_weight_kernel[(tiles, parts)](
        upstream.contiguous(),
        x.contiguous(),
        key.contiguous(),
        weight.contiguous(),
        weight_partial,
        key_partial,
        positions,
        length,
        size,
        outputs,
        instances,
        part_positions,
        COLUMNS=tile_columns,
        INNER=tile_inner,
        ROWS=tile_rows,
        GRAD_KEY=needs_key,
        num_warps=warps,
        num_stages=stages,
    )
    grad_key = key_partial.sum(0) if needs_key else key_partial.new_empty((0, size))
    return weight_partial.sum(0).to(weight.dtype), grad_key.to(key.dtype)


@_compute_weight_grads.register_fake
def _(
    upstream: Tensor, x: Tensor, key: Tensor, weight: Tensor, needs_key: bool
) -> tuple[Tensor, Tensor]:
    """Return empty results of `_compute_weight_grads`, for tracing by torch.compile."""
    return (
        torch.empty(weight.shape, dtype=weight.dtype, device=weight.device),
        key.new_empty((key.shape[0] if needs_key else 0, key.shape[1])),
    )


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    """Save in `ctx` what `_backward` reads: key, weight, and x if a gradient of either is needed.

    `inputs` are the arguments of `_keyed_linear`.
    """
    x, key, weight, _ = inputs
    ctx.save_for_backward(x if any(ctx.needs_input_grad[1:3]) else None, key, weight)


def _backward(
    ctx: torch.autograd.function.FunctionCtx, upstream: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, key, weight and bias; None for those that are not needed.

    `upstream` [B, N, L, E] is the gradient of the output.
    """
    x, key, weight = ctx.saved_tensors
    needs_x, needs_key, needs_weight, needs_bias = ctx.needs_input_grad
    grad_x = grad_key = grad_weight = grad_bias = None
    if needs_x:
        grad_x = _compute_input_grad(upstream, key, weight)
    if needs_key or needs_weight:
        grad_weight, grad_key = _compute_weight_grads(upstream, x, key, weight, needs_key)
    if needs_bias:
        grad_bias = upstream.flatten(0, -2).sum(0)
    return grad_x, grad_key if needs_key else None, grad_weight, grad_bias


_keyed_linear.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(
    [
        torch.ops.megamod.keyed_linear,
        torch.ops.megamod.keyed_linear_grad_input,
        torch.ops.megamod.keyed_linear_grad_weight,
    ]
)
def _count_flops(
    first: tuple[int, ...], *rest: tuple[int, ...], out_shape: object = None, **_: object
) -> int:
    """Count the FLOPs of one matrix product of the size of the layer, which each operation is.

    Args:
        first, rest: shapes of the arguments of the operation; `first` is [B, N, L, columns].
    """
    weight = rest[2] if len(rest) > 3 else rest[1]
    rows = first[0] * first[1] * first[2]
    return 2 * rows * weight[0] * weight[1]


def keyed_linear(
    x: Tensor,
    key: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Compute (x * key) weight^T + bias, each instance multiplied by its key.

    Args:
        x: [B, N, L, D].
        key: [N, D]; its dtype may be wider than that of x.
        weight: [E, D], dtype of x.
        bias: [E], or None.
        implementation: "auto", "triton" or "reference"; "auto" leaves float32 to the reference,
            because its products are faster than a kernel of our own without tensor cores.
    Returns:
        [B, N, L, E], in x's dtype. Differentiable once; backward saves x and the parameters.
    Raises:
        ValueError: if shapes or dtypes do not fit, or the implementation cannot run.
    """
    if (
        x.dim() != 4
        or weight.dim() != 2
        or key.shape != (x.shape[1], x.shape[3])
        or weight.shape[1] != x.shape[3]
        or (bias is not None and bias.shape != weight.shape[:1])
    ):
        bias_shape = "none" if bias is None else tuple(bias.shape)
        raise ValueError(
            f"x {tuple(x.shape)}, key {tuple(key.shape)}, weight {tuple(weight.shape)} and bias "
            f"{bias_shape} do not fit: expected [B, N, L, D], [N, D], [E, D] and [E]"
        )
    if not uses_own_matmul(implementation, x):
        return keyed_linear_reference(x, key, weight, bias)
    if x.dtype != weight.dtype or x.dtype == torch.float64:
        raise ValueError(
            f"x of {x.dtype} and weight of {weight.dtype}: kernels take one of float32, bfloat16 "
            "and float16"
        )
    return _keyed_linear(x, key, weight, bias)


def _launch_matmul(
    source: Tensor, weight: Tensor, key: Tensor, bias: Tensor | None, output: Tensor, forward: bool
) -> None:
    """Run the product kernel, which fills `output`.

    Args:
        source: forward: x [B, N, L, D]; else the gradient of the output [B, N, L, E].
        weight, key, bias: as in `keyed_linear`; no bias unless `forward`.
        output: forward: (source * key) weight^T + bias, [B, N, L, E]; else the gradient of x,
            (source weight) * key, [B, N, L, D].
        forward: compute the forward pass, else the gradient of the input.
    """
    from megamod_kernels import keyed_linear_kernels as kernels

    if output.numel() == 0:
        return
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    _, instances, length, inner = source.shape
    rows, outputs = source.numel() // inner, output.shape[-1]
    tile_rows, tile_columns, tile_inner, warps, stages = kernels.select_matmul_tile(
        rows, outputs, source.element_size()
    )
    strides = weight.stride()
    kernels.keyed_matmul_kernel[
        (_ceil_divide(rows, tile_rows) * _ceil_divide(outputs, tile_columns),)
    ](
        source.contiguous(),
        weight,
        key.contiguous(),
        weight if bias is None else bias.contiguous(),
        output,
        rows,
        length,
        instances,
        inner,
        outputs,
        *(strides[::-1] if forward else strides),
        ROWS=tile_rows,
        COLUMNS=tile_columns,
        INNER=tile_inner,
        ONE_KEY=length % tile_rows == 0,
        FORWARD=forward,
        BIAS=bias is not None,
        num_warps=warps,
        num_stages=stages,
    )


def _ceil_divide(whole: int, part: int) -> int:
    """Return whole / part, rounded up."""
    return -(-whole // part)
