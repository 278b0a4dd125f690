"""A study as a file: arms x rungs x seeds, and the table that is made of their figures.

    title: Experts against a dense model
    kind: language_models
    text: {domains: [law, code], tokenizer: "sentencepiece:1000"}
    common: {hidden_size: 64, per_device_train_batch_size: 32}
    rungs: {short: {max_steps: 100}, long: {max_steps: 400}}
    arms:
      dense: {learning_rate: {short: 8.0e-3, long: 4.0e-3}}
      demix: {untie: feedforward, learning_rate: 8.0e-3}
    seeds: [1, 2, 3]
    table:
      value: perplexity
      baseline: [dense, own]
      lines: {dense: [dense, own], "DEMix, mixed": [demix, mixed]}

Settings are flags of the launcher; those of an arm win over those of a rung, and both over common
ones. A setting may have a value for each rung.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from megamod.errors import UserError, shorten
from megamod.names import Name
from megamod.schemas import Schema, parse_setting, read_checked_file

Settings = dict[str, object]


def _check_setting(value: object) -> object:
    """Return the value of a setting, or the dictionary of its values by rung, unchanged.

    Raises:
        ValueError: for a value that no flag has, or keys that are no text.
    """
    by_rung = isinstance(value, dict)
    for entry in value.values() if by_rung else [value]:
        parse_setting(entry)
    if by_rung and not all(isinstance(rung, str) for rung in value):
        raise ValueError(f"{shorten(value)} has keys that are not names of rungs")
    return value


Setting = Annotated[Any, AfterValidator(_check_setting)]
"""Value of a flag: a scalar or a list of them, or such values by rung."""


class TextSpec(Schema):
    """Text of a study; folders of the names of its domains lie below INPUTS/domains.

    Attributes:
        domains: trained on and scored.
        novel: scored alone.
        tokenizer: as `megamod preprocess --tokenizer`, or `package:NAME/FOLDER`.
        held_out_bytes: bytes of valid and of test text to keep per domain; None: all.
        items: as `megamod preprocess --items`; `bos`: as its --bos.
    """

    domains: list[Name] = Field(min_length=1)
    novel: list[Name] = Field([])
    tokenizer: str
    held_out_bytes: int | None = Field(None, ge=1)
    items: Literal["document", "line"] | None = None
    bos: bool = False


class Table(Schema):
    """Lines of a table: for each its arm and the row of that arm's scores.

    With columns "rungs" a column is a rung and shows `value` of the line's row; with columns "rows"
    a column is a row of scores, and the last one is their mean.

    Attributes:
        value: name of the value of scores that is shown, such as "perplexity".
        rows: rows of scores, for columns "rows".
        lines: by title the arm, and with columns "rungs" its row of scores.
        baseline: arm and row, as of a line, that the lines are compared with.
        digits: decimals of means.
        plot: titles of the lines that the plot has.
    """

    value: str
    columns: Literal["rungs", "rows"] = "rungs"
    rows: list[str] = Field([])
    lines: dict[str, list[str]]
    baseline: list[str]
    compare: Literal["ratio", "difference"] = "ratio"
    digits: int = Field(2, ge=0, le=6)
    plot: list[str] = Field([])

    @model_validator(mode="after")
    def _check_lines(self) -> "Table":
        """Return the table; a validator that pydantic calls.

        Raises:
            ValueError: if a line or the baseline is not as `columns` needs it.
        """
        size = 2 if self.columns == "rungs" else 1
        for name, line in {**self.lines, "baseline": self.baseline}.items():
            if len(line) != size:
                words = "an arm and a row of its scores" if size == 2 else "an arm"
                raise ValueError(f"{name}: {shorten(line)} is not {words}")
        if self.columns == "rows" and not self.rows:
            raise ValueError("columns: rows needs the list `rows`")
        return self


class StudyFile(Schema):
    """The content of a study's file.

    Attributes:
        kind: kind of its cells: `language_models`, `finetuning` or `barrier_cell` runs them.
        text: text of the study; the kind finetuning needs it only to pretrain.
        common, rungs, arms: settings; those of a rung and of an arm by its name.
    """

    title: str
    kind: Literal["language_models", "finetuning", "barriers"]
    text: TextSpec | None = None
    common: dict[str, Setting] = Field({})
    rungs: dict[Name, dict[str, Setting]] = Field({"all": {}})
    arms: dict[Name, dict[str, Setting]] = Field(min_length=1)
    seeds: list[int] = Field([1], min_length=1)
    table: Table

    @model_validator(mode="after")
    def _check_fit(self) -> "StudyFile":
        """Return the study; a validator that pydantic calls.

        Raises:
            ValueError: if text, seeds or arms do not fit each other.
        """
        if self.text is None and self.kind != "finetuning":
            raise ValueError(f"kind: {self.kind} needs `text`")
        if len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError("seeds: different whole numbers from 0 are needed")
        for line in (*self.table.lines.values(), self.table.baseline):
            if line[0] not in self.arms:
                raise ValueError(f"table: {line[0]!r} is no arm")
        return self


@dataclass(frozen=True)
class Cell:
    """One run of a study: an arm at a rung with a seed.

    Attributes:
        settings: those of common, rung and arm together, with values for this rung.
    """

    arm: str
    rung: str
    seed: int
    settings: Settings

    @property
    def name(self) -> str:
        """Name of the cell, as in --cells and in the name of its file: ARM.RUNG.sSEED."""
        return f"{self.arm}.{self.rung}.s{self.seed}"


@dataclass(frozen=True)
class Study:
    """A checked study: its name is that of its file without the ending."""

    name: str
    file: StudyFile
    cells: tuple[Cell, ...]

    def find_cell(self, name: str) -> Cell:
        """Return the cell of that name, see `Cell.name`.

        Raises:
            UserError: if there is none, with the nearest one.
        """
        cells = {cell.name: cell for cell in self.cells}
        if name not in cells:
            near = difflib.get_close_matches(name, cells, n=1, cutoff=0)[0]
            raise UserError(f"--cells: the study {self.name} has no {name!r}; the nearest: {near}")
        return cells[name]


def read_study(path: Path) -> Study:
    """Read and check a study's file.

    Raises:
        UserError: naming the file, the key and what is wrong.
    """
    file = read_checked_file(path, StudyFile)
    cells = [
        Cell(arm, rung, seed, _merge_settings(file, arm, rung, path))
        for rung in file.rungs
        for seed in file.seeds
        for arm in file.arms
    ]
    return Study(path.stem, file, tuple(cells))


def _merge_settings(file: StudyFile, arm: str, rung: str, path: Path) -> Settings:
    """Merge the settings of an arm at a rung: common ones, the rung's, the arm's; later ones win.

    A setting of None is removed.

    Args:
        file: content of the study's file.
        path: the file, for messages.
    Raises:
        UserError: for a setting by rung that lacks one of the rungs or has others.
    """
    merged: Settings = {}
    for level in (file.common, file.rungs[rung], file.arms[arm]):
        for key, value in level.items():
            merged[key] = _select_rung_value(value, rung, file.rungs, f"{path}, {key}")
    return {key: value for key, value in merged.items() if value is not None}


def _select_rung_value(value: object, rung: str, rungs: Mapping[str, object], where: str) -> object:
    """Return the value for a rung if it is a mapping by rungs, otherwise the value itself.

    Args:
        value: value of a setting, or a mapping of values by rung.
        rung: name of the rung.
        rungs: all rungs, by name.
        where: file and key of the value, for messages.
    Raises:
        UserError: if the mapping lacks this rung, or has a key that is no rung.
    """
    if not isinstance(value, dict):
        return value
    if rung not in value or not set(value) <= set(rungs):
        raise UserError(
            f"{where}: a setting by rung has the keys {', '.join(map(str, value))}; the rungs: "
            f"{', '.join(rungs)}"
        )
    return value[rung]
