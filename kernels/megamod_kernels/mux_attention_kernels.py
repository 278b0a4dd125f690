"""Triton kernel of `mux_attention`: a program embeds rows, then projects them."""

import triton
import triton.language as tl

from megamod_kernels.dot import dot
from megamod_kernels.mux_embed_kernels import embed_rows


@triton.jit
def mux_qkv_kernel(
    ids, word, position, token_type, weight, bias, key, types, firsts, seconds, seed,
    residual, mixed, rows, length, D, N, start, first_stride, second_stride, eps, p,
    query, query_bias, key_weight, key_bias, value, value_bias, qkv,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, TYPES: tl.constexpr,
    FIRSTS: tl.constexpr, SECONDS: tl.constexpr, DROPOUT: tl.constexpr, WHOLE: tl.constexpr,
    KEEP: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    """Compute TALL mixed rows from ids into `residual`, then project them to qkv [3, rows, D]."""
    first = tl.program_id(0) * TALL
    for step in range(0, TALL, BLOCK):
        m = first + step + tl.arange(0, BLOCK)
        embed_rows(
            m, m < rows, ids, word, position, token_type, weight, bias, key, types, firsts,
            seconds, seed, residual, mixed, length, D, N, start, first_stride, second_stride, eps,
            p, BLOCK, WIDTH, TILES, TYPES, FIRSTS, SECONDS, DROPOUT, WHOLE, KEEP,
        )  # fmt: skip
    # The product reads rows that other threads of this program have written.
    tl.debug_barrier()
    row = first.to(tl.int64) + tl.arange(0, TALL)
    part = (first * 0 + rows).to(tl.int64) * D  # rows may be the constant 1, which has no .to()
    _project(residual, row, rows, query, query_bias, qkv, D, TALL, WIDE, INNER)
    _project(residual, row, rows, key_weight, key_bias, qkv + part, D, TALL, WIDE, INNER)
    _project(residual, row, rows, value, value_bias, qkv + 2 * part, D, TALL, WIDE, INNER)


@triton.jit
def _project(
    source, row, rows, weight, bias, target, D,
    TALL: tl.constexpr, WIDE: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """target = source weight^T + bias for TALL rows and all columns."""
    valid = row < rows
    for begin in range(0, D, WIDE):
        column = begin + tl.arange(0, WIDE)
        total = tl.zeros([TALL, WIDE], tl.float32)
        for start in range(0, D, INNER):
            inner = start + tl.arange(0, INNER)
            inner_mask = inner < D
            a = tl.load(
                source + row[:, None] * D + inner[None, :],
                mask=valid[:, None] & inner_mask[None, :],
                other=0.0,
            )
            w = tl.load(
                weight + column[None, :] * D + inner[:, None],
                mask=(column < D)[None, :] & inner_mask[:, None],
                other=0.0,
            )
            total += dot(a, w)
        total += tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
        tl.store(
            target + row[:, None] * D + column[None, :],
            total.to(target.dtype.element_ty),
            mask=valid[:, None] & (column < D)[None, :],
        )
