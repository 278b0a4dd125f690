"""Triton kernels of `rsa_demux`: the steps between its matrix products, and a fused product.

Row r of the output is one instance at one mixed position: without pairs, r enumerates [B, N, L];
with PAIRS, both indices are loaded. Only the GELU inputs of the layers (`pre_gelu`, [layers, rows,
D]) are stored; states are recomputed from them and from the two parts of the first layer,
hidden_part [B * L, D] and key_part [N, D]. GELU is the expensive step, so each row is held whole,
as a tuple of TILES tiles of WIDTH columns. `rows` is the number of output rows, `length` L; all
tensors are contiguous.
"""

# ruff: noqa: RUF005, B007 (Triton knows neither starred tuples nor a loop variable `_`)

import triton
import triton.language as tl

from megamod_kernels.dot import dot
from megamod_kernels.rows import (
    compute_tile_moments,
    draw_dropout_factors,
    gelu,
    gelu_and_slope,
    make_valid_mask,
)


@triton.jit
def _find_row_indices(row, pair_position, pair_instance, valid, N, length, PAIRS: tl.constexpr):
    """Return the mixed position (int64) and the instance of each output row [ROWS].

    With PAIRS both are loaded from pair_position and pair_instance; without, they follow from the
    order [B, N, L] of rows. `valid` [ROWS] is False for rows that do not exist.
    """
    if PAIRS:
        position = tl.load(pair_position + row, mask=valid, other=0)
        instance = tl.load(pair_instance + row, mask=valid, other=0)
        return position, instance
    else:
        return (row // (N * length) * length + row % length).to(tl.int64), row // length % N


@triton.jit
def _load_tile(source, row, first_column, D, valid, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """Load a tile [ROWS, WIDTH] of `source` [rows, D] in float32, with 0 outside of it.

    `row` [ROWS] are row indices, of which `valid` exist; the tile starts at `first_column`. WHOLE:
    D is a multiple of WIDTH, so that only rows are masked.
    """
    column = first_column + tl.arange(0, WIDTH)
    pointers = source + row[:, None] * D + column[None, :]
    return tl.load(pointers, mask=make_valid_mask(valid, column, D, WHOLE), other=0.0).to(
        tl.float32
    )


@triton.jit
def _store_tile(
    target, row, first_column, D, valid, value, WIDTH: tl.constexpr, WHOLE: tl.constexpr
):
    """Store a tile `value` [ROWS, WIDTH] into `target` [rows, D], rounded to its dtype.

    Elements outside of the target are not written; arguments as of `_load_tile`.
    """
    column = first_column + tl.arange(0, WIDTH)
    pointers = target + row[:, None] * D + column[None, :]
    tl.store(
        pointers, value.to(target.dtype.element_ty), mask=make_valid_mask(valid, column, D, WHOLE)
    )


@triton.jit
def _compute_state_tile(
    hidden_part, key_part, pre_gelu, seed, row, position, instance, first_column, valid, rows, D,
    dropout, LAYERS: tl.constexpr, DROPOUT: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Compute a tile [ROWS, WIDTH] of the state after LAYERS residual layers, in float32.

    Elements outside of the matrix [rows, D] are 0. `position` and `instance` [ROWS] are the results
    of `_find_row_indices`; `row` and `valid` as of `_load_tile`.
    """
    hidden_tile = _load_tile(hidden_part, position, first_column, D, valid, WIDTH, WHOLE)
    x = gelu(hidden_tile + _load_tile(key_part, instance, first_column, D, valid, WIDTH, WHOLE))
    x *= draw_dropout_factors(seed, 0, row, first_column, dropout, DROPOUT, WIDTH)
    for layer in tl.static_range(LAYERS):
        activation = gelu(
            _load_tile(pre_gelu, layer * rows + row, first_column, D, valid, WIDTH, WHOLE)
        )
        x += activation * draw_dropout_factors(
            seed, layer + 1, row, first_column, dropout, DROPOUT, WIDTH
        )
    return x


@triton.jit
def rsa_demux_state_kernel(
    hidden_part, key_part, pre_gelu, state, pair_position, pair_instance, seed, rows, length, D, N,
    dropout, LAYERS: tl.constexpr, PAIRS: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, TILES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Write the states [rows, D] after LAYERS residual layers, ROWS rows per program.

    They are the input of the next layer's matrix product, which the vendor's kernel computes.
    Arguments: see the top of the file.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    position, instance = _find_row_indices(
        row, pair_position, pair_instance, valid, N, length, PAIRS
    )
    row = row.to(tl.int64)
    for tile in tl.static_range(TILES):
        x = _compute_state_tile(
            hidden_part, key_part, pre_gelu, seed, row, position, instance, tile * WIDTH, valid,
            rows, D, dropout, LAYERS, DROPOUT, WIDTH, WHOLE,
        )  # fmt: skip
        _store_tile(state, row, tile * WIDTH, D, valid, x, WIDTH, WHOLE)


@triton.jit
def rsa_demux_matmul_kernel(
    hidden_part, key_part, pre_gelu, state, weight, bias, output, pair_position, pair_instance,
    seed, rows, length, D, N, dropout, LAYERS: tl.constexpr, LAST: tl.constexpr,
    PAIRS: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    INNER: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Compute output = state weight^T + bias; the prologue of the product computes the state.

    weight [D, D], bias [D]; output and state [rows, D]. LAST: also write the state, for the final
    residual. WHOLE: D is a multiple of INNER. Arguments: see the top of the file.
    """
    # Neighbouring programs read the same rows, which then come from the cache.
    column_tiles = tl.cdiv(D, COLUMNS)
    row = tl.program_id(0) // column_tiles * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    valid = row < rows
    position, instance = _find_row_indices(
        row, pair_position, pair_instance, valid, N, length, PAIRS
    )
    row = row.to(tl.int64)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, D, INNER):
        state_tile = _compute_state_tile(
            hidden_part, key_part, pre_gelu, seed, row, position, instance, start, valid, rows, D,
            dropout, LAYERS, DROPOUT, INNER, WHOLE,
        )  # fmt: skip
        if LAST:
            writes_state = valid & (tl.program_id(0) % column_tiles == 0)
            _store_tile(state, row, start, D, writes_state, state_tile, INNER, WHOLE)
        inner = start + tl.arange(0, INNER)
        weight_tile = tl.load(
            weight + column[None, :].to(tl.int64) * D + inner[:, None],
            mask=(column < D)[None, :] & (inner < D)[:, None],
            other=0.0,
        )
        total += dot(state_tile.to(weight_tile.dtype), weight_tile)
    total += tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    tl.store(
        output + row[:, None] * D + column[None, :],
        total.to(output.dtype.element_ty),
        mask=valid[:, None] & (column < D)[None, :],
    )


@triton.jit
def rsa_demux_finish_kernel(
    last_pre_gelu, norm_weight, norm_bias, output, rows, D, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Add LN(gelu(last_pre_gelu)) to `output` [rows, D], which holds the state, in place.

    last_pre_gelu [rows, D] is that of the last layer; norm_weight and norm_bias [D].
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    x = ()
    for tile in tl.static_range(TILES):
        x = x + (gelu(_load_tile(last_pre_gelu, row, tile * WIDTH, D, valid, WIDTH, WHOLE)),)
    mean, rstd = compute_tile_moments(x, D, eps, TILES, WIDTH, WHOLE)
    for tile in tl.static_range(TILES):
        # Loaded once per row, in the layout of the rows.
        gain = _load_tile(norm_weight, row * 0, tile * WIDTH, D, valid, WIDTH, WHOLE)
        shift = _load_tile(norm_bias, row * 0, tile * WIDTH, D, valid, WIDTH, WHOLE)
        value = (x[tile] - mean[:, None]) * rstd[:, None] * gain + shift
        value += _load_tile(output, row, tile * WIDTH, D, valid, WIDTH, WHOLE)
        _store_tile(output, row, tile * WIDTH, D, valid, value, WIDTH, WHOLE)


@triton.jit
def rsa_demux_layer_bwd_kernel(
    hidden_part, key_part, pre_gelu, upstream, norm_weight, grad, state, partial, pair_position,
    pair_instance, seed, rows, length, D, N, dropout, eps, blocks, LAYER: tl.constexpr,
    NORM: tl.constexpr, PAIRS: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, TILES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Backward of gelu(pre_gelu[LAYER]); with NORM, of the LayerNorm after it first.

    `upstream` [rows, D] is the gradient of the result, `grad` [rows, D] that of the GELU's input.
    Also writes the `state` [rows, D] that product LAYER read, for the gradient of its weight, and
    partial sums over `blocks` of ROWS rows: partial [programs, 1, D] float32 for the product's
    bias; with NORM [programs, 3, D], also for weight and bias of the norm. Arguments: see the top
    of the file.
    """
    bias_sum, gain_sum, shift_sum = (), (), ()
    for tile in tl.static_range(TILES):
        bias_sum = bias_sum + (tl.zeros([ROWS, WIDTH], tl.float32),)
        gain_sum = gain_sum + (tl.zeros([ROWS, WIDTH], tl.float32),)
        shift_sum = shift_sum + (tl.zeros([ROWS, WIDTH], tl.float32),)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        valid = row < rows
        position, instance = _find_row_indices(
            row, pair_position, pair_instance, valid, N, length, PAIRS
        )
        row = row.to(tl.int64)
        x, slopes, upstream_tile = (), (), ()
        for tile in tl.static_range(TILES):
            loaded = _load_tile(pre_gelu, LAYER * rows + row, tile * WIDTH, D, valid, WIDTH, WHOLE)
            value, slope = gelu_and_slope(loaded)
            x, slopes = x + (value,), slopes + (slope,)
            upstream_tile = upstream_tile + (
                _load_tile(upstream, row, tile * WIDTH, D, valid, WIDTH, WHOLE),
            )
        mean, rstd, product_mean, grad_mean = 0.0, 0.0, 0.0, 0.0
        if NORM:
            mean, rstd = compute_tile_moments(x, D, eps, TILES, WIDTH, WHOLE)
            products = tl.zeros([ROWS, WIDTH], tl.float32)
            total = tl.zeros([ROWS, WIDTH], tl.float32)
            for tile in tl.static_range(TILES):
                scaled = upstream_tile[tile] * _load_tile(
                    norm_weight, row * 0, tile * WIDTH, D, valid, WIDTH, WHOLE
                )
                products += scaled * (x[tile] - mean[:, None])
                total += scaled
            product_mean, grad_mean = tl.sum(products, 1) * rstd / D, tl.sum(total, 1) / D
        biases, gains, shifts = (), (), ()
        for tile in tl.static_range(TILES):
            if NORM:
                normed = (x[tile] - mean[:, None]) * rstd[:, None]
                grad_tile = upstream_tile[tile] * _load_tile(
                    norm_weight, row * 0, tile * WIDTH, D, valid, WIDTH, WHOLE
                )
                grad_tile -= grad_mean[:, None] + normed * product_mean[:, None]
                grad_tile *= rstd[:, None] * slopes[tile]
                gains = gains + (gain_sum[tile] + upstream_tile[tile] * normed,)
                shifts = shifts + (shift_sum[tile] + upstream_tile[tile],)
            else:
                grad_tile = upstream_tile[tile] * slopes[tile]
                grad_tile *= draw_dropout_factors(
                    seed, LAYER + 1, row, tile * WIDTH, dropout, DROPOUT, WIDTH
                )
            _store_tile(grad, row, tile * WIDTH, D, valid, grad_tile, WIDTH, WHOLE)
            biases = biases + (bias_sum[tile] + grad_tile,)
            recomputed = _compute_state_tile(
                hidden_part, key_part, pre_gelu, seed, row, position, instance, tile * WIDTH, valid,
                rows, D, dropout, LAYER, DROPOUT, WIDTH, WHOLE,
            )  # fmt: skip
            _store_tile(state, row, tile * WIDTH, D, valid, recomputed, WIDTH, WHOLE)
        bias_sum = biases
        if NORM:
            gain_sum, shift_sum = gains, shifts
    for tile in tl.static_range(TILES):
        column = tile * WIDTH + tl.arange(0, WIDTH)
        target = partial + tl.program_id(0).to(tl.int64) * (3 if NORM else 1) * D + column
        tl.store(target, tl.sum(bias_sum[tile], 0), mask=column < D)
        if NORM:
            tl.store(target + D, tl.sum(gain_sum[tile], 0), mask=column < D)
            tl.store(target + 2 * D, tl.sum(shift_sum[tile], 0), mask=column < D)


@triton.jit
def _compute_first_gelu_grad(
    hidden_part, key_part, upstream, seed, row, position, instance, first_column, valid, D, dropout,
    DROPOUT: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Compute a tile [ROWS, WIDTH] of the gradient of the first GELU's input, in float32.

    `upstream` [rows, D] is the gradient of the state before any residual layer, after the first
    dropout; other arguments as of `_compute_state_tile`.
    """
    hidden_tile = _load_tile(hidden_part, position, first_column, D, valid, WIDTH, WHOLE)
    _, slope = gelu_and_slope(
        hidden_tile + _load_tile(key_part, instance, first_column, D, valid, WIDTH, WHOLE)
    )
    upstream_tile = _load_tile(upstream, row, first_column, D, valid, WIDTH, WHOLE)
    return (
        upstream_tile
        * slope
        * draw_dropout_factors(seed, 0, row, first_column, dropout, DROPOUT, WIDTH)
    )


@triton.jit
def rsa_demux_first_bwd_kernel(
    hidden_part, key_part, upstream, grad, pair_position, pair_instance, seed, rows, D, dropout,
    DROPOUT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Write `grad` [rows, D], the gradient of the first GELU's input, for pairs.

    `upstream` [rows, D] is the gradient of the first state. The caller adds up the rows by position
    and by instance, since pairs come in any order. Arguments: see the top of the file.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    position, instance = _find_row_indices(row, pair_position, pair_instance, valid, 1, 1, True)
    start = tl.program_id(1) * WIDTH
    value = _compute_first_gelu_grad(
        hidden_part, key_part, upstream, seed, row, position, instance, start, valid, D, dropout,
        DROPOUT, WIDTH, WHOLE,
    )  # fmt: skip
    _store_tile(grad, row, start, D, valid, value, WIDTH, WHOLE)


@triton.jit
def rsa_demux_sums_bwd_kernel(
    hidden_part, key_part, upstream, grad_hidden, partial, seed, positions, length, D, N, dropout,
    DROPOUT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Backward of the first GELU for all instances, summed over instances and over positions.

    `upstream` [B * N * L, D] is the gradient of the first state. Written are grad_hidden [B * L, D]
    and partial [programs, N, D] float32, the key's gradient from one block of positions. Arguments:
    see the top of the file.
    """
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = position < positions
    start = tl.program_id(1) * WIDTH
    column = start + tl.arange(0, WIDTH)
    first_row = (position // length * N).to(tl.int64) * length + position % length
    position = position.to(tl.int64)
    target = partial + tl.program_id(0).to(tl.int64) * N * D + column
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    hidden_tile = _load_tile(hidden_part, position, start, D, valid, WIDTH, WHOLE)
    for instance in range(N):
        row = first_row + instance * length
        key_row = tl.load(key_part + instance * D + column, mask=column < D, other=0.0).to(
            tl.float32
        )
        _, slope = gelu_and_slope(hidden_tile + key_row[None, :])
        value = _load_tile(upstream, row, start, D, valid, WIDTH, WHOLE) * slope
        value *= draw_dropout_factors(seed, 0, row, start, dropout, DROPOUT, WIDTH)
        total += value
        tl.store(target + instance * D, tl.sum(value, 0), mask=column < D)
    _store_tile(grad_hidden, position, start, D, valid, total, WIDTH, WHOLE)
