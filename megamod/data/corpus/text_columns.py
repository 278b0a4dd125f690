"""One column of a table, row by row: CSV, TSV and Parquet files, data sets of `datasets`.

All readers yield pairs (place, value), where place is the file and line or row for messages, and
refuse a missing column.
"""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megamod.data.corpus.file_formats import BOM, read_numbered_lines, read_raw_lines
from megamod.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

Cells = Iterator[tuple[str, object]]
"""Pairs (place, value)."""

Decode = Callable[[bytes, Path, int], str]
"""From the bytes of a line, its path and byte offset to its text."""
LONGEST_CELL = 1 << 30  # characters; the default of the csv module is 2**17


def read_csv_column(path: Path, column: str, decode_line: Decode) -> Cells:
    """Yield the cells of a column of a CSV file with a header, commas and double quotes.

    Empty rows are skipped. Raises the limit of the csv module on the length of a cell, for the
    whole process, to `LONGEST_CELL`.

    Args:
        path: the file.
        column: name of the column in the header.
        decode_line: decodes the bytes of a line, see `Decoding.decode_line`.
    Raises:
        UserError: naming file and line, if the column is missing or occurs twice, if a row has
            another number of cells than the header, or if it is not CSV.
    """

    def decode_lines() -> Iterator[str]:
        """Yield the decoded lines of the file with their ends, without a byte order mark."""
        offset = 0
        for raw in read_raw_lines(path):
            begin = len(BOM) if offset == 0 and raw.startswith(BOM) else 0
            yield decode_line(raw[begin:], path, offset + begin)
            offset += len(raw)

    csv.field_size_limit(LONGEST_CELL)
    rows = csv.reader(decode_lines(), strict=True)
    try:
        yield from _select_column_cells(path, column, ((rows.line_num, row) for row in rows if row))
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: not CSV: {error}") from error


def read_tsv_column(path: Path, column: str, decode_line: Decode) -> Cells:
    """Yield the cells of a column of a TSV file with a header; quotes are ordinary characters.

    Empty lines are skipped.

    Args:
        path, column, decode_line: see `read_csv_column`.
    Raises:
        UserError: naming file and line, if the column is missing or occurs twice, or if a row has
            another number of cells than the header.
    """
    lines = (
        (number, decode_line(raw, path, offset))
        for number, offset, raw in read_numbered_lines(path)
        if raw
    )
    return _select_column_cells(
        path, column, ((number, line.split("\t")) for number, line in lines)
    )


def read_parquet_column(path: Path, column: str) -> Cells:
    """Yield the cells of a column of a Parquet file.

    Raises:
        UserError: if the file is damaged or has no such column.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            require_column(str(path), column, file.schema_arrow.names)
            batches = file.iter_batches(batch_size=1024, columns=[column])
            values = (value for batch in batches for value in batch.column(0).to_pylist())
            for row, value in enumerate(values):
                yield f"{path}, row {row}", value
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{path}: cannot be read as Parquet: {reason}") from error


def load_saved_dataset(path: Path) -> "Dataset | DatasetDict":
    """Load a folder that `save_to_disk` of `datasets` wrote.

    Raises:
        UserError: if the folder is of another kind.
    """
    from datasets import load_from_disk

    try:
        return load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a data set written by save_to_disk: {error}") from error


def load_hub_dataset(
    where: str, streaming: bool
) -> "DatasetDict | IterableDatasetDict | Dataset | IterableDataset":
    """Load the data set `hf:NAME[:CONFIG]` from the hub of Hugging Face.

    Args:
        where: the user's name of it, with "hf:".
        streaming: read it without storing it.
    Raises:
        UserError: if it cannot be loaded.
    """
    from datasets import load_dataset

    name, _, config = where.removeprefix("hf:").partition(":")
    try:
        return load_dataset(name, config or None, streaming=streaming)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: the data set cannot be loaded: {error}") from error


def find_split_tables(
    loaded: object, where: str, splits: Mapping[str, Sequence[str]]
) -> dict[str, "Dataset | IterableDataset"]:
    """Find the tables of a loaded data set by split; the key of an only table is "", not its name.

    Args:
        loaded: a mapping from split names to tables, or one table.
        where: the user's name of the data set, for messages.
        splits: possible names of each split; the keys of the result are its keys.
    Raises:
        UserError: if none of several tables is train, a table is no split, or two are one split.
    """
    tables = dict(loaded) if isinstance(loaded, Mapping) else {"": loaded}
    if len(tables) == 1:
        return {"": next(iter(tables.values()))}
    names = {split: [n for n in spellings if n in tables] for split, spellings in splits.items()}
    matched = {split: tables[matches[0]] for split, matches in names.items() if matches}
    if len(matched) != len(tables) or "train" not in matched:
        raise UserError(
            f"{where}: has the splits {sorted(tables)}; allowed are train and at most one each of "
            "valid and test, or a single split, which is divided"
        )
    return matched


def read_dataset_column(table: "Dataset | IterableDataset", column: str, where: str) -> Cells:
    """Yield the cells of a column of a table of `datasets`, streamed or not.

    Args:
        where: the user's name of the data set, for messages.
    Raises:
        UserError: if it has no such column or its rows cannot be read.
    """
    if table.column_names is not None:
        table = table.select_columns([column])
    try:
        for row, record in enumerate(table):
            require_column(where, column, record)
            yield f"{where}, row {row}", record[column]
    except (OSError, RuntimeError) as error:
        raise UserError(f"{where}: the data set cannot be read: {error}") from error


def require_column(where: str, column: str, columns: Sequence[str]) -> None:
    """Refuse a column name that a table does not have.

    Args:
        where: file or data set, for the message.
        columns: names of the columns that the table has.
    Raises:
        UserError: naming `where` and the first columns.
    """
    if column not in columns:
        names = ", ".join(map(repr, list(columns)[:8])) or "none"
        raise UserError(f"{where}: no column {column!r} among {names}; --text_column names another")


def _select_column_cells(path: Path, column: str, rows: Iterator[tuple[int, list[str]]]) -> Cells:
    """Yield place and cell of one column from rows of cells.

    Args:
        path: the file, for messages and places.
        column: name of the column in the header.
        rows: line number and cells of each row; the first row is the header.
    Raises:
        UserError: if the column is missing or occurs twice, or for a row of another length.
    """
    number, header = next(rows, (1, []))
    require_column(f"{path}, line {number}", column, header)
    if header.count(column) > 1:
        raise UserError(f"{path}, line {number}: two columns are named {column!r}")
    index = header.index(column)
    for number, row in rows:
        if len(row) != len(header):
            raise UserError(
                f"{path}, line {number}: {len(row)} columns, the header has {len(header)}"
            )
        yield f"{path}, line {number}", row[index]
