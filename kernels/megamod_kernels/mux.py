"""Multiplexing: N instances of a group become one sequence, each marked by its key.

Hadamard multiplexing is pure bandwidth: the least it can move is the instances once and the result
once. The product of instances and keys is never held.
"""

import torch
from torch import Tensor


def multiplex_reference(x: Tensor, key: Tensor) -> Tensor:
    """The definition: the mean over instances of key * x, in float32 (float64 for float64)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) * key.to(wide)[:, None]).mean(1).to(x.dtype)


class _MultiplexFunction(torch.autograd.Function):
    """Adds one instance after the other, so that nothing of size [B, N, L, D] is made.

    Backward needs the instances only for the gradient of the key: with a frozen key nothing but
    the key itself is saved.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, key: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        scaled = key.to(wide) / x.shape[1]
        mixed = x[:, 0].to(wide) * scaled[0]
        for instance in range(1, x.shape[1]):
            mixed.addcmul_(x[:, instance].to(wide), scaled[instance])
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, key)
        return mixed.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, upstream: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
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


def multiplex(x: Tensor, key: Tensor) -> Tensor:
    """Combine N instances into one sequence by keyed averaging.

    Args:
        x: [B, N, L, D] instances, any float dtype.
        key: [N, D] one vector per instance; its dtype may be wider than that of x.
    Returns:
        [B, L, D], in x's dtype; accumulated in float32. Differentiable once in x and key.
    Raises:
        ValueError: if N or D of x and key differ.
    Source: Murahari et al. 2022 (DataMUX), section 3.1, Hadamard products.
    """
    if x.dim() != 4 or key.shape != (x.shape[1], x.shape[3]):
        raise ValueError(
            f"x {tuple(x.shape)} and key {tuple(key.shape)} do not fit: expected [B, N, L, D] "
            "and [N, D]"
        )
    return _MultiplexFunction.apply(x, key)
