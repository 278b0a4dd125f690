"""Rows of labelled data sets as dictionaries: JSON lines, Parquet files and tables of the hub."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megamod.data.corpus.file_formats import parse_json_object
from megamod.data.corpus.lines import read_lines
from megamod.data.tasks.specs import TaskSpec
from megamod.errors import UserError


@dataclass(frozen=True)
class RowTable:
    """Rows of one split.

    Attributes:
        where: file or data set.
        unit: "line" or "row": what the numbers of `rows` count.
        rows: number of each row, from 1 for lines and 0 for rows, and its values by column; an
            iterator that can be consumed once.
        names: column -> names of its labels, for columns whose labels are numbers with names.
    """

    where: str
    unit: str
    rows: Iterator[tuple[int, Mapping[str, object]]]
    names: Mapping[str, Sequence[str]]

    def describe_origin(self, number: int) -> str:
        """Describe file and line, or data set and row, of the row `number`, for messages."""
        return f"{self.where}, {self.unit} {number}"


def open_json_table(path: Path) -> RowTable:
    """Open a file of JSON lines as a table; blank lines are skipped.

    The file is read while the rows are consumed, and errors are raised then: UserError for a file
    that cannot be read or a line that is no JSON object.
    """
    rows = (
        (number, parse_json_object(line, f"{path}, line {number}"))
        for number, line in read_lines(path)
        if line.strip()
    )
    return RowTable(str(path), "line", rows, {})


def open_parquet_table(path: Path) -> RowTable:
    """Read a whole Parquet file as a table, with the label names that `datasets` stores in it.

    Raises:
        UserError: if it is no Parquet file.
    """
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        table = read_table(path)
    except (ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a Parquet file that can be read: {reason}") from error
    names = _read_label_names((table.schema.metadata or {}).get(b"huggingface"))
    return RowTable(str(path), "row", enumerate(table.to_pylist()), names)


def _read_label_names(metadata: bytes | None) -> dict[str, list[str]]:
    """Read names of labels by column, as `datasets` stores them in a Parquet file.

    Args:
        metadata: JSON in the entry "huggingface" of the file's schema; None: there is none.
    Returns:
        names by column; {} if there are none.
    """
    try:
        features = json.loads(metadata or b"{}")["info"]["features"]
        columns = {name: feature.get("feature", feature) for name, feature in features.items()}
        return {
            name: list(map(str, column["names"]))
            for name, column in columns.items()
            if "names" in column
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def load_hub_tables(task: TaskSpec, splits: Sequence[str]) -> Iterator[tuple[str, RowTable]]:
    """Yield split and table of a task's data set on the hub, by our names of the splits.

    Splits that the data set lacks are skipped.

    Args:
        task: the task, whose `hub` names the data set.
        splits: our names of the splits to read, see `TaskSpec.hub_splits`.
    Raises:
        UserError: at the first iteration, if the task has none there, or it cannot be loaded.
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
        on_hub = task.hub_splits.get(split, split)
        if on_hub in tables:
            yield split, _wrap_hub_table(tables[on_hub], f"{name} {split}")


def _wrap_hub_table(table: object, where: str) -> RowTable:
    """Wrap a split of a data set on the hub as a table, with the names of its class labels.

    Args:
        table: a `datasets.Dataset`.
        where: name of the data set, for messages.
    """
    names = {}
    for column, feature in table.features.items():
        of_labels = getattr(getattr(feature, "feature", feature), "names", None)
        if of_labels is not None:
            names[column] = of_labels
    return RowTable(where, "row", enumerate(table), names)
