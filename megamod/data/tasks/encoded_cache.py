"""Cache of encoded rows in a folder.

A file's name is a digest of everything that the token ids depend on: texts, labels, tokenizer,
lengths, order of the labels. So no file is ever stale. The ids of tasks are not part of it.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from megamod.data.tasks.classification import EncodedRows, RowLengthLimits
from megamod.data.tasks.text_labels import TextSet
from megamod.data.tasks.token_set import TokenSet
from megamod.files import write_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

FORMAT = 2  # raise it when the encoding of the same rows changes
NUMBERS = ("pad_id", "cut", "longest")
ARRAYS = ("ids", "segments", "offsets", "labels")


def compute_cache_key(
    rows: TextSet | TokenSet,
    tokenizer: "PreTrainedTokenizerFast",
    limits: RowLengthLimits,
    labels: Sequence[str],
    label_all: bool,
) -> str:
    """Compute the name of the cache file for encoded rows, without ending: a SHA-256.

    Args:
        rows: rows before their encoding.
        tokenizer: its settings count, not its name.
        limits: see `encode_texts` and `encode_words`.
        labels: names of labels by number.
        label_all: see `encode_words`; False for rows of texts.
    """
    hashed = hashlib.sha256()
    columns: Iterable[Sequence[object]] = rows.texts if isinstance(rows, TextSet) else [rows.words]
    for part in (*columns, [] if rows.labels is None else list(rows.labels)):
        hashed.update(json.dumps([_convert_to_plain_value(value) for value in part]).encode())
    hashed.update(tokenizer.backend_tokenizer.to_str().encode())
    limit_values = {  # under the names of earlier caches, which so stay valid
        "longest": limits.max_tokens,
        "room": limits.model_positions,
        "truncate": limits.truncate,
    }
    settings = [FORMAT, limit_values, list(labels), label_all, rows.labels is None]
    hashed.update(json.dumps([*settings, type(rows).__name__, tokenizer.pad_token_id]).encode())
    return hashed.hexdigest()


def encode_with_cache(
    folder: Path, key: str, encode_rows: Callable[[], EncodedRows]
) -> EncodedRows:
    """Load the cached rows; if they are absent or damaged, encode them and write the cache file.

    A damaged file is replaced, with a warning.

    Args:
        folder: folder of the cache, which is created if it is absent.
        key: see `compute_cache_key`.
        encode_rows: function without arguments that encodes the rows, by `encode_texts` or
            `encode_words`; called if there is no cached file that can be read.
    """
    path = folder / f"{key}.safetensors"
    if path.exists():
        try:
            return _read_cached_rows(path)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            logger.warning("%s cannot be read and is written again: %s", path, error)
    encoded = encode_rows()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, _serialise_rows(encoded))
    return encoded


def _read_cached_rows(path: Path) -> EncodedRows:
    """Read encoded rows from a cache file.

    Raise SafetensorError, OSError, KeyError or ValueError if it is damaged.
    """
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    word_starts = None
    if "heads" in arrays:  # named so in earlier caches, which so stay valid
        word_starts = np.split(arrays["heads"], arrays["head_ends"][:-1])
    return EncodedRows(
        **{name: arrays.get(name) for name in ARRAYS},
        word_starts=word_starts,
        **{name: int(metadata[name]) for name in NUMBERS},
    )


def _serialise_rows(encoded: EncodedRows) -> bytes:
    """Serialise encoded rows to the content of a cache file, which `_read_cached_rows` reads."""
    arrays = {name: getattr(encoded, name) for name in ARRAYS}
    if encoded.word_starts is not None:
        arrays["heads"] = np.concatenate(encoded.word_starts)
        arrays["head_ends"] = np.cumsum([len(starts) for starts in encoded.word_starts])
    whole = {name: np.ascontiguousarray(a) for name, a in arrays.items() if a is not None}
    return save(whole, {name: str(getattr(encoded, name)) for name in NUMBERS})


def _convert_to_plain_value(value: object) -> object:
    """Convert a NumPy scalar to a number of Python, for JSON; return other values unchanged."""
    return value.item() if isinstance(value, np.generic) else value
