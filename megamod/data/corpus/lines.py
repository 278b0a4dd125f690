"""Numbered lines of a text file in which every line is a record: strict, no repairs."""

import re
from collections.abc import Iterator
from pathlib import Path

from megamod.data.corpus.file_formats import raw_lines
from megamod.errors import UserError

BOM = b"\xef\xbb\xbf"


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines from 1 without their ends; .gz and .zst files are decompressed.

    Only a line feed, or carriage return and line feed, ends a line: data sets hold other control
    characters inside of sentences. A byte order mark at the start is dropped.

    Raises:
        UserError: naming file and line, if the file cannot be read, holds bytes that are not UTF-8,
            or ends its lines with carriage returns alone.
    """
    for number, raw in enumerate(raw_lines(path), start=1):
        ended = raw.endswith(b"\n")
        raw = raw.removesuffix(b"\n").removesuffix(b"\r")
        if number == 1:
            raw = raw.removeprefix(BOM)
            if raw.count(b"\r") > ended:
                raise UserError(
                    f"{path}: its lines end with carriage returns alone; convert them to line feeds"
                )
        where = f"{path}, line {number}"
        try:
            yield number, checked_text(raw.decode(), where)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where}: invalid UTF-8 at byte {error.start + 1} of the line"
            ) from error


def checked_text(text: str, where: str) -> str:
    """The text, if it has neither NUL nor half a surrogate pair.

    Raises:
        UserError: naming `where`.
    """
    bad = re.search("[\0\ud800-\udfff]", text)
    if bad:
        raise UserError(f"{where}: character U+{ord(bad[0]):04X} is not text")
    return text
