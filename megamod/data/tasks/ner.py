"""Labels per word from CoNLL files: columns, the IOB schemes, and sentences.

One word per line, columns apart by tabs or blanks, a blank line behind each sentence; lines with
-DOCSTART- and comments of CoNLL-U are left out. Entities come out as IOB2 whatever the file has.

Source: Tjong Kim Sang and De Meulder 2003 (CoNLL-2003), section 2.3; Ramshaw and Marcus 1995 (IOB).
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megamod.data.corpus.lines import checked_text, read_lines
from megamod.data.tasks.glue import hub_tables
from megamod.data.tasks.specs import TaskSpec, find_files
from megamod.errors import UserError

logger = logging.getLogger(__name__)

ENTITY = re.compile(r"[BI]-.+")
COMMENT = re.compile(r"# (\S.* = |new(doc|par)\b)")


@dataclass
class TokenSet:
    """Sentences of one split in the order of the file.

    Attributes:
        words, labels: by sentence; labels None: hidden.
        lines: number of the first line of each sentence (row, on the hub).
        where: the file.
    """

    words: list[list[str]]
    labels: list[list[str]] | None
    lines: list[int]
    where: str

    def __len__(self) -> int:
        return len(self.words)

    def first(self, count: int | None) -> "TokenSet":
        """The first sentences only; None: all."""
        labels = None if self.labels is None else self.labels[:count]
        return TokenSet(self.words[:count], labels, self.lines[:count], self.where)


def read_token_task(
    task: TaskSpec,
    data_dir: str | Path | None,
    splits: Sequence[str],
    *,
    repair: bool = False,
    labels: Sequence[str] = (),
) -> tuple[TaskSpec, dict[str, TokenSet]]:
    """Sentences of the splits, and the task with its labels filled in.

    Args:
        data_dir: folder of the files; None: the hub.
        splits: wanted; "train" and "dev" must exist.
        repair: turn an I- without a B- in front into a B-, and not refuse it.
        labels: of a trained model, which decide; empty: those of the spec or of the train file.
    Raises:
        UserError: naming file and line of what does not fit.
    """
    if data_dir is None:
        sources = dict(hub_tables(task, splits))
    else:
        sources = {s: path for s, path in find_files(task, data_dir).items() if s in splits}
    for split in splits:
        if split in ("train", "dev", "test") and split not in sources:
            place = data_dir if data_dir is not None else "the hub"
            raise UserError(f"task {task.name}: {place} has no split {split}")
    sets = {}
    for split, source in sources.items():
        found = (
            read_conll(source, task.texts[0].place or 0, _label_place(task), split)
            if isinstance(source, Path)
            else _from_hub(task, split, source)
        )
        if not len(found):
            raise UserError(f"{found.where}: no sentence in it")
        if found.labels is not None and entities_in(found):
            normalise(found, repair)
        sets[split] = found
    labels = tuple(labels) or task.labels or label_set(sets)
    for found in sets.values():
        _check_labels(found, labels)
    entities = any(ENTITY.fullmatch(label) for label in labels)
    if not entities and set(task.metrics) & {"f1", "precision", "recall"}:
        task = replace(task, metrics=("accuracy",))
    return replace(task, labels=labels), sets


def read_conll(path: Path, word_column: int, label_column: int, split: str = "train") -> TokenSet:
    """Sentences of a CoNLL file.

    Args:
        word_column, label_column: from 0, or from -1 backwards.
        split: a file of a split that begins with "test" may have one column, its labels hidden.
    Raises:
        UserError: naming the line with another number of columns than the first.
    """
    words, labels, lines = [[]], [[]], []
    width, tabs = 0, False
    for number, line in read_lines(path):
        if not line.strip() or line.startswith("-DOCSTART-"):
            if words[-1]:
                words.append([])
                labels.append([])
            continue
        if COMMENT.match(line) and not words[-1]:
            continue
        cells = line.split("\t") if tabs or (not width and "\t" in line) else line.split()
        where = f"{path}, line {number}"
        if not width:
            width, tabs = len(cells), "\t" in line
            hidden = split.startswith("test") and width == 1
            for column in (word_column, *(() if hidden else (label_column,))):
                if not -width <= column < width:
                    raise UserError(f"{where}: {width} columns, there is no column {column}")
            if not hidden and word_column % width == label_column % width:
                raise UserError(
                    f"{where}: {width} columns, so word and label would be the same one"
                )
        if len(cells) != width:
            raise UserError(f"{where}: {len(cells)} columns, the lines above have {width}")
        if not cells[word_column].strip():
            raise UserError(f"{where}: no word in column {word_column}")
        if not words[-1]:
            lines.append(number)
        words[-1].append(cells[word_column])
        if not hidden:
            if not cells[label_column]:
                raise UserError(f"{where}: no label in column {label_column}")
            labels[-1].append(cells[label_column])
    if not width:
        raise UserError(f"{path}: no sentence in it")
    if not words[-1]:
        words.pop()
        labels.pop()
    return TokenSet(words, None if hidden else labels, lines, str(path))


def entities_in(found: TokenSet) -> bool:
    """True if the labels are of entities: O, B-TYPE, I-TYPE; False for plain tags."""
    return any(label == "O" or ENTITY.fullmatch(label) for row in found.labels for label in row)


def normalise(found: TokenSet, repair: bool) -> str:
    """Turn labels of entities into IOB2 in place; returns the scheme they had.

    In IOB2 every entity begins with B-; in IOB1 only one that touches another of its type does. A
    file that follows neither is "broken": an I- whose entity has no beginning.

    Args:
        repair: read such an I- as the beginning, as the CoNLL evaluation does.
    Raises:
        UserError: naming the line of a label of no scheme, and of an I- if `repair` is not set.
    """
    orphan = None  # an I- that begins an entity
    needless = False  # a B- that IOB1 would write I-
    for row, first in zip(found.labels, found.lines, strict=True):
        before = "O"
        for place, label in enumerate(row):
            where = f"{found.where}, line {first + place}"
            if label != "O" and not ENTITY.fullmatch(label):
                raise UserError(f"{where}: label {label!r} is none of O, B-TYPE, I-TYPE")
            touches = before != "O" and before[2:] == label[2:]
            if label.startswith("I-") and not touches:
                orphan = orphan or (where, label, before)
            needless |= label.startswith("B-") and not touches
            before = label
    if orphan is None:
        return "iob2"
    if needless and not repair:
        where, label, before = orphan
        raise UserError(
            f"{where}: {label} follows {before}: neither IOB1 nor IOB2 allows this beside the B- "
            f"labels of the file; --repair_iob reads it as B-{label[2:]}"
        )
    for row in found.labels:
        before = "O"
        for place, label in enumerate(row):
            if label.startswith("I-") and (before == "O" or before[2:] != label[2:]):
                row[place] = "B-" + label[2:]
            before = label
    logger.info("%s: %s read as IOB2", found.where, "broken IOB2" if needless else "IOB1")
    return "broken" if needless else "iob1"


def label_set(sets: dict[str, TokenSet]) -> tuple[str, ...]:
    """Labels of the train split in an order that does not depend on the file's.

    O comes first, then B- and I- of each type by name, both even if one of them does not occur;
    plain tags are sorted.

    Raises:
        UserError: if there is no train split to take them from.
    """
    if "train" not in sets or sets["train"].labels is None:
        raise UserError("the labels come from a train split, or from a trained model; give either")
    found = {label for row in sets["train"].labels for label in row}
    if not entities_in(sets["train"]):
        return tuple(sorted(found))
    types = sorted({label[2:] for label in found if label != "O"})
    return ("O", *(f"{part}-{kind}" for kind in types for part in "BI"))


def _check_labels(found: TokenSet, labels: Sequence[str]) -> None:
    known = set(labels)
    for row, first in zip(found.labels or (), found.lines if found.labels else (), strict=True):
        for place, label in enumerate(row):
            if label not in known:
                raise UserError(
                    f"{found.where}, line {first + place}: label {label!r} is not one of "
                    f"{', '.join(labels)}"
                )


def _label_place(task: TaskSpec) -> int:
    return -1 if task.label.place is None else task.label.place


def _from_hub(task: TaskSpec, split: str, table: object) -> TokenSet:
    """Sentences of a hub data set with a list of words and one of labels in every row."""
    where = f"{task.hub[0]} {split}"
    word_name, label_name = task.texts[0].name, task.label.name
    for name in (word_name, label_name):
        if name not in table.column_names:
            raise UserError(f"{where}: no column {name!r} among {table.column_names}")
    feature = table.features[label_name]
    names = getattr(getattr(feature, "feature", feature), "names", None)
    words, labels, lines = [], [], []
    for number, row in enumerate(table):
        if not row[word_name]:
            continue
        if len(row[word_name]) != len(row[label_name]):
            raise UserError(
                f"{where}, row {number}: {len(row[word_name])} words and "
                f"{len(row[label_name])} labels"
            )
        words.append([checked_text(word, f"{where}, row {number}") for word in row[word_name]])
        labels.append([names[one] if names else str(one) for one in row[label_name]])
        lines.append(number)
    return TokenSet(words, labels, lines, where)
