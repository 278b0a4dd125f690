"""Documents of a domain: text files, JSON lines, tables, data sets of `datasets`, lists.

Everything is streamed. Input that is not clean text raises an error with the file and the line, row
or byte offset; with encoding_errors="replace" it is repaired and counted.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from megamod.data.corpus.decoding import Decoding
from megamod.data.corpus.file_formats import (
    find_format,
    parse_json_object,
    read_numbered_lines,
    require_format,
    strip_format_endings,
)
from megamod.data.corpus.header import SPLITS
from megamod.data.corpus.text_columns import (
    Cells,
    find_split_tables,
    load_hub_dataset,
    load_saved_dataset,
    read_csv_column,
    read_dataset_column,
    read_parquet_column,
    read_tsv_column,
    require_column,
)
from megamod.errors import UserError

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

SPELLINGS = {"train": ("train",), "valid": ("valid", "validation", "dev"), "test": ("test",)}
SHARES = {"train": 0.90, "valid": 0.05, "test": 0.05}
FORMATS = ("text", "JSON lines", "JSON", "CSV", "TSV", "Parquet")


class DocumentSource:
    """The documents of one domain, with splits of their own or divided by a hash.

    Args:
        where: the user's name of the source, for messages.
        readers: a function per split that iterates over its documents. If a split has none, its
            documents are taken out of train by `assign_split`; the documents of a single function
            under the key "" are divided into all splits.
        decoding: counts the replaced characters of the latest pass.
        seed: seed of the division.
        line_readers: a function per split that iterates over its lines, for plain text.
    """

    def __init__(
        self,
        where: str,
        readers: Mapping[str, Callable[[], Iterator[str]]],
        decoding: Decoding,
        seed: int,
        line_readers: Mapping[str, Callable[[], Iterator[str]]] | None = None,
    ) -> None:
        """Store the arguments, see the class; nothing is read."""
        self.where, self.readers, self.decoding, self.seed = where, readers, decoding, seed
        self.line_readers = line_readers or {}

    def iterate_documents(self, only_split: str | None = None) -> Iterator[tuple[str, str]]:
        """Yield pairs (split, document) in the order of the source, and restart `decoding`'s count.

        Args:
            only_split: the only split to yield; None: all.
        Raises:
            UserError: as the readers, for content that is not text.
        """
        self.decoding.replaced = 0
        absent = [split for split in SPLITS if split not in self.readers]
        for split, reader in self.readers.items():
            divided = absent if split in ("", "train") else []
            if only_split not in (None, split, *divided):
                continue
            for document in reader():
                drawn = assign_split(document, self.seed) if divided else split
                name = drawn if drawn in divided else split
                if only_split in (None, name):
                    yield name, document

    def iterate_lines(self, only_split: str | None = None) -> Iterator[tuple[str, str]]:
        """Yield pairs (split, line), in the same way as `iterate_documents`.

        For a source without readers of lines these are the lines of its documents, with an empty
        line between two documents of a split.

        Raises:
            UserError: as `iterate_documents`.
        """
        if self.line_readers:
            self.decoding.replaced = 0
            for split, reader in self.line_readers.items():
                if only_split in (None, split):
                    yield from ((split, line) for line in reader())
            return
        started_splits = set()
        for split, document in self.iterate_documents(only_split):
            if split in started_splits:
                yield split, ""
            started_splits.add(split)
            yield from ((split, line) for line in document.split("\n"))


def parse_domain_paths(values: Sequence[str]) -> dict[str, str]:
    """Parse `NAME=PATH` arguments into paths by domain, in their order.

    Raises:
        UserError: for a value without a name or a path, or a repeated name.
    """
    inputs: dict[str, str] = {}
    for value in values:
        name, sign, path = value.partition("=")
        if not (name and sign and path):
            raise UserError(f"--input {value}: write NAME=PATH, for example news=data/news.jsonl")
        if name in inputs:
            raise UserError(f"--input {value}: the domain {name} is {inputs[name]} already")
        inputs[name] = path
    return inputs


def open_document_source(
    spec: "str | Path | Sequence[str] | Dataset | DatasetDict",
    *,
    text_column: str = "text",
    encoding_errors: str = "strict",
    seed: int = 0,
    streaming: bool = False,
) -> DocumentSource:
    """Open the source that a user named.

    Args:
        spec: a file of one of `FORMATS`; a folder with train, valid and test files; a folder
            written by `Dataset.save_to_disk`; `hf:NAME[:CONFIG]`; a list of documents; or a data
            set of `datasets`, streamed or not.
        text_column: JSON key or column that holds the text.
        encoding_errors: "strict" or "replace", see `Decoding`.
        seed: seed of the division of a source without splits.
        streaming: read data sets of the hub without storing them.

    Raises:
        UserError: if it does not exist, cannot be loaded, has an unknown format, or lacks the
            train split, a shard of a split or the column.
    """
    decoding = Decoding(encoding_errors)
    if not isinstance(spec, (str, Path)):
        where = "the documents passed in"
        if hasattr(spec, "column_names"):
            return DocumentSource(
                where, _make_dataset_readers(spec, where, text_column, decoding), decoding, seed
            )
        readers = {"": lambda: (decoding.repair_string(text, where) for text in spec)}
        return DocumentSource(where, readers, decoding, seed)
    where = str(spec)
    if where.startswith("hf:"):
        loaded = load_hub_dataset(where, streaming)
        return DocumentSource(
            where, _make_dataset_readers(loaded, where, text_column, decoding), decoding, seed
        )
    path = Path(spec)
    if not path.exists():
        raise UserError(
            f"{path} does not exist; --input takes a file, a folder or hf:NAME[:CONFIG]"
        )
    if path.is_file():
        return DocumentSource(
            where, {"": _make_file_reader([path], text_column, decoding)}, decoding, seed
        )
    if any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        loaded = load_saved_dataset(path)
        return DocumentSource(
            where, _make_dataset_readers(loaded, where, text_column, decoding), decoding, seed
        )
    files = _find_split_files(path)
    readers = {
        split: _make_file_reader(shards, text_column, decoding) for split, shards in files.items()
    }
    line_readers = {}
    is_text = all(require_format(file, FORMATS) == "text" for file in chain(*files.values()))
    if is_text and len(files) == len(SPLITS):
        line_readers = {
            split: lambda shards=shards: (
                line for file in shards for _, line in read_decoded_lines(file, decoding)
            )
            for split, shards in files.items()
        }
    return DocumentSource(where, readers, decoding, seed, line_readers)


def read_documents(
    path: str | Path, text_column: str = "text", decoding: Decoding | None = None
) -> Iterator[str]:
    r"""Yield the documents of one file in the format of its ending.

    In plain text one or more blank lines separate documents, and line ends inside a document are
    kept as "\n". A byte order mark at the start is dropped and CRLF is read as LF. Documents that
    are only white space are skipped.

    Args:
        path: the file, perhaps compressed.
        text_column: JSON key or column of the text; without effect for plain text.
        decoding: treatment of bytes that are not text; None: they are errors.
    Raises:
        UserError: naming file and line or byte offset, for an unknown ending, a missing column, and
            content that is not text.
    """
    path, decoding = Path(path), decoding or Decoding()
    name = require_format(path, FORMATS)
    if name == "text":
        yield from _read_plain_documents(path, decoding)
        return
    if name == "CSV":
        cells = read_csv_column(path, text_column, decoding.decode_line)
    elif name == "TSV":
        cells = read_tsv_column(path, text_column, decoding.decode_line)
    elif name == "Parquet":
        cells = read_parquet_column(path, text_column)
    else:
        cells = _read_json_cells(path, text_column, decoding)
    yield from _read_cell_texts(cells, text_column, decoding)


def _read_plain_documents(path: Path, decoding: Decoding) -> Iterator[str]:
    """Yield the documents of a text file, which blank lines separate.

    Logs a warning if the first line is a JSON object.

    Args:
        path: the file, perhaps compressed.
        decoding: treatment of bytes that are not text.
    """
    lines: list[str] = []
    for number, line in read_decoded_lines(path, decoding):
        if number == 1 and _is_json_object(line):
            logger.warning(
                "%s: line 1 is a JSON object, and the whole line is read as text because of the "
                "ending %s; rename the file to .jsonl to read its fields",
                *(path, path.suffix),
            )
        if line.strip():
            lines.append(line)
        elif lines:
            yield "\n".join(lines)
            lines = []
    if lines:
        yield "\n".join(lines)


def _is_json_object(line: str) -> bool:
    """Return True for a line that is a JSON object: the file is probably JSON lines."""
    try:
        parse_json_object(line, "line 1")
    except UserError:
        return False
    return True


def assign_split(document: str, seed: int) -> str:
    """Assign a document to "train", "valid" or "test" by a hash of seed and content.

    Equal documents are therefore in one split and never leak from train into test.
    """
    digest = hashlib.blake2b(f"{seed}\n{document}".encode(), digest_size=8).digest()
    position = int.from_bytes(digest, "little") / 2**64
    if position < SHARES["train"]:
        return "train"
    return "valid" if position < SHARES["train"] + SHARES["valid"] else "test"


def read_decoded_lines(path: Path, decoding: Decoding) -> Iterator[tuple[int, str]]:
    """Yield the number from 1 and the text of each line, without its end.

    Raises:
        UserError: if the file cannot be read, or `decoding` refuses its content.
    """
    for number, offset, raw in read_numbered_lines(path):
        yield number, decoding.decode_line(raw, path, offset)


def _read_json_cells(path: Path, text_column: str, decoding: Decoding) -> Cells:
    """Yield place and value of one key of every JSON line that is not blank.

    Args:
        path: file of JSON lines.
        text_column: the key.
        decoding: treatment of bytes that are not text.
    Raises:
        UserError: for a line that is no JSON object or lacks the key.
    """
    for number, line in read_decoded_lines(path, decoding):
        if line.strip():
            where = f"{path}:{number}"
            row = parse_json_object(line, where, text_column)
            if text_column not in row:
                keys = ", ".join(map(repr, sorted(row)[:8])) or "none"
                raise UserError(
                    f"{where}: no key {text_column!r} among {keys}; --text_column names another key"
                )
            yield where, row[text_column]


def _require_string(value: object, text_column: str, where: str) -> str:
    """Return `value` if it is a string; raise UserError for any other type.

    Args:
        value: cell of the text column.
        text_column: name of the column, for the message.
        where: file and line, for the message.
    """
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise UserError(f"{where}: {text_column!r} is {kind}, a string is needed")
    return value


def _make_file_reader(
    files: Sequence[Path], text_column: str, decoding: Decoding
) -> Callable[[], Iterator[str]]:
    """Make the reader of a split: a function that iterates over the documents of its files.

    The first document of each file with columns is read at once, to check the column.

    Args:
        files: shards of the split, in order.
        text_column: JSON key or column of the text.
        decoding: treatment of bytes that are not text.
    Raises:
        UserError: if the column is missing or the ending is unknown.
    """
    for file in files:
        if require_format(file, FORMATS) != "text":
            next(read_documents(file, text_column, decoding), None)  # checks the key or column
    return lambda: chain.from_iterable(
        read_documents(file, text_column, decoding) for file in files
    )


def _find_split_files(folder: Path) -> dict[str, list[Path]]:
    """Find the file, or all shards in order, of each split that a folder has.

    Raises:
        UserError: if there is none for train, several for a split, or a shard is missing.
    """
    files: dict[str, list[Path]] = {}
    known = [file for file in sorted(folder.iterdir()) if find_format(file) in FORMATS]
    for split, spellings in SPELLINGS.items():
        name = rf"(?:{'|'.join(spellings)})"
        matches = [file for file in known if re.fullmatch(name, strip_format_endings(file))]
        shards = [
            file
            for file in known
            if re.fullmatch(rf"{name}-\d+-of-\d+", strip_format_endings(file))
        ]
        names = " and ".join(file.name for file in (matches + shards)[:4]) or "none"
        if shards and not matches:
            _, first, last = strip_format_endings(shards[-1]).replace("-of-", "-").rsplit("-", 2)
            if not len(shards) == int(first) + 1 == int(last):
                raise UserError(
                    f"{folder}: {len(shards)} of {int(last)} files of the split {split}: {names}"
                )
        elif len(matches) + len(shards) > 1 or (split == "train" and not matches):
            raise UserError(
                f"{folder}: one file for the split {split} is needed, named "
                f"{' or '.join(spellings)} with an ending such as .txt or .jsonl.gz, or its shards "
                f"{spellings[0]}-00000-of-00002...; there is {names}"
            )
        if matches or shards:
            files[split] = matches or shards
    return files


def _make_dataset_readers(
    loaded: object, where: str, text_column: str, decoding: Decoding
) -> dict[str, Callable[[], Iterator[str]]]:
    """Make a reader per split of a loaded data set: a function that iterates over its documents.

    Args:
        loaded: a table of `datasets`, or a mapping from splits to tables.
        where: the user's name of the data set, for messages.
        text_column: column of the text.
        decoding: treatment of characters that are not text.
    Raises:
        UserError: if the column is missing, or the splits are others than ours.
    """
    tables = find_split_tables(loaded, where, SPELLINGS)
    for table in tables.values():
        if table.column_names is not None:  # unknown for some streams
            require_column(where, text_column, table.column_names)
    return {
        split: lambda table=table: _read_cell_texts(
            read_dataset_column(table, text_column, where), text_column, decoding
        )
        for split, table in tables.items()
    }


def _read_cell_texts(cells: Cells, text_column: str, decoding: Decoding) -> Iterator[str]:
    """Yield the texts of cells, checked to be strings; cells of white space alone are skipped.

    Args:
        cells: pairs of place, for messages, and value.
        text_column: name of the cells' column, for messages.
        decoding: treatment of characters that are not text.
    Raises:
        UserError: for a cell that is no string, or holds characters that `decoding` refuses.
    """
    for where, value in cells:
        text = decoding.repair_string(_require_string(value, text_column, where), where)
        if text.strip():
            yield text
