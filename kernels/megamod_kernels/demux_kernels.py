"""Triton kernels of `rsa_demux`.

Row r of the result is instance k of mixed position u: for all instances and positions r counts
[B, N, L], for pairs both numbers are read. What is left of layers between is their input to GELU
(`before`); states are made again from it and from both parts of the first layer.
"""

import triton
import triton.language as tl

from megamod_kernels.dot import dot
from megamod_kernels.rows import gelu, gelu_slope, moments


@triton.jit
def _places(row, of_hidden, of_key, valid, N, L, PAIRS: tl.constexpr):
    """Mixed position and instance of rows."""
    if PAIRS:
        return (
            tl.load(of_hidden + row, mask=valid, other=0),
            tl.load(of_key + row, mask=valid, other=0),
        )
    else:
        return row // (N * L) * L + row % L, row // L % N


@triton.jit
def _kept(seed, layer, row, column, D, dropout):
    """What dropout multiplies with: Philox, counted by (layer, row, column)."""
    offset = row[:, None] * D + column[None, :]
    drawn = tl.rand(tl.load(seed) + layer, offset)
    return tl.where(drawn >= dropout, 1.0 / (1.0 - dropout), 0.0)


@triton.jit
def _state(
    hidden,
    key,
    before,
    seed,
    row,
    place,
    instance,
    column,
    inside,
    rows,
    D,
    dropout,
    LAYERS: tl.constexpr,
    DROPS: tl.constexpr,
):
    """Rows x columns of the state behind LAYERS residual layers, in float32."""
    first = tl.load(hidden + place[:, None] * D + column[None, :], mask=inside, other=0.0)
    marked = tl.load(key + instance[:, None] * D + column[None, :], mask=inside, other=0.0)
    x = gelu(first.to(tl.float32) + marked.to(tl.float32))
    if DROPS:
        x *= _kept(seed, 0, row, column, D, dropout)
    for layer in tl.static_range(LAYERS):
        at = before + (layer * rows + row[:, None]) * D + column[None, :]
        more = gelu(tl.load(at, mask=inside, other=0.0).to(tl.float32))
        if DROPS:
            more *= _kept(seed, layer + 1, row, column, D, dropout)
        x += more
    return x


@triton.jit
def rsa_demux_matmul_kernel(
    hidden,
    key,
    before,
    weight,
    bias,
    output,
    of_hidden,
    of_key,
    seed,
    rows,
    D,
    N,
    L,
    dropout,
    LAYERS: tl.constexpr,
    PAIRS: tl.constexpr,
    DROPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """output = state W^T + bias, the state being made where the product needs it."""
    # Neighbouring programs share their rows, whose states then come from cache.
    across = tl.cdiv(D, COLUMNS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    valid = row < rows
    place, instance = _places(row, of_hidden, of_key, valid, N, L, PAIRS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, D, INNER):
        inner = start + tl.arange(0, INNER)
        inside = valid[:, None] & (inner < D)[None, :]
        x = _state(
            hidden, key, before, seed, row, place, instance, inner, inside, rows, D, dropout,
            LAYERS, DROPS,
        )  # fmt: skip
        w = tl.load(
            weight + column[None, :].to(tl.int64) * D + inner[:, None],
            mask=(column < D)[None, :] & (inner < D)[:, None],
            other=0.0,
        )
        total += dot(tl.where(inside, x, 0.0).to(w.dtype), w)
    total += tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    tl.store(
        output + row[:, None] * D + column[None, :],
        total.to(output.dtype.element_ty),
        mask=valid[:, None] & (column < D)[None, :],
    )


@triton.jit
def rsa_demux_finish_kernel(
    hidden,
    key,
    before,
    last,
    norm,
    norm_bias,
    output,
    of_hidden,
    of_key,
    seed,
    rows,
    D,
    N,
    L,
    dropout,
    eps,
    LAYERS: tl.constexpr,
    PAIRS: tl.constexpr,
    DROPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """output = LN(gelu(last)) + state."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    place, instance = _places(row, of_hidden, of_key, valid, N, L, PAIRS)
    mean, scale = moments(last, row, valid, D, eps, ROWS, WIDTH, True)
    for start in range(0, D, WIDTH):
        column = start + tl.arange(0, WIDTH)
        inside = valid[:, None] & (column < D)[None, :]
        at = row[:, None] * D + column[None, :]
        value = gelu(tl.load(last + at, mask=inside, other=0.0).to(tl.float32))
        w = tl.load(norm + column, mask=column < D, other=0.0).to(tl.float32)
        b = tl.load(norm_bias + column, mask=column < D, other=0.0).to(tl.float32)
        value = (value - mean[:, None]) * scale[:, None] * w[None, :] + b[None, :]
        value += _state(
            hidden, key, before, seed, row, place, instance, column, inside, rows, D, dropout,
            LAYERS, DROPS,
        )  # fmt: skip
        tl.store(output + at, value.to(output.dtype.element_ty), mask=inside)


@triton.jit
def rsa_demux_norm_bwd_kernel(
    hidden,
    key,
    before,
    last,
    upstream,
    norm,
    grad_last,
    state,
    partial,
    of_hidden,
    of_key,
    seed,
    rows,
    D,
    N,
    L,
    dropout,
    eps,
    blocks,
    LAYERS: tl.constexpr,
    PAIRS: tl.constexpr,
    DROPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Through norm and last GELU; the state for the weight's gradient; sums for norm and bias.

    partial [programs, 3, D] float32: gradients of norm, norm's bias, last bias, of some blocks.
    """
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        valid = row < rows
        place, instance = _places(row, of_hidden, of_key, valid, N, L, PAIRS)
        mean, scale = moments(last, row, valid, D, eps, ROWS, WIDTH, True)
        along = tl.zeros([ROWS], tl.float32)
        level = tl.zeros([ROWS], tl.float32)
        for start in range(0, D, WIDTH):
            column = start + tl.arange(0, WIDTH)
            inside = valid[:, None] & (column < D)[None, :]
            at = row[:, None] * D + column[None, :]
            value = gelu(tl.load(last + at, mask=inside, other=0.0).to(tl.float32))
            unit = tl.where(inside, (value - mean[:, None]) * scale[:, None], 0.0)
            up = tl.load(upstream + at, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(norm + column, mask=column < D, other=0.0).to(tl.float32)
            along += tl.sum(up * w[None, :] * unit, 1)
            level += tl.sum(up * w[None, :], 1)
        along, level = along / D, level / D
        for start in range(0, D, WIDTH):
            column = start + tl.arange(0, WIDTH)
            inside = valid[:, None] & (column < D)[None, :]
            at = row[:, None] * D + column[None, :]
            given = tl.load(last + at, mask=inside, other=0.0).to(tl.float32)
            unit = tl.where(inside, (gelu(given) - mean[:, None]) * scale[:, None], 0.0)
            up = tl.load(upstream + at, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(norm + column, mask=column < D, other=0.0).to(tl.float32)
            grad = (up * w[None, :] - level[:, None] - unit * along[:, None]) * scale[:, None]
            grad *= gelu_slope(given)
            grad = tl.where(inside, grad, 0.0)
            tl.store(grad_last + at, grad.to(grad_last.dtype.element_ty), mask=inside)
            x = _state(
                hidden, key, before, seed, row, place, instance, column, inside, rows, D,
                dropout, LAYERS, DROPS,
            )  # fmt: skip
            tl.store(state + at, x.to(state.dtype.element_ty), mask=inside)
            own = partial + tl.program_id(0).to(tl.int64) * 3 * D + column
            more = column < D
            if block == tl.program_id(0):
                tl.store(own, tl.sum(up * unit, 0), mask=more)
                tl.store(own + D, tl.sum(up, 0), mask=more)
                tl.store(own + 2 * D, tl.sum(grad, 0), mask=more)
            else:
                tl.store(own, tl.load(own, mask=more) + tl.sum(up * unit, 0), mask=more)
                tl.store(own + D, tl.load(own + D, mask=more) + tl.sum(up, 0), mask=more)
                tl.store(own + 2 * D, tl.load(own + 2 * D, mask=more) + tl.sum(grad, 0), mask=more)


@triton.jit
def rsa_demux_layer_bwd_kernel(
    hidden,
    key,
    before,
    layer,
    upstream,
    grad_layer,
    state,
    partial,
    of_hidden,
    of_key,
    seed,
    rows,
    D,
    N,
    L,
    dropout,
    blocks,
    LAYER: tl.constexpr,
    PAIRS: tl.constexpr,
    DROPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Through the GELU of residual layer LAYER; its state, and sums for its bias."""
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        valid = row < rows
        place, instance = _places(row, of_hidden, of_key, valid, N, L, PAIRS)
        for start in range(0, D, WIDTH):
            column = start + tl.arange(0, WIDTH)
            inside = valid[:, None] & (column < D)[None, :]
            at = row[:, None] * D + column[None, :]
            given = tl.load(layer + at, mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(upstream + at, mask=inside, other=0.0).to(tl.float32)
            if DROPS:
                grad *= _kept(seed, LAYER + 1, row, column, D, dropout)
            grad = tl.where(inside, grad * gelu_slope(given), 0.0)
            tl.store(grad_layer + at, grad.to(grad_layer.dtype.element_ty), mask=inside)
            x = _state(
                hidden, key, before, seed, row, place, instance, column, inside, rows, D,
                dropout, LAYER, DROPS,
            )  # fmt: skip
            tl.store(state + at, x.to(state.dtype.element_ty), mask=inside)
            own = partial + tl.program_id(0).to(tl.int64) * D + column
            total = tl.sum(grad, 0)
            if block != tl.program_id(0):
                total += tl.load(own, mask=column < D)
            tl.store(own, total, mask=column < D)


@triton.jit
def rsa_demux_first_bwd_kernel(
    hidden,
    key,
    upstream,
    grad,
    of_hidden,
    of_key,
    seed,
    rows,
    D,
    N,
    L,
    dropout,
    PAIRS: tl.constexpr,
    DROPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Through the first GELU, row by row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    valid = row < rows
    inside = valid[:, None] & (column < D)[None, :]
    place, instance = _places(row, of_hidden, of_key, valid, N, L, PAIRS)
    first = tl.load(hidden + place[:, None] * D + column[None, :], mask=inside, other=0.0)
    marked = tl.load(key + instance[:, None] * D + column[None, :], mask=inside, other=0.0)
    at = row[:, None] * D + column[None, :]
    value = tl.load(upstream + at, mask=inside, other=0.0).to(tl.float32)
    if DROPS:
        value *= _kept(seed, 0, row, column, D, dropout)
    value *= gelu_slope(first.to(tl.float32) + marked.to(tl.float32))
    tl.store(grad + at, value.to(grad.dtype.element_ty), mask=inside)


@triton.jit
def rsa_demux_sums_bwd_kernel(
    hidden,
    key,
    upstream,
    grad_hidden,
    partial,
    seed,
    positions,
    D,
    N,
    L,
    dropout,
    blocks,
    DROPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The same for all instances of a position at once, summed over them, and over positions.

    partial [programs, N, D] float32: the key's gradient from some blocks of positions.
    """
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    own = partial + tl.program_id(0).to(tl.int64) * N * D + column
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        place = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (place < positions)[:, None] & (column < D)[None, :]
        at = place[:, None] * D + column[None, :]
        first = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
        total = tl.zeros([ROWS, WIDTH], tl.float32)
        for instance in range(N):
            row = (place // L * N + instance) * L + place % L
            marked = tl.load(key + instance * D + column, mask=column < D, other=0.0)
            value = tl.load(
                upstream + row[:, None] * D + column[None, :], mask=inside, other=0.0
            ).to(tl.float32)
            if DROPS:
                value *= _kept(seed, 0, row, column, D, dropout)
            value *= gelu_slope(first + marked.to(tl.float32)[None, :])
            value = tl.where(inside, value, 0.0)
            total += value
            share = tl.sum(value, 0)
            if block != tl.program_id(0):
                share += tl.load(own + instance * D, mask=column < D)
            tl.store(own + instance * D, share, mask=column < D)
        tl.store(grad_hidden + at, total.to(grad_hidden.dtype.element_ty), mask=inside)
