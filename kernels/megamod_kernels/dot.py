"""The matrix product of all kernels, and the order of its tiles."""

import triton
import triton.language as tl

from megamod_kernels.dispatch import INTERPRETED

_UPCAST = tl.constexpr(INTERPRETED)


@triton.jit
def tile_of_program(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which tile, down and across, a program computes.

    Programs that run together share 8 blocks of rows, which then stay in the cache.
    """
    across = tl.cdiv(columns, COLUMNS)
    band = tl.program_id(0) // (8 * across)
    height = min(8, tl.cdiv(rows, ROWS) - band * 8)
    within = tl.program_id(0) % (8 * across)
    return band * 8 + within % height, within // height


@triton.jit
def dot(a, b):
    """Matrix product accumulated in float32; the interpreter cannot multiply bf16."""
    if _UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")
