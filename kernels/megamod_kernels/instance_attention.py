"""Attention among the N instances of each position, for contextual multiplexing.

B, N, L, D: groups, instances of a group, tokens of a sequence, hidden size. Stock attention treats
this as B * L sequences of length N: it permutes every tensor and runs nearly empty tiles. Here a
tile holds all instances of as many positions as fit, row r being instance r % N of the tile's
position r // N. One matrix product computes all scores, and scores between different positions are
masked. Tensors keep the layout that the projections wrote.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from megamod_kernels.dispatch import uses_triton

# Added to the score of a masked key, as in BERT; finite, so all keys may be masked.
MASKED = -10000.0
LARGEST_N = 64  # instances of a position share a tile
LARGEST_HEAD = 256  # columns of a head


def instance_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute `instance_attention` in plain torch: stock attention over B * L sequences.

    Args:
        q, k, v: [B, N, L, D]; other arguments as in `instance_attention`.
    Returns:
        [B, N, L, D].
    """
    groups, _, length, _ = q.shape
    q, k, v = (
        x.transpose(1, 2).flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2)
        for x in (q, k, v)
    )  # [B * L, heads, N, K]
    shift = None
    if mask is not None:
        by_position = mask.transpose(1, 2).flatten(0, 1)
        shift = by_position.logical_not()[:, None, None, :].to(q.dtype) * MASKED
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=shift, dropout_p=dropout)
    return mixed.transpose(1, 2).flatten(2).unflatten(0, (groups, length)).transpose(1, 2)


@torch.library.custom_op("megamod::instance_attention", mutates_args=())
def _instance_attention(
    projected: list[Tensor], heads: int, mask: Tensor | None, dropout: float, seed: Tensor | None
) -> Tensor:
    """Run the forward kernel: [B, N, L, D].

    Args:
        projected: q, k and v [B, N, L, D], or one tensor [B, N, L, 3 D] with the three.
        heads, dropout: as in `instance_attention`.
        mask: [B, N, L] bool, or None.
        seed: [1] int64; None without dropout.
    """
    from megamod_kernels import instance_attention_kernels as kernels

    q, k, v = (_ensure_unit_stride(x) for x in _split_qkv(projected))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    arguments, constants = _make_launch_arguments(q, heads, mask, dropout)
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    kernels.instance_attention_fwd_kernel[_make_grid(q, constants)](
        q, k, v, out, *_replace_missing_tensors(mask, seed, q), *arguments, *strides, **constants
    )
    return out


@_instance_attention.register_fake
def _(
    projected: list[Tensor], heads: int, mask: Tensor | None, dropout: float, seed: Tensor | None
) -> Tensor:
    """Return an empty result of `_instance_attention`, for tracing by torch.compile."""
    q = _split_qkv(projected)[0]
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@torch.library.custom_op("megamod::instance_attention_backward", mutates_args=())
def _instance_attention_backward(
    upstream: Tensor,
    projected: list[Tensor],
    heads: int,
    mask: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> list[Tensor]:
    """Return a contiguous gradient for each tensor of `projected`, of its shape.

    `upstream` [B, N, L, D] is the gradient of the output; other arguments as in
    `_instance_attention`.
    """
    from megamod_kernels import instance_attention_kernels as kernels

    up, q, k, v = (_ensure_unit_stride(x) for x in (upstream, *_split_qkv(projected)))
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in projected]
    if q.numel() == 0:
        return grads
    arguments, constants = _make_launch_arguments(q, heads, mask, dropout)
    strides = [stride for x in (up, q, k, v) for stride in x.stride()[:3]]
    kernels.instance_attention_bwd_kernel[_make_grid(q, constants)](
        up,
        q,
        k,
        v,
        *_split_qkv(grads),
        *_replace_missing_tensors(mask, seed, q),
        *arguments,
        *strides,
        grads[0].shape[-1],
        **constants,
    )
    return grads


@_instance_attention_backward.register_fake
def _(
    upstream: Tensor,
    projected: list[Tensor],
    heads: int,
    mask: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> list[Tensor]:
    """Return empty results of `_instance_attention_backward`, for tracing by torch.compile."""
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in projected]


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    """Save in `ctx` what `_backward` reads, the arguments of `_instance_attention`; no scores."""
    projected, ctx.heads, mask, ctx.dropout, seed = inputs
    ctx.save_for_backward(*projected, mask, seed)


def _backward(
    ctx: torch.autograd.function.FunctionCtx, upstream: Tensor
) -> tuple[list[Tensor], None, None, None, None]:
    """Return the gradients of `projected`; None for the other arguments.

    `upstream` [B, N, L, D] is the gradient of the output.
    """
    *projected, mask, seed = ctx.saved_tensors
    grads = _instance_attention_backward(upstream, projected, ctx.heads, mask, ctx.dropout, seed)
    return grads, None, None, None, None


_instance_attention.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.megamod.instance_attention)
def _count_flops(projected: list[tuple[int, ...]], *_: object, **__: object) -> int:
    """Count the FLOPs of both products within positions; masked scores are not counted.

    `projected` are the shapes of the tensors of that name in `_instance_attention`.
    """
    groups, instances, length, columns = projected[0]
    size = columns // (1 if len(projected) == 3 else 3)
    return 4 * groups * length * instances**2 * size


@register_flop_formula(torch.ops.megamod.instance_attention_backward)
def _count_backward_flops(
    _: object, projected: list[tuple[int, ...]], *__: object, **___: object
) -> int:
    """Count the FLOPs of five products, one of which recomputes the scores.

    `projected` are the shapes of the tensors of that name in `_instance_attention`.
    """
    return _count_flops(projected) // 2 * 5


def uses_kernels(x: Tensor, heads: int, implementation: str = "auto") -> bool:
    """Return True if `instance_attention` of tensors like x [B, N, L, D] runs its kernels.

    Args:
        heads: number of heads.
        implementation: "auto", "triton" or "reference".
    Raises:
        ValueError: if "triton" is requested for unsupported shapes, or cannot run.
    """
    if not uses_triton(implementation, x):
        return False
    narrow = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    fits = narrow and x.shape[1] <= LARGEST_N and x.shape[-1] // heads <= LARGEST_HEAD
    if implementation == "triton" and not fits:
        raise ValueError(
            f"kernels support N <= {LARGEST_N} and at most {LARGEST_HEAD} columns per head of "
            f"float32, bfloat16 or float16; here N is {x.shape[1]}, a head has "
            f"{x.shape[-1] // heads} columns of {x.dtype}"
        )
    return fits


def instance_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    implementation: str = "auto",
) -> Tensor:
    """Compute multi-head attention of each position's N instances among themselves.

    Args:
        q, k, v: [B, N, L, D], any strides; head h has columns [h * D / heads, (h + 1) * D / heads).
        mask: [B, N, L], True for visible instances; the others get BERT's shift of -10000, so if
            none is visible, all are. None: all visible.
        dropout: dropout probability of attention weights, seeded by torch's generator; 0 in
            evaluation.
        implementation: "auto", "triton" or "reference". Kernels support N <= 64 and heads of at
            most 256 columns in float32, bfloat16 or float16; "auto" uses the reference otherwise.
    Returns:
        [B, N, L, D]. Differentiable once; backward saves q, k, v and recomputes the scores.
    Raises:
        ValueError: if shapes do not fit, or "triton" does not support them.
    Source: Murahari et al. 2023 (MUX-PLM), section 3.1, contextual multiplexer; Dao et al. 2022,
        appendix B.2, for the backward pass.
    """
    if q.dim() != 4 or not q.shape == k.shape == v.shape:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: expected "
            "three times [B, N, L, D]"
        )
    _check_arguments(q.shape, heads, mask, dropout)
    if not uses_kernels(q, heads, implementation):
        return instance_attention_reference(q, k, v, heads, mask, dropout)
    return _instance_attention([q, k, v], heads, mask, dropout, _draw_seed(q, dropout))


def instance_attention_packed(
    qkv: Tensor,
    heads: int,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    implementation: str = "auto",
) -> Tensor:
    """Compute `instance_attention` of queries, keys and values in one tensor.

    The gradient is one tensor too, so nothing is copied between this and a fused projection.

    Args:
        qkv: [B, N, L, 3 D], the three side by side in the last dimension.
        heads, mask, dropout, implementation: as in `instance_attention`.
    Returns:
        [B, N, L, D].
    Raises:
        ValueError: as `instance_attention`, and if 3 does not divide the last dimension.
    """
    if qkv.dim() != 4 or qkv.shape[-1] % 3:
        raise ValueError(f"qkv {tuple(qkv.shape)} does not fit: expected [B, N, L, 3 * D]")
    q, k, v = qkv.chunk(3, -1)
    _check_arguments(q.shape, heads, mask, dropout)
    if not uses_kernels(q, heads, implementation):
        return instance_attention_reference(q, k, v, heads, mask, dropout)
    return _instance_attention([qkv], heads, mask, dropout, _draw_seed(q, dropout))


def _check_arguments(shape: torch.Size, heads: int, mask: Tensor | None, dropout: float) -> None:
    """Raise ValueError unless heads, mask and dropout fit tensors of `shape`, (B, N, L, D)."""
    if heads < 1 or shape[-1] % heads:
        raise ValueError(f"{heads} heads do not divide {shape[-1]} columns")
    if mask is not None and (mask.shape != shape[:-1] or mask.dtype != torch.bool):
        raise ValueError(
            f"mask {tuple(mask.shape)} of {mask.dtype} does not fit: expected bool "
            f"{tuple(shape[:-1])}"
        )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout {dropout} is not in [0, 1)")


def _draw_seed(q: Tensor, dropout: float) -> Tensor | None:
    """Draw the dropout seed [1] int64 on q's device; None without dropout.

    It comes from torch's generator, which activation checkpointing restores, so that a recomputed
    forward pass drops the same weights.
    """
    if not dropout:
        return None
    return torch.randint(2**62, (1,), device=q.device, dtype=torch.int64)


def _split_qkv(projected: list[Tensor]) -> tuple[Tensor, ...]:
    """Return q, k and v, each [B, N, L, D]: as they are, or views of one packed tensor."""
    return tuple(projected) if len(projected) == 3 else projected[0].chunk(3, -1)


def _ensure_unit_stride(x: Tensor) -> Tensor:
    """Return x [B, N, L, D], copied unless its columns are adjacent and its offsets fit 32 bits."""
    adjacent = x.stride(-1) == 1 or x.shape[-1] == 1
    return x if adjacent and x.stride(1) * x.shape[1] < 2**31 else x.contiguous()


def _replace_missing_tensors(
    mask: Tensor | None, seed: Tensor | None, placeholder: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the mask, contiguous, and the seed, each replaced by the placeholder if it is None.

    Kernels do not read a placeholder, but a launch needs a tensor.
    """
    return (
        placeholder if mask is None else mask.contiguous(),
        placeholder if seed is None else seed,
    )


def _make_launch_arguments(
    q: Tensor, heads: int, mask: Tensor | None, dropout: float
) -> tuple[tuple[int | float, ...], dict[str, float]]:
    """Return the arguments of a launch after the tensors, by position and by name.

    Args:
        q: [B, N, L, D]; heads, mask, dropout: as in `instance_attention`.
    Returns:
        (B * L, L, scale of the scores, dropout); and those of `make_compile_time_arguments` with
        "num_warps".
    """
    from megamod_kernels import instance_attention_kernels as kernels

    groups, instances, length, size = q.shape
    head = size // heads
    rows, warps = kernels.select_rows_and_warps(instances, head, q.element_size())
    shift = 0.0 if mask is None else MASKED
    constants = kernels.make_compile_time_arguments(
        instances, heads, head, rows, shift, dropout > 0
    )
    return (groups * length, length, head**-0.5, dropout), constants | {"num_warps": warps}


def _make_grid(q: Tensor, constants: dict[str, float]) -> tuple[int]:
    """Return the launch grid of q [B, N, L, D]: one program per head and block of positions.

    `constants` are the compile-time arguments of `_make_launch_arguments`.
    """
    blocks = -(-q.shape[0] * q.shape[2] // (constants["ROWS"] // constants["N"]))
    return (blocks * constants["HEADS"],)
