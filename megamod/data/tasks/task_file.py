"""Task specifications in YAML files."""

import re
from pathlib import Path

import yaml

from megamod.data.tasks.specs import METRICS, Column, TaskSpec
from megamod.errors import UserError

KINDS = ("sequence", "pair", "regression", "token")
USUAL = {
    "sequence": ("accuracy",),
    "pair": ("accuracy",),
    "regression": ("pearson", "spearmanr"),
    "token": ("f1",),
}


def read_spec(path: str | Path) -> TaskSpec:
    """The task that a YAML file describes.

        name: reviews
        kind: sequence            # or pair, regression, token
        text: sentence            # column by name or number; a list of two for pairs
        label: label
        labels: [bad, good]       # left out: those of the train file, sorted
        metrics: [accuracy, f1]   # left out: accuracy; pearson and spearmanr; f1
        files: {train: train.tsv, dev: dev.jsonl, test: test.tsv}
        header: true              # false: text and label are numbers
        bounds: [0, 5]            # of a regression, optional
        hub: NAME or NAME:CONFIG  # instead of files

    Files are relative to --data_dir, without it to the YAML file.

    Raises:
        UserError: naming file, line or key, and what is allowed.
    """
    path = Path(path)
    try:
        value = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise UserError(f"--task_spec {path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--task_spec {path}: not YAML: {' '.join(str(error).split())}") from error
    return _spec_of(value, f"--task_spec {path}")


def _spec_of(value: object, where: str) -> TaskSpec:
    keys = (
        "name",
        "kind",
        "text",
        "label",
        "labels",
        "metrics",
        "files",
        "header",
        "bounds",
        "hub",
    )
    if not isinstance(value, dict):
        raise UserError(f"{where}: not a list of `key: value` lines; keys are {', '.join(keys)}")
    for key in value:
        if key not in keys:
            raise UserError(f"{where}: unknown key {key!r}; allowed are {', '.join(keys)}")
    for key in ("name", "kind", "text", "label"):
        if key not in value:
            raise UserError(f"{where}: {key} is missing")
    name = str(value["name"])
    if not re.fullmatch(r"[\w.-]+", name, re.ASCII) or set(name) == {"."}:
        raise UserError(f"{where}, name: {name[:60]!r} is not made of letters, digits, _ . and -")
    kind = value["kind"]
    if kind not in KINDS:
        raise UserError(f"{where}, kind: {kind!r} is not allowed; give one of {', '.join(KINDS)}")
    header = value.get("header", True)
    if not isinstance(header, bool):
        raise UserError(f"{where}, header: {header!r} is not true or false")
    texts = value["text"] if isinstance(value["text"], list) else [value["text"]]
    allowed = {"sequence": (1,), "pair": (2,), "regression": (1, 2), "token": (1,)}[kind]
    if len(texts) not in allowed:
        raise UserError(f"{where}, text: {len(texts)} columns, a {kind} task has {allowed[-1]}")
    labels = value.get("labels", [])
    if isinstance(labels, list):
        labels = [str(label).strip() for label in labels]
    if not isinstance(labels, list) or len(set(labels)) < len(labels) or "" in labels:
        raise UserError(f"{where}, labels: {repr(labels)[:200]} is not a list of different names")
    if kind == "regression" and labels:
        raise UserError(f"{where}, labels: a regression has none")
    if len(labels) == 1:
        raise UserError(f"{where}, labels: {labels!r} leaves nothing to decide; give two or more")
    files = value.get("files", {})
    if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
        raise UserError(f"{where}, files: {files!r} is not split: file")
    for split in files:
        if not re.fullmatch(r"(train|dev\w*|test\w*)", str(split)):
            raise UserError(f"{where}, files: split {split!r} is not train, dev... or test...")
    hub = value.get("hub")
    if (hub is None) == (not files) or not isinstance(hub, str | None):
        raise UserError(f"{where}: give either files or hub (NAME or NAME:CONFIG)")
    metrics = value.get("metrics", list(USUAL[kind]))
    if not isinstance(metrics, list) or not metrics or any(m not in METRICS for m in metrics):
        raise UserError(f"{where}, metrics: {metrics!r}; a list of {', '.join(METRICS)} is allowed")
    bounds = value.get("bounds")
    if bounds is not None and not (
        isinstance(bounds, list) and len(bounds) == 2 and all(_number(b) for b in bounds)
    ):
        raise UserError(f"{where}, bounds: {bounds!r} is not [least, largest]")
    hub_name, _, config = (hub or "").partition(":")
    return TaskSpec(
        name=name,
        kind=kind,
        texts=tuple(_column(text, header, f"{where}, text") for text in texts),
        label=_column(value["label"], header, f"{where}, label"),
        labels=tuple(labels),
        metrics=tuple(metrics),
        files={split: (file,) for split, file in files.items()}
        or {"train": (), "dev": (), "test": ()},
        headless=() if header else tuple(files),
        bounds=None if bounds is None else (float(bounds[0]), float(bounds[1])),
        hub=(hub_name, config or None) if hub else None,
    )


def _column(value: object, header: bool, where: str) -> Column:
    if isinstance(value, int) and not isinstance(value, bool) and value >= -1:
        return Column(f"column {value}", value)
    if isinstance(value, str) and value and header:
        return Column(value)
    allowed = "a name or a number from 0 (-1: the last)" if header else "a number: no header"
    raise UserError(f"{where}: {value!r} is not {allowed}")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
