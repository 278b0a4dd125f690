"""Labelled sentences and pairs: TSV in the layouts of GLUE, CSV, JSON lines, Parquet, the hub.

A TSV is read as GLUE writes it: tabs only, no quoting, lines end with a line feed alone (some
sentences hold other control characters). Blanks around a label do not count. What does not fit is
refused with file and line.
"""

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megamod.data.corpus.file_formats import require_format
from megamod.data.corpus.lines import check_text, read_lines
from megamod.data.tasks.specs import (
    Column,
    TaskSpec,
    find_task_files,
    format_some_names,
    make_label_normaliser,
)
from megamod.data.tasks.task_rows import (
    RowTable,
    load_hub_tables,
    open_json_table,
    open_parquet_table,
)
from megamod.errors import UserError, name_origin

FORMATS = ("TSV", "text", "CSV", "JSON lines", "JSON", "Parquet")

Rows = Iterator[tuple[str, Sequence[str], str | None]]
"""Origin of a row for messages, its texts, and its label; None: hidden."""


@dataclass(frozen=True)
class TextSet:
    """Examples of one split in the order of the file.

    Attributes:
        texts: one list per text of an example: one, or two for pairs.
        labels: [n] int64 numbers of labels, or float32 of a regression; None: hidden.
        origins: "FILE, line 7" of each example, for messages.
    """

    texts: tuple[list[str], ...]
    labels: np.ndarray | None
    origins: list[str]

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.origins)

    def take_first(self, count: int | None) -> "TextSet":
        """Return the first `count` examples; None: all."""
        return TextSet(
            tuple(texts[:count] for texts in self.texts),
            None if self.labels is None else self.labels[:count],
            self.origins[:count],
        )


def read_text_task(
    task: TaskSpec, data_dir: str | Path | None, splits: Sequence[str]
) -> tuple[TaskSpec, dict[str, TextSet]]:
    """Read the splits of a task that has labels of sentences or pairs.

    Args:
        task: the task; without labels in it, they are those of the train split, sorted.
        data_dir: folder of the files; None: the hub.
        splits: names of the splits to read. "train", "dev" and "test" must exist if they are named;
            others are skipped if they are absent.
    Returns:
        the task with its labels filled in, and the examples by split.
    Raises:
        UserError: for a missing or empty split, a row or label that does not fit, and labels that
            cannot be taken from a train split.
    """
    if data_dir is None:
        sources = dict(load_hub_tables(task, splits))
    else:
        sources = {s: path for s, path in find_task_files(task, data_dir).items() if s in splits}
    for split in splits:
        if split in ("train", "dev", "test") and split not in sources:
            names = " or ".join(task.files[split]) if split in task.files else split
            source = data_dir if data_dir is not None else "the hub"
            raise UserError(f"task {task.name}: {source} has no split {split} ({names})")
    with name_origin(f"task {task.name} in {data_dir or 'the hub'}"):
        rows = {split: list(_read_rows(task, split, source)) for split, source in sources.items()}
    for split, examples in rows.items():
        if not examples:
            where = getattr(sources[split], "where", sources[split])
            raise UserError(f"{where}: no example of task {task.name} in it")
    if not task.labels and not task.is_regression:
        if "train" not in rows:
            raise UserError(
                f"task {task.name}: without labels in its spec, a train split is needed"
            )
        names = sorted({label for _, _, label in rows["train"] if label is not None})
        if len(names) < 2:
            raise UserError(
                f"task {task.name}, split train: all its labels are "
                f"{format_some_names(map(repr, names))}, a task needs two or more"
            )
        task = replace(task, labels=tuple(names))
    return task, {split: _build_text_set(task, examples) for split, examples in rows.items()}


def _build_text_set(task: TaskSpec, rows: list[tuple[str, Sequence[str], str | None]]) -> TextSet:
    """Build the set of a split's examples.

    Args:
        rows: origin, texts and label (None: hidden) of each example.
    Raises:
        UserError: for a label that the task lacks, or a value outside its bounds.
    """
    texts = tuple([row[1][n] for row in rows] for n in range(len(task.texts)))
    origins = [origin for origin, _, _ in rows]
    if rows[0][2] is None:
        return TextSet(texts, None, origins)
    if task.is_regression:
        values = [_parse_regression_value(task, label, origin) for origin, _, label in rows]
        return TextSet(texts, np.array(values, dtype=np.float32), origins)
    number, normalise_label = (
        {name: index for index, name in enumerate(task.labels)},
        make_label_normaliser(task.labels),
    )
    for origin, _, label in rows:
        if normalise_label(label) is None:
            raise UserError(
                f"{origin}: label {label[:60]!r} is not one of task {task.name}: "
                f"{format_some_names(task.labels)}"
            )
    numbers = [number[normalise_label(label)] for _, _, label in rows]
    return TextSet(texts, np.array(numbers, dtype=np.int64), origins)


def _parse_regression_value(task: TaskSpec, text: str | None, origin: str) -> float:
    """Parse the value that a regression is to predict.

    Args:
        text: the cell of the label; None: it is missing.
        origin: file and line, for the message.
    Raises:
        UserError: if it is missing, no finite number, or outside the task's bounds.
    """
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    least, most = task.bounds or (-math.inf, math.inf)
    if not math.isfinite(value) or not least <= value <= most:
        raise UserError(
            f"{origin}: label {(text or '')[:60]!r} is not a number"
            + (f" from {least:g} to {most:g}" if task.bounds else "")
        )
    return value


def _read_rows(task: TaskSpec, split: str, source: Path | RowTable) -> Rows:
    """Yield origin, texts and label of each row of a split, by the format of its source.

    Rows with a label in `task.skip_labels` are skipped. The labels of a split that begins with
    "test" may be hidden, and are None then.

    Args:
        split: name of the split.
        source: file of the split, or its table on the hub.
    Raises:
        UserError: for a row without text, and for one without label, unless all of the split's
            labels are hidden.
    """
    kind = require_format(source, FORMATS) if isinstance(source, Path) else "hub"
    if kind in ("TSV", "text"):
        rows = _read_table_rows(task, split, source, _read_tsv_cells(source))
    elif kind == "CSV":
        rows = _read_table_rows(task, split, source, _read_csv_cells(source))
    elif kind == "Parquet":
        rows = _read_dict_rows(task, split, open_parquet_table(source))
    elif kind == "hub":
        rows = _read_dict_rows(task, split, source, task.hub_columns)
    else:
        rows = _read_dict_rows(task, split, open_json_table(source))
    hidden = None
    for origin, texts, label in rows:
        label = None if label is None else label.strip()
        if label in task.skip_labels and label is not None:
            continue
        if not label and split.startswith("test"):
            label = None
        if hidden is None:
            hidden = label is None
        if hidden != (label is None):
            raise UserError(f"{origin}: some rows of the split have a label and some have none")
        if label == "" and not task.is_regression:
            raise UserError(f"{origin}: no label in {task.label.name}")
        if not any(text.strip() for text in texts):
            raise UserError(f"{origin}: no text in {', '.join(c.name for c in task.texts)}")
        yield origin, texts, label


def _read_table_rows(
    task: TaskSpec, split: str, path: Path, lines: Iterator[tuple[int, list[str]]]
) -> Rows:
    """Yield origin, texts and label (None: hidden) of the rows of a TSV or CSV file.

    With `task.skip_short` a line with too few cells is skipped, and one of another length is used
    if it has the needed cells.

    Args:
        split: name of the split.
        path: the file, for messages.
        lines: number and cells of each line; the first is the header, if the split has one.
    Raises:
        UserError: for an empty file, a column that is missing, or a line with another number of
            cells.
    """
    columns = [*task.texts, task.label]
    indices: list[int | None] | None = None
    width = 0
    for number, cells in lines:
        where = f"{path}, line {number}"
        if indices is None:
            width = len(cells)
            header = split not in task.headless
            indices = _find_column_indices(
                task, columns, cells if header else None, width, split, where
            )
            if header:
                continue
        needed = max(index for index in indices if index is not None) + 1
        if len(cells) != width:
            if task.skip_short and len(cells) < needed:
                continue
            if not (task.skip_short and len(cells) >= needed):
                raise UserError(f"{where}: {len(cells)} columns, {width} are needed")
        texts = [cells[index] for index in indices[:-1]]
        yield where, texts, None if indices[-1] is None else cells[indices[-1]]
    if indices is None:
        raise UserError(f"{path}: the file is empty")


def _find_column_indices(
    task: TaskSpec,
    columns: Sequence[Column],
    header: list[str] | None,
    width: int,
    split: str,
    where: str,
) -> list[int | None]:
    """Find the index of each column in the lines of a file.

    The names in the header decide. If it has none of them, or there is no header, the indices of
    the columns do.

    Args:
        columns: columns of the texts, then that of the label.
        header: cells of the first line; None: the split has no header.
        width: number of cells of the first line.
        split: the labels of a split that begins with "test" may be hidden.
        where: file and line, for messages.
    Returns:
        index of each column; that of the label is None if the labels of such a split are hidden.
    Raises:
        UserError: for columns that are missing or have the same name.
    """
    test = split.startswith("test")
    if header is not None:
        if len(set(header)) < len(header):
            doubled_name = next(name for name in header if header.count(name) > 1)
            raise UserError(f"{where}: two columns are named {doubled_name[:60]!r}")
        indices_by_name = [header.index(c.name) if c.name in header else None for c in columns]
        missing = [
            c for c, index in zip(columns[:-1], indices_by_name, strict=False) if index is None
        ]
        if indices_by_name[-1] is None and not missing and columns[-1].index == -1 and not test:
            # RTE says "label" where MNLI says "gold_label"; both have it last.
            indices_by_name[-1] = width - 1 if width - 1 not in indices_by_name else None
        if not missing and (indices_by_name[-1] is not None or test):
            return indices_by_name
        if any(index is not None for index in indices_by_name) or any(
            c.index is None for c in columns
        ):
            missing_columns = missing or columns[-1:]
            raise UserError(
                f"{where}: no column {missing_columns[0].name!r} for task {task.name}; "
                f"the header has {format_some_names(map(repr, header))}"
            )
    numbers = [c.index % width if -width <= c.index < width else None for c in columns]
    if test and (header is not None or numbers[-1] in (*numbers[:-1], None)):
        numbers[-1] = None
    elif None in numbers:
        raise UserError(
            f"{where}: {width} columns, task {task.name} needs {max(c.index for c in columns) + 1}"
        )
    if None in numbers[:-1] or len(set(numbers)) < len(numbers):
        raise UserError(
            f"{where}: {width} columns are too few for task {task.name}, which has "
            f"{', '.join(c.name for c in columns)}"
        )
    return numbers


def _read_tsv_cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield number and cells of each line; empty lines at the end of the file are dropped.

    Raise UserError for any other empty line.
    """
    blank = None
    for number, line in read_lines(path):
        if not line:
            blank = blank or number
            continue
        if blank is not None:
            raise UserError(f"{path}, line {blank}: an empty line between rows")
        yield number, line.split("\t")


def _read_csv_cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of its last line and the cells of each CSV row; empty rows are skipped.

    Raise UserError if the file is not CSV.
    """
    reader = csv.reader((f"{line}\n" for _, line in read_lines(path)), strict=True)
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, cells
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV: {error}") from error


def _read_dict_rows(
    task: TaskSpec, split: str, table: RowTable, columns: Mapping[str, str] | None = None
) -> Rows:
    """Yield origin, texts and label of the rows of a table.

    Numbers of named labels become names. The number -1 is a hidden label: such a row is skipped
    unless the split begins with "test".

    Args:
        split: name of the split; the labels of one that begins with "test" may be hidden.
        table: rows as dictionaries.
        columns: our name of a column -> the table's, where they differ.
    Raises:
        UserError: if the table has other labels than the task, or a row lacks a column or has a
            value that does not fit.
    """
    columns = columns or {}
    names = table.names.get(columns.get(task.label.name, task.label.name))
    if names is not None and task.labels and set(names) != set(task.labels):
        if len(names) != len(task.labels):
            raise UserError(
                f"{table.where}: its labels are {format_some_names(names)}, those of task "
                f"{task.name} are "
                f"{format_some_names(task.labels)}"
            )
        names = task.labels  # GLUE's files say 0 and 1 where the hub has words
    for number, row in table.rows:
        where = table.describe_origin(number)
        texts, label = _read_row_fields(task, split, row, where, columns)
        if names is not None and label is not None and label not in names:
            label = _find_label_name(label, names, where)
            if label is None and not split.startswith("test"):
                continue
        yield where, texts, label


def _find_label_name(number: str, names: Sequence[str], where: str) -> str | None:
    """Find the name of a label by its number; None for -1, a hidden label.

    Args:
        number: the number as text.
        names: names of the labels by number.
        where: file or data set and row, for the message.
    Raises:
        UserError: for text that is no number, or a number without a name.
    """
    index = int(number) if number.removeprefix("-").isdecimal() else len(names)
    if not -1 <= index < len(names):
        raise UserError(f"{where}: label {number[:60]!r} is not one of 0 to {len(names) - 1}")
    return None if index < 0 else names[index]


def _read_row_fields(
    task: TaskSpec, split: str, row: Mapping[str, object], where: str, names: Mapping[str, str]
) -> tuple[list[str], str | None]:
    """Read texts and label of a row.

    Args:
        split: name of the split.
        row: values by column.
        where: file or data set and row, for messages.
        names: our name of a column -> the table's, where they differ.
    Returns:
        texts, and the label, None if it is hidden in a split that begins with "test".
    Raises:
        UserError: for a text or label that is missing or malformed.
    """
    texts = []
    for column in task.texts:
        name = names.get(column.name, column.name)
        if name not in row:
            raise UserError(
                f"{where}: no column {name!r}; there are {format_some_names(map(repr, row))}"
            )
        if not isinstance(row[name], str):
            raise UserError(f"{where}: {name!r} is {repr(row[name])[:60]}, text is needed")
        texts.append(check_text(row[name], where))
    label = row.get(names.get(task.label.name, task.label.name))
    if label is None and not split.startswith("test"):
        raise UserError(f"{where}: no label {task.label.name!r}")
    if label is not None and (isinstance(label, bool) or not isinstance(label, str | int | float)):
        raise UserError(f"{where}: label {repr(label)[:60]} is not a name or a number")
    return texts, None if label is None else str(label)
