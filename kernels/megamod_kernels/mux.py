"""Multiplexing: the mean of N instances of a group, each multiplied by its key.

Hadamard multiplexing is limited by memory bandwidth: at least the instances are read once and the
result is written once. The product of instances and keys is never stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megamod_kernels.dispatch import uses_triton

WIDTH = 256  # columns per tile; the tuned widths are multiples of it
ROWS = 4  # mixed positions per tile
PARTIALS = 128  # rows of the buffer of partial sums of the key's gradient


def multiplex_reference(x: Tensor, key: Tensor) -> Tensor:
    """Compute `multiplex` in plain torch, in float32 (float64 for float64), as its definition.

    Args:
        x, key: [B, N, L, D] and [N, D].
    Returns:
        [B, L, D], in x's dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) * key.to(wide)[:, None]).mean(1).to(x.dtype)


class _MultiplexFunction(torch.autograd.Function):
    """Autograd function of `multiplex` in plain torch, without a tensor [B, N, L, D].

    Instances are added one at a time. Backward needs them only for the gradient of the key: with a
    frozen key only the key is saved.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, key: Tensor) -> Tensor:
        """Compute the mean over instances of key * x: [B, N, L, D], [N, D] -> [B, L, D]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        scaled = key.to(wide) / x.shape[1]
        mixed = x[:, 0].to(wide) * scaled[0]
        for instance in range(1, x.shape[1]):
            add = mixed.addcmul if instance == x.shape[1] - 1 else mixed.addcmul_
            mixed = add(x[:, instance].to(wide), scaled[instance])
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, key)
        # No in-place result and no conversion to the same dtype: up to torch 2.11 the compiler
        # drops the gradient of such a result.
        return mixed if x.dtype == wide else mixed.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, upstream: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of x and key; None for one that is not needed.

        `upstream` [B, L, D] is the gradient of the result.
        """
        x, key = ctx.saved_tensors
        wide = torch.promote_types(upstream.dtype, torch.float32)
        shared = upstream.to(wide) / key.shape[0]
        grad_x = grad_key = None
        if ctx.needs_input_grad[0]:
            grad_x = (shared[:, None] * key.to(wide)[:, None]).to(upstream.dtype)
        if ctx.needs_input_grad[1]:
            instances = range(key.shape[0])
            rows = [(x[:, i].to(wide) * shared).flatten(0, -2).sum(0) for i in instances]
            grad_key = torch.stack(rows).to(key.dtype)
        return grad_x, grad_key


@torch.library.custom_op("megamod::multiplex", mutates_args=())
def _multiplex(x: Tensor, key: Tensor) -> Tensor:
    """Compute the mean over instances of key * x, [B, L, D], with the kernel; see `multiplex`."""
    from megamod_kernels.mux_kernels import multiplex_fwd_kernel

    groups, instances, length, size = x.shape
    x, key = x.contiguous(), key.contiguous()
    mixed = x.new_empty(groups, length, size)
    rows = groups * length
    if mixed.numel():
        grid = (-(-rows // ROWS), -(-size // WIDTH))
        multiplex_fwd_kernel[grid](
            x, key, mixed, rows, length, size, instances, ROWS, WIDTH, num_warps=4
        )
    return mixed


@_multiplex.register_fake
def _(x: Tensor, key: Tensor) -> Tensor:
    """Return an empty result of `_multiplex`, for tracing by torch.compile."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[3])


@torch.library.custom_op("megamod::multiplex_backward", mutates_args=())
def _multiplex_backward(
    upstream: Tensor, x: Tensor | None, key: Tensor, needs_x: bool
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of x [B, N, L, D] and of the key [N, D] with the kernel.

    Args:
        upstream: [B, L, D], gradient of the result.
        x: [B, N, L, D]; None: the gradient of the key is not needed, and is returned empty.
        key: [N, D].
        needs_x: compute the gradient of x; else it is returned empty.
    """
    from megamod_kernels.mux_kernels import multiplex_bwd_kernel

    groups, length, size = upstream.shape
    instances, rows = len(key), groups * length
    upstream, key = upstream.contiguous(), key.contiguous()
    grad_x = upstream.new_empty((groups, instances, length, size) if needs_x else 0)
    if not upstream.numel():
        return grad_x, torch.zeros_like(key) if x is not None else key.new_empty(0)
    blocks = -(-rows // ROWS)
    programs = blocks if x is None else min(blocks, PARTIALS)
    shape = (programs, instances, size) if x is not None else 0
    partial = upstream.new_empty(shape, dtype=torch.float32)
    multiplex_bwd_kernel[(programs, -(-size // WIDTH))](
        upstream,
        x.contiguous() if x is not None else upstream,
        key,
        grad_x,
        partial,
        rows,
        length,
        size,
        instances,
        blocks,
        ROWS,
        WIDTH,
        needs_x,
        x is not None,
        num_warps=4,
    )
    return grad_x, partial.sum(0).to(key.dtype) if x is not None else key.new_empty(0)


@_multiplex_backward.register_fake
def _(upstream: Tensor, x: Tensor | None, key: Tensor, needs_x: bool) -> tuple[Tensor, Tensor]:
    """Return empty results of `_multiplex_backward`, for tracing by torch.compile."""
    groups, length, size = upstream.shape
    grad_x = upstream.new_empty((groups, len(key), length, size) if needs_x else 0)
    return grad_x, torch.empty_like(key) if x is not None else key.new_empty(0)


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor
) -> None:
    """Save in `ctx` what `_backward` reads: the key, and x if the gradient of the key is needed."""
    x, key = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, key)


def _backward(
    ctx: torch.autograd.function.FunctionCtx, upstream: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of x and key; None for one that is not needed.

    `upstream` [B, L, D] is the gradient of the result.
    """
    needs_x, needs_key = ctx.needs_input_grad
    grad_x, grad_key = _multiplex_backward(upstream, *ctx.saved_tensors, needs_x)
    return grad_x if needs_x else None, grad_key if needs_key else None


_multiplex.register_autograd(_backward, setup_context=_setup_context)


def multiplex(x: Tensor, key: Tensor, implementation: str = "auto") -> Tensor:
    """Multiplex N instances into one sequence by keyed averaging.

    Args:
        x: [B, N, L, D] instances, any float dtype.
        key: [N, D] one vector per instance; its dtype may be wider than that of x.
        implementation: "triton", "reference", or "auto", which is Triton on a GPU. float64 always
            uses the reference.
    Returns:
        [B, L, D], in x's dtype; accumulated in float32. Differentiable once in x and key.
    Raises:
        ValueError: if N or D of x and key differ, N is 0, or the implementation cannot run.
    Source: Murahari et al. 2022 (DataMUX), section 3.1, Hadamard products.
    """
    if x.dim() != 4 or key.shape != (x.shape[1], x.shape[3]) or not x.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} and key {tuple(key.shape)} do not fit: expected [B, N, L, D] "
            "and [N, D], N at least 1"
        )
    if uses_triton(implementation, x) and x.dtype != torch.float64:
        return _multiplex(x, key)
    return _MultiplexFunction.apply(x, key)
