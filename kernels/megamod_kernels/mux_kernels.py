"""Triton kernels of `multiplex`."""

import triton
import triton.language as tl


@triton.jit
def multiplex_fwd_kernel(
    x, key, mixed, rows, length, D, N, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Compute a tile [ROWS, WIDTH] of `mixed` [B * L, D], the mean of key * x over all instances.

    x [B, N, L, D] and key [N, D]; `rows` is B * L and `length` L. Sums are accumulated in float32.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = (row < rows)[:, None] & (column < D)[None, :]
    # Division in 32 bits is much faster.
    first_row = (row // length).to(tl.int64) * N * length + row % length
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for instance in range(N):
        offset = (first_row + instance * length) * D
        instance_tile = tl.load(x + offset[:, None] + column[None, :], mask=mask, other=0.0)
        # Loaded once per row, in the layout of the rows.
        key_offset = instance * D + row[:, None] * 0 + column[None, :]
        total += instance_tile.to(tl.float32) * tl.load(key + key_offset, mask=mask, other=0.0).to(
            tl.float32
        )
    tl.store(
        mixed + row.to(tl.int64)[:, None] * D + column[None, :],
        (total * (1.0 / N)).to(mixed.dtype.element_ty),
        mask=mask,
    )


@triton.jit
def multiplex_bwd_kernel(
    upstream,
    x,
    key,
    grad_x,
    partial,
    rows,
    length,
    D,
    N,
    blocks,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    GRAD_X: tl.constexpr,
    GRAD_KEY: tl.constexpr,
):
    """Compute the gradients of x and key for some blocks of rows and WIDTH columns.

    `upstream` [B, L, D] is the gradient of the result; its `rows` = B * L are `blocks` blocks of
    ROWS. grad_x [B, N, L, D] is written if GRAD_X; `partial` [programs, N, D] float32, the key's
    gradient from this program's blocks, if GRAD_KEY. Instances are the outer loop: the upstream
    gradient stays in the cache from one to the next, and a program holds the sum of a single
    instance.
    """
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    weight_of_instance = 1.0 / N
    for instance in range(N):
        key_row = tl.load(key + instance * D + column, mask=column < D, other=0.0).to(tl.float32)
        total = tl.zeros([ROWS, WIDTH], tl.float32)
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            row = block * ROWS + tl.arange(0, ROWS)
            mask = (row < rows)[:, None] & (column < D)[None, :]
            first_row = (row // length).to(tl.int64) * N * length + row % length
            row = row.to(tl.int64)
            upstream_tile = tl.load(
                upstream + row[:, None] * D + column[None, :], mask=mask, other=0.0
            ).to(tl.float32)
            upstream_tile *= weight_of_instance
            offset = ((first_row + instance * length) * D)[:, None] + column[None, :]
            if GRAD_X:
                grad = upstream_tile * key_row[None, :]
                tl.store(grad_x + offset, grad.to(grad_x.dtype.element_ty), mask=mask)
            if GRAD_KEY:
                total += upstream_tile * tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
        if GRAD_KEY:
            partial_start = (tl.program_id(0).to(tl.int64) * N + instance) * D
            tl.store(partial + partial_start + column, tl.sum(total, 0), mask=column < D)
