"""Blocks of token ids from a text file, for measuring losses of language models."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megamod.data.corpus.file_formats import require_format
from megamod.data.corpus.lines import read_lines
from megamod.errors import UserError

LINES = 1000  # lines concatenated at once; tokens after the last whole block are dropped


def read_text_blocks(
    path: Path,
    tokenize: Callable[[str], Sequence[int]],
    length: int,
    *,
    most: int | None = None,
    spaced: bool = False,
) -> np.ndarray:
    """Read the ids [n, length] of the concatenated lines of a file.

    Args:
        tokenize: from a line to ids, including special ones; blank lines are skipped.
        most: largest number of blocks; None: all.
        spaced: put a blank between the characters of a line. The program of Verma and Elbayad 2024
            does this by mistake, and its published curves are of such text.
    Raises:
        UserError: if the file cannot be read or is shorter than a block.
    """
    require_format(path, ["text"])
    lines = [line for _, line in read_lines(path) if line.strip()]
    blocks: list[np.ndarray] = []
    for start in range(0, len(lines), LINES):
        part = lines[start : start + LINES]
        ids = [token for line in part for token in tokenize(" ".join(line) if spaced else line)]
        whole = len(ids) // length
        blocks += list(np.array(ids[: whole * length], dtype=np.int64).reshape(whole, length))
        if most is not None and len(blocks) >= most:
            break
    if not blocks:
        raise UserError(f"{path}: has fewer tokens than one block of {length}")
    return np.stack(blocks[:most])
