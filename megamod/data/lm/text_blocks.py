"""Blocks of token ids from a text file, for measuring losses of language models."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megamod.data.corpus.file_formats import require_format
from megamod.data.corpus.lines import read_lines
from megamod.errors import UserError

LINES = 1000  # lines concatenated at once, as in the program of Verma and Elbayad 2024


def read_text_blocks(
    path: Path,
    tokenize: Callable[[str], Sequence[int]],
    block_length: int,
    *,
    max_blocks: int | None = None,
    space_characters: bool = False,
) -> np.ndarray:
    """Read the ids of the concatenated lines of a text file as blocks: [n, block_length] int64.

    `LINES` lines are concatenated at a time, and what does not fill a block is dropped each time.

    Args:
        path: text file, perhaps compressed.
        tokenize: from a line to ids, including special ones; blank lines are skipped.
        block_length: tokens of a block.
        max_blocks: largest number of blocks; None: all.
        space_characters: put a blank between the characters of a line. The program of Verma and
            Elbayad 2024 does this by mistake, and its published curves are of such text.
    Raises:
        UserError: if the file is no text file, cannot be read, or fills no block.
    """
    require_format(path, ["text"])
    lines = [line for _, line in read_lines(path) if line.strip()]
    blocks: list[np.ndarray] = []
    for start in range(0, len(lines), LINES):
        chunk = lines[start : start + LINES]
        ids = [
            token
            for line in chunk
            for token in tokenize(" ".join(line) if space_characters else line)
        ]
        full_blocks = len(ids) // block_length
        blocks += list(
            np.array(ids[: full_blocks * block_length], dtype=np.int64).reshape(
                full_blocks, block_length
            )
        )
        if max_blocks is not None and len(blocks) >= max_blocks:
            break
    if not blocks:
        raise UserError(f"{path}: has fewer tokens than one block of {block_length}")
    return np.stack(blocks[:max_blocks])
