"""What several kernels do to rows: GELU, the moments that a norm needs, dropout."""

import triton
import triton.language as tl

from megamod_kernels.dispatch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
_DENSITY = tl.constexpr(0.3989422804014327)  # of the standard normal distribution at 0
_HALF_LOG2_E = tl.constexpr(0.7213475204444817)
_SCALE = tl.constexpr(0.33)


@triton.jit
def _above(distance):
    """What of a normal distribution lies above a distance >= 0, and exp(-distance^2 / 2).

    Half of what an error function costs, and the exponential comes with it. The factor of the
    exponential is a polynomial in 1 / (1 + 0.33 distance), as in Abramowitz and Stegun 7.1.26, but
    of degree 7, fitted for GELU's least error: 2e-9, of its values.
    """
    power = -_HALF_LOG2_E * distance * distance
    below = 1.0 + _SCALE * distance
    if _INTERPRETED:
        bell = tl.exp2(power)
        t = 1.0 / below
    else:
        # Plain operators would look for denormal numbers, of which none matters here.
        bell = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [power], tl.float32, True, 1
        )
        t = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [below], tl.float32, True, 1
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
    """The exact one, x times the normal distribution up to x."""
    distance = tl.abs(x)
    above, _ = _above(distance)
    return tl.maximum(x, 0.0) - distance * above


@triton.jit
def gelu_and_slope(x):
    """The same, and its derivative."""
    distance = tl.abs(x)
    above, bell = _above(distance)
    slope = tl.where(x > 0.0, 1.0 - above, above) + _DENSITY * x * bell
    return tl.maximum(x, 0.0) - distance * above, slope


@triton.jit
def inside(valid, column, D, WHOLE: tl.constexpr):
    """Which of a tile is there; WHOLE: D fills all tiles."""
    if WHOLE:
        return valid[:, None]
    else:
        return valid[:, None] & (column < D)[None, :]


@triton.jit
def moments(source, row, valid, D, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Mean and 1 / deviation of rows, tile by tile (Chan et al. 1979)."""
    mean = tl.zeros([ROWS], tl.float32)
    spread = tl.zeros([ROWS], tl.float32)
    for start in range(0, D, WIDTH):
        column = start + tl.arange(0, WIDTH)
        there = valid[:, None] & (column < D)[None, :]
        given = tl.load(source + row[:, None] * D + column[None, :], mask=there, other=0.0)
        value = given.to(tl.float32)
        count = tl.minimum(D - start, WIDTH).to(tl.float32)
        own = tl.sum(value, 1) / count
        apart = tl.where(there, value - own[:, None], 0.0)
        delta = own - mean
        mean += delta * count / (start + count)
        spread += tl.sum(apart * apart, 1) + delta * delta * start * count / (start + count)
    return mean, 1.0 / tl.sqrt(spread / D + eps)


@triton.jit
def held_moments(x, D, eps, TILES: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """The same of rows that are held as tiles, with zeros beyond D; WHOLE: D fills all tiles."""
    # Tiles are added to each other first: what costs is the sum over threads.
    total = x[0]
    for tile in tl.static_range(1, TILES):
        total += x[tile]
    mean = tl.sum(total, 1) / D
    square = tl.zeros_like(total)
    for tile in tl.static_range(TILES):
        off = x[tile] - mean[:, None]
        if not WHOLE:
            column = tile * WIDTH + tl.arange(0, WIDTH)
            off = tl.where((column < D)[None, :], off, 0.0)
        square += off * off
    return mean, 1.0 / tl.sqrt(tl.sum(square, 1) / D + eps)


@triton.jit
def kept(seed, stream, row, first_column, p, DROPOUT: tl.constexpr, WIDTH: tl.constexpr):
    """What dropout multiplies a tile by; Philox counts (row, column // 4, stream)."""
    if DROPOUT:
        quad = first_column // 4 + tl.arange(0, WIDTH // 4)
        drawn = tl.load(seed)
        counter = row.to(tl.int32)[:, None] + tl.zeros_like(quad)[None, :]
        quads = quad[None, :] + tl.zeros_like(counter)
        a, b, c, d = tl.philox(
            drawn, counter, quads, tl.zeros_like(counter) + stream, tl.zeros_like(counter)
        )
        bits = tl.join(tl.join(a, c), tl.join(b, d))
        bits = tl.reshape(bits, [row.shape[0], WIDTH])
        uniform = (bits >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
        return tl.where(uniform >= p, 1.0 / (1.0 - p), 0.0)
    else:
        return tl.full([row.shape[0], WIDTH], 1.0, tl.float32)
