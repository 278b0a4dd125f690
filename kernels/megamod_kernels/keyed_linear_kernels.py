"""Triton kernels of `keyed_linear`: a product of keyed rows, and the gradient of its weight.

Row r of x is token r % L of instance r // L % N. IN and OUT are the columns that a kernel sums over
and those of its result.
"""

import triton
import triton.language as tl

from megamod_kernels.dot import dot, find_program_tile

PROGRAMS = 264  # two per multiprocessor of an H100


@triton.jit
def keyed_matmul_kernel(
    source,
    weight,
    key,
    bias,
    output,
    rows,
    length,
    N,
    IN,
    OUT,
    weight_in_stride,
    weight_out_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    ONE_KEY: tl.constexpr,
    FORWARD: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Compute a tile of (source * key) weight^T + bias, or of the gradient of the input.

    The latter, unless FORWARD, is (source weight) * key, where `source` is the gradient of the
    output. source [rows, IN], key [N, IN] (unless FORWARD [N, OUT]), bias [OUT], read with BIAS,
    and output [rows, OUT] are contiguous; the weight is addressed by its strides. ONE_KEY: all rows
    of a tile belong to one instance.
    """
    row_tile, column_tile = find_program_tile(rows, OUT, ROWS, COLUMNS)
    row = row_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    if ONE_KEY:
        instance = tl.zeros((1,), tl.int64) + row_tile.to(tl.int64) * ROWS // length % N
    else:
        instance = row // length % N
    step = tl.arange(0, INNER)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, IN, INNER):
        inner = start + step
        source_tile = tl.load(
            source + row[:, None] * IN + inner[None, :],
            mask=(row < rows)[:, None] & (inner < IN)[None, :],
            other=0.0,
        )
        if FORWARD:
            key_tile = tl.load(
                key + instance[:, None] * IN + inner[None, :], mask=(inner < IN)[None, :], other=0.0
            )
            source_tile = (source_tile.to(tl.float32) * key_tile.to(tl.float32)).to(
                source.dtype.element_ty
            )
        weight_tile = tl.load(
            weight + inner[:, None] * weight_in_stride + column[None, :] * weight_out_stride,
            mask=(inner < IN)[:, None] & (column < OUT)[None, :],
            other=0.0,
        )
        total += dot(source_tile, weight_tile)
    mask = column < OUT
    if BIAS:
        total += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)[None, :]
    if not FORWARD:
        key_tile = tl.load(key + instance[:, None] * OUT + column[None, :], mask=mask[None, :])
        total *= key_tile.to(tl.float32)
    tl.store(
        output + row[:, None] * OUT + column[None, :],
        total.to(output.dtype.element_ty),
        mask=(row < rows)[:, None] & mask[None, :],
    )


@triton.jit
def keyed_weight_kernel(
    upstream,
    x,
    key,
    weight,
    weight_partial,
    key_partial,
    positions,
    length,
    IN,
    OUT,
    N,
    part_positions,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    GRAD_KEY: tl.constexpr,
):
    """Compute partial gradients of the weight and of the keys, from one part of the positions.

    upstream [B, N, L, OUT], x [B, N, L, IN], key [N, IN] and weight [OUT, IN] are contiguous; a
    part is `part_positions` of the B * L `positions`. Written are weight_partial [parts, OUT, IN]
    and, if GRAD_KEY, key_partial [parts * output tiles, N, IN], both float32; the caller sums over
    the first dimension.
    """
    inner_tiles = tl.cdiv(IN, INNER)
    output_tile = tl.program_id(0) // inner_tiles
    column = output_tile * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.program_id(0) % inner_tiles * INNER + tl.arange(0, INNER)
    first = tl.program_id(1) * part_positions
    last = min(first + part_positions, positions)
    offset = column.to(tl.int64)[:, None] * IN + inner[None, :]
    mask = (column < OUT)[:, None] & (inner < IN)[None, :]
    total = tl.zeros((COLUMNS, INNER), tl.float32)
    for instance in range(N):
        instance_total = tl.zeros((COLUMNS, INNER), tl.float32)
        for start in range(first, last, ROWS):
            position = start + tl.arange(0, ROWS)
            group = (position // length).to(tl.int64)
            row = (group * N + instance) * length + position % length
            upstream_tile = tl.load(
                upstream + row[None, :] * OUT + column[:, None],
                mask=(position < last)[None, :] & (column < OUT)[:, None],
                other=0.0,
            )
            x_tile = tl.load(
                x + row[:, None] * IN + inner[None, :],
                mask=(position < last)[:, None] & (inner < IN)[None, :],
                other=0.0,
            )
            instance_total += dot(upstream_tile, x_tile)
        key_row = tl.load(key + instance * IN + inner, mask=inner < IN, other=0.0)
        total += instance_total * key_row.to(tl.float32)[None, :]
        if GRAD_KEY:
            weight_tile = tl.load(weight + offset, mask=mask, other=0.0).to(tl.float32)
            part = tl.program_id(1) * tl.cdiv(OUT, COLUMNS) + output_tile
            tl.store(
                key_partial + (part.to(tl.int64) * N + instance) * IN + inner,
                tl.sum(weight_tile * instance_total, axis=0),
                mask=inner < IN,
            )
    tl.store(weight_partial + tl.program_id(1).to(tl.int64) * OUT * IN + offset, total, mask=mask)


def select_matmul_tile(
    rows: int, outputs: int, element_size: int
) -> tuple[int, int, int, int, int]:
    """Return ROWS, COLUMNS, INNER, warps and stages of a product [rows, outputs].

    Tiles are large only where they are at least one per multiprocessor of an H100. float32, which
    uses no tensor cores, has one tile. `element_size` is in bytes.
    """
    if element_size == 4:
        return 64, 64, 32, 8, 3
    if triton.cdiv(rows, 128) * triton.cdiv(outputs, 128) < PROGRAMS // 2:
        return 64, 64, 64, 4, 4
    return 128, 128, 64, 8, 3


def select_weight_tile(element_size: int, needs_key: bool) -> tuple[int, int, int, int, int]:
    """Return COLUMNS, INNER, ROWS, warps and stages of `keyed_weight_kernel`.

    A program holds two accumulators, and with `needs_key` (the gradient of the keys) also its tile
    of the weight, so tiles are smaller then. `element_size` is in bytes.
    """
    if element_size == 4:
        return 64, 32 if needs_key else 64, 32, 8, 3
    return (64, 64, 64, 8, 3) if needs_key else (128, 128, 64, 8, 3)
