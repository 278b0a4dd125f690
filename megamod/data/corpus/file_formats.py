"""Formats of data files by their endings, in any case, and files read through their compression."""

import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from megamod.errors import UserError

FORMATS = {
    "text": (".txt", ".text"),
    "JSON lines": (".jsonl", ".ndjson", ".jsonlines", ".jl"),
    "JSON": (".json",),
    "TSV": (".tsv", ".tab"),
    "CSV": (".csv",),
    "CoNLL": (".conll", ".conllu", ".conllup", ".iob", ".iob2", ".bio", ".bioes"),
    "Parquet": (".parquet",),
}
COMPRESSIONS = (".gz", ".zst")
CHUNK = 1 << 20


def format_of(path: Path, allowed: Sequence[str]) -> str:
    """Key of `FORMATS` for a file; an ending of a compression is left out.

    Raises:
        UserError: if the ending is unknown or its format is not in `allowed`.
    """
    name = path.name.lower()
    for end in COMPRESSIONS:
        name = name.removesuffix(end)
    suffix = Path(name).suffix
    for kind in allowed:
        if suffix in FORMATS[kind]:
            return kind
    ends = "; ".join(f"{', '.join(FORMATS[kind])} ({kind})" for kind in allowed)
    raise UserError(
        f"{path}: the ending {suffix!r} is not one of {ends}, each perhaps with "
        f"{' or '.join(COMPRESSIONS)} after it"
    )


def raw_lines(path: Path) -> Iterator[bytes]:
    """Lines of a file with their ends; .gz and .zst are decompressed.

    Raises:
        UserError: if the file cannot be read or its compressed data are damaged or cut.
    """
    from zstandard import ZstdError

    try:
        with _open(path) as file:
            yield from file
    except (OSError, EOFError, zlib.error, ZstdError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read: {reason}") from error


def _open(path: Path) -> io.BufferedIOBase:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")
    if suffix == ".zst":
        return io.BufferedReader(_ZstandardFile(path), CHUNK)
    return open(path, "rb")


class _ZstandardFile(io.RawIOBase):
    """Decompressed bytes of all frames of a file.

    `zstandard.open` stops after the first frame, and ends without an error where a file is cut.
    """

    def __init__(self, path: Path):
        from zstandard import ZstdDecompressor

        self._file = open(path, "rb")  # noqa: SIM115
        self._start = ZstdDecompressor().decompressobj
        self._frame, self._input, self._output = None, b"", b""

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: memoryview) -> int:
        """Fill the buffer; 0 at the end of the last frame."""
        while not self._output:
            self._input = self._input or self._file.read(CHUNK)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the compressed data end inside a frame")
                return 0
            self._frame = self._frame or self._start()
            self._output = self._frame.decompress(self._input)
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()
