"""The two token files of a split of a data-bin: writing, counts and digests."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megamod.data.corpus.indexed import IndexedWriter, compute_block_digests, select_token_dtype
from megamod.data.corpus.pool import EncodeTexts
from megamod.data.corpus.tokenizers import Tokenizer
from megamod.files import hash_file


@dataclass
class ItemCounter:
    """Counter of the items of one split: their number, UTF-8 bytes and digest.

    The digest covers the length of each item, so that other item boundaries change it.
    """

    items: int = 0
    bytes: int = 0

    def __post_init__(self) -> None:
        """Start the digest."""
        self._hash = hashlib.sha256()

    def add_item(self, text: str) -> None:
        """Count an item and its bytes, and add length and text to the digest."""
        data = text.encode()
        self.items += 1
        self.bytes += len(data)
        self._hash.update(len(data).to_bytes(8, "little"))
        self._hash.update(data)

    @property
    def digest(self) -> str:
        """SHA-256 of the items so far, hexadecimal."""
        return self._hash.hexdigest()


def write_split(
    texts: Iterator[str],
    tokenizer: Tokenizer,
    add_bos: bool,
    prefix: Path,
    encode: EncodeTexts,
    report_bytes: Callable[[int], object],
) -> dict:
    """Encode the items of a split and write its two token files; return its header entry.

    Each item ends with eos. Existing files are replaced at the end.

    Args:
        texts: the items.
        tokenizer: the tokenizer that `encode` uses; its bos, eos and vocabulary size count here.
        add_bos: start each item with bos.
        prefix: path of the files without ending.
        encode: see `open_encoder`.
        report_bytes: called with the number of bytes of text since its last call.
    Returns:
        fields of `SplitHeader`.
    """
    counter = ItemCounter()
    start = [tokenizer.bos_id] if add_bos else []
    tokens, largest, reported = 0, tokenizer.eos_id, 0

    def iterate_counted_items() -> Iterator[str]:
        """Yield the items, and count each of them."""
        for text in texts:
            counter.add_item(text)
            yield text

    with IndexedWriter(prefix, select_token_dtype(tokenizer.vocab_size)) as writer:
        for ids in encode(iterate_counted_items()):
            ids = np.concatenate([start, ids, [tokenizer.eos_id]]).astype(np.int32)
            writer.add_item(ids)
            tokens += len(ids)
            largest = max(largest, int(ids.max()))
            if counter.bytes > reported:
                report_bytes(counter.bytes - reported)
                reported = counter.bytes
    return {
        "items": counter.items,
        "tokens": tokens,
        "bytes": counter.bytes,
        "max_id": largest,
        "text_sha256": counter.digest,
        "sha256": hash_split_files(prefix),
        "blocks": compute_block_digests(prefix.with_name(f"{prefix.name}.bin")),
    }


def hash_split_files(prefix: Path) -> dict[str, str]:
    """Compute the SHA-256 of a split's .bin and .idx, by ending; a missing file has no entry."""
    files = {ending: prefix.with_name(f"{prefix.name}.{ending}") for ending in ("bin", "idx")}
    return {ending: hash_file(file) for ending, file in files.items() if file.exists()}
