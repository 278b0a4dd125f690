"""The matrix product of all kernels."""

import triton
import triton.language as tl

from megamod_kernels.dispatch import INTERPRETED

_UPCAST = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b):
    """Matrix product accumulated in float32; the interpreter cannot multiply bf16."""
    if _UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")
