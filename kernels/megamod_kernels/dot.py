"""Matrix product of all kernels, and the order of its tiles."""

import triton
import triton.language as tl

from megamod_kernels.dispatch import INTERPRETED

_UPCAST = tl.constexpr(INTERPRETED)


@triton.jit
def find_program_tile(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return row and column index of the tile that a program computes.

    Programs that run at the same time share 8 row tiles, which then stay in the cache.
    """
    column_tiles = tl.cdiv(columns, COLUMNS)
    band = tl.program_id(0) // (8 * column_tiles)
    height = min(8, tl.cdiv(rows, ROWS) - band * 8)
    within = tl.program_id(0) % (8 * column_tiles)
    return band * 8 + within % height, within // height


@triton.jit
def dot(a, b):
    """Multiply matrices and accumulate in float32; the interpreter cannot multiply bf16."""
    if _UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")
