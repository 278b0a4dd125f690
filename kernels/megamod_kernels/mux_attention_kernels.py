"""Triton kernel of `mux_attention`: a program embeds rows, then projects them."""

import triton
import triton.language as tl

from megamod_kernels.dot import dot
from megamod_kernels.mux_embed_kernels import embed_rows


@triton.jit
def mux_qkv_kernel(
    ids, word, position, token_type, weight, bias, key, types, firsts, seconds, seed,
    residual, mixed, rows, length, D, N, start, first_stride, second_stride, eps, dropout,
    query, query_bias, key_weight, key_bias, value, value_bias, qkv,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, TYPES: tl.constexpr,
    FIRSTS: tl.constexpr, SECONDS: tl.constexpr, DROPOUT: tl.constexpr, WHOLE: tl.constexpr,
    KEEP: tl.constexpr, TILE_ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    """Compute TILE_ROWS mixed rows from ids into `residual`; project them to qkv [3, rows, D].

    residual [rows, D]; weights `query`, `key_weight` and `value` [D, D] and their biases [D],
    contiguous. Other arguments as of `embed_rows`, which embeds ROWS rows at once.
    """
    first_row = tl.program_id(0) * TILE_ROWS
    for step in range(0, TILE_ROWS, ROWS):
        mixed_row = first_row + step + tl.arange(0, ROWS)
        embed_rows(
            mixed_row, mixed_row < rows, ids, word, position, token_type, weight, bias, key, types,
            firsts, seconds, seed, residual, mixed, length, D, N, start, first_stride,
            second_stride, eps, dropout, ROWS, WIDTH, TILES, TYPES, FIRSTS, SECONDS, DROPOUT,
            WHOLE, KEEP,
        )  # fmt: skip
    # The product reads rows that other threads of this program have written.
    tl.debug_barrier()
    row = first_row.to(tl.int64) + tl.arange(0, TILE_ROWS)
    part = (first_row * 0 + rows).to(tl.int64) * D  # rows may be the constant 1, which has no .to()
    _project(residual, row, rows, query, query_bias, qkv, D, TILE_ROWS, COLUMNS, INNER)
    _project(residual, row, rows, key_weight, key_bias, qkv + part, D, TILE_ROWS, COLUMNS, INNER)
    _project(residual, row, rows, value, value_bias, qkv + 2 * part, D, TILE_ROWS, COLUMNS, INNER)


@triton.jit
def _project(
    source, row, rows, weight, bias, target, D,
    TILE_ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Compute target = source weight^T + bias for TILE_ROWS rows and all columns.

    source and target [rows, D], weight [D, D], bias [D]; `row` [TILE_ROWS] are the indices of the
    rows.
    """
    valid = row < rows
    for first_column in range(0, D, COLUMNS):
        column = first_column + tl.arange(0, COLUMNS)
        total = tl.zeros([TILE_ROWS, COLUMNS], tl.float32)
        for start in range(0, D, INNER):
            inner = start + tl.arange(0, INNER)
            inner_mask = inner < D
            source_tile = tl.load(
                source + row[:, None] * D + inner[None, :],
                mask=valid[:, None] & inner_mask[None, :],
                other=0.0,
            )
            weight_tile = tl.load(
                weight + column[None, :] * D + inner[:, None],
                mask=(column < D)[None, :] & inner_mask[:, None],
                other=0.0,
            )
            total += dot(source_tile, weight_tile)
        total += tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
        tl.store(
            target + row[:, None] * D + column[None, :],
            total.to(target.dtype.element_ty),
            mask=valid[:, None] & (column < D)[None, :],
        )
