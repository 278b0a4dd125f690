"""Matrix product of all kernels, and the order of its tiles."""

import triton
import triton.language as tl

from megamod_kernels.dispatch import INTERPRETED

_UPCAST = tl.constexpr(INTERPRETED)


@triton.jit
def find_program_tile(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return row and column index of the tile that a program of a one-dimensional grid computes.

    Tiles [ROWS, COLUMNS] cover a matrix [rows, columns]. Programs that run at the same time share 8
    row tiles, which then stay in the cache.
    """
    column_tiles = tl.cdiv(columns, COLUMNS)
    band = tl.program_id(0) // (8 * column_tiles)
    height = min(8, tl.cdiv(rows, ROWS) - band * 8)
    within = tl.program_id(0) % (8 * column_tiles)
    return band * 8 + within % height, within // height


@triton.jit
def dot(a, b):
    """Multiply tiles [M, K] and [K, N] of one dtype; the result [M, N] is float32.

    "ieee": float32 is not rounded to TF32, so its products use no tensor cores.
    """
    # Triton's interpreter cannot multiply bfloat16.
    if _UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")
