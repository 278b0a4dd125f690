"""Triton kernels of `multiplex`."""

import triton
import triton.language as tl


@triton.jit
def multiplex_fwd_kernel(
    x, key, mixed, rows, length, D, N, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):
    """Compute one tile of the result: BLOCK positions, WIDTH columns, all instances."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = (row < rows)[:, None] & (column < D)[None, :]
    # Division in 32 bits is much faster.
    first = (row // length).to(tl.int64) * N * length + row % length
    total = tl.zeros([BLOCK, WIDTH], tl.float32)
    for instance in range(N):
        offset = (first + instance * length) * D
        loaded = tl.load(x + offset[:, None] + column[None, :], mask=mask, other=0.0)
        # Loaded once per row, in the layout of the rows.
        key_offset = instance * D + row[:, None] * 0 + column[None, :]
        total += loaded.to(tl.float32) * tl.load(key + key_offset, mask=mask, other=0.0).to(
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
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    OF_X: tl.constexpr,
    OF_KEY: tl.constexpr,
):
    """Backward of some blocks of rows and WIDTH columns, one instance at a time.

    The upstream gradient stays in the cache from instance to instance, so a program holds the sum
    of one instance only.
    """
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    weight_of_instance = 1.0 / N
    for instance in range(N):
        scale = tl.load(key + instance * D + column, mask=column < D, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK, WIDTH], tl.float32)
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            row = block * BLOCK + tl.arange(0, BLOCK)
            mask = (row < rows)[:, None] & (column < D)[None, :]
            first = (row // length).to(tl.int64) * N * length + row % length
            row = row.to(tl.int64)
            shared = tl.load(
                upstream + row[:, None] * D + column[None, :], mask=mask, other=0.0
            ).to(tl.float32)
            shared *= weight_of_instance
            offset = ((first + instance * length) * D)[:, None] + column[None, :]
            if OF_X:
                grad = shared * scale[None, :]
                tl.store(grad_x + offset, grad.to(grad_x.dtype.element_ty), mask=mask)
            if OF_KEY:
                total += shared * tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
        if OF_KEY:
            row_of_partial = (tl.program_id(0).to(tl.int64) * N + instance) * D
            tl.store(partial + row_of_partial + column, tl.sum(total, 0), mask=column < D)
