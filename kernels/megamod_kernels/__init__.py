"""Fused operations of megamod: torch and Triton only, nothing from `megamod`.

Each file holds one operation, its reference (the definition in plain torch) first.
"""

from megamod_kernels.linear_cross_entropy import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
