"""Tasks that label every word: entities, parts of speech, or any other tags.

Sentences are read from CoNLL, JSON lines or Parquet files, or from the hub. Entity labels of any
scheme become IOB2.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megamod.data.corpus.file_formats import require_format
from megamod.data.corpus.lines import check_text
from megamod.data.tasks.conll import read_conll
from megamod.data.tasks.iob import (
    OUTSIDE,
    are_entity_labels,
    convert_to_iob2,
    format_entity_label,
    parse_entity_label,
)
from megamod.data.tasks.specs import (
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
from megamod.data.tasks.token_set import TokenSet
from megamod.errors import UserError

FORMATS = ("text", "CoNLL", "TSV", "JSON lines", "JSON", "Parquet")


def read_token_task(
    task: TaskSpec,
    data_dir: str | Path | None,
    splits: Sequence[str],
    *,
    repair: bool = False,
    labels: Sequence[str] = (),
) -> tuple[TaskSpec, dict[str, TokenSet]]:
    """Read the splits of a task that labels every word, such as entities or parts of speech.

    Entity labels become IOB2. Labels get the spelling of the task's, from which they may differ in
    capitals.

    Args:
        task: the task, of kind "token".
        data_dir: folder of the files; None: the hub.
        splits: names of the splits to read. "train", "dev" and "test" must exist if they are named;
            others are skipped if they are absent.
        repair: see `convert_to_iob2`.
        labels: labels of a trained model, which win over those of `task`; if both are empty, they
            are those of the train split, see `_collect_labels`.
    Returns:
        the task and the sentences by split. The task has its labels filled in. If these are no
        entity labels and have no O, metrics of entities (F1, precision, recall) are replaced by
        accuracy.
    Raises:
        UserError: for a missing or empty split, a label that is none of the task's, and naming file
            and line of anything else that does not fit.
    """
    if data_dir is None:
        sources = dict(load_hub_tables(task, splits))
    else:
        sources = {s: path for s, path in find_task_files(task, data_dir).items() if s in splits}
    for split in splits:
        if split in ("train", "dev", "test") and split not in sources:
            origin = data_dir if data_dir is not None else "the hub"
            raise UserError(f"task {task.name}: {origin} has no split {split}")
    sets = {split: _read_sentences(task, split, source) for split, source in sources.items()}
    labels = tuple(labels) or task.labels
    entities = are_entity_labels(
        {label for part in sets.values() for row in part.labels or () for label in row}
        | set(labels)
    )
    if entities:
        for sentences in sets.values():
            if sentences.labels is not None:
                convert_to_iob2(sentences, repair)
    labels = labels or _collect_labels(sets, entities)
    for sentences in sets.values():
        _normalise_labels(sentences, labels)
    of_entities = {"f1", "precision", "recall"}
    if not entities and OUTSIDE not in labels and set(task.metrics) & of_entities:
        task = replace(task, metrics=("accuracy",))
    return replace(task, labels=labels), sets


def _collect_labels(token_sets: dict[str, TokenSet], are_entities: bool) -> tuple[str, ...]:
    """Collect the labels of the train split, in an order that does not depend on the file's.

    Entity labels are O, then B- and I- of each type in the order of their names, even if one of the
    two does not occur. Other labels are sorted.

    Args:
        token_sets: sentences by split.
        are_entities: True if the labels are entity labels in IOB2.
    Raises:
        UserError: if there is no train split with labels, or it has one label only.
    """
    if "train" not in token_sets or token_sets["train"].labels is None:
        raise UserError(
            f"the names of the labels come from a train split, or from a trained model; the splits "
            f"read, {', '.join(token_sets) or 'none'}, have no train split with labels"
        )
    labels = {label for row in token_sets["train"].labels for label in row}
    if are_entities:
        types = sorted({parse_entity_label(label)[1] for label in labels if label != OUTSIDE})
        labels = (OUTSIDE, *(format_entity_label(part, kind) for kind in types for part in "BI"))
    if len(labels) < 2:
        raise UserError(
            f"{token_sets['train'].where}: all its labels are {min(labels)[:60]!r}, a task needs "
            "two or more; --label_column names another column"
        )
    return tuple(labels) if are_entities else tuple(sorted(labels))


def _read_sentences(task: TaskSpec, split: str, source: Path | RowTable) -> TokenSet:
    """Read the sentences of one split, with labels as its source spells them.

    Args:
        split: name of the split; the labels of one that begins with "test" may be hidden.
        source: file, read in the format of its ending, or a table of the hub.
    Raises:
        UserError: if there are none, or the source is of another format or malformed.
    """
    if isinstance(source, Path):
        kind = require_format(source, FORMATS)
        if kind in ("JSON lines", "JSON"):
            source = open_json_table(source)
        elif kind == "Parquet":
            source = open_parquet_table(source)
    if isinstance(source, RowTable):
        sentences = _read_row_sentences(task, split, source)
    else:
        word, label, tags = task.texts[0].index, task.label.index, task.label.name == "upos"
        sentences = read_conll(source, word, label, split, label_after_word=tags)
    if not len(sentences):
        raise UserError(f"{sentences.where}: no sentence in it")
    return sentences


def _normalise_labels(sentences: TokenSet, labels: Sequence[str]) -> None:
    """Replace each label of `sentences` by its spelling in `labels`, which may differ in capitals.

    Raises:
        UserError: naming the line of a label that is none of them.
    """
    normalise_label = make_label_normaliser(labels)
    for sentence, row in enumerate(sentences.labels or ()):
        for word, label in enumerate(row):
            row[word] = normalise_label(label)
            if row[word] is None:
                raise UserError(
                    f"{sentences.describe_origin(sentence, word)}: label {label[:60]!r} is "
                    f"not one of {format_some_names(labels)}"
                )


def _read_row_sentences(task: TaskSpec, split: str, table: RowTable) -> TokenSet:
    """Read the sentences of a table, whose rows have a list of words and a list of labels.

    Rows without words are skipped. A split that begins with "test" may have null instead of labels,
    in all rows.

    Args:
        split: name of the split.
        table: rows as dictionaries.
    Raises:
        UserError: for words without labels, or values that are no words or labels.
    """
    word_name, label_name = task.texts[0].name, task.label.name
    names = table.names.get(label_name)
    words, labels, lines = [], [], []
    for number, row in table.rows:
        where = table.describe_origin(number)
        row_words = _require_list(row, word_name, where)
        hidden = split.startswith("test") and row.get(label_name) is None
        row_labels = [] if hidden else _require_list(row, label_name, where)
        if not row_words:
            continue
        if not hidden and len(row_words) != len(row_labels):
            raise UserError(
                f"{where}: {len(row_words)} words and {len(row_labels)} labels; each word needs one"
            )
        for word in row_words:
            if not isinstance(word, str) or not word:
                raise UserError(f"{where}: {word!r} among {word_name!r} is not a word")
        words.append([check_text(word, where) for word in row_words])
        lines.append([number] * len(row_words))
        if not hidden:
            labels.append([_read_label(label, names, where) for label in row_labels])
    if labels and len(labels) != len(words):
        raise UserError(f"{table.where}: some rows have labels and some have none")
    return TokenSet(words, labels or None, lines, table.where, table.unit)


def _require_list(row: dict[str, object], name: str, where: str) -> list[object]:
    """Return the list in a column of a row; raise UserError if it is missing or no list.

    Args:
        row: values by column.
        name: name of the column.
        where: file or data set and row, for the message.
    """
    if name not in row:
        raise UserError(
            f"{where}: no column {name!r}; there are {format_some_names(map(repr, row))}"
        )
    if not isinstance(row[name], list):
        raise UserError(f"{where}: {name!r} is {type(row[name]).__name__}, a list is needed")
    return row[name]


def _read_label(value: object, names: Sequence[str] | None, where: str) -> str:
    """Return the name of a label.

    Args:
        value: the name, or the number of a name.
        names: names by number; None: the column has none, and a number is a name itself.
        where: file or data set and row, for the message.
    Raises:
        UserError: for another type, or a number without a name.
    """
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UserError(f"{where}: label {repr(value)[:60]} is not a name or a number")
    if names is None or isinstance(value, str):
        return str(value).strip()
    if not 0 <= value < len(names):
        raise UserError(f"{where}: label {value} is not one of the numbers 0 to {len(names) - 1}")
    return names[value]
