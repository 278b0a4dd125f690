"""Token files in fairseq's format: `PREFIX.bin`, `PREFIX.idx`, and the vocabulary `dict.txt`.

    .idx   9 bytes "MMIDIDX\\0\\0", u64 version 1, u8 dtype code, u64 number of items n,
           n x i32 sizes in tokens, n x i64 byte offsets into .bin           (little endian)
    .bin   the ids of all items, concatenated

Source: fairseq MMapIndexedDataset and Dictionary.
"""

import hashlib
import os
import re
import struct
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import numpy as np

from megamod.errors import UserError
from megamod.files import build_temporary_path, sync_folder, write_atomic

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQ")
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4", 10: "<u8"}
CODES = {np.dtype(name): code for code, name in DTYPES.items()}
FAIRSEQ_SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3 of every dict.txt
OVERWRITE = "#fairseq:overwrite"
SCAN = 1 << 20  # items or tokens checked at once
BLOCK_BYTES = 4 << 20  # of a .bin that have a digest of their own


def format_split_prefix(domain: str, split: str) -> str:
    """Format the path of a split's files in a data-bin, relative to it and without ending.

    The file names of held-out splits have the name of the domain, those of train do not.
    """
    return f"{domain}/{split}" if split == "train" else f"{domain}/{split}_{domain}"


def select_token_dtype(vocab_size: int) -> np.dtype:
    """Select uint16 for vocabularies below 65500 ids, as in fairseq, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedWriter:
    """Writer of a token file as a context: `prefix.bin` and `prefix.idx` appear at its end.

    Existing files of these names are replaced then. If the `with` block raises, nothing changes.

    Args:
        prefix: path without ending, in an existing folder.
        dtype: integer type of the ids, see `select_token_dtype`.
    Raises:
        ValueError: for a dtype that token files do not have.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype):
        """Check the dtype; the files are opened when the context is entered."""
        self.bin_path, self.idx_path = _build_file_paths(prefix)
        self.dtype = np.dtype(dtype)
        if self.dtype not in CODES:
            raise ValueError(f"{self.dtype} is no dtype of a token file")
        self.sizes: list[int] = []
        self._limits = np.iinfo(self.dtype)
        self._partial = build_temporary_path(self.bin_path)

    def __enter__(self) -> "IndexedWriter":
        """Open a temporary file for the ids, beside the later .bin."""
        self._file = open(self._partial, "wb")
        return self

    def add_item(self, ids: np.ndarray) -> None:
        """Append one item, [tokens] ids of any integer type.

        Raises:
            ValueError: if `ids` is not a 1-D array of integers, or an id does not fit the dtype.
        """
        ids = np.asarray(ids)
        if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or ids.size == 0):
            raise ValueError(f"an item is a 1-D array of integers, not {ids.ndim}-D {ids.dtype}")
        if ids.dtype != self.dtype and ids.size:
            low, high = int(ids.min()), int(ids.max())
            if low < self._limits.min or high > self._limits.max:
                raise ValueError(
                    f"item {len(self.sizes)} holds ids {low} to {high}, beyond {self.dtype}"
                )
        self._file.write(ids.astype(self.dtype).tobytes())
        self.sizes.append(ids.size)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Sync and rename the files, unless the block raised; the temporary file is deleted."""
        try:
            with self._file:
                if kind is not None:
                    return
                self._file.flush()
                os.fsync(self._file.fileno())
            # An old index would be read with the new ids; without an index there is no data.
            self.idx_path.unlink(missing_ok=True)
            os.replace(self._partial, self.bin_path)
            sync_folder(self.bin_path.parent)
            write_atomic(self.idx_path, self._encode_index())
        finally:
            self._partial.unlink(missing_ok=True)

    def _encode_index(self) -> bytes:
        """Encode the .idx file of the items so far: header, sizes, byte offsets."""
        sizes = np.array(self.sizes, dtype="<i4")
        offsets = np.zeros(len(sizes), dtype="<i8")
        np.cumsum(sizes[:-1], out=offsets[1:])
        header = HEADER.pack(MAGIC, VERSION, CODES[self.dtype], len(sizes))
        return header + sizes.tobytes() + (offsets * self.dtype.itemsize).tobytes()


class IndexedDataset:
    """Items of a token file, memory-mapped.

    Args:
        prefix: path without ending.
        vocab_size: ids are checked against it; None: no check.
        scan: check all ids now, see `check_all_ids`; False: readers check what they read, by
            `check_read_ids`.

    Attributes:
        sizes: [n] int32, tokens of each item.
        offsets: [n+1] int64, start of each item and end of the last one, in tokens.
        tokens: [tokens] all ids, memory-mapped.

    Raises:
        UserError: if a file is missing, malformed or empty, or an id is outside the vocabulary.
    """

    def __init__(self, prefix: str | Path, vocab_size: int | None = None, scan: bool = True):
        """Map the files and check them; see the class for arguments and errors."""
        self.prefix, self.vocab_size = Path(prefix), vocab_size
        self.bin_path, self.idx_path = _build_file_paths(prefix)
        try:
            self.dtype, self.sizes, self.offsets = _read_index(self.idx_path)
            size, end = self.bin_path.stat().st_size, int(self.offsets[-1]) * self.dtype.itemsize
            if size != end:
                relation = "shorter" if size < end else "longer"
                raise UserError(
                    f"{self.bin_path}: ends at byte {size}, {relation} than in {self.idx_path.name}"
                    f": {len(self.sizes)} items of {self.dtype} end at byte {end}"
                )
            # A plain view, because slicing the memmap class takes several times as long.
            self.tokens = np.asarray(np.memmap(self.bin_path, dtype=self.dtype, mode="r"))
        except OSError as error:
            raise UserError(f"{error.filename or self.prefix}: {error.strerror}") from error
        if vocab_size is not None and scan:
            self.check_all_ids(vocab_size)

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.sizes)

    def __getitem__(self, item: int) -> np.ndarray:
        """Return ids [size] of an item, read-only, in the dtype of the file."""
        item = range(len(self))[item]
        return self.tokens[self.offsets[item] : self.offsets[item + 1]]

    def __reduce__(self) -> tuple[type, tuple[Path, int | None, bool]]:
        """Return class and arguments for pickle: a worker process maps the file again."""
        return IndexedDataset, (self.prefix, self.vocab_size, False)

    def check_read_ids(self, ids: np.ndarray, start: int) -> None:
        """Check ids that were read from the file; without a `vocab_size` nothing is checked.

        Args:
            ids: the ids, of any integer type.
            start: number of the first of them among all tokens of the file.
        Raises:
            UserError: naming the first id that is negative or not below `vocab_size`.
        """
        if self.vocab_size is not None and has_ids_outside_vocabulary(ids, self.vocab_size):
            self._raise_for_outside_id(start, ids, self.vocab_size)

    def check_all_ids(self, vocab_size: int) -> None:
        """Check all ids against the vocabulary, in one pass over the file.

        Raises:
            UserError: naming the first id that is negative or not below `vocab_size`.
        """
        for start in range(0, len(self.tokens), SCAN):
            chunk = self.tokens[start : start + SCAN]
            if has_ids_outside_vocabulary(chunk, vocab_size):
                self._raise_for_outside_id(start, chunk, vocab_size)

    def _raise_for_outside_id(self, start: int, ids: np.ndarray, vocab_size: int) -> NoReturn:
        """Raise UserError with file and place of the first id outside the vocabulary.

        Args:
            start: number of the first of `ids` among all tokens of the file.
            ids: ids that were read, at least one outside.
            vocab_size: ids must be below it.
        """
        position = start + int(np.argmax((ids >= vocab_size) | (ids < 0)))
        item = int(np.searchsorted(self.offsets, position, side="right")) - 1
        raise UserError(
            f"{self.bin_path}: token id {self.tokens[position]} at byte "
            f"{position * self.dtype.itemsize} (item {item}) is outside the vocabulary of "
            f"{vocab_size}: allowed are 0 to {vocab_size - 1}"
        )


def has_ids_outside_vocabulary(ids: np.ndarray, vocab_size: int) -> bool:
    """Return True if an id is negative or not below the size of the vocabulary."""
    # As unsigned numbers negative ids are the largest, so that one pass finds both.
    return ids.size > 0 and int(ids.view(f"u{ids.dtype.itemsize}").max()) >= vocab_size


def compute_block_digests(path: Path) -> str:
    """Compute a digest of each `BLOCK_BYTES` of a file: 16 hexadecimal digits each, joined."""
    with open(path, "rb") as file:
        return "".join(map(_hash_block, iter(partial(file.read, BLOCK_BYTES), b"")))


def check_blocks(path: Path, digests: str, numbers: Iterable[int]) -> None:
    """Compare some blocks of a file with their digests.

    Args:
        path: the file.
        digests: result of `compute_block_digests` for the undamaged file.
        numbers: numbers of the blocks to read, from 0.
    Raises:
        UserError: naming the first block that differs.
    """
    with open(path, "rb") as file:
        for number in sorted(numbers):
            file.seek(number * BLOCK_BYTES)
            if _hash_block(file.read(BLOCK_BYTES)) != digests[16 * number : 16 * number + 16]:
                first = number * BLOCK_BYTES
                raise UserError(
                    f"{path}: the {BLOCK_BYTES >> 20} MiB from byte {first} on do not have their "
                    "digest: the file was damaged or replaced; copy it again"
                )


def _hash_block(block: bytes) -> str:
    """Compute the digest of a block: 16 hexadecimal digits."""
    return hashlib.blake2b(block, digest_size=8).hexdigest()


class Dictionary:
    """Dictionary of fairseq: symbols, their ids and counts.

    `<s>`, `<pad>`, `</s>` and `<unk>` are always 0 to 3. In a file, line k (from 0) is
    `symbol count` and has id k + 4.
    """

    def __init__(self) -> None:
        """Start with the four special symbols."""
        self.symbols = list(FAIRSEQ_SYMBOLS)
        self.counts = [1] * len(FAIRSEQ_SYMBOLS)
        self._ids = {symbol: number for number, symbol in enumerate(FAIRSEQ_SYMBOLS)}

    @classmethod
    def load(cls, path: str | Path) -> "Dictionary":
        """Read a `dict.txt`.

        A repeated symbol is an error unless the later line ends in `#fairseq:overwrite`; the symbol
        then has the later id.

        Raises:
            UserError: if the file cannot be read, or naming a line that is malformed or repeats a
                symbol.
        """
        dictionary = cls()
        try:
            lines = Path(path).read_bytes().split(b"\n")
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error
        if not lines[-1]:
            lines.pop()
        for number, raw in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            try:
                line = raw.decode().removesuffix("\r").rstrip(" ")
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8 at byte {error.start} of the line") from error
            overwrite = line.endswith(" " + OVERWRITE)
            line = line.removesuffix(" " + OVERWRITE)
            symbol, _, count = line.rpartition(" ")
            if not symbol or not re.fullmatch("-?[0-9]{1,18}", count):
                raise UserError(
                    f'{where}: {line!r} is not "symbol count", perhaps followed by {OVERWRITE}'
                )
            if symbol in dictionary._ids and not overwrite:
                raise UserError(
                    f"{where}: {symbol!r} has id {dictionary.get_id(symbol)} already; a line that "
                    f"replaces it ends in {OVERWRITE}"
                )
            dictionary._append_symbol(symbol, int(count))
        return dictionary

    def save(self, path: str | Path) -> None:
        """Write a `dict.txt`, a line `symbol count` per symbol but the four special ones."""
        seen, lines = set(FAIRSEQ_SYMBOLS), []
        for number in range(len(FAIRSEQ_SYMBOLS), len(self)):
            symbol = self.symbols[number]
            mark = f" {OVERWRITE}" if symbol in seen else ""
            lines.append(f"{symbol} {self.counts[number]}{mark}\n")
            seen.add(symbol)
        write_atomic(Path(path), "".join(lines))

    def __len__(self) -> int:
        """Return the number of symbols, special ones included."""
        return len(self.symbols)

    def get_id(self, symbol: str) -> int:
        """Return the id of a symbol; 3, the id of `<unk>`, for unknown symbols."""
        return self._ids.get(symbol, FAIRSEQ_SYMBOLS.index("<unk>"))

    def get_symbol(self, number: int) -> str:
        """Return the symbol of an id; an id outside the dictionary raises IndexError."""
        if not 0 <= number < len(self):
            raise IndexError(f"id {number} is outside the dictionary of {len(self)}")
        return self.symbols[number]

    def add_symbol(self, symbol: str, count: int = 1) -> int:
        """Add `count` to the frequency of a symbol, which is appended if it is new; return its id.

        Raises:
            ValueError: for a symbol that cannot be written on one line.
        """
        if not symbol or "\n" in symbol or "\r" in symbol:
            raise ValueError(f"{symbol!r} cannot be a symbol: it is empty or contains a line end")
        if symbol not in self._ids:
            return self._append_symbol(symbol, count)
        self.counts[self._ids[symbol]] += count
        return self._ids[symbol]

    def _append_symbol(self, symbol: str, count: int) -> int:
        """Append a symbol with its frequency `count`, and return its new id.

        A symbol that is in the dictionary already is appended again, and gets the new id.
        """
        self._ids[symbol] = len(self.symbols)
        self.symbols.append(symbol)
        self.counts.append(count)
        return len(self.symbols) - 1


def _build_file_paths(prefix: str | Path) -> tuple[Path, Path]:
    """Return the paths of the .bin and the .idx file of a prefix."""
    prefix = Path(prefix)
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """Read an .idx file: dtype of the ids, sizes [n] int32 and token offsets [n + 1] int64.

    Raise UserError if it is damaged, of another format, or has no tokens.
    """
    length = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(HEADER.size)
        if head[: len(MAGIC)] != MAGIC[: len(head)]:
            raise UserError(
                f"{path}: begins with {head[: len(MAGIC)]!r} at byte 0, not with the {MAGIC!r} of "
                "a fairseq index"
            )
        if len(head) < HEADER.size:
            raise UserError(f"{path}: ends at byte {len(head)}, inside its {HEADER.size}-byte head")
        _, version, code, items = HEADER.unpack(head)
        if version != VERSION:
            raise UserError(f"{path}: version {version} at byte 9; only {VERSION} can be read")
        if code not in DTYPES:
            allowed = ", ".join(f"{number} ({np.dtype(name)})" for number, name in DTYPES.items())
            raise UserError(f"{path}: dtype code {code} at byte 17; tokens have one of {allowed}")
        dtype = np.dtype(DTYPES[code])
        expected = HEADER.size + 12 * items
        if length != expected:
            _refuse_megatron_index(path, file.read(8), items, length)
            raise UserError(
                f"{path}: is {length} bytes long, but {items} items (the number at byte 18) need "
                f"{expected}"
            )
        if items == 0:
            raise UserError(f"{path}: holds no items (the number at byte 18 is 0)")
        sizes = np.fromfile(file, dtype="<i4", count=items)
        offsets = np.empty(items + 1, dtype="<i8")
        file.readinto(offsets[:-1])
    if sizes.min() < 0:
        item = int(np.argmax(sizes < 0))
        raise UserError(
            f"{path}: size {sizes[item]} of item {item} at byte {HEADER.size + 4 * item} is "
            "negative"
        )
    end = 0
    for first in range(0, items, SCAN):
        part = sizes[first : first + SCAN]
        ends = end + np.cumsum(part * np.int64(dtype.itemsize))
        starts = offsets[first : first + len(part)]
        expected = np.append(end, ends[:-1])
        if (starts != expected).any():
            item = int(np.argmax(starts != expected))
            raise UserError(
                f"{path}: offset {starts[item]} of item {first + item} at byte "
                f"{HEADER.size + 4 * items + 8 * (first + item)} does not follow from the sizes "
                f"before it, which end at {expected[item]}"
            )
        end = int(ends[-1])
    offsets[-1] = end
    offsets //= dtype.itemsize
    if offsets[-1] == 0:
        raise UserError(f"{path}: all {items} items are empty")
    return dtype, sizes, offsets


def _refuse_megatron_index(path: Path, field: bytes, items: int, length: int) -> None:
    """Raise UserError if an index of a wrong length is one of Megatron-LM.

    Megatron-LM has the same magic and version, but more arrays.

    Args:
        path: the index, for the message.
        field: the 8 bytes after the header, there the number of document bounds.
        items: number of items in the header.
        length: bytes of the file.
    """
    documents = int.from_bytes(field, "little")
    expected = HEADER.size + 8 + 12 * items + 8 * documents
    if len(field) == 8 and length in (expected, expected + items):
        raise UserError(
            f"{path}: is an index of Megatron-LM ({documents} document bounds at byte "
            f"{HEADER.size}), not of fairseq; run megamod preprocess on the text again"
        )
