"""Decoding of bytes and strings to text, with refusal or replacement of what is not text."""

import re
from dataclasses import dataclass
from pathlib import Path

from megamod.errors import UserError


@dataclass
class Decoding:
    """Treatment of bytes that are not text.

    Attributes:
        errors: "strict" refuses them, "replace" replaces them with U+FFFD.
        replaced: characters replaced so far.

    Raises:
        UserError: for another value of `errors`.
    """

    errors: str = "strict"
    replaced: int = 0

    def __post_init__(self) -> None:
        """Check the value of `errors`; raise UserError for one that is not allowed."""
        if self.errors not in ("strict", "replace"):
            raise UserError(f"--encoding_errors {self.errors}: allowed are strict and replace")

    def decode_line(self, raw: bytes, path: Path, offset: int) -> str:
        """Decode the line `raw`, which begins at byte `offset` of `path`.

        Bytes that are not UTF-8 and NUL characters are replaced and counted.

        Args:
            raw: bytes of the line, without its end.
            path: the file, for messages.
            offset: byte offset of the line in the file.
        Raises:
            UserError: for such bytes, naming their place, if `errors` is "strict".
        """
        try:
            text, problem = raw.decode(), None
            if "\0" in text:
                problem = f"NUL byte at offset {offset + raw.index(0)}"
        except UnicodeDecodeError as error:
            text = raw.decode(errors="replace")
            problem = f"invalid UTF-8 at byte offset {offset + error.start}"
        if problem is None:
            return text
        self._raise_if_strict(path, problem)
        self.replaced += text.count("�") - raw.count("�".encode()) + text.count("\0")
        return text.replace("\0", "�")

    def repair_string(self, text: str, where: str) -> str:
        """Return `text` with NUL characters and lone surrogates replaced, which are counted.

        Args:
            where: origin of the text, for messages.
        Raises:
            UserError: for such characters, if `errors` is "strict".
        """
        invalid = re.findall("[\0\ud800-\udfff]", text)
        if not invalid:
            return text
        self._raise_if_strict(where, f"character U+{ord(invalid[0]):04X} is not text")
        self.replaced += len(invalid)
        return re.sub("[\0\ud800-\udfff]", "�", text)

    def _raise_if_strict(self, where: str | Path, problem: str) -> None:
        """Raise UserError if `errors` is "strict"; else do nothing, and the caller replaces.

        Args:
            where: file, or origin of the string, for the message.
            problem: clause that describes the invalid bytes or character.
        """
        if self.errors == "strict":
            raise UserError(
                f"{where}: {problem}; correct the file, or pass --encoding_errors replace to "
                "replace such characters with U+FFFD"
            )
