"""Row operations shared by the kernels: GELU, LayerNorm moments and dropout."""

import triton
import triton.language as tl

from megamod_kernels.dispatch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
_DENSITY = tl.constexpr(0.3989422804014327)  # of the standard normal distribution at 0
_HALF_LOG2_E = tl.constexpr(0.7213475204444817)
_SCALE = tl.constexpr(0.33)  # of the polynomial's argument, see `_compute_upper_tail`


@triton.jit
def _compute_upper_tail(distance):
    """Return the normal distribution's upper tail at a distance >= 0, and exp(-distance^2 / 2).

    Costs half as much as erf, and the exponential is needed for the slope anyway. The polynomial in
    1 / (1 + 0.33 distance) has the form of Abramowitz and Stegun 7.1.26, with degree 7 and
    coefficients fitted to minimise the error of GELU (2e-9).
    """
    power = -_HALF_LOG2_E * distance * distance
    denominator = 1.0 + _SCALE * distance
    if _INTERPRETED:
        bell = tl.exp2(power)
        t = 1.0 / denominator
    else:
        # Plain operators handle denormal numbers, which do not matter here.
        bell = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [power], tl.float32, True, 1
        )
        t = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [denominator], tl.float32, True, 1
        )
    factor = 0.045372895896434784 * t - 0.21972547471523285
    factor = factor * t + 0.3294706642627716
    factor = factor * t - 0.08738142997026443
    factor = factor * t + 0.17987503111362457
    factor = factor * t + 0.11981846392154694
    factor = factor * t + 0.13256984949111938
    return factor * t * bell, bell


@triton.jit
def gelu(x):
    """Compute the exact GELU of a float32 tile: x times the normal distribution function at x."""
    distance = tl.abs(x)
    tail, _ = _compute_upper_tail(distance)
    return tl.maximum(x, 0.0) - distance * tail


@triton.jit
def gelu_and_slope(x):
    """Return gelu(x) and its derivative at x, for a float32 tile; one exponential serves both."""
    distance = tl.abs(x)
    tail, bell = _compute_upper_tail(distance)
    slope = tl.where(x > 0.0, 1.0 - tail, tail) + _DENSITY * x * bell
    return tl.maximum(x, 0.0) - distance * tail, slope


@triton.jit
def make_valid_mask(valid, column, D, WHOLE: tl.constexpr):
    """Return the mask [ROWS, WIDTH] of elements inside of a matrix with D columns.

    `valid` [ROWS] is True for rows of the matrix; `column` [WIDTH] are column indices. WHOLE: D is
    a multiple of WIDTH, so that the mask has one column, of the valid rows.
    """
    if WHOLE:
        return valid[:, None]
    else:
        return valid[:, None] & (column < D)[None, :]


@triton.jit
def compute_moments(source, row, valid, D, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return mean and reciprocal standard deviation [ROWS] of rows of `source` [rows, D].

    `row` [ROWS] are the row indices, `valid` [ROWS] is False for those that do not exist; `eps` is
    added to the variance. Rows are read tile by tile and the moments of tiles combined (Chan et al.
    1979), which loses no digits where the mean is far from zero.
    """
    mean = tl.zeros([ROWS], tl.float32)
    square_sum = tl.zeros([ROWS], tl.float32)
    for start in range(0, D, WIDTH):
        column = start + tl.arange(0, WIDTH)
        mask = valid[:, None] & (column < D)[None, :]
        loaded = tl.load(source + row[:, None] * D + column[None, :], mask=mask, other=0.0)
        value = loaded.to(tl.float32)
        count = tl.minimum(D - start, WIDTH).to(tl.float32)
        tile_mean = tl.sum(value, 1) / count
        centred = tl.where(mask, value - tile_mean[:, None], 0.0)
        delta = tile_mean - mean
        mean += delta * count / (start + count)
        square_sum += tl.sum(centred * centred, 1) + delta * delta * start * count / (start + count)
    return mean, 1.0 / tl.sqrt(square_sum / D + eps)


@triton.jit
def compute_tile_moments(x, D, eps, TILES: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """Return mean and reciprocal standard deviation [ROWS] of rows that are held in registers.

    x is a tuple of TILES tiles [ROWS, WIDTH] in float32, with zeros beyond column D; `eps` is added
    to the variance. WHOLE: D is a multiple of WIDTH.
    """
    # Add the tiles first, because the sum over threads is the expensive part.
    total = x[0]
    for tile in tl.static_range(1, TILES):
        total += x[tile]
    mean = tl.sum(total, 1) / D
    square = tl.zeros_like(total)
    for tile in tl.static_range(TILES):
        centred = x[tile] - mean[:, None]
        if not WHOLE:
            column = tile * WIDTH + tl.arange(0, WIDTH)
            centred = tl.where((column < D)[None, :], centred, 0.0)
        square += centred * centred
    return mean, 1.0 / tl.sqrt(tl.sum(square, 1) / D + eps)


@triton.jit
def draw_dropout_factors(
    seed, stream, row, first_column, dropout, DROPOUT: tl.constexpr, WIDTH: tl.constexpr
):
    """Draw the dropout factors of a tile [ROWS, WIDTH]: 0 or 1 / (1 - dropout); 1 unless DROPOUT.

    They follow from `seed` (pointer to one int64) and Philox's counter (row, column // 4, stream),
    so that backward draws the same ones. `row` [ROWS] are row indices, `first_column` is that of
    the tile, a multiple of 4; `stream` numbers the dropouts of an operation.
    """
    if DROPOUT:
        quad = first_column // 4 + tl.arange(0, WIDTH // 4)
        seed_value = tl.load(seed)
        counter = row.to(tl.int32)[:, None] + tl.zeros_like(quad)[None, :]
        quads = quad[None, :] + tl.zeros_like(counter)
        a, b, c, d = tl.philox(
            seed_value, counter, quads, tl.zeros_like(counter) + stream, tl.zeros_like(counter)
        )
        bits = tl.join(tl.join(a, c), tl.join(b, d))
        bits = tl.reshape(bits, [row.shape[0], WIDTH])
        uniform = (bits >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
        return tl.where(uniform >= dropout, 1.0 / (1.0 - dropout), 0.0)
    else:
        return tl.full([row.shape[0], WIDTH], 1.0, tl.float32)
