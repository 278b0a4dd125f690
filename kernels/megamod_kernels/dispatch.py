"""Dispatch of an operation to Triton kernels or to its reference in plain torch.

Every operation takes `implementation`: "triton", "reference", or "auto", which is Triton for
tensors on a GPU. With TRITON_INTERPRET=1 in the environment before Triton is imported, kernels run
on the CPU, slowly: tests do so. This file does not import Triton, which is optional.
"""

import os

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "triton", "reference")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def uses_triton(implementation: str, tensor: Tensor) -> bool:
    """Return True if an operation on this tensor runs its kernels.

    Tensors on the meta device count as on a GPU with "triton", and as not on one with "auto".

    Args:
        implementation: "auto", "triton" or "reference", see above.
        tensor: an argument of the operation; its device decides.
    Raises:
        ValueError: for an unknown implementation, or "triton" where it cannot run.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation {implementation!r} is none of {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation == "triton" and not (tensor.is_cuda or tensor.is_meta or INTERPRETED):
        raise ValueError(
            f"implementation 'triton' needs tensors on a GPU, these are on {tensor.device}; "
            "'auto' selects by device"
        )
    return implementation == "triton" or (implementation == "auto" and tensor.is_cuda)


def uses_own_matmul(implementation: str, tensor: Tensor) -> bool:
    """Return True if an operation with a fused matrix product runs its kernels.

    With "auto" it does so on a GPU in bfloat16 and float16, whose products use tensor cores.

    Args:
        implementation, tensor: as in `uses_triton`; the dtype of the tensor decides too.
    Raises:
        ValueError: as `uses_triton`.
    """
    if implementation == "auto":
        return tensor.is_cuda and tensor.dtype in (torch.bfloat16, torch.float16)
    return uses_triton(implementation, tensor)
