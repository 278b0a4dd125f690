"""Sequences of equal length from token files: inputs and labels of next-token prediction.

Source: fairseq's `TokenBlockDataset` (break mode "none") and `MonolingualDataset`, as used by DEMix
(Gururangan et al. 2022).
"""

import numpy as np
import torch
from torch import Tensor

from megamod.data.corpus.indexed import IndexedDataset
from megamod.errors import UserError

IGNORE = -100


def build_inputs_and_labels(
    rows: np.ndarray,
    opens: np.ndarray,
    lengths: np.ndarray,
    eos_id: int,
    pad_id: int,
    first: np.ndarray | None,
) -> tuple[Tensor, Tensor, bool]:
    """Build inputs [B, T] and labels [B, T], int64; also return True if any sequence is padded.

    Args:
        rows: [B, span + 1] int64 from `TokenBlocks.read_blocks`; overwritten.
        opens: [B] bool, rows whose block begins at the start of an item.
        lengths: [B] tokens of each block.
        first: [B] domain tokens, or None; with them T is span + 1.
    """
    rows[opens, 0] = eos_id
    span = rows.shape[1] - 1
    padded = bool(lengths.min() < span)
    whole = torch.from_numpy(rows)
    inputs, labels = whole[:, :-1], whole[:, 1:]
    if padded:
        beyond = torch.from_numpy(np.arange(span) >= lengths[:, None])
        inputs, labels = inputs.masked_fill(beyond, pad_id), labels.masked_fill(beyond, IGNORE)
    if first is not None:
        column = torch.from_numpy(first[:, None])
        inputs, labels = torch.cat([column, inputs], 1), torch.cat([column, labels], 1)
    return inputs, labels, padded


class TokenBlocks:
    """The concatenated items of a split, cut into blocks in file order.

    Every token is a target once. The input of a block's first target is the preceding token, or eos
    if the block begins at the start of an item. The last block may be short.

    Args:
        dataset: items of one domain and split.
        block_size: length T of a sequence.
        eos_id, pad_id: ids of the tokenizer.
        domain_token: id that is prepended to inputs and targets; blocks then have T - 1 tokens.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        block_size: int,
        eos_id: int,
        pad_id: int,
        domain_token: int | None = None,
    ):
        self.dataset = dataset
        self.eos_id, self.pad_id, self.domain_token = eos_id, pad_id, domain_token
        self.span = block_size - (domain_token is not None)
        self.total = len(dataset.tokens)
        if self.span < 1:
            raise UserError(f"--max_seq_length {block_size}: no room for a token of text")

    def __len__(self) -> int:
        return -(-self.total // self.span)

    def count_targets(self, indices: np.ndarray) -> np.ndarray:
        """Count the target tokens of blocks, int64, including the domain token."""
        return np.minimum(self.span, self.total - np.asarray(indices) * self.span) + (
            self.domain_token is not None
        )

    def find_item_starts(self, indices: np.ndarray) -> np.ndarray:
        """Return a mask of the blocks that begin at the start of an item, bool of the shape
        of `indices`.
        """
        starts, offsets = np.asarray(indices) * self.span, self.dataset.offsets
        return offsets[np.searchsorted(offsets, starts)] == starts

    def gather_tensors(self, indices: np.ndarray) -> tuple[Tensor, Tensor, bool]:
        """Gather inputs [B, T] and labels [B, T], int64; also return True if any block is short.

        Short blocks are padded with pad_id in inputs and -100 in labels. Without short blocks and
        domain tokens, both are views of one buffer.

        Raises:
            IndexError: for an index outside the blocks.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if ((indices < 0) | (indices >= len(self))).any():
            raise IndexError(f"blocks are 0 to {len(self) - 1}, not {indices.tolist()}")
        first = None if self.domain_token is None else np.full(len(indices), self.domain_token)
        rows, lengths = self.read_blocks(indices), self.count_targets(indices) - (first is not None)
        return build_inputs_and_labels(
            rows, self.find_item_starts(indices), lengths, self.eos_id, self.pad_id, first
        )

    def read_blocks(self, indices: np.ndarray) -> np.ndarray:
        """Read the preceding token and the tokens of each block, [B, span + 1] int64, 0 at padding.

        If all blocks are full, this is one gather from overlapping windows and one cast.
        """
        preceding = indices * self.span - 1
        if preceding.min() >= 0 and preceding.max() + self.span < self.total:
            size = self.dataset.dtype.itemsize
            shape = (self.total - self.span, self.span + 1)
            windows = np.ndarray(shape, self.dataset.dtype, self.dataset.tokens, 0, (size, size))
            return windows[preceding].astype(np.int64)
        rows = np.zeros((len(indices), self.span + 1), dtype=np.int64)
        for row, index in zip(rows, indices.tolist(), strict=True):
            self.read_block_into(row, index)
        return rows

    def read_block_into(self, row: np.ndarray, index: int) -> None:
        """Read one block and its preceding token into the beginning of `row` [span + 1]."""
        start = index * self.span
        piece = self.dataset.tokens[max(start - 1, 0) : start + self.span]
        skipped = int(start == 0)
        row[skipped : skipped + len(piece)] = piece
