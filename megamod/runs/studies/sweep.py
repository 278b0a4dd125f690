"""Many finetuning runs from one file: tasks x models x instances x seeds, as processes.

Finished runs are kept and interrupted ones resume. The results are a table and two plots: the score
by N (the number of instances that share a forward pass), and the score by instances per second.
"""

import itertools
import logging
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from megamod.btm.placement import find_free_port
from megamod.data.tasks.specs import GLUE
from megamod.errors import UserError, shorten
from megamod.evaluation.glue import average_task_scores
from megamod.evaluation.plots import plot_scores_by_instances, plot_trade_off
from megamod.evaluation.seeds import compute_mean_and_deviation
from megamod.files import write_json
from megamod.flags import format_flags
from megamod.names import Name
from megamod.runs.finetune.records import RESULTS, Results
from megamod.schemas import Items, Schema, check_against_schema, read_checked_file
from megamod.tables import format_score_table

logger = logging.getLogger(__name__)

RECORD = "job.json"  # in the folder of a run
LAUNCHERS = ("glue", "ner", "mtl")
LAUNCH_FLAGS = {
    "deepspeed": "num_gpus= num_nodes= include= exclude= hostfile= master_addr= master_port= "
    "node_rank= no_ssh force_multi bind_cores_to_rank bind_core_list=",
    "torchrun": "nnodes= nproc_per_node= node_rank= rdzv_backend= rdzv_endpoint= rdzv_id= "
    "max_restarts= master_addr= master_port= standalone",
    "srun": "nodes= N= ntasks= n= ntasks_per_node= gpus= G= gpus_per_node= gpus_per_task= "
    "cpus_per_task= c= mem= gres= partition= p= account= A= qos= q= constraint= C= nodelist= w= "
    "job_name= J= time= t= exclusive",
    "accelerate": "num_processes= num_machines= machine_rank= main_process_ip= main_process_port= "
    "mixed_precision= gpu_ids= num_cpu_threads_per_process= multi_gpu cpu",
}
"""Programs that a sweep may start, and those of their flags that start no other program; `=`: the
flag has a value."""


def _check_flags(flags: dict[str, object]) -> dict[str, object]:
    """Return the flags, for pydantic; raise ValueError for a flag that the sweep itself sets."""
    for name in flags:
        if name.replace("-", "_") in ("output_dir", "seed", "seeds"):
            raise ValueError(f"{name} is chosen for each run; leave it out")
    return flags


def _check_launch_command(words: tuple[str, ...]) -> tuple[str, ...]:
    """Return the words of a command that starts a launcher; none is the running python.

    Raises:
        ValueError: for a program that is not in `LAUNCH_FLAGS`, and for words that are no flag of
            it there, because they could start another program.
    """
    if not words:
        return words
    program, *rest = words
    if program not in LAUNCH_FLAGS:
        raise ValueError(f"{shorten(program)} is not one of {', '.join(LAUNCH_FLAGS)}")
    if program == "accelerate":
        if rest[:1] != ["launch"]:
            raise ValueError("accelerate needs `launch` after it")
        rest = rest[1:]
    if program == "srun" and rest[-1:] == ["python"]:
        rest = rest[:-1]
    known = {flag.rstrip("="): flag.endswith("=") for flag in LAUNCH_FLAGS[program].split()}
    following = iter(rest)
    for word in following:
        flag, equals, _ = word.partition("=")
        name = flag.lstrip("-").replace("-", "_")
        if flag[:1] != "-" or name not in known:
            raise ValueError(
                f"{shorten(word)} is not a flag of {program} that a sweep may set; allowed are "
                f"{', '.join(known)}"
            )
        if known[name] and not equals and next(following, None) is None:
            raise ValueError(f"{word} has no value")
    return words


Flags = Annotated[
    dict[str, object],
    BeforeValidator(lambda value: {} if value is None else value),
    AfterValidator(_check_flags),
]


class SweepFile(Schema):
    """The content of a sweep's file, see `read_sweep`."""

    common: Flags = Field({})
    tasks: dict[Name, Flags] = Field(min_length=1)
    models: dict[Name, Flags] = Field(min_length=1)
    seeds: Items[Annotated[int, Field(ge=0)]] = Field((1,), min_length=1)
    launch: Annotated[Items[str], AfterValidator(_check_launch_command)] = ()


@dataclass(frozen=True)
class SweepJob:
    """One run of a launcher.

    Attributes:
        instances: N, rows that share a forward pass.
        launcher: "glue", "ner" or "mtl".
        flags: flags of the launcher, without the seed and the output folder.
    """

    task: str
    model: str
    instances: int
    seed: int
    launcher: str
    flags: Mapping[str, object]

    def get_folder(self, output: Path) -> Path:
        """Return the folder of the run, OUT/TASK/MODEL/N-n/seed-s; it need not exist.

        Args:
            output: OUT.
        """
        return output / self.task / self.model / f"N-{self.instances}" / f"seed-{self.seed}"

    def list_arguments(self, output: Path) -> list[str]:
        """List the command-line arguments of the run; job.json records them.

        Args:
            output: folder of the sweep.
        """
        values = {**self.flags, "seed": self.seed, "output_dir": str(self.get_folder(output))}
        return format_flags(values)


def read_sweep(path: Path) -> tuple[list[SweepJob], list[str]]:
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
    file = read_checked_file(path, SweepFile)
    jobs: list[SweepJob] = []
    for task, model in itertools.product(file.tasks, file.models):
        jobs += _make_jobs(task, model, file, str(path))
    return jobs, [*file.launch]


def run_sweep(
    jobs: Sequence[SweepJob], output: Path, launchers: Path, at_once: int, launch: Sequence[str]
) -> str:
    """Run unfinished jobs, then write summary.json and the plots.

    Args:
        jobs: runs of the sweep, see `read_sweep`.
        output: folder of all runs, created if needed.
        launchers: folder of finetune_glue.py and the other finetuning launchers.
        at_once: largest number of concurrent processes.
        launch: command that starts a launcher; empty: the running python.
    Returns:
        the table to print.
    Raises:
        UserError: if a folder holds a run with other flags, before any job runs; naming the logs of
            failed jobs, after all other jobs have run.
    """
    output.mkdir(parents=True, exist_ok=True)
    command = list(launch) or [sys.executable]
    pending = [job for job in jobs if not _is_finished(job, output)]
    logger.info("%d of %d runs are finished", len(jobs) - len(pending), len(jobs))
    with ThreadPoolExecutor(at_once) as pool:
        succeeded = list(pool.map(lambda job: _run_job(job, output, launchers, command), pending))
    failed = [
        str(job.get_folder(output) / "log.txt")
        for job, success in zip(pending, succeeded, strict=True)
        if not success
    ]
    table = _write_summary([job for job in jobs if _is_finished(job, output)], output)
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} runs failed; see {', '.join(failed)}")
    return table


def _make_jobs(task: str, model: str, file: SweepFile, where: str) -> Iterator[SweepJob]:
    """Yield a job for each number of instances and each seed of a task and a model.

    Its flags are those of `common`, the task, the model and the number of instances, where a later
    one replaces an earlier one; {N} in texts becomes that number. The launcher is glue by default.

    Args:
        task, model: names in the file.
        file: content of the file.
        where: the file, for messages.
    Raises:
        UserError: for a launcher or a number of instances that is not allowed, or flags of a number
            of instances that are none.
    """
    flags = {**file.common, **file.tasks[task], **file.models[model]}
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
        key = f"models.{model}.num_instances.{instances}"
        count_flags = check_against_schema(block, Flags, where, key)
        job_flags = {
            name: flag.replace("{N}", str(instances or 1)) if isinstance(flag, str) else flag
            for name, flag in {**flags, **count_flags}.items()
        }
        if instances is not None:
            job_flags["num_instances"] = instances
        for seed in file.seeds:
            yield SweepJob(task, model, instances or 1, seed, launcher, job_flags)


def _is_finished(job: SweepJob, output: Path) -> bool:
    """Return True if the job has results from an earlier sweep.

    False if it never ran, or was interrupted, so that it runs (again).

    Args:
        output: folder of the sweep.
    Raises:
        UserError: if the folder of the job holds a run with other flags.
    """
    folder = job.get_folder(output)
    record = folder / RECORD
    if not record.exists():
        return False
    previous = read_checked_file(record, list[str])
    if previous != job.list_arguments(output):
        raise UserError(
            f"{folder} holds a run with other flags ({' '.join(previous)}); remove it or choose "
            "another --output_dir"
        )
    return (folder / RESULTS).exists()


def _run_job(job: SweepJob, output: Path, launchers: Path, command: Sequence[str]) -> bool:
    """Run a job and wait for it; return True if it succeeds and has results.

    Its folder gets job.json before, and log.txt is appended to.

    Args:
        output: folder of the sweep.
        launchers: folder of the finetuning launchers.
        command: words before the launcher's file.
    """
    folder, words = job.get_folder(output), job.list_arguments(output)
    port_is_set = any(word.startswith("--master_port") for word in command)
    if command[0] == "deepspeed" and not port_is_set:
        # Concurrent launchers cannot share the default port.
        command = [*command, "--master_port", str(find_free_port(()))]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECORD, words)
    logger.info("%s starts", folder)
    with open(folder / "log.txt", "ab") as log:
        program = str(launchers / f"finetune_{job.launcher}.py")
        process = subprocess.run([*command, program, *words], stdout=log, stderr=log, check=False)
    success = process.returncode == 0 and (folder / RESULTS).exists()
    logger.info("%s %s", folder, "is finished" if success else f"failed ({process.returncode})")
    return success


def _write_summary(jobs: Sequence[SweepJob], output: Path) -> str:
    """Write summary.json of finished jobs and, if any was scored, scores.png and trade_off.png.

    Args:
        jobs: jobs of the sweep, all with results.
        output: folder of the sweep.
    Returns:
        a table of scores and a list of the files.
    """
    runs: dict[tuple[str, int], dict[str, list[dict[str, float]]]] = {}
    for job in jobs:
        results = read_checked_file(job.get_folder(output) / RESULTS, Results)
        if results.task_score is not None:
            score = {"task_score": results.task_score, **results.mean}
            score["instances_per_second"] = results.instances_per_second
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
