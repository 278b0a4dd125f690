"""What a study of barriers compares: models, pairs, tasks, and ways to align."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from megamod.errors import UserError
from megamod.merging.alignment.options import Options, checked_options

MLM, CLM = "mlm", "clm"
KEYS = ("models", "pairs", "task", "data", "tokenizer", "max_seq_length", "batch_size", "points")
KEYS += ("max_items", "seed", "char_split", "variants", "mlm_probability")


@dataclass(frozen=True)
class Study:
    """A whole study.

    Attributes:
        models: name -> folder or hub id; {task} in it stands for the task.
        pairs: names of what is compared; the second of a pair is aligned to the first.
        tasks: "mlm", "clm", and names of tasks with labels.
        data: a text file for mlm and clm, for the others the folder of the tasks; None: the hub.
        tokenizer: folder or name; None: that of the first model.
        max_seq_length: tokens of a block, or of a row at most.
        batch_size: rows of a forward pass.
        points: on the line between two models, ends included.
        max_items: blocks, or rows of a split, that are scored; None: all.
        seed: of the masks.
        mlm_probability: share of tokens that are masked.
        char_split: see `text_blocks`.
        variants: name -> how to align; with the method "identity": not at all.
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


def read_study(path: Path) -> Study:
    """A study from a YAML file.

        models: {a: runs/seed-1/model, b: runs/seed-2/model}   # or a list
        pairs: [[a, b]]                                        # left out: all
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
    models = _models(fields.pop("models", None), f"{path}, models")
    tasks = fields.pop("task", MLM)
    tasks = tasks if isinstance(tasks, list) else [tasks]
    if not tasks or not all(isinstance(task, str) for task in tasks):
        raise UserError(f"{path}, task: {tasks!r} is not mlm, clm or the name of a task")
    for key in ("seed", "mlm_probability"):
        if key in fields and MLM not in tasks:
            raise UserError(f"{path}, {key}: has no effect without the task mlm; leave it out")
    return Study(
        models=models,
        pairs=_pairs(fields.pop("pairs", None), models, f"{path}, pairs"),
        tasks=tuple(tasks),
        variants=_variants(fields.pop("variants", None), f"{path}, variants"),
        **checked_fields(fields, path),
    )


def _models(value: object, where: str) -> dict[str, str]:
    if isinstance(value, list):
        value = {str(number): one for number, one in enumerate(value, start=1)}
    if not isinstance(value, dict) or len(value) < 2:
        raise UserError(f"{where}: {value!r} is not two or more models")
    for name, folder in value.items():
        if not isinstance(folder, str):
            raise UserError(f"{where}: {name}: {folder!r} is not a folder or name")
    return {str(name): folder for name, folder in value.items()}


def _pairs(value: object, models: Mapping[str, str], where: str) -> tuple[tuple[str, str], ...]:
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


def _variants(value: object, where: str) -> dict[str, Options]:
    if not isinstance(value, dict) or not value:
        raise UserError(f"{where}: {value!r} is not names, each with its way to align")
    return {
        str(name): checked_options(block or {}, f"{where}, {name}") for name, block in value.items()
    }


def checked_fields(fields: Mapping[str, object], path: Path) -> dict[str, object]:
    """Fields of a `Study` that are plain values, each of the right kind and size.

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
        raise UserError(f"{path}, mlm_probability: is not between 0 and 1")
    return dict(fields)
