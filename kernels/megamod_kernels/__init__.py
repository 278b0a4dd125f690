"""Fused operations of megamod: torch and Triton only, nothing from `megamod`.

A file NAME.py holds one operation and its reference, the definition in plain torch;
NAME_kernels.py holds its Triton kernels. launch.py, rows.py and dispatch.py are shared.
"""

from megamod_kernels.linear_cross_entropy import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
