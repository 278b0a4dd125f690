"""Documents of a domain: plain text, JSON lines, data sets on disk or on the hub, or given lists.

Everything is streamed. Input that is not clean text ends with the file and the line, row or byte
offset, or is repaired and counted where the user asked for that.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megamod.data.corpus.file_formats import (
    format_of,
    json_object,
    known_format,
    numbered_lines,
    stem_of,
)
from megamod.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

SPLITS = ("train", "valid", "test")
SPELLINGS = {"train": ("train",), "valid": ("valid", "validation", "dev"), "test": ("test",)}
SHARES = {"train": 0.90, "valid": 0.05, "test": 0.05}
FORMATS = ("text", "JSON lines", "JSON")


@dataclass
class Decoding:
    """What happens to bytes that are not text, and how many characters were replaced so far.

    Args:
        errors: "strict" refuses them, "replace" puts U+FFFD in their place and counts.
    """

    errors: str = "strict"
    replaced: int = 0

    def __post_init__(self) -> None:
        if self.errors not in ("strict", "replace"):
            raise UserError(f"--encoding_errors {self.errors}: allowed are strict and replace")

    def line(self, raw: bytes, path: Path, offset: int) -> str:
        """Text of the bytes `raw`, which stand at byte `offset` of `path`."""
        try:
            text, problem = raw.decode(), None
            if "\0" in text:
                problem = f"NUL byte at offset {offset + raw.index(0)}"
        except UnicodeDecodeError as error:
            text = raw.decode(errors="replace")
            problem = f"invalid UTF-8 at byte offset {offset + error.start}"
        if problem is None:
            return text
        self._refuse(path, problem)
        self.replaced += text.count("�") - raw.count("�".encode()) + text.count("\0")
        return text.replace("\0", "�")

    def string(self, text: str, where: str) -> str:
        """`text` from a place that holds Unicode already: no NUL and no lone surrogate."""
        bad = re.findall("[\0\ud800-\udfff]", text)
        if not bad:
            return text
        self._refuse(where, f"character U+{ord(bad[0]):04X} is not text")
        self.replaced += len(bad)
        return re.sub("[\0\ud800-\udfff]", "�", text)

    def _refuse(self, where: str | Path, problem: str) -> None:
        if self.errors == "strict":
            raise UserError(
                f"{where}: {problem}; mend the file or pass --encoding_errors replace to put "
                "U+FFFD in the place of such characters"
            )


class Source:
    """The documents of one domain, already divided into splits or divided here.

    Args:
        where: what the user named, for messages.
        readers: one function per split giving its documents, or a single one under the key ""
            whose documents are divided by `split_of`.
        decoding: counts replaced characters; its count is that of the latest complete pass.
        seed: chooses the division of a single reader.
        line_readers: one function per split giving its lines, where the source has lines.
    """

    def __init__(
        self,
        where: str,
        readers: Mapping[str, Callable[[], Iterator[str]]],
        decoding: Decoding,
        seed: int,
        line_readers: Mapping[str, Callable[[], Iterator[str]]] | None = None,
    ) -> None:
        self.where, self.readers, self.decoding, self.seed = where, readers, decoding, seed
        self.line_readers = line_readers or {}

    def documents(self, only: str | None = None) -> Iterator[tuple[str, str]]:
        """Pairs (split, document) in the order of the source; `only` leaves out other splits."""
        self.decoding.replaced = 0
        for split, reader in self.readers.items():
            if only and split not in ("", only):
                continue
            for document in reader():
                found = split or split_of(document, self.seed)
                if only in (None, found):
                    yield found, document

    def lines(self, only: str | None = None) -> Iterator[tuple[str, str]]:
        """Pairs (split, line): a plain text file as it is, else documents with a blank between."""
        if self.line_readers:
            self.decoding.replaced = 0
            for split, reader in self.line_readers.items():
                if only in (None, split):
                    yield from ((split, line) for line in reader())
            return
        begun = set()
        for split, document in self.documents(only):
            if split in begun:
                yield split, ""
            begun.add(split)
            yield from ((split, line) for line in document.split("\n"))


def parse_inputs(values: Sequence[str]) -> dict[str, str]:
    """Domains of `NAME=PATH` arguments, in the order given.

    Raises:
        UserError: on a value without a name or a path, or a name given twice.
    """
    inputs: dict[str, str] = {}
    for value in values:
        name, sign, path = value.partition("=")
        if not (name and sign and path):
            raise UserError(f"--input {value}: write NAME=PATH, for example news=data/news.jsonl")
        if name in inputs:
            raise UserError(f"--input {value}: the domain {name} was given already: {inputs[name]}")
        inputs[name] = path
    return inputs


def open_source(
    spec: str | Path | Sequence[str],
    *,
    field: str = "text",
    encoding_errors: str = "strict",
    seed: int = 0,
) -> Source:
    """The source a user named.

    Args:
        spec: a .txt or .jsonl file; a folder with train, valid and test files; a folder written
            by `Dataset.save_to_disk`; `hf:NAME[:CONFIG]`; or a list of documents.
        field: JSON key or column that holds the text.

    Raises:
        UserError: if it does not exist, is of no known form, or lacks a split.
    """
    decoding = Decoding(encoding_errors)
    if not isinstance(spec, (str, Path)):
        readers = {"": lambda: (decoding.string(text, "given document") for text in spec)}
        return Source("the given documents", readers, decoding, seed)
    where = str(spec)
    if where.startswith("hf:"):
        return Source(where, _hub_readers(where, field, decoding), decoding, seed)
    path = Path(spec)
    if not path.exists():
        raise UserError(f"{path} does not exist: a file, a folder or hf:NAME[:CONFIG] is needed")
    if path.is_file():
        return Source(where, {"": _file_reader(path, field, decoding)}, decoding, seed)
    if any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        return Source(where, _saved_readers(path, field, decoding), decoding, seed)
    files = _split_files(path)
    readers = {split: _file_reader(file, field, decoding) for split, file in files.items()}
    line_readers = {}
    if all(format_of(file, FORMATS) == "text" for file in files.values()):
        line_readers = {
            split: lambda file=file: (line for _, line in text_lines(file, decoding))
            for split, file in files.items()
        }
    return Source(where, readers, decoding, seed, line_readers)


def read_documents(
    path: str | Path, field: str = "text", decoding: Decoding | None = None
) -> Iterator[str]:
    """Documents of one file, in the format that its ending says.

    In plain text one or more blank lines stand between documents, and line ends inside a document
    are kept as "\\n". A byte order mark at the start is dropped and CRLF is read as LF. Documents
    of nothing but white space are left out.

    Raises:
        UserError: naming file and line or byte offset.
    """
    path, decoding = Path(path), decoding or Decoding()
    if format_of(path, FORMATS) != "text":
        for number, line in text_lines(path, decoding):
            if line.strip():
                text = _json_text(line, field, f"{path}:{number}")
                text = decoding.string(text, f"{path}:{number}")
                if text.strip():
                    yield text
        return
    kept: list[str] = []
    for _, line in text_lines(path, decoding):
        if line.strip():
            kept.append(line)
        elif kept:
            yield "\n".join(kept)
            kept = []
    if kept:
        yield "\n".join(kept)


def split_of(document: str, seed: int) -> str:
    """Split of a document: a pure function of (seed, content), so that equal documents, which
    would leak from train into test, always go together."""
    digest = hashlib.blake2b(f"{seed}\n{document}".encode(), digest_size=8).digest()
    position = int.from_bytes(digest, "little") / 2**64
    if position < SHARES["train"]:
        return "train"
    return "valid" if position < SHARES["train"] + SHARES["valid"] else "test"


def text_lines(path: Path, decoding: Decoding) -> Iterator[tuple[int, str]]:
    """Lines of a file from 1 on, without their ends.

    Raises:
        UserError: if it cannot be read, or holds what the decoding refuses.
    """
    for number, offset, raw in numbered_lines(path):
        yield number, decoding.line(raw, path, offset)


def _json_text(line: str, field: str, where: str) -> str:
    row = json_object(line, where, field)
    if field not in row:
        keys = ", ".join(map(repr, sorted(row)[:8])) or "none"
        raise UserError(f"{where}: no key {field!r} among {keys}; --field names another key")
    return _require_string(row[field], field, where)


def _require_string(value: object, field: str, where: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise UserError(f"{where}: {field!r} is {kind}, a string is needed")
    return value


def _file_reader(path: Path, field: str, decoding: Decoding) -> Callable[[], Iterator[str]]:
    format_of(path, FORMATS)
    return lambda: read_documents(path, field, decoding)


def _split_files(folder: Path) -> dict[str, Path]:
    files = {}
    for split, spellings in SPELLINGS.items():
        matches = [
            file
            for file in sorted(folder.iterdir())
            if stem_of(file) in spellings and known_format(file) in FORMATS
        ]
        if len(matches) != 1:
            names = " and ".join(file.name for file in matches) or "none"
            raise UserError(
                f"{folder}: one file of the split {split} is needed, named "
                f"{' or '.join(spellings)} with an ending such as .txt or .jsonl.gz; found {names}"
            )
        files[split] = matches[0]
    return files


def _saved_readers(
    path: Path, field: str, decoding: Decoding
) -> dict[str, Callable[[], Iterator[str]]]:
    from datasets import load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a data set written by save_to_disk: {error}") from error
    return _dataset_readers(loaded, str(path), field, decoding)


def _hub_readers(
    where: str, field: str, decoding: Decoding
) -> dict[str, Callable[[], Iterator[str]]]:
    from datasets import load_dataset

    name, _, config = where.removeprefix("hf:").partition(":")
    try:
        loaded = load_dataset(name, config or None)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: the data set cannot be loaded: {error}") from error
    return _dataset_readers(loaded, where, field, decoding)


def _dataset_readers(
    loaded: "Dataset | DatasetDict",
    where: str,
    field: str,
    decoding: Decoding,
) -> dict[str, Callable[[], Iterator[str]]]:
    tables = dict(loaded) if isinstance(loaded, Mapping) else {"": loaded}
    if len(tables) == 1:
        tables = {"": next(iter(tables.values()))}
    else:
        found = {
            split: [name for name in spellings if name in tables]
            for split, spellings in SPELLINGS.items()
        }
        wrong = [split for split, names in found.items() if len(names) != 1]
        if wrong:
            raise UserError(
                f"{where}: the splits {sorted(tables)} do not give one each of train, valid and "
                f"test (look at {', '.join(wrong)}); a single split is divided instead"
            )
        tables = {split: tables[names[0]] for split, names in found.items()}
    for table in tables.values():
        if field not in table.column_names:
            raise UserError(f"{where}: no column {field!r} among {table.column_names} (--field)")
    return {
        split: lambda table=table: _rows(table, where, field, decoding)
        for split, table in tables.items()
    }


def _rows(table: "Dataset", where: str, field: str, decoding: Decoding) -> Iterator[str]:
    for row, record in enumerate(table):
        place = f"{where}, row {row}"
        text = decoding.string(_require_string(record[field], field, place), place)
        if text.strip():
            yield text
