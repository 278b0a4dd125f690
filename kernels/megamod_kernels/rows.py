"""What several kernels do to rows: GELU, and the moments that a norm needs."""

import triton
import triton.language as tl

_ROOT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY = tl.constexpr(0.3989422804014327)  # of the standard normal distribution at 0


@triton.jit
def gelu(x):
    """The exact one, by the error function."""
    return 0.5 * x * (1.0 + tl.math.erf(x * _ROOT_HALF))


@triton.jit
def gelu_slope(x):
    """Its derivative."""
    return 0.5 * (1.0 + tl.math.erf(x * _ROOT_HALF)) + x * _DENSITY * tl.exp(-0.5 * x * x)


@triton.jit
def moments(
    source, row, valid, D, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr, GELU: tl.constexpr
):
    """Mean and 1 / deviation of rows, or of GELU of them, tile by tile (Chan et al. 1979)."""
    mean = tl.zeros([ROWS], tl.float32)
    spread = tl.zeros([ROWS], tl.float32)
    for start in range(0, D, WIDTH):
        column = start + tl.arange(0, WIDTH)
        inside = valid[:, None] & (column < D)[None, :]
        given = tl.load(source + row[:, None] * D + column[None, :], mask=inside, other=0.0)
        value = given.to(tl.float32)
        if GELU:
            value = tl.where(inside, gelu(value), 0.0)
        count = tl.minimum(D - start, WIDTH).to(tl.float32)
        own = tl.sum(value, 1) / count
        apart = tl.where(inside, value - own[:, None], 0.0)
        delta = own - mean
        mean += delta * count / (start + count)
        spread += tl.sum(apart * apart, 1) + delta * delta * start * count / (start + count)
    return mean, 1.0 / tl.sqrt(spread / D + eps)
