"""Which code an operation runs: Triton kernels or their reference in plain torch.

Every operation takes `implementation`: "triton", "reference", or "auto", which is Triton for tensors
on a GPU. With TRITON_INTERPRET=1 in the environment before Triton is imported, kernels run on the
CPU, slowly: tests do so. `dot` exists because of that interpreter.
"""

import os

import triton
import triton.language as tl
from torch import Tensor

IMPLEMENTATIONS = ("auto", "triton", "reference")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_UPCAST_DOT = tl.constexpr(INTERPRETED)


def uses_triton(implementation: str, tensor: Tensor) -> bool:
    """Whether an operation on this tensor runs its kernels.

    Raises:
        ValueError: for an unknown implementation, or Triton asked for where it cannot run.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation {implementation!r} is none of {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation == "triton" and not (tensor.is_cuda or tensor.is_meta or INTERPRETED):
        raise ValueError(
            f"implementation 'triton' needs tensors on a GPU, these are on {tensor.device}; "
            "'auto' chooses by the device"
        )
    return implementation == "triton" or (implementation == "auto" and tensor.is_cuda)


@triton.jit
def dot(a, b, precision: tl.constexpr = "ieee"):
    """Matrix product accumulated in float32; the interpreter cannot multiply bf16."""
    if _UPCAST_DOT:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=precision)
    else:
        return tl.dot(a, b, input_precision=precision)
