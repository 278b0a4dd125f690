"""Finetuning on sentence tasks and on labels per word, one instance or N in a forward pass.

A run trains with the one loop, scores the dev splits on the way, keeps the model that was best by
the task's first metric, and writes predictions. Several seeds are several runs.
"""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers.utils.logging import disable_progress_bar

from megamod.args import Arguments, OptimArgs, RunArgs, SafetyArgs, origin_of
from megamod.data.batches import check_instances
from megamod.data.tasks.classification import TrainRows
from megamod.data.tasks.specs import describe
from megamod.dist.process import init_process, started_rank, started_world_size
from megamod.dist.scope import Sharing
from megamod.dist.topology import DomainTopology
from megamod.evaluation.glue import (
    Scores,
    mean_and_deviation,
    score_table,
    task_score,
)
from megamod.files import write_json
from megamod.flags import change
from megamod.runs.finetune.args import TaskArgs, TunedArgs, WordArgs
from megamod.runs.finetune.problem import Problem, load_model, prepare
from megamod.runs.finetune.scores import (
    RESULTS,
    Best,
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
from megamod.train.objectives import Classify


def finetune(
    run: RunArgs,
    safety: SafetyArgs,
    optim: OptimArgs,
    tuned: TunedArgs,
    args: TaskArgs,
    words: WordArgs | None = None,
) -> None:
    """Train, score and predict as the flags say; print a table and write OUT/results.json.

    Args:
        words: given for labels per word.
    Raises:
        UserError: for arguments, data, model or ranks that do not fit, before anything is written.
    """
    disable_progress_bar()
    problem = prepare(tuned, args, words)
    for flag in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        if origin_of(run, flag) == "default":
            change(run, {flag: 32 * problem.instances}, "32 x --num_instances")
    check_instances(
        "--per_device_eval_batch_size", run.per_device_eval_batch_size, problem.instances
    )
    parsed = tuple(part for part in (run, safety, optim, tuned, args, words) if part is not None)
    output = Path(run.output_dir)
    if tuned.do_train:
        runs = train_with_seeds(parsed, partial(_train, problem))
        if runs is None:
            return
    else:
        device = init_process(safety.dist_timeout)
        model = problem.make_model(run.seed).to(device)
        runs = {run.seed: _answer(problem, model, device, run, tuned, args, output)}
    if started_rank() == 0:
        print(_report(problem, runs, output, tuned))


def _train(problem: Problem, parsed: Sequence[Arguments], folder: Path) -> dict[str, object] | None:
    """One run; what is to be said of it, None if only the groups were asked for."""
    run, safety, optim, tuned, args = parsed[:5]
    task, train = problem.task, problem.encoded["train"]
    topology = DomainTopology(started_world_size(), (task.name,), Sharing.DENSE)
    settled = settle(run, optim, safety, topology, problem.config.hidden_size)
    steps_of_epochs(run, tuned, len(train) / settled.global_batch)
    metric = task.metrics[0]
    best = Best(folder, lambda one: one["scores"]["dev"].get(metric))

    def make_model() -> nn.Module:
        if dist.get_rank() == 0:
            shutil.rmtree(folder / "tokenizer", ignore_errors=True)
            problem.tokenizer.save_pretrained(folder / "tokenizer")
        return problem.make_model(run.seed)

    def make_evaluate(running: Running) -> "_Evaluation":
        best.load(running.state.step)
        return _Evaluation(problem, run, running, best)

    recipe = Recipe(
        config=problem.config,
        topology=topology,
        data_digest=train.digest,
        tokenizer=folder / "tokenizer",
        card=_card(problem),
        groups=(task.name,),
        unit="tokens" if train.per_token else "examples",
        make_batches=lambda shape: TrainRows(
            train, shape, seed=run.seed, instances=problem.instances, pad_to=problem.pad_to
        ),
        make_model=make_model,
        make_objective=lambda device: Classify(
            problem.inputs, device, task.regression, problem.retrieved
        ),
        make_evaluate=make_evaluate if tuned.do_eval else lambda running: lambda step: None,
        write_model=best.write_model,
    )
    done = execute(recipe, parsed, workers=args.dataloader_num_workers)
    if done is None:
        return None
    if dist.get_rank() == 0:
        done.monitor.close()
    record: dict[str, object] = {"step": done.state.step}
    if best.evaluations:
        record |= {"best": best.best, "last": best.evaluations[-1]}
    if tuned.do_predict:
        model = load_model(task, str(folder / "model")).to(done.device)
        predictor = predictor_of(problem, model, done.device)
        record["predicted"] = predict(
            problem, predictor, run, args.predict_split, folder / "predictions"
        )
    if dist.get_rank() == 0:
        write_json(folder / RESULTS, {**_facts(problem), "seed": run.seed, **record})
    return record


def _answer(
    problem: Problem,
    model: nn.Module,
    device: torch.device,
    run: RunArgs,
    tuned: TunedArgs,
    args: TaskArgs,
    output: Path,
) -> dict[str, object]:
    """Score and predict with a model as it is."""
    predictor, record = predictor_of(problem, model, device), {}
    if tuned.do_eval:
        scores = {s: score_split(problem, s, predictor, run)[0] for s in problem.splits("dev")}
        speed = predictor.instances_per_second
        record["last"] = record["best"] = _evaluation(0, scores, speed)
    if tuned.do_predict:
        record["predicted"] = predict(
            problem, predictor, run, args.predict_split, output / "predictions"
        )
    return record


class _Evaluation:
    """Called in training: scores the dev splits, and publishes the model if it is the best."""

    def __init__(self, problem: Problem, run: RunArgs, running: Running, best: Best):
        self.problem, self.run, self.running, self.best = problem, run, running, best
        self.predictor = predictor_of(problem, running.engine.module, running.device)

    def __call__(self, step: int) -> None:
        scores = {}
        for split in self.problem.splits("dev"):
            scores[split], _ = score_split(self.problem, split, self.predictor, self.run)
            for name, value in scores[split].items():
                if isinstance(value, float):
                    told = {self.problem.task.name: value}
                    self.running.monitor.evaluated(step, told, split, kind=name)
        if self.best.add(_evaluation(step, scores, self.predictor.instances_per_second)):
            publish(self.running.export, self.running.output / "model")
        if dist.get_rank() == 0:
            self.best.save()


def _evaluation(step: int, scores: dict[str, Scores], speed: float) -> dict[str, object]:
    """Scores by split, and rows per second of rank 0, forward passes alone."""
    return {"step": step, "scores": scores, "instances_per_second": speed}


def _facts(problem: Problem) -> dict[str, object]:
    return {
        "task": describe(problem.task),
        "num_instances": problem.instances,
        "rows": {split: len(encoded) for split, encoded in problem.encoded.items()},
        "cut_rows": {split: encoded.cut for split, encoded in problem.encoded.items()},
    }


def _report(
    problem: Problem, runs: dict[int, dict[str, object]], output: Path, tuned: TunedArgs
) -> str:
    """Write OUT/results.json; the table to print."""
    rows = {}
    for seed, record in runs.items():
        splits = {**record.get("best", {}).get("scores", {}), **record.get("predicted", {})}
        rows[f"seed {seed}"] = {
            f"{split} {name}": value
            for split, scores in splits.items()
            for name, value in scores.items()
            if isinstance(value, float)
        }
    means, deviations = mean_and_deviation(list(rows.values()))
    record = {
        **_facts(problem),
        "model": tuned.model or tuned.config_name,
        "metric": problem.task.metrics[0],
        "seeds": {str(seed): one for seed, one in runs.items()},
        "mean": means,
        "deviation": deviations,
    }
    held = [one["best"] for one in runs.values() if "best" in one]
    if held:
        scores = [task_score(problem.task, one["scores"]) for one in held]
        record["task_score"] = float(np.mean(scores))
        speeds = [one["instances_per_second"] for one in held]
        record["instances_per_second"] = float(np.mean(speeds))
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / RESULTS, record)
    if len(runs) > 1:
        rows["mean"], rows["deviation"] = means, deviations
    table = score_table(rows, problem.task.name) if means else "nothing was scored"
    return "\n".join(["", table, "", told_places(output, tuned)])


def _card(problem: Problem) -> Card:
    task = problem.task
    kind = "TokenClassification" if task.kind == "token" else "SequenceClassification"
    return Card(
        summary=f"A classifier for the task {task.name}, trained with megamod.",
        tags=("classification", task.name),
        facts={
            "labels, in order": ", ".join(task.labels) or "a number",
            "instances that share a forward pass": str(problem.instances),
        },
        load=f"AutoModelFor{kind}.from_pretrained(FOLDER)",
    )
