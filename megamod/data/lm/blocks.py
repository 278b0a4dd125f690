"""Sequences of equal length from token files: inputs and labels of next-token prediction.

Source: fairseq's `TokenBlockDataset` (break mode "none") and `MonolingualDataset`, as used by DEMix
(Gururangan et al. 2022).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megamod.data.corpus.indexed import IndexedDataset, has_ids_outside_vocabulary
from megamod.errors import UserError

IGNORE = -100


def build_inputs_and_labels(
    token_rows: np.ndarray,
    starts_item: np.ndarray,
    block_lengths: np.ndarray,
    eos_id: int,
    pad_id: int,
    domain_tokens: np.ndarray | None,
) -> tuple[Tensor, Tensor, bool]:
    """Build inputs and labels of next-token prediction from blocks.

    Args:
        token_rows: [B, span + 1] int64 from `TokenBlocks.read_blocks`; overwritten.
        starts_item: [B] bool, rows whose block begins at the start of an item.
        block_lengths: [B] tokens of each block.
        eos_id: input of the first target of an item.
        pad_id: input after the end of a short block; its label is -100.
        domain_tokens: [B] ids that are prepended to inputs and labels; None: no domain tokens.
    Returns:
        inputs [B, T] and labels [B, T], int64, where T is span, or span + 1 with domain tokens; and
        True if any sequence is padded. Without padding and domain tokens both are views of
        `token_rows`.
    """
    token_rows[starts_item, 0] = eos_id
    span = token_rows.shape[1] - 1
    padded = bool(block_lengths.min() < span)
    tokens = torch.from_numpy(token_rows)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    if padded:
        is_padding = torch.from_numpy(np.arange(span) >= block_lengths[:, None])
        inputs, labels = (
            inputs.masked_fill(is_padding, pad_id),
            labels.masked_fill(is_padding, IGNORE),
        )
    if domain_tokens is not None:
        column = torch.from_numpy(domain_tokens[:, None])
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
    Raises:
        UserError: if T leaves no token of text.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        block_size: int,
        eos_id: int,
        pad_id: int,
        domain_token: int | None = None,
    ):
        """Compute the number of tokens per block; see the class for arguments and errors."""
        self.dataset = dataset
        self.eos_id, self.pad_id, self.domain_token = eos_id, pad_id, domain_token
        self.span = block_size - (domain_token is not None)
        self.total = len(dataset.tokens)
        if self.span < 1:
            raise UserError(f"--max_seq_length {block_size}: no room for a token of text")

    def __len__(self) -> int:
        """Return the number of blocks, a short last one included."""
        return -(-self.total // self.span)

    def count_targets(self, block_indices: np.ndarray) -> np.ndarray:
        """Count target tokens, domain token included: int64 of the shape of `block_indices`."""
        return np.minimum(self.span, self.total - np.asarray(block_indices) * self.span) + (
            self.domain_token is not None
        )

    def mask_item_starts(self, block_indices: np.ndarray) -> np.ndarray:
        """Return True for blocks that start an item: bool of the shape of `block_indices`."""
        starts, offsets = np.asarray(block_indices) * self.span, self.dataset.offsets
        return offsets[np.searchsorted(offsets, starts)] == starts

    def gather_inputs_and_labels(self, block_indices: np.ndarray) -> tuple[Tensor, Tensor, bool]:
        """Read blocks as inputs and labels of next-token prediction.

        Args:
            block_indices: [B] indices of blocks in file order.
        Returns:
            inputs [B, T] and labels [B, T], int64, and True if any sequence is padded; see
                `build_inputs_and_labels`.
        Raises:
            IndexError: for an index outside the blocks.
            UserError: for an id outside the vocabulary.
        """
        block_indices = np.asarray(block_indices, dtype=np.int64)
        if ((block_indices < 0) | (block_indices >= len(self))).any():
            raise IndexError(f"blocks are 0 to {len(self) - 1}, not {block_indices.tolist()}")
        domain_tokens = (
            None if self.domain_token is None else np.full(len(block_indices), self.domain_token)
        )
        rows, block_lengths = (
            self.read_blocks(block_indices),
            self.count_targets(block_indices) - (domain_tokens is not None),
        )
        self.check_row_ids(rows, block_indices)
        return build_inputs_and_labels(
            rows,
            self.mask_item_starts(block_indices),
            block_lengths,
            self.eos_id,
            self.pad_id,
            domain_tokens,
        )

    def check_row_ids(self, rows: np.ndarray, block_indices: Sequence[int] | np.ndarray) -> None:
        """Check the ids of rows that `read_blocks` or `read_block_into` filled.

        A dataset without a vocabulary size is not checked.

        Args:
            rows: [B, span + 1] ids.
            block_indices: [B] block of each row.
        Raises:
            UserError: naming the file and the place of an id outside the vocabulary.
        """
        limit = self.dataset.vocab_size
        if limit is not None and has_ids_outside_vocabulary(rows, limit):
            for row, index in zip(rows, block_indices, strict=True):
                self.dataset.check_read_ids(row, int(index) * self.span - 1)

    def read_blocks(self, block_indices: np.ndarray) -> np.ndarray:
        """Read the preceding token and the tokens of each block: [B, span + 1] int64.

        The rest of a short block, and what precedes the first block, is 0. Ids are not checked, see
        `check_row_ids`. If all blocks are full, this is one gather from overlapping windows and one
        cast.

        Args:
            block_indices: [B] int64 indices of blocks, at least one.
        """
        preceding = block_indices * self.span - 1
        if preceding.min() >= 0 and preceding.max() + self.span < self.total:
            size = self.dataset.dtype.itemsize
            shape = (self.total - self.span, self.span + 1)
            windows = np.ndarray(shape, self.dataset.dtype, self.dataset.tokens, 0, (size, size))
            return windows[preceding].astype(np.int64)
        rows = np.zeros((len(block_indices), self.span + 1), dtype=np.int64)
        for row, index in zip(rows, block_indices.tolist(), strict=True):
            self.read_block_into(row, index)
        return rows

    def read_block_into(self, row: np.ndarray, block_index: int) -> None:
        """Write the preceding token and the tokens of a block into `row` [span + 1].

        Elements after a short block, and the first one of block 0, are left as they are.

        Args:
            row: [span + 1] int64, written in place.
            block_index: index of the block in file order.
        """
        start = block_index * self.span
        piece = self.dataset.tokens[max(start - 1, 0) : start + self.span]
        skipped = int(start == 0)
        row[skipped : skipped + len(piece)] = piece
