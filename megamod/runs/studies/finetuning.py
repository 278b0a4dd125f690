"""One cell of a study of finetuning: what finetune_glue.py, _ner.py or _mtl.py does with flags.

Settings are flags of the launcher that `launcher` names (glue, ner or mtl). A model or tokenizer
`package:NAME/FOLDER` lies in an installed Python package; `data_dir` is below the folder of inputs.
"""

import importlib.util
import shutil
from pathlib import Path

from megamod.args import SafetyArgs
from megamod.errors import UserError
from megamod.files import hash_file
from megamod.flags import format_flags, parse_args
from megamod.runs.finetune.args import (
    FinetuneOptimArgs,
    FinetuneRunArgs,
    ManyTasksArgs,
    OneTaskArgs,
    TaskArgs,
    TaskListArgs,
    WordArgs,
)
from megamod.runs.finetune.records import RESULTS, Results
from megamod.runs.studies.records import Figures, Scores
from megamod.runs.studies.study_file import Cell, Settings, Study
from megamod.schemas import read_checked_file

PACKAGE = "package:"  # prefix of a model or tokenizer that lies in a Python package
COMMON = (FinetuneRunArgs, SafetyArgs, FinetuneOptimArgs)
CLASSES = {
    "glue": (*COMMON, OneTaskArgs, TaskArgs),
    "ner": (*COMMON, OneTaskArgs, TaskArgs, WordArgs),
    "mtl": (*COMMON, ManyTasksArgs, TaskListArgs),
}
"""Classes of the flags of each launcher, in the order that `finetune` needs."""


def run_finetuning_cell(
    study: Study, cell: Cell, inputs: Path, work: Path
) -> tuple[Figures, dict[str, object]]:
    """Finetune and score on dev; delete the run's folder when its figures are read.

    With the setting `one_model_a_task` of the launcher mtl each task has a run.

    Args:
        study: the study of the cell, not used.
        cell: arm, rung and seed, with their settings.
        inputs: folder that `data_dir` is below.
        work: folder in which the runs are.
    Returns:
        the figures, with a row per task and `mean`, and the digest of the model's weights if the
        model lies in a package.
    Raises:
        UserError: for an unknown launcher, settings that the launcher refuses, or a setting that
            the launcher mtl needs or another cannot have.
    """
    settings = dict(cell.settings)
    launcher = settings.pop("launcher", "glue")
    if launcher not in CLASSES:
        raise UserError(f"launcher {launcher!r} is none of {', '.join(CLASSES)}")
    several = settings.pop("one_model_a_task", False)
    if launcher == "mtl" and "tasks" not in settings:
        raise UserError(f"{cell.name}: the launcher mtl needs the setting tasks")
    if launcher != "mtl" and several:
        raise UserError(f"{cell.name}: one_model_a_task is for the launcher mtl, not {launcher}")
    tasks = settings["tasks"] if launcher == "mtl" else [None]
    runs = [[task] for task in tasks] if several else [tasks]
    figures, digests = Figures({}), {}
    for named in runs:
        folder = work / f"{cell.name}{'.' + named[0] if several else ''}"
        flags = settings | ({"tasks": named} if launcher == "mtl" else {})
        digests |= _run_finetuning(flags, launcher, cell.seed, inputs, folder)
        _add_task_scores(read_checked_file(folder / RESULTS, Results), launcher, figures)
        shutil.rmtree(folder)
    speed = [values["instances_per_second"] for values in figures.scores.values()]
    scores = [values["score"] for values in figures.scores.values()]
    figures.scores["mean"] = {
        "score": sum(scores) / len(scores),
        "instances_per_second": sum(speed) / len(speed),
    }
    return figures, digests


def _run_finetuning(
    settings: Settings, launcher: str, seed: int, inputs: Path, folder: Path
) -> dict[str, object]:
    """Finetune once in `folder`, which keeps the run.

    Args:
        settings: flags of the launcher.
        launcher: a key of `CLASSES`: "glue", "ner" or "mtl".
        seed: seed of the run.
        inputs: folder that `data_dir` is below.
        folder: output folder of the run.
    Returns:
        the digest of the model's weights, 16 hexadecimal digits, under the key `model`; empty
        unless the model is in a package.
    Raises:
        UserError: for flags that the launcher refuses, or a package that is not installed.
    """
    flags = dict(settings)
    digests: dict[str, object] = {}
    for name in ("model", "tokenizer_name"):
        if str(flags.get(name, "")).startswith(PACKAGE):
            flags[name] = str(find_package_folder(str(flags[name])))
            weights = Path(flags[name]) / "model.safetensors"
            if name == "model" and weights.is_file():
                digests["model"] = hash_file(weights)[:16]
    names = flags.get("data_dir", [])
    folders = [str(inputs / name) for name in (names if isinstance(names, list) else [names])]
    if folders:
        flags["data_dir"] = folders if launcher == "mtl" else folders[0]
    flags |= {
        "seed": seed,
        "output_dir": str(folder),
        "do_train": True,
        "do_eval": True,
        "report_to": "none",
        "save_total_limit": 1,
    }
    parsed = parse_args(*CLASSES[launcher], argv=format_flags(flags))
    # Heavy, and not needed where figures are only read.
    from megamod.runs.finetune.run import finetune

    if launcher == "mtl":
        from megamod.runs.finetune.many_tasks import prepare_many_tasks_model as prepare
    else:
        from megamod.runs.finetune.one_task import prepare_one_task_model as prepare
    finetune(prepare(*parsed[3:]), parsed)
    return digests


def find_package_folder(text: str) -> Path:
    """Find a folder inside an installed Python package, such as one that brings model weights.

    Args:
        text: `package:NAME/FOLDER`.
    Raises:
        UserError: if the package is not installed or has no such folder.
    """
    name, _, inside = text.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pip = name.replace("_", "-")
        raise UserError(f"{text}: the Python package {name} is not installed; pip install {pip}")
    folder = Path(spec.origin).parent / inside
    if not folder.is_dir():
        raise UserError(f"{text}: there is no folder {inside} in the package {name}")
    return folder


def _add_task_scores(results: Results, launcher: str, figures: Figures) -> None:
    """Add the last evaluation of a run of one seed to `figures.scores`, a row per task.

    A row has `score` (the task's score as GLUE defines it), `instances_per_second`, and each metric
    as SPLIT_METRIC.

    Args:
        results: content of results.json of the run.
        launcher: launcher of the run; "mtl" has several tasks.
        figures: figures of the cell, changed in place.
    """
    (seed,) = results.seeds.values()
    last = seed.last
    speed = last.instances_per_second
    if launcher == "mtl":
        splits, means = last.tasks, results.mean
    else:
        name = results.task["name"]
        splits, means = {name: last.scores}, {name: results.task_score}
    for task, scores_by_split in splits.items():
        values = {
            f"{split}_{metric}": value
            for split, scores in scores_by_split.items()
            for metric, value in scores.items()
            if isinstance(value, float)
        }
        scores: Scores = {task: {"score": means[task], "instances_per_second": speed, **values}}
        figures.scores |= scores
