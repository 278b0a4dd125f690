"""Triton kernels of `keyed_linear`: a product of keyed rows, and the gradient of its weight.

Row r of x is token r % L of instance r // L % N.
"""

import triton
import triton.language as tl

from megamod_kernels.dot import dot, tile_of_program

PROGRAMS = 264  # two per multiprocessor


@triton.jit
def keyed_matmul_kernel(
    a_ptr,
    weight_ptr,
    key_ptr,
    bias_ptr,
    out_ptr,
    rows,
    length,
    N,
    IN,
    OUT,
    weight_in,
    weight_out,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    ONE_KEY: tl.constexpr,
    FORWARD: tl.constexpr,
    USES_BIAS: tl.constexpr,
):
    """Forward: (a * key) weight^T + bias; else (a weight) * key, the gradient of the input.

    ONE_KEY: all rows of a block belong to one instance.
    """
    block, across = tile_of_program(rows, OUT, BLOCK_ROWS, BLOCK_OUT)
    row = block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = across * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    if ONE_KEY:
        slot = tl.zeros((1,), tl.int64) + block.to(tl.int64) * BLOCK_ROWS // length % N
    else:
        slot = row // length % N
    step = tl.arange(0, BLOCK_IN)
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    for start in range(0, IN, BLOCK_IN):
        inner = start + step
        a = tl.load(
            a_ptr + row[:, None] * IN + inner[None, :],
            mask=(row < rows)[:, None] & (inner < IN)[None, :],
            other=0.0,
        )
        if FORWARD:
            key = tl.load(
                key_ptr + slot[:, None] * IN + inner[None, :], mask=(inner < IN)[None, :], other=0.0
            )
            a = (a.to(tl.float32) * key.to(tl.float32)).to(a_ptr.dtype.element_ty)
        weight = tl.load(
            weight_ptr + inner[:, None] * weight_in + column[None, :] * weight_out,
            mask=(inner < IN)[:, None] & (column < OUT)[None, :],
            other=0.0,
        )
        total += dot(a, weight)
    mask = column < OUT
    if USES_BIAS:
        total += tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)[None, :]
    if not FORWARD:
        key = tl.load(key_ptr + slot[:, None] * OUT + column[None, :], mask=mask[None, :])
        total *= key.to(tl.float32)
    tl.store(
        out_ptr + row[:, None] * OUT + column[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=(row < rows)[:, None] & mask[None, :],
    )


@triton.jit
def keyed_weight_kernel(
    up_ptr,
    x_ptr,
    key_ptr,
    weight_ptr,
    weight_part_ptr,
    key_part_ptr,
    positions,
    length,
    N,
    IN,
    OUT,
    part_positions,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    KEY_GRAD: tl.constexpr,
):
    """Partial gradients of the weight and of the keys, from one part of the positions."""
    across = tl.cdiv(IN, BLOCK_IN)
    outputs = tl.program_id(0) // across
    out = outputs * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inner = tl.program_id(0) % across * BLOCK_IN + tl.arange(0, BLOCK_IN)
    first = tl.program_id(1) * part_positions
    last = min(first + part_positions, positions)
    at = out.to(tl.int64)[:, None] * IN + inner[None, :]
    mask = (out < OUT)[:, None] & (inner < IN)[None, :]
    total = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for instance in range(N):
        instance_total = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
        for start in range(first, last, BLOCK_ROWS):
            position = start + tl.arange(0, BLOCK_ROWS)
            group = (position // length).to(tl.int64)
            row = (group * N + instance) * length + position % length
            up = tl.load(
                up_ptr + row[None, :] * OUT + out[:, None],
                mask=(position < last)[None, :] & (out < OUT)[:, None],
                other=0.0,
            )
            x = tl.load(
                x_ptr + row[:, None] * IN + inner[None, :],
                mask=(position < last)[:, None] & (inner < IN)[None, :],
                other=0.0,
            )
            instance_total += dot(up, x)
        key = tl.load(key_ptr + instance * IN + inner, mask=inner < IN, other=0.0)
        total += instance_total * key.to(tl.float32)[None, :]
        if KEY_GRAD:
            weight = tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)
            part = tl.program_id(1) * tl.cdiv(OUT, BLOCK_OUT) + outputs
            tl.store(
                key_part_ptr + (part.to(tl.int64) * N + instance) * IN + inner,
                tl.sum(weight * instance_total, axis=0),
                mask=inner < IN,
            )
    tl.store(weight_part_ptr + tl.program_id(1).to(tl.int64) * OUT * IN + at, total, mask=mask)


def matmul_tile(rows: int, outputs: int, element_size: int) -> tuple[int, int, int, int, int]:
    """Rows, outputs and inputs of a block, warps, stages: large blocks only for large products."""
    if element_size == 4:
        return 64, 64, 32, 8, 3
    if triton.cdiv(rows, 128) * triton.cdiv(outputs, 128) < PROGRAMS // 2:
        return 64, 64, 64, 4, 4
    return 128, 128, 64, 8, 3


def weight_tile(element_size: int, key_grad: bool) -> tuple[int, int, int, int, int]:
    """Outputs, inputs and rows of a block, warps, stages.

    A block has two accumulators, and with key_grad also its tile of the weight.
    """
    if element_size == 4:
        return 64, 32 if key_grad else 64, 32, 8, 3
    return (64, 64, 64, 8, 3) if key_grad else (128, 128, 64, 8, 3)
