"""Fused operations of megamod: torch and Triton only, nothing from `megamod`.

A file NAME.py holds one operation and its reference, the definition in plain torch. References of
`mux_embed` and `rsa_demux` are in NAME_torch.py; Triton kernels, where there are any, in
NAME_kernels.py. dispatch.py, rows.py and dot.py are shared; compile_ahead.py compiles the kernels
without a GPU, as builds.py lists them.

Kernels use one vocabulary. Tiles: ROWS rows of tokens, COLUMNS output columns and INNER summed
columns of a matrix product; WIDTH columns of an element-wise tile, TILES of which hold a whole row;
WHOLE: D is a multiple of the tile. Sizes: D columns, N instances, `length` tokens. Flags: DROPOUT,
BIAS, PAIRS. Sizes come in the order rows, length, D, N. `upstream` is the gradient of the output,
grad_X that of X, and `partial` holds one sum per program.
"""

from megamod_kernels.linear_cross_entropy import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
