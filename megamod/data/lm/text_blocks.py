"""A text file as blocks of token ids of one length: what losses of language models are told on."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megamod.data.corpus.file_formats import format_of
from megamod.data.corpus.lines import read_lines
from megamod.errors import UserError

LINES = 1000  # concatenated at once; what is left of them is dropped


def text_blocks(
    path: Path,
    tokenize: Callable[[str], Sequence[int]],
    length: int,
    *,
    most: int | None = None,
    spaced: bool = False,
) -> np.ndarray:
    """[n, length] ids of the lines of a file, laid end to end.

    Args:
        tokenize: from a line to ids, special ones included; blank lines are passed over.
        most: blocks behind which it stops; None: all.
        spaced: put a blank between all characters of a line. The program of Verma and Elbayad 2024
            does so, by mistake, and its published curves are of such text.
    Raises:
        UserError: if the file cannot be read or does not fill a block.
    """
    format_of(path, ["text"])
    lines = [line for _, line in read_lines(path) if line.strip()]
    blocks: list[np.ndarray] = []
    for start in range(0, len(lines), LINES):
        part = lines[start : start + LINES]
        ids = [one for line in part for one in tokenize(" ".join(line) if spaced else line)]
        whole = len(ids) // length
        blocks += list(np.array(ids[: whole * length], dtype=np.int64).reshape(whole, length))
        if most is not None and len(blocks) >= most:
            break
    if not blocks:
        raise UserError(f"{path}: has fewer than the {length} tokens of one block")
    return np.stack(blocks[:most])
