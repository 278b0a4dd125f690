"""Triton kernels of `rsa_demux`: everything between its matrix products, and one with a prologue.

Row r of the result is instance k of mixed position u: for all instances and positions r counts
[B, N, L], for pairs both numbers are read. What is left of layers between is their input to GELU
(`before`); states are made again from it and from both parts of the first layer. GELUs are what
costs, so that rows are held whole, as tuples of TILES tiles of WIDTH columns.
"""

# ruff: noqa: RUF005, B007 (Triton knows neither starred tuples nor a loop variable `_`)

import triton
import triton.language as tl

from megamod_kernels.dot import dot
from megamod_kernels.rows import gelu, gelu_and_slope, held_moments, inside, kept


@triton.jit
def _places(row, of_hidden, of_key, valid, N, L, PAIRS: tl.constexpr):
    """Mixed position and instance of rows."""
    if PAIRS:
        place = tl.load(of_hidden + row, mask=valid, other=0)
        instance = tl.load(of_key + row, mask=valid, other=0)
        return place, instance
    else:
        return (row // (N * L) * L + row % L).to(tl.int64), row // L % N


@triton.jit
def _read(source, row, first_column, D, valid, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """A tile of rows in float32, and 0 outside."""
    column = first_column + tl.arange(0, WIDTH)
    at = source + row[:, None] * D + column[None, :]
    return tl.load(at, mask=inside(valid, column, D, WHOLE), other=0.0).to(tl.float32)


@triton.jit
def _write(target, row, first_column, D, valid, value, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    column = first_column + tl.arange(0, WIDTH)
    at = target + row[:, None] * D + column[None, :]
    tl.store(at, value.to(target.dtype.element_ty), mask=inside(valid, column, D, WHOLE))


@triton.jit
def _state(
    hidden, key, before, seed, row, place, instance, first_column, valid, rows, D, dropout,
    LAYERS: tl.constexpr, DROPS: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A tile of the state behind LAYERS residual layers, in float32, and 0 outside."""
    first = _read(hidden, place, first_column, D, valid, WIDTH, WHOLE)
    x = gelu(first + _read(key, instance, first_column, D, valid, WIDTH, WHOLE))
    x *= kept(seed, 0, row, first_column, dropout, DROPS, WIDTH)
    for layer in tl.static_range(LAYERS):
        more = gelu(_read(before, layer * rows + row, first_column, D, valid, WIDTH, WHOLE))
        x += more * kept(seed, layer + 1, row, first_column, dropout, DROPS, WIDTH)
    return x


@triton.jit
def rsa_demux_state_kernel(
    hidden, key, before, state, of_hidden, of_key, seed, rows, D, N, L, dropout,
    LAYERS: tl.constexpr, PAIRS: tl.constexpr, DROPS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, TILES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What the next product reads."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    place, instance = _places(row, of_hidden, of_key, valid, N, L, PAIRS)
    row = row.to(tl.int64)
    for tile in tl.static_range(TILES):
        x = _state(hidden, key, before, seed, row, place, instance, tile * WIDTH, valid, rows, D,
                   dropout, LAYERS, DROPS, WIDTH, WHOLE)  # fmt: skip
        _write(state, row, tile * WIDTH, D, valid, x, WIDTH, WHOLE)


@triton.jit
def rsa_demux_matmul_kernel(
    hidden, key, before, state, weight, bias, output, of_hidden, of_key, seed, rows, D, N, L,
    dropout, LAYERS: tl.constexpr, LAST: tl.constexpr, PAIRS: tl.constexpr, DROPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """output = state weight^T + bias, the state made where the product reads it.

    With LAST it is written as well, for what comes behind; WHOLE: INNER divides D.
    """
    # Neighbouring programs share their rows, whose states then come from cache.
    across = tl.cdiv(D, COLUMNS)
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    valid = row < rows
    place, instance = _places(row, of_hidden, of_key, valid, N, L, PAIRS)
    row = row.to(tl.int64)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, D, INNER):
        x = _state(hidden, key, before, seed, row, place, instance, start, valid, rows, D, dropout,
                   LAYERS, DROPS, INNER, WHOLE)  # fmt: skip
        if LAST:
            first = valid & (tl.program_id(0) % across == 0)
            _write(state, row, start, D, first, x, INNER, WHOLE)
        inner = start + tl.arange(0, INNER)
        w = tl.load(
            weight + column[None, :].to(tl.int64) * D + inner[:, None],
            mask=(column < D)[None, :] & (inner < D)[:, None],
            other=0.0,
        )
        total += dot(x.to(w.dtype), w)
    total += tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    tl.store(
        output + row[:, None] * D + column[None, :],
        total.to(output.dtype.element_ty),
        mask=valid[:, None] & (column < D)[None, :],
    )


@triton.jit
def rsa_demux_finish_kernel(
    last, norm, norm_bias, output, rows, D, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Adds LN(gelu(last)) to the output, which holds the state."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    x = ()
    for tile in tl.static_range(TILES):
        x = x + (gelu(_read(last, row, tile * WIDTH, D, valid, WIDTH, WHOLE)),)
    mean, scale = held_moments(x, D, eps, TILES, WIDTH, WHOLE)
    for tile in tl.static_range(TILES):
        # Read as often as there are rows, but laid out as they are.
        gain = _read(norm, row * 0, tile * WIDTH, D, valid, WIDTH, WHOLE)
        shift = _read(norm_bias, row * 0, tile * WIDTH, D, valid, WIDTH, WHOLE)
        value = (x[tile] - mean[:, None]) * scale[:, None] * gain + shift
        value += _read(output, row, tile * WIDTH, D, valid, WIDTH, WHOLE)
        _write(output, row, tile * WIDTH, D, valid, value, WIDTH, WHOLE)


@triton.jit
def rsa_demux_layer_bwd_kernel(
    hidden, key, before, upstream, norm, grad, state, partial, of_hidden, of_key, seed,
    rows, D, N, L, dropout, eps, blocks,
    LAYER: tl.constexpr, NORM: tl.constexpr, PAIRS: tl.constexpr, DROPS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Through the GELU behind product LAYER; with NORM through the norm behind that before.

    Also the state that the product was given, for its weight's gradient, and sums over some blocks
    of rows: partial [programs, 1, D] float32, gradients of the product's bias; with NORM
    [programs, 3, D], those of the norm's weight and bias behind it.
    """
    of_bias, of_gain, of_shift = (), (), ()
    for tile in tl.static_range(TILES):
        of_bias = of_bias + (tl.zeros([ROWS, WIDTH], tl.float32),)
        of_gain = of_gain + (tl.zeros([ROWS, WIDTH], tl.float32),)
        of_shift = of_shift + (tl.zeros([ROWS, WIDTH], tl.float32),)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        valid = row < rows
        place, instance = _places(row, of_hidden, of_key, valid, N, L, PAIRS)
        row = row.to(tl.int64)
        x, slopes, up = (), (), ()
        for tile in tl.static_range(TILES):
            given = _read(before, LAYER * rows + row, tile * WIDTH, D, valid, WIDTH, WHOLE)
            value, slope = gelu_and_slope(given)
            x, slopes = x + (value,), slopes + (slope,)
            up = up + (_read(upstream, row, tile * WIDTH, D, valid, WIDTH, WHOLE),)
        mean, scale, along, level = 0.0, 0.0, 0.0, 0.0
        if NORM:
            mean, scale = held_moments(x, D, eps, TILES, WIDTH, WHOLE)
            products = tl.zeros([ROWS, WIDTH], tl.float32)
            total = tl.zeros([ROWS, WIDTH], tl.float32)
            for tile in tl.static_range(TILES):
                wanted = up[tile] * _read(norm, row * 0, tile * WIDTH, D, valid, WIDTH, WHOLE)
                products += wanted * (x[tile] - mean[:, None])
                total += wanted
            along, level = tl.sum(products, 1) * scale / D, tl.sum(total, 1) / D
        biases, gains, shifts = (), (), ()
        for tile in tl.static_range(TILES):
            if NORM:
                unit = (x[tile] - mean[:, None]) * scale[:, None]
                more = up[tile] * _read(norm, row * 0, tile * WIDTH, D, valid, WIDTH, WHOLE)
                more -= level[:, None] + unit * along[:, None]
                more *= scale[:, None] * slopes[tile]
                gains = gains + (of_gain[tile] + up[tile] * unit,)
                shifts = shifts + (of_shift[tile] + up[tile],)
            else:
                more = up[tile] * slopes[tile]
                more *= kept(seed, LAYER + 1, row, tile * WIDTH, dropout, DROPS, WIDTH)
            _write(grad, row, tile * WIDTH, D, valid, more, WIDTH, WHOLE)
            biases = biases + (of_bias[tile] + more,)
            made = _state(hidden, key, before, seed, row, place, instance, tile * WIDTH, valid,
                          rows, D, dropout, LAYER, DROPS, WIDTH, WHOLE)  # fmt: skip
            _write(state, row, tile * WIDTH, D, valid, made, WIDTH, WHOLE)
        of_bias = biases
        if NORM:
            of_gain, of_shift = gains, shifts
    for tile in tl.static_range(TILES):
        column = tile * WIDTH + tl.arange(0, WIDTH)
        own = partial + tl.program_id(0).to(tl.int64) * (3 if NORM else 1) * D + column
        tl.store(own, tl.sum(of_bias[tile], 0), mask=column < D)
        if NORM:
            tl.store(own + D, tl.sum(of_gain[tile], 0), mask=column < D)
            tl.store(own + 2 * D, tl.sum(of_shift[tile], 0), mask=column < D)


@triton.jit
def _into_first(
    hidden, key, upstream, seed, row, place, instance, first_column, valid, D, dropout,
    DROPS: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient of what the first GELU was given."""
    first = _read(hidden, place, first_column, D, valid, WIDTH, WHOLE)
    _, slope = gelu_and_slope(first + _read(key, instance, first_column, D, valid, WIDTH, WHOLE))
    up = _read(upstream, row, first_column, D, valid, WIDTH, WHOLE)
    return up * slope * kept(seed, 0, row, first_column, dropout, DROPS, WIDTH)


@triton.jit
def rsa_demux_first_bwd_kernel(
    hidden, key, upstream, grad, of_hidden, of_key, seed, rows, D, dropout,
    DROPS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Through the first GELU, row by row, for pairs."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    place, instance = _places(row, of_hidden, of_key, valid, 1, 1, True)
    start = tl.program_id(1) * WIDTH
    value = _into_first(hidden, key, upstream, seed, row, place, instance, start, valid, D,
                        dropout, DROPS, WIDTH, WHOLE)  # fmt: skip
    _write(grad, row, start, D, valid, value, WIDTH, WHOLE)


@triton.jit
def rsa_demux_sums_bwd_kernel(
    hidden, key, upstream, grad_hidden, partial, seed, positions, D, N, L, dropout,
    DROPS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The same for all instances of a position at once, summed over them, and over positions.

    partial [programs, N, D] float32: the key's gradient from one block of positions.
    """
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = place < positions
    start = tl.program_id(1) * WIDTH
    column = start + tl.arange(0, WIDTH)
    first_row = (place // L * N).to(tl.int64) * L + place % L
    place = place.to(tl.int64)
    own = partial + tl.program_id(0).to(tl.int64) * N * D + column
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    first = _read(hidden, place, start, D, valid, WIDTH, WHOLE)
    for instance in range(N):
        row = first_row + instance * L
        marked = tl.load(key + instance * D + column, mask=column < D, other=0.0).to(tl.float32)
        _, slope = gelu_and_slope(first + marked[None, :])
        value = _read(upstream, row, start, D, valid, WIDTH, WHOLE) * slope
        value *= kept(seed, 0, row, start, dropout, DROPS, WIDTH)
        total += value
        tl.store(own + instance * D, tl.sum(value, 0), mask=column < D)
    _write(grad_hidden, place, start, D, valid, total, WIDTH, WHOLE)
