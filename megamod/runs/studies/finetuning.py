"""One cell of a study of finetuning: what finetune_glue.py, _ner.py or _mtl.py does with flags.

Settings are flags of the launcher that `launcher` names (glue, ner or mtl). A model or tokenizer
`package:NAME/FOLDER` lies in an installed Python package; `data_dir` is below the folder of inputs.
With settings pretrain_KEY, KEY a flag of megamod pretrain, the model is pretrained first, on the
text of the study; cells with the same flags share this run.
"""

import json
import shutil
from pathlib import Path

from megamod.args import DataArgs, ModelArgs, MuxArgs, OptimArgs, RunArgs, SafetyArgs
from megamod.data.lm.databin import DataBin
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
from megamod.runs.studies.packages import PACKAGE, resolve_package_path
from megamod.runs.studies.records import Figures, Scores, compute_json_digest
from megamod.runs.studies.study_file import Cell, Settings, Study
from megamod.runs.studies.texts import open_study_text
from megamod.runs.studies.work_folders import wait_for_folder_lock
from megamod.schemas import read_checked_file

PRETRAIN = "pretrain_"  # prefix of settings that are flags of megamod pretrain
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
        study: the study of the cell, whose text is used to pretrain.
        cell: arm, rung and seed, with their settings.
        inputs: folder that `data_dir` is below.
        work: folder in which the runs are.
    Returns:
        the figures, with a row per task and `mean`, and digests: of the model's weights if the
        model lies in a package, and of the text if it was pretrained on.
    Raises:
        UserError: for an unknown launcher, settings that a launcher refuses, a setting that the
            launcher mtl needs or another cannot have, or pretraining in a study without text.
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
    figures, digests = Figures({}), _resolve_model(settings)
    names = [name for name in settings if name.startswith(PRETRAIN)]
    flags = {name.removeprefix(PRETRAIN): settings.pop(name) for name in names}
    if flags:
        if study.file.text is None:
            raise UserError(f"{cell.name}: {PRETRAIN}* settings need a study with `text`")
        text = open_study_text(study.file.text, inputs, work)
        flags = {"seed": cell.seed, "model": settings["model"], **flags}
        folder = _pretrain_unless_done(flags, text.training_bin, work)
        settings["model"] = str(folder / "model")
        digests["text"] = text.digest
        figures.details["pretraining"] = json.loads((folder / RESULTS).read_text())
    for named in runs:
        folder = work / f"{cell.name}{'.' + named[0] if several else ''}"
        flags = settings | ({"tasks": named} if launcher == "mtl" else {})
        _run_finetuning(flags, launcher, cell.seed, inputs, folder)
        _add_task_scores(read_checked_file(folder / RESULTS, Results), launcher, figures)
        shutil.rmtree(folder)
    speed = [values["instances_per_second"] for values in figures.scores.values()]
    scores = [values["score"] for values in figures.scores.values()]
    figures.scores["mean"] = {
        "score": sum(scores) / len(scores),
        "instances_per_second": sum(speed) / len(speed),
    }
    return figures, digests


def _resolve_model(settings: Settings) -> dict[str, object]:
    """Replace a model and tokenizer in packages by their folders, in place.

    Returns:
        the digest of the model's weights, 16 hexadecimal digits, under the key `model`; empty
        unless the model is in a package.
    Raises:
        UserError: for a package that is not installed.
    """
    in_package = str(settings.get("model", "")).startswith(PACKAGE)
    for name in settings.keys() & {"model", "tokenizer_name"}:
        settings[name] = resolve_package_path(str(settings[name]))
    weights = Path(str(settings.get("model", ""))) / "model.safetensors"
    return {"model": hash_file(weights)[:16]} if in_package and weights.is_file() else {}


def _pretrain_unless_done(flags: Settings, databin: Path, work: Path) -> Path:
    """Pretrain an encoder unless that is done; return the run's folder.

    It is in `work`, named after the flags and the text. Other processes that need it wait.

    Args:
        flags: flags of megamod pretrain, `model` among them.
        databin: folder of the data-bin to train on.
    Raises:
        UserError: as `pretrain_encoder`.
    """
    folder = work / f"encoder-{compute_json_digest({**flags, 'text': DataBin(databin).digest})}"
    with wait_for_folder_lock(folder):
        if not (folder / RESULTS).is_file():
            from megamod.runs.pretrain.encoder_lm import pretrain_encoder

            places = {"data": str(databin), "output_dir": str(folder), "report_to": "none"}
            classes = (RunArgs, SafetyArgs, ModelArgs, OptimArgs, MuxArgs, DataArgs)
            pretrain_encoder(*parse_args(*classes, argv=format_flags({**flags, **places})))
    return folder


def _run_finetuning(
    settings: Settings, launcher: str, seed: int, inputs: Path, folder: Path
) -> None:
    """Finetune once in `folder`, which keeps the run.

    Args:
        settings: flags of the launcher.
        launcher: a key of `CLASSES`: "glue", "ner" or "mtl".
        seed: seed of the run.
        inputs: folder that `data_dir` is below.
        folder: output folder of the run.
    Raises:
        UserError: for flags that the launcher refuses.
    """
    flags = dict(settings)
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
