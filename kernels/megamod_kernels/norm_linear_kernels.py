"""Triton kernels of `norm_linear`: moments of rows, and a product with the norm as prologue."""

import triton
import triton.language as tl

from megamod_kernels.dot import dot, find_program_tile
from megamod_kernels.rows import compute_moments


@triton.jit
def norm_moments_kernel(x, stats, rows, D, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Write `stats` [2, rows] float32 of x [rows, D]: mean and reciprocal standard deviation.

    A program does ROWS rows; `eps` is added to the variance.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    mean, rstd = compute_moments(x, row, valid, D, eps, ROWS, WIDTH)
    tl.store(stats + row, mean, mask=valid)
    tl.store(stats + rows + row, rstd, mask=valid)


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
    weight_out_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Compute a tile of output [rows, OUT] = (gain (x - mean) / std + shift) weight^T + bias.

    x [rows, D] is normed as its tiles are loaded, with the `stats` of `norm_moments_kernel`; gain
    and shift [D]; weight [OUT, D] with the row stride `weight_out_stride`; bias [OUT], read with
    BIAS.
    """
    row_tile, column_tile = find_program_tile(rows, OUT, ROWS, COLUMNS)
    row = row_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    valid = row < rows
    mean = tl.load(stats + row, mask=valid, other=0.0)
    rstd = tl.load(stats + rows + row, mask=valid, other=0.0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D, INNER):
        inner = start + tl.arange(0, INNER)
        inner_mask = inner < D
        x_tile = tl.load(
            x + row[:, None] * D + inner[None, :],
            mask=valid[:, None] & inner_mask[None, :],
            other=0.0,
        )
        gain_tile = tl.load(gain + inner, mask=inner_mask, other=0.0).to(tl.float32)
        shift_tile = tl.load(shift + inner, mask=inner_mask, other=0.0).to(tl.float32)
        # Columns beyond D are 0, because gain and shift are 0 there.
        normed = (x_tile.to(tl.float32) - mean[:, None]) * rstd[:, None] * gain_tile[
            None, :
        ] + shift_tile[None, :]
        weight_tile = tl.load(
            weight + column[None, :].to(tl.int64) * weight_out_stride + inner[:, None],
            mask=inner_mask[:, None] & (column < OUT)[None, :],
            other=0.0,
        )
        total += dot(normed.to(x.dtype.element_ty), weight_tile)
    if BIAS:
        total += tl.load(bias + column, mask=column < OUT, other=0.0).to(tl.float32)[None, :]
    tl.store(
        output + row[:, None] * OUT + column[None, :],
        total.to(output.dtype.element_ty),
        mask=valid[:, None] & (column < OUT)[None, :],
    )
