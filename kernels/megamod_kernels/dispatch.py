"""Which code an operation runs: Triton kernels or their reference in plain torch.

Every operation takes `implementation`: "triton", "reference", or "auto", which is Triton for
tensors on a GPU. With TRITON_INTERPRET=1 in the environment before Triton is imported, kernels run
on the CPU, slowly: tests do so. This file does without Triton, which not every machine has.
"""

import os

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "triton", "reference")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


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


def multiplies(implementation: str, tensor: Tensor) -> bool:
    """`uses_triton` of products of our own: "auto" takes them where tensor cores multiply."""
    if implementation == "auto":
        return tensor.is_cuda and tensor.dtype in (torch.bfloat16, torch.float16)
    return uses_triton(implementation, tensor)
