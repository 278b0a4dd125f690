"""Many finetuning runs from one file: tasks x models x instances x seeds, as processes.

Finished runs are kept and interrupted ones resume. The results are a table and two plots: the score
by N (the number of instances that share a forward pass), and the score by instances per second.
"""

import itertools
import json
import logging
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

from megamod.btm.placement import find_free_port
from megamod.data.tasks.specs import GLUE
from megamod.errors import UserError
from megamod.evaluation.glue import (
    average_task_scores,
    compute_mean_and_deviation,
    format_score_table,
)
from megamod.evaluation.plots import plot_scores_by_instances, plot_trade_off
from megamod.files import write_json
from megamod.flags import format_flags

logger = logging.getLogger(__name__)

RECORD = "job.json"
LAUNCHERS = ("glue", "ner", "mtl")
KEYS = ("common", "tasks", "models", "seeds", "launch")
Flags = dict[str, object]


@dataclass(frozen=True)
class Job:
    """One run of a launcher; `flags` has neither the seed nor the output folder."""

    task: str
    model: str
    instances: int
    seed: int
    launcher: str
    flags: Mapping[str, object]

    def folder(self, output: Path) -> Path:
        """Return the output folder of the run."""
        return output / self.task / self.model / f"N-{self.instances}" / f"seed-{self.seed}"

    def list_arguments(self, output: Path) -> list[str]:
        """Return the command-line arguments of the run."""
        values = {**self.flags, "seed": self.seed, "output_dir": str(self.folder(output))}
        return format_flags(values)


def read_sweep(path: Path) -> tuple[list[Job], list[str]]:
    """Read the jobs of a YAML file, and the command that starts a launcher in place of python.

        common: {data_dir: GLUE, max_steps: 1000, do_train: true, do_eval: true}
        tasks:                                    # flags of a task override common flags
          sst-2: {max_steps: 20000}
          wnut17: {launcher: ner, data_dir: NER}  # default: glue
          all: {launcher: mtl, tasks: [cola, rte]}
        models:                                   # flags of a model override those of tasks
          plain: {model: runs/bert/model}
          mux: {model: "runs/mux-{N}/model", num_instances: [2, 5, 10]}
          other: {model: runs/other, num_instances: {2: {}, 5: {learning_rate: 3.0e-4}}}
        seeds: [1, 2, 3]
        launch: [deepspeed, --num_gpus, "2"]      # optional

    Flags of a number of instances override all others.

    Raises:
        UserError: naming the key that is wrong and what is allowed.
    """
    where = f"{path}"
    try:
        value = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: not `key: value` lines; keys are {', '.join(KEYS)}")
    for key in value:
        if key not in KEYS:
            raise UserError(f"{where}: unknown key {key!r}; allowed are {', '.join(KEYS)}")
    tasks, models = (_check_flags_by_name(value, key, where) for key in ("tasks", "models"))
    common = _check_flags(value.get("common") or {}, f"{where}, common")
    seeds = value.get("seeds", [1])
    if (
        not isinstance(seeds, list)
        or not all(type(s) is int and s >= 0 for s in seeds)
        or not seeds
    ):
        raise UserError(f"{where}, seeds: {seeds!r} is not a list of whole numbers")
    launch = value.get("launch", [])
    if not isinstance(launch, list) or not all(isinstance(word, str) for word in launch):
        raise UserError(f"{where}, launch: {launch!r} is not a list of words")
    jobs = []
    for task, model in itertools.product(tasks, models):
        jobs += _make_jobs(task, model, common, tasks[task], models[model], seeds, where)
    return jobs, launch


def run_sweep(
    jobs: Sequence[Job], output: Path, launchers: Path, at_once: int, launch: Sequence[str]
) -> str:
    """Run unfinished jobs, then write summary.json and the plots.

    Args:
        launchers: folder of finetune_glue.py and the other finetuning launchers.
        at_once: largest number of concurrent processes.
        launch: command that starts a launcher; empty: the running python.
    Returns:
        the table to print.
    Raises:
        UserError: naming the logs of failed jobs, after all other jobs have run.
    """
    output.mkdir(parents=True, exist_ok=True)
    command = list(launch) or [sys.executable]
    pending = [job for job in jobs if not _is_finished(job, output)]
    logger.info("%d of %d runs are finished", len(jobs) - len(pending), len(jobs))
    with ThreadPoolExecutor(at_once) as pool:
        succeeded = list(pool.map(lambda job: _run_job(job, output, launchers, command), pending))
    failed = [
        str(job.folder(output) / "log.txt")
        for job, success in zip(pending, succeeded, strict=True)
        if not success
    ]
    table = _write_summary([job for job in jobs if _is_finished(job, output)], output)
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} runs failed; see {', '.join(failed)}")
    return table


def _check_flags_by_name(value: Mapping[str, object], key: str, where: str) -> dict[str, Flags]:
    blocks = value.get(key)
    if not isinstance(blocks, dict) or not blocks:
        raise UserError(f"{where}: {key} is missing: names, each with its flags")
    return {
        str(name): _check_flags(flags or {}, f"{where}, {key}, {name}")
        for name, flags in blocks.items()
    }


def _check_flags(value: object, where: str) -> Flags:
    """Return a copy of flags from the file, checked to be a mapping without the flags that the
    sweep sets.
    """
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{where}: {value!r} is not `flag: value` lines")
    for name in ("output_dir", "seed", "seeds"):
        if name in value:
            raise UserError(f"{where}: {name} is chosen for each run; leave it out")
    return dict(value)


def _make_jobs(
    task: str,
    model: str,
    common: Flags,
    task_flags: Flags,
    model_flags: Flags,
    seeds: Sequence[int],
    where: str,
) -> Iterator[Job]:
    """Yield a job for each number of instances and each seed of a task and a model."""
    flags = {**common, **task_flags, **model_flags}
    launcher = flags.pop("launcher", "glue")
    if launcher not in LAUNCHERS:
        raise UserError(
            f"{where}, {task}: launcher {launcher!r} is not allowed; give {', '.join(LAUNCHERS)}"
        )
    if launcher == "mtl":
        flags = {"tasks": [task], **flags}
    elif "task_spec" not in flags:
        flags = {"task": task, **flags}
    value = flags.pop("num_instances", None)
    if isinstance(value, dict):
        counts = list(value.items())
    else:
        counts = [(count, {}) for count in (value if isinstance(value, list) else [value])]
    for instances, block in counts:
        if instances is not None and (type(instances) is not int or instances < 1):
            raise UserError(
                f"{where}, {model}: num_instances {instances!r} is not a whole number from 1"
            )
        count_flags = _check_flags(block, f"{where}, {model}, num_instances {instances}")
        job_flags = {
            name: flag.replace("{N}", str(instances or 1)) if isinstance(flag, str) else flag
            for name, flag in {**flags, **count_flags}.items()
        }
        if instances is not None:
            job_flags["num_instances"] = instances
        for seed in seeds:
            yield Job(task, model, instances or 1, seed, launcher, job_flags)


def _is_finished(job: Job, output: Path) -> bool:
    """Return True if the job has results from an earlier sweep.

    Raises:
        UserError: if the folder of the job holds a run with other flags.
    """
    folder = job.folder(output)
    record = folder / RECORD
    if not record.exists():
        return False
    previous = json.loads(record.read_text(encoding="utf-8"))
    if previous != job.list_arguments(output):
        raise UserError(
            f"{folder} holds a run with other flags ({' '.join(previous)}); remove it or choose "
            "another --output_dir"
        )
    return (folder / "results.json").exists()


def _run_job(job: Job, output: Path, launchers: Path, command: Sequence[str]) -> bool:
    """Run the job; return True if it succeeds and has results."""
    folder, words = job.folder(output), job.list_arguments(output)
    if Path(command[0]).name == "deepspeed" and "--master_port" not in command:
        # Concurrent launchers cannot share the default port.
        command = [*command, "--master_port", str(find_free_port(()))]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECORD, words)
    logger.info("%s starts", folder)
    with open(folder / "log.txt", "ab") as log:
        program = str(launchers / f"finetune_{job.launcher}.py")
        process = subprocess.run([*command, program, *words], stdout=log, stderr=log, check=False)
    success = process.returncode == 0 and (folder / "results.json").exists()
    logger.info("%s %s", folder, "is finished" if success else f"failed ({process.returncode})")
    return success


def _write_summary(jobs: Sequence[Job], output: Path) -> str:
    """Write summary.json of finished jobs and, if any was scored, scores.png and trade_off.png.

    Returns:
        a table of scores and a list of the files.
    """
    runs: dict[tuple[str, int], dict[str, list[dict[str, float]]]] = {}
    for job in jobs:
        record = json.loads((job.folder(output) / "results.json").read_text(encoding="utf-8"))
        if "task_score" in record:
            score = {"task_score": record["task_score"], **record["mean"]}
            score["instances_per_second"] = record["instances_per_second"]
            runs.setdefault((job.model, job.instances), {}).setdefault(job.task, []).append(score)
    rows: dict[str, dict[str, str]] = {}
    summary, lines, speeds = [], {}, {}
    for (model, instances), tasks in runs.items():
        row, means = {}, {}
        for task, scores in tasks.items():
            mean, deviation = compute_mean_and_deviation(scores)
            means[task] = mean["task_score"]
            row[task] = f"{mean['task_score']:.4f} ± {deviation['task_score']:.4f}"
            lines.setdefault(f"{task}, {model}", {})[instances] = (
                mean["task_score"],
                deviation["task_score"],
            )
            line = speeds.setdefault(task, {}).setdefault(model, {})
            line[instances] = (mean["instances_per_second"], mean["task_score"])
            summary.append(
                {
                    "task": task,
                    "model": model,
                    "num_instances": instances,
                    "seeds": len(scores),
                    "mean": mean,
                    "deviation": deviation,
                }
            )
        if set(GLUE) <= set(means):
            row["GLUE"] = f"{average_task_scores({task: means[task] for task in GLUE}):.4f}"
        rows[f"{model}, N = {instances}"] = row
    write_json(output / "summary.json", summary)
    files = {"numbers": "summary.json"}
    if lines:
        plot_scores_by_instances(lines, output / "scores.png")
        plot_trade_off(speeds, output / "trade_off.png")
        files |= {"plots": "scores.png", "": "trade_off.png"}
    table = format_score_table(rows, "score on dev") if rows else "nothing was scored (do_eval)"
    return "\n".join(
        ["", table, "", *(f"{label:7}  {output / file}" for label, file in files.items())]
    )
