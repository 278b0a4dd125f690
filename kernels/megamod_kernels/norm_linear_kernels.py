"""Triton kernels of `norm_linear`: moments of rows, and a product with the norm as prologue."""

import triton
import triton.language as tl

from megamod_kernels.dot import dot, tile_of_program
from megamod_kernels.rows import moments


@triton.jit
def norm_moments_kernel(x, stats, rows, D, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Write stats [2, rows] float32: mean and reciprocal standard deviation."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    mean, scale = moments(x, row, valid, D, eps, ROWS, WIDTH)
    tl.store(stats + row, mean, mask=valid)
    tl.store(stats + rows + row, scale, mask=valid)


@triton.jit
def norm_matmul_kernel(
    x,
    stats,
    gain,
    shift,
    weight,
    bias,
    output,
    rows,
    D,
    OUT,
    weight_out,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    USES_BIAS: tl.constexpr,
):
    """output = (gain (x - mean) / std + shift) weight^T + bias."""
    block, across = tile_of_program(rows, OUT, BLOCK_ROWS, BLOCK_OUT)
    row = block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = across * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    valid = row < rows
    mean = tl.load(stats + row, mask=valid, other=0.0)
    scale = tl.load(stats + rows + row, mask=valid, other=0.0)
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    for start in range(0, D, BLOCK_IN):
        inner = start + tl.arange(0, BLOCK_IN)
        inner_mask = inner < D
        a = tl.load(
            x + row[:, None] * D + inner[None, :],
            mask=valid[:, None] & inner_mask[None, :],
            other=0.0,
        )
        w = tl.load(gain + inner, mask=inner_mask, other=0.0).to(tl.float32)
        b = tl.load(shift + inner, mask=inner_mask, other=0.0).to(tl.float32)
        # Columns beyond D are 0, because gain and shift are 0 there.
        normed = (a.to(tl.float32) - mean[:, None]) * scale[:, None] * w[None, :] + b[None, :]
        weight_tile = tl.load(
            weight + column[None, :].to(tl.int64) * weight_out + inner[:, None],
            mask=inner_mask[:, None] & (column < OUT)[None, :],
            other=0.0,
        )
        total += dot(normed.to(x.dtype.element_ty), weight_tile)
    if USES_BIAS:
        total += tl.load(bias + column, mask=column < OUT, other=0.0).to(tl.float32)[None, :]
    tl.store(
        output + row[:, None] * OUT + column[None, :],
        total.to(output.dtype.element_ty),
        mask=valid[:, None] & (column < OUT)[None, :],
    )
