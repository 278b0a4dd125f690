"""Specifications of labelled tasks: files, columns, labels, metrics; those of GLUE and others.

A `TaskSpec` has everything that readers, models and scores need. Further tasks are described in
YAML files, see `megamod.data.tasks.task_file`.

Source: Wang et al. 2019 (GLUE), section 3, for tasks and metrics; the layout of its files.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from megamod.data.corpus.file_formats import COMPRESSIONS, FORMATS
from megamod.errors import UserError

Kind = Literal["sequence", "pair", "regression", "token"]
METRICS = (
    *("accuracy", "f1", "macro_f1", "matthews_correlation", "pearson", "spearmanr"),
    *("precision", "recall"),
)


@dataclass(frozen=True)
class Column:
    """A column of a file.

    Attributes:
        name: in the header, or the key of a JSON object.
        index: from 0, or from -1 backwards; used without a header, and where the header has none
            of the task's names. None: only the name counts.
    """

    name: str
    index: int | None = None


@dataclass(frozen=True)
class TaskSpec:
    """One task.

    Attributes:
        name: in flags and results.
        kind: labels of one text or of two, values (of one or two texts), or labels of words.
        texts: columns of the texts; of a token task the column of the words.
        label: column of the label; may be missing in test files, whose labels are hidden.
        labels: names by number; empty for regression, and if the train file decides.
        metrics: keys of `METRICS`; the first one selects the best model.
        files: split -> file names, of which the first that exists is read. Splits that begin with
            "dev" are scored in training, those that begin with "test" are predicted.
        folder: folder of the files below the data folder.
        headless: splits without a header line.
        skip_short: skip rows with too few columns, as QQP has them, instead of refusing them.
        skip_labels: skip rows with these labels: annotators did not agree (SNLI).
        bounds: least and largest value of a regression.
        submission: split -> file name for the benchmark's server.
        hub: data set on the hub and its configuration.
        hub_columns: our column name -> the hub's, where they differ.
        hub_splits: our split -> the hub's, where they differ.
    """

    name: str
    kind: Kind
    texts: tuple[Column, ...]
    label: Column
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    files: Mapping[str, tuple[str, ...]]
    folder: str = ""
    headless: tuple[str, ...] = ()
    skip_short: bool = False
    skip_labels: tuple[str, ...] = ()
    bounds: tuple[float, float] | None = None
    submission: Mapping[str, str] = field(default_factory=dict)
    hub: tuple[str, str | None] | None = None
    hub_columns: Mapping[str, str] = field(default_factory=dict)
    hub_splits: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_regression(self) -> bool:
        """True if values are predicted instead of labels."""
        return self.kind == "regression"

    def list_splits(self, kind: str) -> tuple[str, ...]:
        """List the splits whose names begin with `kind`: "train", "dev" or "test"."""
        return tuple(split for split in self.files if split.startswith(kind))


def find_text_task(name: str) -> TaskSpec:
    """Find a task of `TASKS` by its name or folder; only letters and digits count, not capitals.

    Raises:
        UserError: if no task has that name.
    """
    key = _normalise_name(name)
    for task in TASKS.values():
        if key in (_normalise_name(task.name), _normalise_name(task.folder)):
            return task
    raise UserError(
        f"--task {name!r} is none of {', '.join(TASKS)}; --task_spec FILE describes another one"
    )


def find_task_files(task: TaskSpec, data_dir: str | Path) -> dict[str, Path]:
    """Find the existing files of a task by split.

    They are those of the first folder that has any: the task's folder in `data_dir`, a folder there
    that is named after the task, `data_dir` itself. Splits without a file are absent from the
    result. A file may be compressed.

    Raises:
        UserError: if the folder does not exist or has no file of the task.
    """
    root = Path(data_dir)
    if not root.is_dir():
        raise UserError(f"--data_dir {root}: there is no such folder")
    below = (
        []
        if not task.folder
        else [p for p in root.iterdir() if _normalise_name(p.name) == _normalise_name(task.name)]
    )
    folders = [root / task.folder, *sorted(below), root] if task.folder else [root]
    for folder in folders:
        files = {split: _find_first_file(folder, names) for split, names in task.files.items()}
        if any(files.values()):
            return {split: path for split, path in files.items() if path is not None}
    names = ", ".join(names[0] for names in task.files.values())
    raise UserError(
        f"--data_dir {root}: no file of task {task.name} ({names}) in {folders[0]} or {root}"
    )


def _find_first_file(folder: Path, names: Sequence[str]) -> Path | None:
    """Find the first of `names` that is a file in `folder`, perhaps compressed; None if none is."""
    paths = (folder / f"{name}{end}" for name in names for end in ("", *COMPRESSIONS))
    return next((path for path in paths if path.is_file()), None)


def make_label_normaliser(labels: Sequence[str]) -> Callable[[str], str | None]:
    """Return a function from a label to its spelling in `labels`; None for a label of no spelling.

    Capitals do not count, unless two of `labels` differ by nothing else.
    """
    exact = {label: label for label in labels}
    folded = {label.casefold(): label for label in labels}
    if len(folded) < len(exact):
        folded = {}
    return lambda label: exact.get(label) or folded.get(label.casefold())


def format_some_names(names: Iterable[str], max_names: int = 12) -> str:
    """Format at most `max_names` names for a message, with their number if there are more.

    Names longer than 40 characters are cut.
    """
    names = [name if len(name) <= 40 else f"{name[:40]}..." for name in names]
    rest = f", ... ({len(names)} in all)" if len(names) > max_names else ""
    return ", ".join(names[:max_names]) + rest


def _normalise_name(name: str) -> str:
    """Reduce a name to its letters and digits, in small letters."""
    return re.sub("[^a-z0-9]", "", name.lower())


# Values that several specifications share.
_TSV = {"train": ("train.tsv",), "dev": ("dev.tsv",), "test": ("test.tsv",)}
_PAIR = (Column("sentence1", 1), Column("sentence2", 2))
_NLI = ("contradiction", "entailment", "neutral")
_ENTAILS = ("entailment", "not_entailment")
_DEV = {"dev": "validation"}
SPELLINGS = {"train": ("train",), "dev": ("dev", "valid", "validation"), "test": ("test",)}
_SNLI = {
    split: (f"{split}.tsv", f"snli_1.0_{split}.jsonl", f"{split}.jsonl")
    for split in ("train", "dev", "test")
}
_SCITAIL = {
    split: (f"scitail_1.0_{split}.tsv", f"{split}.tsv") for split in ("train", "dev", "test")
}


def _make_glue_task(
    name: str,
    folder: str,
    texts: tuple[Column, ...],
    label: Column,
    labels: tuple[str, ...],
    metrics: tuple[str, ...] = ("accuracy",),
    **other_fields: object,
) -> TaskSpec:
    """Make a task in the layout of GLUE: TSV files, and a configuration of `nyu-mll/glue`.

    Args:
        name, texts, label, labels, metrics: see `TaskSpec`; the name is that of the hub's
            configuration, without hyphens.
        folder: folder of the files below the data folder; also names the submission file.
        other_fields: fields of `TaskSpec`, in place of those of the layout.
    """
    task = TaskSpec(
        name=name,
        kind="sequence" if len(texts) == 1 else "pair",
        texts=texts,
        label=label,
        labels=labels,
        metrics=metrics,
        files=_TSV,
        folder=folder,
        submission={"test": f"{folder}.tsv"},
        hub=("nyu-mll/glue", name.replace("-", "")),
        hub_columns={label.name: "label"},
        hub_splits=_DEV,
    )
    return replace(task, **other_fields)


TASKS: dict[str, TaskSpec] = {
    task.name: task
    for task in (
        _make_glue_task(
            "cola",
            "CoLA",
            (Column("sentence", 3),),
            Column("label", 1),
            ("0", "1"),
            ("matthews_correlation", "accuracy"),
            headless=("train", "dev"),
        ),
        _make_glue_task(
            "mnli",
            "MNLI",
            (Column("sentence1", 8), Column("sentence2", 9)),
            Column("gold_label", -1),
            _NLI,
            files={
                "train": ("train.tsv",),
                "dev": ("dev_matched.tsv",),
                "dev_mm": ("dev_mismatched.tsv",),
                "test": ("test_matched.tsv",),
                "test_mm": ("test_mismatched.tsv",),
            },
            submission={"test": "MNLI-m.tsv", "test_mm": "MNLI-mm.tsv"},
            skip_labels=("-",),
            hub_columns={"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"},
            hub_splits={
                "dev": "validation_matched",
                "dev_mm": "validation_mismatched",
                "test": "test_matched",
                "test_mm": "test_mismatched",
            },
        ),
        _make_glue_task("rte", "RTE", _PAIR, Column("label", -1), _ENTAILS),
        _make_glue_task("wnli", "WNLI", _PAIR, Column("label", -1), ("0", "1")),
        _make_glue_task(
            "qqp",
            "QQP",
            (Column("question1", 3), Column("question2", 4)),
            Column("is_duplicate", 5),
            ("0", "1"),
            ("accuracy", "f1"),
            skip_short=True,
        ),
        _make_glue_task(
            "sts-b",
            "STS-B",
            (Column("sentence1", 7), Column("sentence2", 8)),
            Column("score", -1),
            (),
            ("spearmanr", "pearson"),
            kind="regression",
            bounds=(0.0, 5.0),
        ),
        _make_glue_task("sst-2", "SST-2", (Column("sentence", 0),), Column("label", 1), ("0", "1")),
        _make_glue_task(
            "qnli",
            "QNLI",
            (Column("question", 1), Column("sentence", 2)),
            Column("label", -1),
            _ENTAILS,
        ),
        _make_glue_task(
            "mrpc",
            "MRPC",
            (Column("#1 String", 3), Column("#2 String", 4)),
            Column("Quality", 0),
            ("0", "1"),
            ("accuracy", "f1"),
            hub_columns={
                "#1 String": "sentence1",
                "#2 String": "sentence2",
                "Quality": "label",
            },
        ),
        _make_glue_task(
            "sick-e", "SICK-E", _PAIR, Column("label", -1), _NLI, submission={}, hub=None
        ),
        _make_glue_task(
            "snli",
            "SNLI",
            (Column("sentence1", 7), Column("sentence2", 8)),
            Column("gold_label", -1),
            _NLI,
            files=_SNLI,
            skip_labels=("-",),
            submission={},
            hub=("stanfordnlp/snli", None),
            hub_columns={"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"},
        ),
        _make_glue_task(
            "scitail",
            "SciTail",
            (Column("sentence1", 0), Column("sentence2", 1)),
            Column("label", 2),
            ("entails", "neutral"),
            files=_SCITAIL,
            headless=("train", "dev", "test"),
            submission={},
            hub=None,
        ),
    )
}
"""Tasks on sentences and pairs by name: GLUE in the order of CA-MTL, then further ones."""

GLUE = tuple(TASKS)[:9]
"""Names of the nine tasks of GLUE, the first of `TASKS`; the diagnostic set is not one."""


def make_token_task(
    name: str, word_column: int | None = None, label_column: int | None = None
) -> TaskSpec:
    """Make a task of labels per word in CoNLL, JSON lines or Parquet files; any name is allowed.

    Args:
        name: also of the folder below the data folder, if there is one. "pos" and names that begin
            with "ud_" are part-of-speech tasks.
        word_column, label_column: see `read_conll`; None: by the content of the files.
    """
    pos = name == "pos" or name.startswith("ud_")
    ends = tuple(end for kind in ("text", "CoNLL", "TSV", "JSON lines") for end in FORMATS[kind])
    return TaskSpec(
        name=name,
        kind="token",
        texts=(Column("tokens", word_column),),
        label=Column("upos" if pos else "ner_tags", label_column),
        labels=(),
        metrics=("accuracy",) if pos else ("f1", "precision", "recall", "accuracy"),
        files={
            split: tuple(f"{stem}{end}" for stem in stems for end in (*ends, ".parquet"))
            for split, stems in SPELLINGS.items()
        },
        folder=name,
        hub=_TOKEN_HUB.get(name),
        hub_splits=_DEV,
    )


_TOKEN_HUB: dict[str, tuple[str, str | None]] = {
    "ner": ("conll2003", None),
    "conll2003": ("conll2003", None),
    "pos": ("universal_dependencies", "en_ewt"),
    "ud_ewt": ("universal_dependencies", "en_ewt"),
    "wnut17": ("wnut_17", None),
    "wikiann_en": ("wikiann", "en"),
}


def find_any_task(name: str) -> TaskSpec:
    """Find a task of any kind by name: a token task on the hub, or one of `TASKS`.

    Raises:
        UserError: if no task has that name.
    """
    if name.lower() in _TOKEN_HUB:
        return make_token_task(name.lower())
    try:
        return find_text_task(name)
    except UserError:
        known = ", ".join((*TASKS, *_TOKEN_HUB))
        raise UserError(
            f"--tasks {name}: is none of {known}; a YAML file describes another one"
        ) from None


def describe_task(task: TaskSpec) -> dict[str, object]:
    """Return the name, kind, columns, labels and metrics of a task as values for JSON."""
    plain = {f.name: getattr(task, f.name) for f in fields(task)}
    plain["texts"], plain["label"] = [c.name for c in task.texts], task.label.name
    return {key: plain[key] for key in ("name", "kind", "texts", "label", "labels", "metrics")}
