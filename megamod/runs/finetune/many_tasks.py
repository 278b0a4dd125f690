"""Finetuning on many tasks at once: CA-MTL, or a plain BERT with a head per task.

Trains with the one loop, scores every task on the way, keeps the model whose mean score over the
tasks is best, and writes predictions of each. Several seeds are several runs.

Source: Pilault et al. 2021 (CA-MTL), sections 2 and 3.
"""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers.utils.logging import disable_progress_bar

from megamod.args import Arguments, OptimArgs, RunArgs, SafetyArgs
from megamod.data.tasks.specs import GLUE, describe
from megamod.data.tasks.task_mixture import TaskMixture
from megamod.dist.process import init_process, started_rank, started_world_size
from megamod.dist.scope import Sharing
from megamod.dist.topology import DomainTopology
from megamod.evaluation.glue import (
    Scores,
    glue_average,
    mean_and_deviation,
    score_table,
    task_score,
)
from megamod.evaluation.plots import plot_task_shares
from megamod.evaluation.predict import Predictor
from megamod.files import write_json
from megamod.models.ca_mtl.model import CaMtlForMultiTask, OneTask
from megamod.runs.finetune.many_tasks_args import ConditionedArgs, MixtureArgs
from megamod.runs.finetune.many_tasks_problem import Mixture, prepare
from megamod.runs.finetune.scores import (
    RESULTS,
    Best,
    Evaluation,
    predict,
    predictor_of,
    score_split,
    steps_of_epochs,
    told_places,
    train_with_seeds,
)
from megamod.runs.training import Recipe, Running, execute
from megamod.train.deepspeed_settings import settle
from megamod.train.export import Card, publish
from megamod.train.objectives import MultiTask
from megamod.train.selection import MostUncertain

SHARES = "task_shares.png"
AVERAGE = "average"


def finetune_tasks(
    run: RunArgs,
    safety: SafetyArgs,
    optim: OptimArgs,
    stage: ConditionedArgs,
    args: MixtureArgs,
) -> None:
    """Train, score and predict as the flags say; print a table and write OUT/results.json.

    Raises:
        UserError: for arguments, data, model or ranks that do not fit, before anything is written.
    """
    disable_progress_bar()
    mixture = prepare(stage, args)
    parsed, output = (run, safety, optim, stage, args), Path(run.output_dir)
    if stage.do_train:
        runs = train_with_seeds(parsed, partial(_train, mixture))
        if runs is None:
            return
    else:
        device = init_process(safety.dist_timeout)
        model, _ = mixture.make_model(run.seed)
        runs = {run.seed: _answer(mixture, model.to(device), device, run, stage, args, output)}
    if started_rank() == 0:
        print(_report(mixture, runs, output, stage))


def _train(mixture: Mixture, parsed: Sequence[Arguments], folder: Path) -> Evaluation | None:
    """One run; what is to be said of it, None if only the groups were asked for."""
    run, safety, optim, stage, args = parsed
    names = tuple(task.name for task in mixture.tasks)
    topology = DomainTopology(started_world_size(), names, Sharing.DENSE)
    settled = settle(run, optim, safety, topology, mixture.config.hidden_size)
    rows = TaskMixture(
        [problem.encoded["train"] for problem in mixture.problems],
        args.mt_sampling,
        settled.shape(started_rank()),
        seed=run.seed,
        alpha=args.sampling_alpha,
    )
    steps_of_epochs(run, stage, rows.epoch(args.percent_of_max_data_size))
    best = Best(folder, lambda one: one.get("score"))
    inputs = mixture.problems[0].inputs

    def make_model() -> CaMtlForMultiTask:
        model, report = mixture.make_model(run.seed)
        if dist.get_rank() == 0:
            shutil.rmtree(folder / "tokenizer", ignore_errors=True)
            mixture.tokenizer.save_pretrained(folder / "tokenizer")
            write_json(folder / "start.json", {"weights": mixture.weights, **report})
        return model

    def make_evaluate(running: Running) -> "_Evaluation":
        best.load(running.state.step)
        return _Evaluation(mixture, run, running, best)

    def make_choice(device: torch.device) -> MostUncertain:
        return MostUncertain(
            rows,
            inputs,
            names,
            mixture.config.task_kinds,
            device,
            scope=args.uncertainty_selection,
            dropout=not args.uncertainty_eval_mode,
            rule=args.uncertainty_score,
            regression=args.uncertainty_regression,
        )

    recipe = Recipe(
        config=mixture.config,
        topology=topology,
        data_digest=rows.digest,
        tokenizer=folder / "tokenizer",
        card=_card(mixture),
        groups=names,
        unit="examples",
        make_batches=lambda shape: rows,
        make_model=make_model,
        make_objective=lambda device: MultiTask(inputs, names, device, args.task_loss_reduction),
        make_evaluate=make_evaluate if stage.do_eval else lambda running: lambda step: None,
        make_choice=make_choice if args.mt_sampling == "uncertainty" else None,
        write_model=best.write_model,
    )
    done = execute(recipe, parsed, workers=args.dataloader_num_workers)
    if done is None:
        return None
    record: Evaluation = {"step": done.state.step}
    if best.evaluations:
        record |= {"best": best.best, "last": best.evaluations[-1], "by_task": _peaks(best)}
    if stage.do_predict:
        model = CaMtlForMultiTask.from_pretrained(folder / "model", dtype=torch.float32)
        record["predicted"] = _predict(
            mixture, model.to(done.device), done.device, run, args, folder
        )
    if dist.get_rank() == 0:
        done.monitor.close()
        plot_task_shares(folder / "metrics.jsonl", folder / SHARES)
        write_json(folder / RESULTS, {**_facts(mixture), "seed": run.seed, **record})
    return record


def _answer(
    mixture: Mixture,
    model: CaMtlForMultiTask,
    device: torch.device,
    run: RunArgs,
    stage: ConditionedArgs,
    args: MixtureArgs,
    output: Path,
) -> Evaluation:
    """Score and predict with a model as it is."""
    record: Evaluation = {}
    if stage.do_eval:
        evaluation = _evaluate(mixture, _predictors(mixture, model, device), run, 0)
        record["last"] = record["best"] = evaluation
    if stage.do_predict:
        record["predicted"] = _predict(mixture, model, device, run, args, output)
    return record


class _Evaluation:
    """Called in training: scores the dev splits, and publishes the model if it is the best."""

    def __init__(self, mixture: Mixture, run: RunArgs, running: Running, best: Best):
        self.mixture, self.run, self.running, self.best = mixture, run, running, best
        self.predictors = _predictors(mixture, running.engine.module, running.device)

    def __call__(self, step: int) -> None:
        evaluation = _evaluate(self.mixture, self.predictors, self.run, step)
        told: dict[tuple[str, str], dict[str, float]] = {}
        for task, splits in evaluation["tasks"].items():
            for split, scores in splits.items():
                for name, value in scores.items():
                    if isinstance(value, float):
                        told.setdefault((split, name), {})[task] = value
        for (split, name), values in told.items():
            self.running.monitor.evaluated(step, values, split, kind=name)
        score = {AVERAGE: evaluation["score"]}
        self.running.monitor.evaluated(step, score, "dev", kind="score")
        if self.best.add(evaluation):
            publish(self.running.export, self.running.output / "model")
        if dist.get_rank() == 0:
            self.best.save()


def _predictors(
    mixture: Mixture, model: CaMtlForMultiTask, device: torch.device
) -> list[Predictor]:
    return [
        predictor_of(problem, OneTask(model, task), device)
        for task, problem in enumerate(mixture.problems)
    ]


def _evaluate(
    mixture: Mixture, predictors: Sequence[Predictor], run: RunArgs, step: int
) -> Evaluation:
    """Scores by task and split, and their mean; collective."""
    tasks = {
        problem.task.name: {
            split: score_split(problem, split, predictor, run)[0] for split in problem.splits("dev")
        }
        for problem, predictor in zip(mixture.problems, predictors, strict=True)
    }
    scores = _task_scores(mixture, tasks)
    return {
        "step": step,
        "tasks": tasks,
        "score": float(np.mean(list(scores.values()))),
        "instances_per_second": float(np.mean([one.instances_per_second for one in predictors])),
    }


def _task_scores(mixture: Mixture, tasks: dict[str, dict[str, Scores]]) -> dict[str, float]:
    return {task.name: task_score(task, tasks[task.name]) for task in mixture.tasks}


def _peaks(best: Best) -> dict[str, dict[str, object]]:
    """Of each task the best value of each of its scores, and the step that had it."""
    peaks: dict[str, dict[str, object]] = {}
    for evaluation in best.evaluations:
        for task, splits in evaluation["tasks"].items():
            for split, scores in splits.items():
                for name, value in scores.items():
                    if not isinstance(value, float) or name == "loss":
                        continue
                    peak = peaks.setdefault(task, {}).get(f"{split} {name}")
                    if peak is None or value > peak["value"]:
                        at = {"value": value, "step": evaluation["step"]}
                        peaks[task][f"{split} {name}"] = at
    return peaks


def _predict(
    mixture: Mixture,
    model: CaMtlForMultiTask,
    device: torch.device,
    run: RunArgs,
    args: MixtureArgs,
    output: Path,
) -> dict[str, dict[str, Scores]]:
    """Write predictions of every task; scores where labels are known."""
    return {
        problem.task.name: predict(
            problem,
            predictor,
            run,
            args.predict_split,
            output / "predictions",
            f"{problem.task.name}_{{split}}.txt",
        )
        for problem, predictor in zip(
            mixture.problems, _predictors(mixture, model, device), strict=True
        )
    }


def _facts(mixture: Mixture) -> dict[str, object]:
    return {
        "tasks": [describe(task) for task in mixture.tasks],
        "variant": mixture.config.variant,
        "rows": {
            problem.task.name: {split: len(one) for split, one in problem.encoded.items()}
            for problem in mixture.problems
        },
        "cut_rows": {
            problem.task.name: {split: one.cut for split, one in problem.encoded.items()}
            for problem in mixture.problems
        },
    }


def _report(
    mixture: Mixture, runs: dict[int, Evaluation], output: Path, stage: ConditionedArgs
) -> str:
    """Write OUT/results.json; the table to print."""
    rows = {}
    for seed, record in runs.items():
        if "best" in record:
            scores = _task_scores(mixture, record["best"]["tasks"])
            row = {**scores, AVERAGE: record["best"]["score"]}
            if set(GLUE) <= set(scores):
                row["glue_avg"] = glue_average({task: scores[task] for task in GLUE})
            rows[f"seed {seed}"] = row
    record = {**_facts(mixture), "model": stage.model or stage.config_name}
    record["seeds"] = {str(seed): one for seed, one in runs.items()}
    if rows:
        means, deviations = mean_and_deviation(list(rows.values()))
        speeds = [one["best"]["instances_per_second"] for one in runs.values()]
        record |= {
            "mean": means,
            "deviation": deviations,
            "task_score": means[AVERAGE],
            "instances_per_second": float(np.mean(speeds)),
        }
        if len(runs) > 1:
            rows["mean"], rows["deviation"] = means, deviations
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / RESULTS, record)
    table = score_table(rows, "task score") if rows else "nothing was scored"
    places = told_places(output, stage, ("task shares", SHARES))
    return "\n".join(["", table, "", places])


def _card(mixture: Mixture) -> Card:
    tasks = ", ".join(task.name for task in mixture.tasks)
    return Card(
        summary=f"A model of many tasks ({tasks}), trained with megamod.",
        tags=("classification", "multi-task", *(task.name for task in mixture.tasks)),
        facts={"variant": mixture.config.variant, "tasks, in the order of their ids": tasks},
        load="AutoModel.from_pretrained(FOLDER)",
    )
