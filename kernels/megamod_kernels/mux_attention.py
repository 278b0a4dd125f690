"""Attention of the first block from token ids, with embedding and multiplexing as prologue.

A program embeds and mixes some rows, writes them for the residual, and projects them to queries,
keys and values while they are in the cache.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from megamod_kernels import mux_embed as embedding
from megamod_kernels.dispatch import uses_triton
from megamod_kernels.mux_embed import Tables, mux_embed, mux_embed_reference

Projections = Sequence[tuple[Tensor, Tensor]]
"""Weight [D, D] and bias [D] of queries, keys and values, in this order."""

MULTIPROCESSORS = 132  # of an H100 or H200


def mux_attention_reference(
    ids: Tensor,
    key: Tensor,
    tables: Tables,
    projections: Projections,
    heads: int,
    token_type_ids: Tensor | None = None,
    first_positions: Tensor | None = None,
    second_positions: Tensor | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute `mux_attention` in plain torch; arguments and the two results [B, T, D] as there."""
    optional = (token_type_ids, first_positions, second_positions)
    x = mux_embed_reference(ids, key, tables, *optional, dropout)
    projected = [F.linear(x, *projection) for projection in projections]
    return _compute_attention(projected, heads, mask, attention_dropout), x


def _compute_attention(
    projected: Sequence[Tensor], heads: int, mask: Tensor | None, dropout: float
) -> Tensor:
    """Compute softmax(Q K^T / sqrt(D / heads) + mask) V, [B, T, D].

    `projected` are queries, keys and values [B, T, D]; other arguments as in `mux_attention`.
    """
    query, key, value = (tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in projected)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    mixed = F.scaled_dot_product_attention(query, key, value, mask, dropout)
    return mixed.transpose(1, 2).flatten(2)


def select_matmul_tile(rows: int, itemsize: int) -> tuple[int, int, int, int, int]:
    """Return TILE_ROWS, COLUMNS, INNER, warps and stages of `mux_qkv_kernel`.

    A program computes all columns of its TILE_ROWS rows, and so reads all weights. TILE_ROWS is the
    smallest of 32, 64 and 128 with which one program per multiprocessor is enough, and 128 if none
    is. float32, whose products use no tensor cores, has one tile.

    Args:
        rows: mixed positions B * T, the rows of the product.
        itemsize: bytes of an element.
    """
    if itemsize == 4:
        return 32, 64, 32, 8, 2
    fitting = (size for size in (32, 64) if rows <= MULTIPROCESSORS * size)
    return next(fitting, 128), 128, 64, 8, 3


def count_embedded_rows(size: int) -> int:
    """Return the number of mixed rows of `size` columns that a program embeds at once.

    A program embeds the rows of its tile in several rounds, because it holds the rows of one round
    in registers.
    """
    return 8 if size <= 1024 else 4


@torch.library.custom_op("megamod::mux_qkv", mutates_args=())
def _mux_qkv(
    ids: Tensor, word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor,
    key: Tensor, types: Tensor | None, firsts: Tensor | None, seconds: Tensor | None,
    seed: Tensor | None, projections: Sequence[Tensor], eps: float, start: int, dropout: float,
    word_padding: int, position_padding: int, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the encoder's input [B, T, D], qkv [3, B, T, D], and the mixed rows for backward.

    Arguments as in `mux_embed.make_embedding_arguments`; `projections` are weight and bias of
    queries, keys and values, six tensors; the two paddings are read by backward alone, -1: none.
    The mixed rows [B, T, D] are empty unless `keep`.
    """
    from megamod_kernels import mux_attention_kernels as kernels

    output, qkv, mixed = _allocate_outputs(ids, word, key, keep)
    if output.numel():
        arguments, flags = embedding.make_embedding_arguments(
            ids, word, position, token_type, weight, bias, key, types, firsts, seconds, seed,
            output, mixed, eps, start, dropout, keep,
        )  # fmt: skip
        rows, size = output.shape[0] * output.shape[1], output.shape[2]
        tile_rows, tile_columns, inner, warps, stages = select_matmul_tile(
            rows, output.element_size()
        )
        kernels.mux_qkv_kernel[(-(-rows // tile_rows),)](
            *arguments, *(tensor.contiguous() for tensor in projections), qkv, **flags,
            ROWS=count_embedded_rows(size), TILE_ROWS=tile_rows, COLUMNS=tile_columns, INNER=inner,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return output, qkv, mixed


@_mux_qkv.register_fake
def _(
    ids: Tensor, word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor,
    key: Tensor, types: Tensor | None, firsts: Tensor | None, seconds: Tensor | None,
    seed: Tensor | None, projections: Sequence[Tensor], eps: float, start: int, dropout: float,
    word_padding: int, position_padding: int, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return empty results of `_mux_qkv`, for tracing by torch.compile."""
    return _allocate_outputs(ids, word, key, keep)


def _allocate_outputs(
    ids: Tensor, word: Tensor, key: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the results of `_mux_qkv`: [B, T, D], [3, B, T, D], and [B, T, D] or empty.

    Arguments as there.
    """
    shape = (ids.shape[0] // key.shape[0], ids.shape[1], key.shape[1])
    return word.new_empty(shape), word.new_empty(3, *shape), word.new_empty(shape if keep else 0)


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]
) -> None:
    """Save in `ctx` what `_backward` reads: arguments and first and last result of `_mux_qkv`."""
    *tensors, projections, eps, start, dropout, word_padding, position_padding, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], output[2], *projections, *tensors)
    ctx.numbers = (eps, start, dropout, word_padding, position_padding)


def _backward(
    ctx: torch.autograd.function.FunctionCtx,
    residual_grad: Tensor | None,
    qkv_grad: Tensor | None,
    _: Tensor | None,
) -> tuple[object, ...]:
    """Return the gradients of `_mux_qkv`'s arguments; None for ids, seed and numbers.

    `residual_grad` [B, T, D] and `qkv_grad` [3, B, T, D] are those of its first two results, None
    if the loss does not depend on one. Those of the projections are the vendor's products. Their
    input gradient is added to that of the residual and goes on through `mux_embed_backward`.
    """
    residual, mixed, *rest = ctx.saved_tensors
    projections, tensors = rest[:6], rest[6:]
    flat = residual.flatten(0, -2)
    grad = torch.zeros_like(flat) if residual_grad is None else residual_grad.flatten(0, -2)
    grads = []
    for part in range(3):
        weight, bias = projections[2 * part : 2 * part + 2]
        if qkv_grad is None:
            grads += [torch.zeros_like(weight), torch.zeros_like(bias)]
            continue
        upstream = qkv_grad[part].flatten(0, -2)
        grads += [upstream.T @ flat, upstream.sum(0)]
        grad = torch.addmm(grad, upstream, weight)
    needed, parameter_grads = ctx.needs_input_grad[1:7], (None,) * 6
    if any(needed):
        table_grads = embedding.mux_embed_backward(
            grad.view_as(residual), mixed, *tensors, *ctx.numbers
        )
        parameter_grads = (
            tensor if is_needed else None
            for tensor, is_needed in zip(table_grads, needed, strict=True)
        )
    return None, *parameter_grads, None, None, None, None, grads, *(None,) * 6


_mux_qkv.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.megamod.mux_qkv)
def _count_flops(
    ids: Sequence[int], *arguments: object, out_shape: object = None, **_: object
) -> int:
    """Count the FLOPs of the three projections, from the shapes of the arguments of `_mux_qkv`.

    `ids` is that of the first argument, [B * N, T].
    """
    instances, size = arguments[5]
    return 3 * 2 * ids[0] // instances * ids[1] * size * size


def mux_attention(
    ids: Tensor,
    key: Tensor,
    tables: Tables,
    projections: Projections,
    heads: int,
    token_type_ids: Tensor | None = None,
    first_positions: Tensor | None = None,
    second_positions: Tensor | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute the attention of a multiplexed encoder's first block, from token ids.

        x = mux_embed(ids, key, tables);  softmax(Q K^T / sqrt(D / heads) + mask) V of x

    Args:
        ids, key, tables, token_type_ids, first_positions, second_positions, dropout: see
            `mux_embed`.
        projections: of x to queries, keys and values, each (weight [D, D], bias [D]).
        heads: number of heads; divides D.
        mask: broadcastable to [B, 1, T, T]: bool, True for visible positions, or float, added.
        attention_dropout: dropout probability of attention weights.
        implementation: "triton": one kernel embeds, mixes and projects. "reference": plain torch.
            "auto": on a GPU `mux_embed` and then the vendor's products, because the fused kernel
            reads all weights in every program (docs/kernels.md). float64 and autocast always use
            the reference.
    Returns:
        the attention output before the block's output projection, and x, the residual input of the
        block; both [B, T, D].
    Raises:
        ValueError: if shapes do not fit, or the implementation cannot run.
    Source: Murahari et al. 2023 (MUX-PLM), section 3.1; Vaswani et al. 2017, section 3.2.
    """
    optional = (token_type_ids, first_positions, second_positions)
    embedding.check_shapes(ids, key, tables, *optional)
    size = key.shape[1]
    for weight, bias in projections:
        if weight.shape != (size, size) or bias.shape != (size,):
            raise ValueError(
                f"projection {tuple(weight.shape)} with bias {tuple(bias.shape)} does not fit key "
                f"{tuple(key.shape)}: expected {[size, size]} and {[size]}"
            )
    if size % heads:
        raise ValueError(f"heads {heads} do not divide {size} columns")
    autocast = not ids.is_meta and torch.is_autocast_enabled(ids.device.type)
    triton = uses_triton(implementation, ids)
    if not triton or tables.word.dtype == torch.float64 or autocast:
        rest = (*optional, mask, dropout, attention_dropout)
        return mux_attention_reference(ids, key, tables, projections, heads, *rest)
    if implementation == "auto":
        x = mux_embed(ids, key, tables, *optional, dropout)
        projected = [F.linear(x, *projection) for projection in projections]
    else:
        learned = (*tables[:5], key)
        seed, numbers = embedding.make_seed_and_scalars(ids, learned, tables, dropout)
        flat = [tensor for projection in projections for tensor in projection]
        x, qkv, _ = _mux_qkv(ids, *learned, *optional, seed, flat, *numbers)
        projected = qkv.unbind()
    return _compute_attention(projected, heads, mask, attention_dropout), x
