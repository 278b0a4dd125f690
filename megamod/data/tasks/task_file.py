"""Task specifications in YAML files."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from megamod.data.tasks.specs import METRICS, Column, Kind, TaskSpec
from megamod.errors import shorten
from megamod.names import Name
from megamod.schemas import Items, Schema, read_checked_file

USUAL_METRICS = {  # by kind, of tasks whose file names none
    "sequence": ("accuracy",),
    "pair": ("accuracy",),
    "regression": ("pearson", "spearmanr"),
    "token": ("f1",),
}


def _check_column(value: object) -> str | int:
    """Return `value` if it names or numbers a column; raise ValueError for any other value.

    For pydantic, as the type of the keys text and label.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= -1:
        return value
    if isinstance(value, str) and value:
        return value
    raise ValueError(f"{shorten(value)} is not a name or a number from 0 (-1: the last)")


def _check_split(split: str) -> str:
    """Return `split` if a split may have this name; raise ValueError, for pydantic, if not."""
    if not re.fullmatch(r"(train|dev\w*|test\w*)", split):
        raise ValueError(f"split {shorten(split)} is not train, dev... or test...")
    return split


_Column = Annotated[Any, AfterValidator(_check_column)]
_Label = Annotated[str, BeforeValidator(lambda label: str(label).strip())]


class _TaskFile(Schema):
    """Schema of a task's YAML file, see `read_task_spec`."""

    name: Name
    kind: Kind
    text: Annotated[
        tuple[_Column, ...],
        BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else (value,)),
    ]
    label: _Column
    labels: Items[_Label] = ()
    metrics: Items[Literal[METRICS]] = Field((), min_length=1)
    files: dict[Annotated[str, AfterValidator(_check_split)], str] = Field({})
    header: bool = True
    bounds: Annotated[Items[float], Field(min_length=2, max_length=2)] | None = None
    hub: str | None = None

    @model_validator(mode="after")
    def _check_keys_fit(self) -> "_TaskFile":
        """Check that the keys fit each other; a validator that pydantic calls.

        Raises:
            ValueError: for columns or labels that do not fit the kind, or not exactly one of files
                and hub.
        """
        allowed = {"sequence": (1,), "pair": (2,), "regression": (1, 2), "token": (1,)}[self.kind]
        if len(self.text) not in allowed:
            raise ValueError(
                f"text: {len(self.text)} columns, a {self.kind} task has {allowed[-1]}"
            )
        labels = list(self.labels)
        if len(set(labels)) < len(labels) or "" in labels:
            raise ValueError(f"labels: {shorten(labels)} is not a list of different names")
        if self.kind == "regression" and labels:
            raise ValueError("labels: a regression has none")
        if len(labels) == 1:
            raise ValueError(f"labels: {labels} leaves nothing to decide; give two or more")
        if (self.hub is None) == (not self.files):
            raise ValueError("give either files or hub (NAME or NAME:CONFIG)")
        for column in (*self.text, self.label):
            if not self.header and isinstance(column, str):
                raise ValueError(f"{shorten(column)} is not a number: no header has this column")
        return self


def read_task_spec(path: str | Path) -> TaskSpec:
    """Read the task that a YAML file describes.

        name: reviews
        kind: sequence            # or pair, regression, token
        text: sentence            # column by name or number; a list of two for pairs
        label: label
        labels: [bad, good]       # optional; else those of the train file, sorted
        metrics: [accuracy, f1]   # optional; else accuracy, for a regression pearson and
                                  # spearmanr, for a token task f1
        files: {train: train.tsv, dev: dev.jsonl, test: test.tsv}
        header: true              # false: text and label are numbers
        bounds: [0, 5]            # of a regression, optional
        hub: NAME or NAME:CONFIG  # instead of files

    Names of files are not resolved here: the commands look for them in --data_dir, or in the folder
    of the YAML file without this flag.

    Raises:
        UserError: naming file, line or key, and what is allowed.
    """
    file = read_checked_file(path, _TaskFile, f"--task_spec {path}")
    hub_name, _, config = (file.hub or "").partition(":")
    return TaskSpec(
        name=file.name,
        kind=file.kind,
        texts=tuple(map(_make_column, file.text)),
        label=_make_column(file.label),
        labels=file.labels,
        metrics=file.metrics or USUAL_METRICS[file.kind],
        files={split: (name,) for split, name in file.files.items()}
        or {"train": (), "dev": (), "test": ()},
        headless=() if file.header else tuple(file.files),
        bounds=file.bounds,
        hub=(hub_name, config or None) if file.hub else None,
    )


def _make_column(value: str | int) -> Column:
    """Make a column from its name in a header or from its number."""
    return Column(value) if isinstance(value, str) else Column(f"column {value}", value)
