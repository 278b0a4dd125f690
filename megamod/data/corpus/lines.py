"""Numbered lines of a text file with one record per line, decoded strictly."""

import re
from collections.abc import Iterator
from pathlib import Path

from megamod.data.corpus.file_formats import read_numbered_lines
from megamod.errors import UserError


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line of a UTF-8 file, numbered from 1.

    Lines end with a line feed, or carriage return and line feed, and with nothing else. A byte
    order mark at the start is dropped. A file with the ending of a compression is decompressed.

    Raises:
        UserError: naming file and line, if the file cannot be read, holds bytes that are not UTF-8,
            or NUL characters, or ends its lines with carriage returns alone.
    """
    for number, _, raw in read_numbered_lines(path):
        where = f"{path}, line {number}"
        try:
            yield number, check_text(raw.decode(), where)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where}: invalid UTF-8 at byte {error.start + 1} of the line"
            ) from error


def check_text(text: str, where: str) -> str:
    """Return `text` unchanged, if it has neither NUL characters nor lone surrogates.

    Args:
        where: origin of the text, for messages.
    Raises:
        UserError: for such a character.
    """
    invalid = re.search("[\0\ud800-\udfff]", text)
    if invalid:
        raise UserError(f"{where}: character U+{ord(invalid[0]):04X} is not text")
    return text
