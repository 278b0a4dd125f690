"""Triton kernels of `multiplex`."""

import triton
import triton.language as tl


@triton.jit
def multiplex_fwd_kernel(
    x, key, mixed, rows, length, D, N, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):
    """One tile of the result: ROWS positions, WIDTH columns, all instances."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    # Divided in 32 bits, which is far faster.
    first = (row // length).to(tl.int64) * N * length + row % length
    total = tl.zeros([BLOCK, WIDTH], tl.float32)
    for instance in range(N):
        place = (first + instance * length) * D
        given = tl.load(x + place[:, None] + column[None, :], mask=inside, other=0.0)
        # Read as often as there are rows, but laid out as they are.
        at = instance * D + row[:, None] * 0 + column[None, :]
        total += given.to(tl.float32) * tl.load(key + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(
        mixed + row.to(tl.int64)[:, None] * D + column[None, :],
        (total * (1.0 / N)).to(mixed.dtype.element_ty),
        mask=inside,
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
    """Some blocks of rows, WIDTH columns, one instance after the other.

    What the program reads of the upstream gradient stays in its cache from instance to instance,
    so that one instance's sum is all it has to hold.
    """
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    part = 1.0 / N
    for instance in range(N):
        scale = tl.load(key + instance * D + column, mask=column < D, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK, WIDTH], tl.float32)
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            row = block * BLOCK + tl.arange(0, BLOCK)
            inside = (row < rows)[:, None] & (column < D)[None, :]
            first = (row // length).to(tl.int64) * N * length + row % length
            row = row.to(tl.int64)
            shared = tl.load(
                upstream + row[:, None] * D + column[None, :], mask=inside, other=0.0
            ).to(tl.float32)
            shared *= part
            place = ((first + instance * length) * D)[:, None] + column[None, :]
            if OF_X:
                grad = shared * scale[None, :]
                tl.store(grad_x + place, grad.to(grad_x.dtype.element_ty), mask=inside)
            if OF_KEY:
                total += shared * tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        if OF_KEY:
            row_of_partial = (tl.program_id(0).to(tl.int64) * N + instance) * D
            tl.store(partial + row_of_partial + column, tl.sum(total, 0), mask=column < D)
