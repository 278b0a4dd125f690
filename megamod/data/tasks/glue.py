"""Labelled sentences and pairs of sentences: TSV in the layouts of GLUE, JSON lines, the hub.

A TSV is read as GLUE writes it: tabs only, no quoting, lines end with a line feed alone (some
sentences hold other control characters). What does not fit ends with file and line.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megamod.data.corpus.lines import checked_text, read_lines
from megamod.data.tasks.specs import Column, TaskSpec, find_files
from megamod.errors import UserError

Rows = Iterator[tuple[str, Sequence[str], str | None]]
"""Place of a row for messages, its texts, and its label; None: hidden."""


@dataclass(frozen=True)
class TextSet:
    """Examples of one split in the order of the file.

    Attributes:
        texts: one list per text of an example: one, or two for pairs.
        labels: [n] int64 numbers of labels, or float32 of a regression; None: hidden.
        places: "FILE, line 7" of each example, for messages.
    """

    texts: tuple[list[str], ...]
    labels: np.ndarray | None
    places: list[str]

    def __len__(self) -> int:
        return len(self.places)

    def first(self, count: int | None) -> "TextSet":
        """The first examples only; None: all."""
        return TextSet(
            tuple(texts[:count] for texts in self.texts),
            None if self.labels is None else self.labels[:count],
            self.places[:count],
        )


def read_task(
    task: TaskSpec, data_dir: str | Path | None, splits: Sequence[str]
) -> tuple[TaskSpec, dict[str, TextSet]]:
    """Examples of the splits that exist, and the task with its labels filled in.

    Args:
        data_dir: folder of the files; None: the hub.
        splits: wanted.
    Raises:
        UserError: for a missing train or only dev file, a row or a label that does not fit.
    """
    if data_dir is None:
        sources = dict(hub_tables(task, splits))
    else:
        sources = {s: path for s, path in find_files(task, data_dir).items() if s in splits}
    for split in splits:
        if split in ("train", "dev", "test") and split not in sources:
            names = " or ".join(task.files[split]) if split in task.files else split
            place = data_dir if data_dir is not None else "the hub"
            raise UserError(f"task {task.name}: {place} has no split {split} ({names})")
    rows = {split: list(_rows_of(task, split, source)) for split, source in sources.items()}
    for split, found in rows.items():
        if not found:
            raise UserError(f"{sources[split]}: no example of task {task.name} in it")
    if not task.labels and not task.regression:
        if "train" not in rows:
            raise UserError(
                f"task {task.name}: without labels in its spec, a train split is needed"
            )
        names = sorted({label for _, _, label in rows["train"] if label is not None})
        if len(names) < 2:
            raise UserError(f"{sources['train']}: its labels are {names}, a task needs two or more")
        task = replace(task, labels=tuple(names))
    return task, {split: _texts(task, found) for split, found in rows.items()}


def _texts(task: TaskSpec, rows: list[tuple[str, Sequence[str], str | None]]) -> TextSet:
    texts = tuple([row[1][n] for row in rows] for n in range(len(task.texts)))
    places = [place for place, _, _ in rows]
    if rows[0][2] is None:
        return TextSet(texts, None, places)
    if task.regression:
        values = [_value(task, label, place) for place, _, label in rows]
        return TextSet(texts, np.array(values, dtype=np.float32), places)
    number = {name: index for index, name in enumerate(task.labels)}
    for place, _, label in rows:
        if label not in number:
            raise UserError(
                f"{place}: label {label!r} is not one of task {task.name}: {', '.join(task.labels)}"
            )
    return TextSet(texts, np.array([number[row[2]] for row in rows], dtype=np.int64), places)


def _value(task: TaskSpec, text: str | None, place: str) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    least, most = task.bounds or (-math.inf, math.inf)
    if not math.isfinite(value) or not least <= value <= most:
        raise UserError(
            f"{place}: label {text!r} is not a number"
            + (f" from {least:g} to {most:g}" if task.bounds else "")
        )
    return value


def _rows_of(task: TaskSpec, split: str, source: object) -> Rows:
    if not isinstance(source, Path):
        rows = _hub_rows(task, split, source)
    elif source.suffix in (".jsonl", ".json"):
        rows = _json_rows(task, split, source)
    else:
        rows = _tsv_rows(task, split, source)
    hidden = None
    for place, texts, label in rows:
        if label in task.skip_labels and label is not None:
            continue
        if hidden is None:
            hidden = label is None
        if hidden != (label is None):
            raise UserError(f"{place}: some rows of the split have a label and some have none")
        if not any(text.strip() for text in texts):
            raise UserError(f"{place}: no text in {', '.join(c.name for c in task.texts)}")
        yield place, texts, label


def _tsv_rows(task: TaskSpec, split: str, path: Path) -> Rows:
    columns = [*task.texts, task.label]
    places: list[int | None] | None = None
    width = 0
    for number, line in _filled_lines(path):
        cells = line.split("\t")
        where = f"{path}, line {number}"
        if places is None:
            width = len(cells)
            header = split not in task.headless
            places = _places(task, columns, cells if header else None, width, split, where)
            if header:
                continue
        needed = max(place for place in places if place is not None) + 1
        if len(cells) != width:
            if task.skip_short and len(cells) < needed:
                continue
            if not (task.skip_short and len(cells) >= needed):
                raise UserError(f"{where}: {len(cells)} columns, {width} are needed")
        texts = [cells[place] for place in places[:-1]]
        yield where, texts, None if places[-1] is None else cells[places[-1]]
    if places is None:
        raise UserError(f"{path}: the file is empty")


def _places(
    task: TaskSpec,
    columns: Sequence[Column],
    header: list[str] | None,
    width: int,
    split: str,
    where: str,
) -> list[int | None]:
    """Where the columns stand; that of the label is None if it is hidden."""
    test = split.startswith("test")
    if header is not None:
        if len(set(header)) < len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise UserError(f"{where}: two columns are named {twice!r}")
        named = [header.index(c.name) if c.name in header else None for c in columns]
        missing = [c for c, place in zip(columns[:-1], named, strict=False) if place is None]
        if named[-1] is None and not missing and columns[-1].place == -1 and not test:
            # RTE says "label" where MNLI says "gold_label"; both have it last.
            named[-1] = width - 1 if width - 1 not in named else None
        if not missing and (named[-1] is not None or test):
            return named
        if any(place is not None for place in named) or any(c.place is None for c in columns):
            wanted = missing or columns[-1:]
            raise UserError(
                f"{where}: no column {wanted[0].name!r} for task {task.name}; "
                f"the header has {', '.join(map(repr, header))}"
            )
    numbers = [c.place % width if -width <= c.place < width else None for c in columns]
    if test and (header is not None or numbers[-1] in (*numbers[:-1], None)):
        numbers[-1] = None
    elif None in numbers:
        raise UserError(
            f"{where}: {width} columns, task {task.name} needs {max(c.place for c in columns) + 1}"
        )
    if None in numbers[:-1] or len(set(numbers)) < len(numbers):
        raise UserError(
            f"{where}: {width} columns are too few for task {task.name}, which has "
            f"{', '.join(c.name for c in columns)}"
        )
    return numbers


def _filled_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a TSV; blank ones at the end are dropped, elsewhere refused."""
    blank = None
    for number, line in read_lines(path):
        if not line:
            blank = blank or number
            continue
        if blank is not None:
            raise UserError(f"{path}, line {blank}: an empty line between rows")
        yield number, line


def _json_rows(task: TaskSpec, split: str, path: Path) -> Rows:
    for number, line in read_lines(path):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: {type(row).__name__} where a JSON object is needed")
        yield where, *_fields(task, split, row, where, {})


def _fields(
    task: TaskSpec, split: str, row: dict, where: str, names: dict[str, str]
) -> tuple[list[str], str | None]:
    texts = []
    for column in task.texts:
        name = names.get(column.name, column.name)
        if name not in row:
            raise UserError(f"{where}: no column {name!r}; there are {', '.join(map(repr, row))}")
        if not isinstance(row[name], str):
            raise UserError(f"{where}: {name!r} is {row[name]!r}, text is needed")
        texts.append(checked_text(row[name], where))
    label = row.get(names.get(task.label.name, task.label.name))
    if label is None and not split.startswith("test"):
        raise UserError(f"{where}: no label {task.label.name!r}")
    if label is not None and (isinstance(label, bool) or not isinstance(label, str | int | float)):
        raise UserError(f"{where}: label {label!r} is not a name or a number")
    return texts, None if label is None else str(label)


def hub_tables(task: TaskSpec, splits: Sequence[str]) -> Iterator[tuple[str, object]]:
    """Tables of a task's data set on the hub by our names of the splits, where they exist.

    Raises:
        UserError: if the task has none there, or it cannot be loaded.
    """
    if task.hub is None:
        raise UserError(f"--data_dir is missing: task {task.name} is not on the hub")
    from datasets import load_dataset

    name, config = task.hub
    try:
        tables = load_dataset(name, config)
    except Exception as error:  # its loaders raise whatever their scripts and the network raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"task {task.name}: data set {name} cannot be loaded from the hub ({reason}); "
            "--data_dir names a folder with its files"
        ) from error
    for split in splits:
        there = task.hub_splits.get(split, split)
        if there in tables:
            yield split, tables[there]


def _hub_rows(task: TaskSpec, split: str, table: object) -> Rows:
    """Rows of a hub data set; its numbers of labels become names, and -1 hidden ones."""
    column = task.hub_columns.get(task.label.name, task.label.name)
    names = getattr(table.features.get(column), "names", None)
    if names is not None and task.labels and set(names) != set(task.labels):
        if len(names) != len(task.labels):
            raise UserError(
                f"task {task.name}: its labels are {', '.join(task.labels)}, the hub has "
                f"{', '.join(names)}"
            )
        names = list(task.labels)  # GLUE's files say 0 and 1 where the hub has words
    for number, row in enumerate(table):
        where = f"{task.hub[0]} {split}, row {number}"
        texts, label = _fields(task, split, row, where, dict(task.hub_columns))
        if names is not None and label is not None:
            place = int(label)
            if place < 0 and not split.startswith("test"):
                continue
            label = names[place] if place >= 0 else None
        yield where, texts, label
