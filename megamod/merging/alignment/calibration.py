"""Calibration text as batches, and the selection of tokens that count."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from megamod.data.corpus.fast_tokenizers import load_fast_tokenizer
from megamod.data.corpus.file_formats import parse_json_object, read_numbered_lines, require_format
from megamod.errors import UserError
from megamod.merging.alignment.options import Calibration


@dataclass(frozen=True)
class CalibrationBatch:
    """Items of one forward pass.

    Attributes:
        input_ids: [B, T] int64 on the CPU, padded at the end.
        lengths: [B] int64, number of tokens of each item.
        domain: domain of the items, for models with experts; None: all domains.
    """

    input_ids: Tensor
    lengths: Tensor
    domain: str | None = None

    @property
    def attention_mask(self) -> Tensor:
        """Mask [B, T] int64, 1 at tokens and 0 at padding."""
        positions = torch.arange(self.input_ids.shape[1])
        return (positions < self.lengths[:, None]).long()

    def mask_counted_tokens(self, special_tokens: bool) -> Tensor:
        """Return a mask [B, T] of bool, True at tokens that count.

        Args:
            special_tokens: count the first and the last token of an item, too.
        """
        positions = torch.arange(self.input_ids.shape[1])
        inner = 0 if special_tokens else 1
        return (positions >= inner) & (positions < self.lengths[:, None] - inner)


def read_calibration_batches(
    name: str, config: PreTrainedConfig, calibration: Calibration
) -> Iterable[CalibrationBatch]:
    """Read calibration text in the tokens of a model; items are cut to its positions.

    Args:
        name: folder or hub id of the tokenizer.
        config: configuration of the model.
        calibration: names the text; its `path` must not be None.
    Returns:
        an iterator, for one pass.
    Raises:
        UserError: if there is no tokenizer, or the text cannot be read.
    """
    try:
        tokenizer = load_fast_tokenizer(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{name}: has no tokenizer to read calibration text with ({reason})"
        ) from error
    position_limit = find_position_limit(config) or tokenizer.model_max_length
    items = read_token_ids(
        Path(calibration.path), lambda text: tokenizer(text)["input_ids"], position_limit
    )
    pad_id = config.pad_token_id if config.pad_token_id is not None else 0
    return iterate_whole_batches(items, calibration.batch_size, calibration.fraction, pad_id=pad_id)


def find_position_limit(config: PreTrainedConfig) -> int | None:
    """Find the largest number of tokens of a sequence; None: `config` sets no limit."""
    position_limit = getattr(config, "max_position_embeddings", None)
    if position_limit and config.model_type in ("roberta", "xlm-roberta"):
        position_limit -= config.pad_token_id + 1  # positions start after the padding id
    return position_limit or None


def iterate_whole_batches(
    items: Sequence[Sequence[int]],
    batch_size: int,
    fraction: float = 1.0,
    *,
    pad_id: int = 0,
    domain: str | None = None,
) -> Iterator[CalibrationBatch]:
    """Yield batches in order until int(fraction * len(items)) items were seen.

    The last batch is not cut to that number.

    Args:
        items: token ids of each.
        batch_size: items of a batch; the last one of a pass over all items may have fewer.
        fraction: fraction of the items; above 1 they are repeated.
        pad_id: id of padding.
        domain: domain of all items.
    Raises:
        UserError: if int(fraction * items) is less than 1.
    """
    target = int(fraction * len(items))
    if target < 1:
        raise UserError(
            f"calibration: fraction {fraction:g} of {len(items)} items is less than one item"
        )
    starts = range(0, len(items), batch_size)
    seen = 0
    while seen < target:
        for start in starts:
            part = items[start : start + batch_size]
            yield _pad_items(part, pad_id, domain)
            seen += len(part)
            if seen >= target:
                break


def _pad_items(items: Sequence[Sequence[int]], pad_id: int, domain: str | None) -> CalibrationBatch:
    """Make a batch of items of token ids, padded at the end with `pad_id` to the longest.

    Args:
        items: token ids of each item.
        domain: domain of all items; None: no domain.
    """
    lengths = torch.tensor([len(item) for item in items])
    ids = torch.full((len(items), int(lengths.max())), pad_id)
    for row, item in zip(ids, items, strict=True):
        row[: len(item)] = torch.tensor(item)
    return CalibrationBatch(ids, lengths, domain)


def read_token_ids(
    path: Path,
    tokenize: Callable[[str], Sequence[int]],
    max_length: int,
    origin: str = "calibration.path",
) -> list[list[int]]:
    """Read the items of a text file as token ids.

    Args:
        path: JSON lines with the key "text", or text with one item per line; it may be compressed.
            Blank lines, and items without a token, are skipped.
        tokenize: from text to ids; it adds special tokens if they are to be in the items.
        max_length: tokens that are kept of an item, the first ones.
        origin: flag or key that named the file, for messages.
    Raises:
        UserError: if the file cannot be read, holds no item, or a line is not of that form.
    """
    texts = _iterate_texts(Path(path), origin)
    items = [list(tokenize(text))[:max_length] for text in texts]
    items = [item for item in items if item]
    if not items:
        raise UserError(f"{origin}: {path} holds no text")
    return items


def _iterate_texts(path: Path, origin: str) -> Iterator[str]:
    """Yield the non-blank items of a text or JSON-lines file.

    Args:
        path: the file; its ending tells the format.
        origin: flag or key that named the file, for messages.
    Raises:
        UserError: naming file and line, if the file cannot be read, is no UTF-8, or a JSON line has
            no text.
    """
    json_lines = require_format(path, ("text", "JSON lines", "JSON"), f"{origin}: ") != "text"
    for number, _, raw in read_numbered_lines(path):
        where = f"{path}, line {number}"
        try:
            line = raw.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: invalid UTF-8 at byte {error.start + 1}") from error
        if not line.strip():
            continue
        text = parse_json_object(line, where).get("text") if json_lines else line
        if not isinstance(text, str):
            raise UserError(f'{where}: no key "text" with a string')
        yield text
