"""Labelled texts as batches: encoded once, padded, grouped for multiplexing.

The rows of a training step are a pure function of seed and step, whatever the number of ranks.
Held-out rows keep the order of the file. N consecutive rows are the instances of one multiplexed
input: row r of a split is instance r % N (Murahari et al. 2023, MUX-PLM, section 3).
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from megamod.data.batches import BatchDivision, StepBatches, check_fills_instance_groups
from megamod.data.lm.batches import Batch
from megamod.data.lm.blocks import IGNORE
from megamod.data.lm.order import BalancedSampler
from megamod.data.tasks.instance_groups import (
    InstanceLayout,
    arrange_rows_for_ensemble,
    arrange_rows_in_order,
)
from megamod.data.tasks.iob import are_entity_labels, format_entity_label, parse_entity_label
from megamod.data.tasks.text_labels import TextSet
from megamod.data.tasks.token_set import TokenSet
from megamod.errors import UserError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

CHUNK = 4096  # texts encoded at once


@dataclass(frozen=True)
class RowLengthLimits:
    """Limits of the length of a row, and the treatment of longer rows.

    Attributes:
        max_tokens: tokens of a row, special ones included. Longer rows are cut to this length.
        model_positions: positions of the model. Rows with more tokens are refused unless `truncate`
            is set: a user who asks for `max_tokens` tokens expects cuts below the model's limit,
            not above.
        truncate: also cut rows with more tokens than `model_positions`.
    """

    max_tokens: int
    model_positions: int
    truncate: bool = False

    def check_cut_allowed(self, row_tokens: int, where: str) -> None:
        """Refuse to cut a row that has more tokens than the model has positions.

        With `truncate` every row may be cut.

        Args:
            row_tokens: tokens of the uncut row.
            where: origin of the row, for the message.
        Raises:
            UserError: if the row may not be cut.
        """
        if row_tokens > self.model_positions and not self.truncate:
            raise UserError(
                f"{where}: {row_tokens} tokens, the model has {self.model_positions} positions; "
                "--truncate cuts such sentences"
            )


@dataclass
class EncodedRows:
    """Rows of token ids, end to end.

    Attributes:
        ids: [T] int32 of all rows.
        segments: [T] int8, 1 in the second text of a pair.
        offsets: [n + 1] int64, row r is ids[offsets[r]:offsets[r + 1]].
        labels: [n] int64 or float32 of rows, [T] int64 of tokens (-100: none); None: hidden.
        word_starts: for labels of words, [W] positions of the words' first tokens in each row, -1
            for words that were cut off; else None.
        pad_id: padding id of the tokenizer.
        cut: rows that were shortened.
        longest: tokens that a row may have, which also bounds padding.
    """

    ids: np.ndarray
    segments: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray | None
    word_starts: list[np.ndarray] | None
    pad_id: int
    cut: int
    longest: int

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.offsets) - 1

    @property
    def has_token_labels(self) -> bool:
        """True if labels belong to tokens and not to rows."""
        return self.word_starts is not None

    @property
    def digest(self) -> str:
        """SHA-256 of ids, segments, offsets and labels, in hexadecimal.

        A run records it as the digest of its data, and resumes only on equal rows. Padding and
        the places of words, which follow from tokenizer and flags, are not part of it.
        """
        hashed = hashlib.sha256(self.ids.tobytes())
        for part in (self.segments, self.offsets, self.labels):
            hashed.update(b"none" if part is None else part.tobytes())
        return hashed.hexdigest()

    def compute_padded_length(self, row_indices: np.ndarray) -> int:
        """Compute the length that a batch of rows is padded to: the longest, rounded up to 8
        tokens.

        It is at most `longest`.

        Args:
            row_indices: [R] numbers of the rows.
        """
        longest_row = int((self.offsets[row_indices + 1] - self.offsets[row_indices]).max())
        return min(-(-longest_row // 8) * 8, self.longest)

    def gather_batch(self, row_indices: np.ndarray, pad_to: int | None) -> Batch:
        """Gather a batch of rows.

        Args:
            row_indices: [R] numbers; may repeat.
            pad_to: tokens L per row, at least those of the longest; None: see
                `compute_padded_length`.
        Returns:
            input_ids, attention_mask, token_type_ids [R, L] int64, labels ([R] or [R, L]) if there
            are any, and `items`, the number of labels.
        """
        starts, ends = self.offsets[row_indices], self.offsets[row_indices + 1]
        length = pad_to or self.compute_padded_length(row_indices)
        index = starts[:, None] + np.arange(length)
        is_token = index < ends[:, None]
        index = np.where(is_token, index, 0)
        batch: Batch = {
            "input_ids": torch.from_numpy(
                np.where(is_token, self.ids[index], self.pad_id).astype("i8")
            ),
            "attention_mask": torch.from_numpy(is_token.astype(np.int64)),
            "token_type_ids": torch.from_numpy(
                np.where(is_token, self.segments[index], 0).astype("i8")
            ),
            "items": len(row_indices),
        }
        if self.labels is not None and self.has_token_labels:
            labels = np.where(is_token, self.labels[index], IGNORE)
            batch |= {"labels": torch.from_numpy(labels), "items": int((labels != IGNORE).sum())}
        elif self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[row_indices])
        return batch


def encode_texts(
    texts: TextSet, tokenizer: "PreTrainedTokenizerFast", limits: RowLengthLimits
) -> EncodedRows:
    """Encode sentences or pairs with their special tokens.

    Rows longer than `limits` are cut, in pairs the longer text first, and a warning counts them.

    Args:
        texts: sentences or pairs of one split.
        tokenizer: adds the special tokens of its model.
        limits: most tokens of a row.
    Raises:
        UserError: naming file and line of a row that is too long for the model.
    """
    ids_of, types_of, sizes, cut = [], [], [], 0
    for start in range(0, len(texts), CHUNK):
        chunk = [part[start : start + CHUNK] for part in texts.texts]
        batch = tokenizer(*chunk, return_token_type_ids=True)
        ids, types = batch["input_ids"], batch["token_type_ids"]
        for row, tokens in enumerate(ids):
            if len(tokens) <= limits.max_tokens:
                continue
            limits.check_cut_allowed(len(tokens), texts.origins[start + row])
            shortened = tokenizer(
                *(part[row] for part in chunk),
                truncation="longest_first",
                max_length=limits.max_tokens,
                return_token_type_ids=True,
            )
            ids[row], types[row] = shortened["input_ids"], shortened["token_type_ids"]
            cut += 1
        ids_of.append(_flatten_rows(ids, np.int32))
        types_of.append(_flatten_rows(types, np.int8))
        sizes += map(len, ids)
    _warn_of_cut_rows(cut, len(texts), limits)
    return EncodedRows(
        ids=np.concatenate(ids_of),
        segments=np.concatenate(types_of),
        offsets=np.cumsum([0, *sizes], dtype=np.int64),
        labels=texts.labels,
        word_starts=None,
        pad_id=tokenizer.pad_token_id or 0,
        cut=cut,
        longest=limits.max_tokens,
    )


def encode_words(
    tokens: TokenSet,
    tokenizer: "PreTrainedTokenizerFast",
    limits: RowLengthLimits,
    labels: Sequence[str],
    *,
    label_all: bool = False,
) -> EncodedRows:
    """Encode sentences of words; the first token of a word carries its label.

    A word that the tokenizer drops, such as a lone variation selector, becomes the unknown token
    (without one, the padding token): every word has a token, unless its sentence is cut. Every
    word, the first one too, is encoded as in running text: after a blank, where the tokenizer keeps
    blanks. Rows longer than `limits` are cut, and a warning counts them.

    Args:
        tokens: sentences of one split, with their labels.
        limits: most tokens of a row.
        labels: names of labels by number; every label of `tokens` is one of them.
        label_all: label further tokens of a word too, with I- where the word has B-; False: they
            have the label -100.
    Raises:
        UserError: naming file and line of a sentence that is too long for the model.
    """
    prefix_ids, suffix_ids = _find_special_tokens(tokenizer)
    number = {name: index for index, name in enumerate(labels)}
    inside = _map_to_inside_labels(labels)
    rows, word_starts, targets, cut = [], [], [], 0
    for start in range(0, len(tokens), CHUNK):
        sentences = tokens.words[start : start + CHUNK]
        for row, pieces in enumerate(_encode_word_pieces(tokenizer, sentences), start=start):
            sizes = np.array([len(piece) for piece in pieces])
            total = len(prefix_ids) + int(sizes.sum()) + len(suffix_ids)
            if total > limits.max_tokens:
                limits.check_cut_allowed(total, tokens.describe_origin(row))
                cut += 1
            kept_tokens = min(total, limits.max_tokens) - len(suffix_ids)
            first = len(prefix_ids) + np.cumsum(sizes) - sizes
            ids = [*prefix_ids, *(token for piece in pieces for token in piece)][:kept_tokens]
            rows.append([*ids, *suffix_ids])
            word_starts.append(np.where(first < kept_tokens, first, -1))
            target = np.full(len(rows[-1]), IGNORE)
            if tokens.labels is not None:
                for index, size, name in zip(first, sizes, tokens.labels[row], strict=True):
                    if label_all and name in number:
                        target[index : min(index + size, kept_tokens)] = number[inside[name]]
                    if index < kept_tokens:
                        target[index] = number[name]
            targets.append(target)
    _warn_of_cut_rows(cut, len(rows), limits)
    ids = _flatten_rows(rows, np.int32)
    return EncodedRows(
        ids=ids,
        segments=np.zeros(len(ids), dtype=np.int8),
        offsets=np.cumsum([0, *map(len, rows)], dtype=np.int64),
        labels=np.concatenate(targets) if tokens.labels is not None else None,
        word_starts=word_starts,
        pad_id=tokenizer.pad_token_id or 0,
        cut=cut,
        longest=limits.max_tokens,
    )


class TrainRows(StepBatches):
    """Micro-batches of labelled rows of one rank, see `StepBatches`.

    Every epoch is another permutation of the rows. A step that crosses the end of an epoch goes on
    with the next one, so that no row is skipped and every group is full.

    Args:
        encoded: the split.
        seed: seed of the order.
        instances: N, rows of a group; a micro-batch is a multiple of it.
        division: division of a step; a micro-batch has R rows.
        pad_to: see `EncodedRows.gather_batch`.
    Raises:
        UserError: if a micro-batch is not a multiple of `instances`.
    """

    def __init__(
        self,
        encoded: EncodedRows,
        division: BatchDivision,
        *,
        seed: int,
        instances: int,
        pad_to: int | None,
    ):
        """Check the micro-batch and store the arguments, see the class."""
        super().__init__(division)
        check_fills_instance_groups(
            "--per_device_train_batch_size", division.micro_batch, instances
        )
        self.encoded, self.pad_to = encoded, pad_to
        self.order = BalancedSampler([len(encoded)], seed)

    @property
    def digest(self) -> str:
        """SHA-256 of the rows, which a resumed run must have again; see `EncodedRows.digest`."""
        return self.encoded.digest

    def select_rows(self, micro_batch_index: int) -> np.ndarray:
        """Select the rows of a micro-batch of this rank: [R] int64 numbers in the split."""
        return self.order.select_blocks(self.division.get_sample_indices(micro_batch_index))[1]

    def __getitem__(self, micro_batch_index: int) -> Batch:
        """Return a micro-batch of this rank, see `EncodedRows.gather_batch`."""
        return self.encoded.gather_batch(self.select_rows(micro_batch_index), self.pad_to)


class HeldOutBatch(NamedTuple):
    """Batch of consecutive rows of a split in whole groups.

    Attributes:
        start, stop: range of the rows in the split.
        batch: see `EncodedRows.gather_batch`; its lines are those of `layout`.
        layout: lines of each row, counted from `start`.
    """

    start: int
    stop: int
    batch: Batch
    layout: InstanceLayout


def iterate_held_out_rows(
    encoded: EncodedRows,
    batch_size: int,
    instances: int,
    pad_to: int | None,
    *,
    ensemble: bool = False,
    seed: int = 0,
) -> Iterator[HeldOutBatch]:
    """Yield every row of a split once, in batches in the order of the file.

    If the last batch does not fill its groups, its first rows are repeated.

    Args:
        encoded: rows of the split.
        batch_size: rows of a forward pass of the model, a multiple of `instances`.
        instances: N, rows that share a forward pass.
        pad_to: see `EncodedRows.gather_batch`.
        ensemble: give every row `instances` positions instead of one; a batch has fewer rows then,
            and no fillers.
        seed: seed of these positions.
    Raises:
        UserError: if `batch_size` is not a multiple of `instances`.
    """
    check_fills_instance_groups("--per_device_eval_batch_size", batch_size, instances)
    size = batch_size // instances if ensemble else batch_size
    for start in range(0, len(encoded), size):
        stop = min(start + size, len(encoded))
        if ensemble:
            layout = arrange_rows_for_ensemble(stop - start, instances, (seed, start))
        else:
            layout = arrange_rows_in_order(stop - start, instances)
        yield HeldOutBatch(start, stop, encoded.gather_batch(start + layout.rows, pad_to), layout)


def _find_special_tokens(tokenizer: "PreTrainedTokenizerFast") -> tuple[list[int], list[int]]:
    """Find the ids of the special tokens that the tokenizer adds before and after a single text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[:start], whole[start + len(plain) :]


def _encode_word_pieces(
    tokenizer: "PreTrainedTokenizerFast", sentences: Sequence[list[str]]
) -> Iterator[list[list[int]]]:
    """Yield for each sentence the token ids of each word, equal to those in running text.

    A word without tokens has the unknown token, or the padding if the tokenizer has none.
    """
    if _needs_blank_before_words(tokenizer):
        sentences = [[f" {word}" for word in words] for words in sentences]
    encoded = _encode_split_words(tokenizer, sentences)
    unknown = tokenizer.unk_token_id
    if unknown is None:
        unknown = tokenizer.pad_token_id or 0
    for row, words in enumerate(sentences):
        pieces: list[list[int]] = [[] for _ in words]
        for token, word in zip(encoded["input_ids"][row], encoded.word_ids(row), strict=True):
            pieces[word].append(token)
        yield [piece or [unknown] for piece in pieces]


def _needs_blank_before_words(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Return True if separate words need a blank before them to have their tokens of running text.

    Byte-level tokenizers keep the blank before a word in the word's first token. If the words of a
    sentence are passed separately, this blank is lost, unless the tokenizer adds one itself.
    """
    text = tokenizer("a b", add_special_tokens=False)["input_ids"]
    return text != _encode_split_words(tokenizer, [["a", "b"]])["input_ids"][0]


def _encode_split_words(
    tokenizer: "PreTrainedTokenizerFast", sentences: Sequence[list[str]]
) -> "BatchEncoding":
    """Encode sentences, each a list of words, without special tokens."""
    return tokenizer(sentences, is_split_into_words=True, add_special_tokens=False)


def _map_to_inside_labels(labels: Sequence[str]) -> dict[str, str]:
    """Map each label of a word to the label of the word's further tokens.

    That is I- for B-, if `labels` has it, and otherwise the same label.
    """
    inside = {name: name for name in labels}
    if are_entity_labels(labels):
        for name in labels:
            part, kind = parse_entity_label(name) or (None, "")
            if part == "B" and format_entity_label("I", kind) in inside:
                inside[name] = format_entity_label("I", kind)
    return inside


def _flatten_rows(rows: Sequence[Sequence[int]], kind: type) -> np.ndarray:
    """Concatenate rows of numbers into one array of the element type `kind`."""
    return np.fromiter((value for row in rows for value in row), dtype=kind)


def _warn_of_cut_rows(cut_rows: int, row_count: int, limits: RowLengthLimits) -> None:
    """Log a warning with the number of rows that were cut to `limits.max_tokens`, if any were.

    Args:
        cut_rows: number of rows that were cut.
        row_count: number of all rows of the split.
    """
    if cut_rows:
        logger.warning(
            "%d of %d rows were cut to %d tokens", cut_rows, row_count, limits.max_tokens
        )
