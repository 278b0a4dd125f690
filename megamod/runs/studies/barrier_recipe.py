"""Barrier study files: models, pairs, tasks and alignments."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from megamod.errors import UserError
from megamod.merging.alignment.options import Options, read_options

MLM, CLM = "mlm", "clm"
KEYS = ("models", "pairs", "task", "data", "tokenizer", "max_seq_length", "batch_size", "points")
KEYS += ("max_items", "seed", "char_split", "variants", "mlm_probability")


@dataclass(frozen=True)
class BarrierStudy:
    """Settings of a barrier study.

    Attributes:
        models: folder or hub id by name; {task} in it is replaced by the task.
        pairs: names of two models each; the second is aligned to the first.
        tasks: "mlm", "clm", and names of tasks with labels.
        data: text file for mlm and clm, task folder for tasks with labels; None: the hub.
        tokenizer: folder or name; None: tokenizer of the first model.
        max_seq_length: tokens per block of text; largest number of tokens per row.
        batch_size: rows per forward pass.
        points: models evaluated on each line, ends included.
        max_items: blocks, or rows per split, to evaluate; None: all.
        seed: seed of the masks.
        mlm_probability: share of masked tokens.
        char_split: see `text_blocks`.
        variants: alignment options by name; the method "identity" does not align.
    """

    models: Mapping[str, str]
    pairs: tuple[tuple[str, str], ...]
    tasks: tuple[str, ...]
    variants: Mapping[str, Options]
    data: str | None = None
    tokenizer: str | None = None
    max_seq_length: int = 128
    batch_size: int = 8
    points: int = 21
    max_items: int | None = None
    seed: int = 42
    mlm_probability: float = 0.15
    char_split: bool = False


def read_study(path: Path) -> BarrierStudy:
    """Read a study from a YAML file.

        models: {a: runs/seed-1/model, b: runs/seed-2/model}   # or a list
        pairs: [[a, b]]                                        # default: all pairs
        task: mlm                                              # or clm, sst-2, wnut17, a list
        data: valid.txt
        variants:
          vanilla: {method: identity}
          ff+attn: {groups: [ff, attn], calibration: {path: train.txt, fraction: 0.1}}

    Raises:
        UserError: naming the key that is wrong and what is allowed.
    """
    try:
        content = yaml.safe_load(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not `key: value` lines; keys are {', '.join(KEYS)}")
    for key in content:
        if key not in KEYS:
            raise UserError(f"{path}: unknown key {key!r}; allowed are {', '.join(KEYS)}")
    fields = dict(content)
    models = _check_models(fields.pop("models", None), f"{path}, models")
    tasks = fields.pop("task", MLM)
    tasks = tasks if isinstance(tasks, list) else [tasks]
    if not tasks or not all(isinstance(task, str) for task in tasks):
        raise UserError(f"{path}, task: {tasks!r} is not mlm, clm or the name of a task")
    for key in ("seed", "mlm_probability"):
        if key in fields and MLM not in tasks:
            raise UserError(f"{path}, {key}: has no effect without the task mlm; leave it out")
    return BarrierStudy(
        models=models,
        pairs=_check_pairs(fields.pop("pairs", None), models, f"{path}, pairs"),
        tasks=tuple(tasks),
        variants=_check_variants(fields.pop("variants", None), f"{path}, variants"),
        **check_fields(fields, path),
    )


def _check_models(value: object, where: str) -> dict[str, str]:
    if isinstance(value, list):
        value = {str(number): folder for number, folder in enumerate(value, start=1)}
    if not isinstance(value, dict) or len(value) < 2:
        raise UserError(f"{where}: {value!r} is not two or more models")
    for name, folder in value.items():
        if not isinstance(folder, str):
            raise UserError(f"{where}: {name}: {folder!r} is not a folder or name")
    return {str(name): folder for name, folder in value.items()}


def _check_pairs(
    value: object, models: Mapping[str, str], where: str
) -> tuple[tuple[str, str], ...]:
    if value is None:
        return tuple(itertools.combinations(models, 2))
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {value!r} is not a list of pairs")
    pairs = []
    for pair in value:
        names = tuple(map(str, pair)) if isinstance(pair, list) else ()
        if len(names) != 2 or names[0] == names[1] or not set(names) <= set(models):
            raise UserError(f"{where}: {pair!r} is not two of {', '.join(models)}")
        pairs.append(names)
    return tuple(pairs)


def _check_variants(value: object, where: str) -> dict[str, Options]:
    if not isinstance(value, dict) or not value:
        raise UserError(f"{where}: {value!r} is not names, each with alignment options")
    return {str(name): read_options(block or {}, where, name) for name, block in value.items()}


def check_fields(fields: Mapping[str, object], path: Path) -> dict[str, object]:
    """Check the types and ranges of the scalar fields of a `BarrierStudy`; return them.

    Raises:
        UserError: naming the key and what is allowed.
    """
    kinds: dict[str, tuple[type, ...]] = {
        "data": (str,),
        "tokenizer": (str,),
        "mlm_probability": (float,),
        "char_split": (bool,),
    }
    least = {"max_seq_length": 2, "batch_size": 1, "points": 2, "max_items": 1, "seed": 0}
    for key, value in fields.items():
        if key in least:
            if type(value) is not int or value < least[key]:
                raise UserError(f"{path}, {key}: {value!r} is not a whole number from {least[key]}")
        elif not isinstance(value, kinds[key]):
            raise UserError(f"{path}, {key}: {value!r} is not of type {kinds[key][0].__name__}")
    if not 0 < fields.get("mlm_probability", 0.15) < 1:
        raise UserError(
            f"{path}, mlm_probability: {fields['mlm_probability']!r} is not between 0 and 1"
        )
    return dict(fields)
