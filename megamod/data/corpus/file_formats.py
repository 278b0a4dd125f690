"""Formats of data files by their endings, in any letter case, and reading of compressed files.

Unknown endings are refused, because a format is never guessed; so is content that contradicts the
ending.
"""

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megamod.errors import UserError
from megamod.schemas import make_unique_keys_hook

FORMATS = {
    "text": (".txt", ".text", ".raw", ".tokens"),
    "JSON lines": (".jsonl", ".ndjson", ".jsonlines", ".jl"),
    "JSON": (".json",),
    "TSV": (".tsv", ".tab"),
    "CSV": (".csv",),
    "CoNLL": (".conll", ".conllu", ".conllup", ".iob", ".iob2", ".bio", ".bioes"),
    "Parquet": (".parquet", ".pq"),
}
# Ending -> name, and the bytes that every such file begins with.
COMPRESSIONS = {
    ".gz": ("gzip", b"\x1f\x8b"),
    ".zst": ("zstd", b"\x28\xb5\x2f\xfd"),
    ".bz2": ("bzip2", b"BZh"),
    ".xz": ("xz", b"\xfd7zXZ\x00"),
}
BOM = b"\xef\xbb\xbf"
CHUNK = 1 << 20  # bytes decompressed at once
ONE_A_LINE = "JSON lines are needed: one whole object per line"


def require_format(path: Path, allowed: Sequence[str], flag: str = "") -> str:
    """Return the format of a file by its ending, a key of `FORMATS`; refuse other formats.

    An ending of a compression is ignored. The file is not read.

    Args:
        path: the file, which need not exist.
        allowed: keys of the formats that the caller reads.
        flag: prefix of the message, such as the flag that named the file.
    Raises:
        UserError: if the ending is unknown or its format is not in `allowed`.
    """
    name = find_format(path)
    if name in allowed:
        return name
    suffix = Path(_strip_compression_ending(path)).suffix.lower()
    ends = "; ".join(f"{', '.join(FORMATS[kind])} ({kind})" for kind in allowed)
    raise UserError(
        f"{flag}{path}: the ending {suffix!r} is not one of {ends}, each perhaps with "
        f"{' or '.join(COMPRESSIONS)} after it"
    )


def find_format(path: Path) -> str | None:
    """Find the format of a file by its ending, a key of `FORMATS`; None if it is unknown.

    An ending of a compression is ignored. The file is not read.
    """
    suffix = Path(_strip_compression_ending(path)).suffix.lower()
    return next((name for name, endings in FORMATS.items() if suffix in endings), None)


def strip_format_endings(path: Path) -> str:
    """Return the name of a file without the endings of its format and compression."""
    return Path(_strip_compression_ending(path)).stem


@contextmanager
def _open_binary(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading bytes, decompressed if it has a compression ending.

    Raises:
        UserError: if it cannot be read, is cut short, or is not compressed as its ending says, also
            while it is read. Any OSError of the `with` block counts as one of this file.
    """
    compression = COMPRESSIONS.get(path.suffix.lower(), (None,))[0]
    try:
        with open(path, "rb") as file:
            _check_compression(path, file, compression)
            if compression is None:
                yield file
            else:
                with _open_decompressed(file, compression) as decompressed:
                    yield decompressed
    except EOFError as error:
        raise UserError(
            f"{path}: cannot be read: cut short inside its {compression} data; copy it again"
        ) from error
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: cannot be read: damaged {compression} data ({error})") from error
    except OSError as error:
        problem = error.strerror or f"damaged {compression} data"  # bz2 raises a bare OSError
        raise UserError(f"{path}: cannot be read: {problem}") from error


def read_raw_lines(path: Path) -> Iterator[bytes]:
    """Yield the decompressed lines of a file with their ends, as bytes.

    Raises:
        UserError: as `_open_binary`.
    """
    with _open_binary(path) as file:
        yield from file


def read_numbered_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield number from 1, byte offset in the decompressed file, and bytes of each line.

    Only a line feed, or carriage return and line feed, ends a line, because sentences of data sets
    hold other control characters. Line ends and a byte order mark at the start are removed.

    Raises:
        UserError: as `_open_binary`, or if the lines end with carriage returns alone.
    """
    offset, previous = 0, None
    for number, raw in enumerate(read_raw_lines(path), start=1):
        if previous is not None:
            yield previous
        begin = len(BOM) if number == 1 and raw.startswith(BOM) else 0
        previous = number, offset + begin, raw[begin:].removesuffix(b"\n").removesuffix(b"\r")
        offset += len(raw)
    if previous is None:
        return
    if previous[0] == 1 and (returns := previous[2].count(b"\r")):
        raise UserError(
            f"{path}: one line, because its {returns} line ends are carriage returns alone; "
            "convert them to line feeds"
        )
    yield previous


def parse_json_object(line: str, where: str, key: str | None = None) -> dict[str, object]:
    """Parse a line that must be one JSON object.

    Args:
        line: the text of the line.
        where: file and line, for messages.
        key: a key that must not occur twice; None: of any doubled key the last value counts.
    Raises:
        UserError: if the line is not one JSON object, or `key` occurs twice.
    """
    try:
        hook = make_unique_keys_hook(where, key) if key else None
        value = json.loads(line, object_pairs_hook=hook)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        if line.lstrip().startswith("["):
            raise UserError(f"{where}: a JSON list; {ONE_A_LINE}") from error
        raise UserError(f"{where}: not a JSON object: {str(error)[:200]}; {ONE_A_LINE}") from error
    if not isinstance(value, dict):
        kind = {list: "list", type(None): "null"}.get(type(value), type(value).__name__)
        raise UserError(f"{where}: a JSON {kind}; {ONE_A_LINE}")
    return value


def _strip_compression_ending(path: Path) -> str:
    """Return the name of a file without the ending of its compression, if it has one."""
    return path.stem if path.suffix.lower() in COMPRESSIONS else path.name


def _check_compression(path: Path, file: BinaryIO, compression: str | None) -> None:
    """Raise UserError if the first bytes of a file contradict its ending.

    Args:
        path: the file, for the message.
        file: the open file, which stays at its start.
        compression: name of the compression in its ending, see `COMPRESSIONS`; None: it has none.
    """
    head = file.peek(8)
    for ending, (name, magic) in COMPRESSIONS.items():
        if name == compression and not head.startswith(magic):
            content = "not" if head else "empty, not"
            raise UserError(f"{path}: cannot be read: {content} {name} data as its ending says")
        if compression is None and head.startswith(magic):
            raise UserError(f"{path}: {name} data; rename it to {path.name}{ending}")


def _open_decompressed(file: BinaryIO, compression: str) -> BinaryIO:
    """Open a reader of the decompressed bytes of `file`, by a name in `COMPRESSIONS`."""
    if compression == "zstd":
        return io.BufferedReader(_ZstandardFile(file), CHUNK)
    kinds = {"gzip": lambda: gzip.GzipFile(fileobj=file), "bzip2": lambda: bz2.BZ2File(file)}
    return io.BufferedReader(kinds.get(compression, lambda: lzma.LZMAFile(file))(), CHUNK)


class _ZstandardFile(io.RawIOBase):
    """Decompressed bytes of all frames of a file.

    `zstandard.open` stops after the first frame, and ends without an error where a file is cut.
    """

    def __init__(self, file: BinaryIO):
        """Start before the first frame of `file`, the open compressed file."""
        from zstandard import ZstdDecompressor, ZstdError

        self._file, self._error = file, ZstdError
        # Corpora are often packed with --long=31, whose window is 2 GiB.
        self._start = ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._frame, self._input, self._output = None, b"", memoryview(b"")

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: memoryview) -> int:
        """Fill the buffer; return the number of bytes, 0 at the end of the last frame.

        Raise EOFError for a file that ends inside a frame, LZMAError for a damaged one.
        """
        while not self._output:
            self._input = self._input or self._file.read(CHUNK)
            if not self._input:
                if self._frame is not None:
                    raise EOFError
                return 0
            self._frame = self._frame or self._start()
            try:
                self._output = memoryview(self._frame.decompress(self._input))
            except self._error as error:
                raise lzma.LZMAError(str(error)) from error
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count
