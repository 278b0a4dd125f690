"""A finetuning run: train on one task or many, score them on the way, keep the best model, predict.

A run has a list of tasks; one task is a list of one. What depends on the model is in the subclasses
of `FinetuneModel`: `OneTaskModel` and `ManyTasksModel` (CA-MTL). Several seeds are several runs.
"""

import copy
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers.utils.logging import disable_progress_bar

from megamod.args import RunArgs
from megamod.data.batches import check_fills_instance_groups
from megamod.dist.process import join_process_group, read_launcher_rank, read_launcher_world_size
from megamod.dist.scope import Sharing
from megamod.dist.topology import DomainTopology
from megamod.evaluation.plots import plot_task_shares
from megamod.evaluation.predict import Predictor
from megamod.evaluation.seeds import compute_mean_and_deviation
from megamod.files import write_json
from megamod.flags import Arguments, find_origin, set_values
from megamod.runs.finetune.args import StageArgs
from megamod.runs.finetune.best import BestModel
from megamod.runs.finetune.model import FinetuneModel
from megamod.runs.finetune.records import (
    AVERAGE,
    RESULTS,
    Record,
    TaskScores,
    find_selection_value,
    get_task_score,
    make_evaluation_record,
    make_finetuned_card,
    make_peaks_record,
    make_predictions_record,
    make_table_row,
    make_tasks_record,
)
from megamod.runs.finetune.scores import make_predictors, predict_splits, score_splits
from megamod.runs.training import ActiveRun, RunSpec, execute_run, lock_output
from megamod.tables import format_score_table
from megamod.train.deepspeed_settings import resolve_settings
from megamod.train.export import publish_model

SHARES_PLOT = "task_shares.png"  # in OUT, of a run on many tasks


def finetune(model: FinetuneModel, parsed: Sequence[Arguments]) -> None:
    """Train, score and predict as the flags say; rank 0 prints a table and writes OUT/results.json.

    Collective. With --print_groups only the table of ranks is printed.

    Args:
        model: see `prepare_one_task_model` and `prepare_many_tasks_model`.
        parsed: all arguments: RunArgs, SafetyArgs, OptimArgs, StageArgs, RowArgs, then others.
            Batch sizes that were not given are set in RunArgs.
    Raises:
        UserError: for arguments or ranks that do not fit, before anything is written, or if another
            job writes into the output folder.
        PolicyStop, Interrupted: see `megamod.train.loop.train`.
    """
    disable_progress_bar()
    run, safety, _, stage, _ = parsed[:5]
    output = Path(run.output_dir)
    _set_batch_sizes(run, model)
    if safety.print_groups:
        _train_once(model, parsed, output)
        return
    device = join_process_group(safety.dist_timeout)
    with lock_output(output):
        if stage.do_train:
            records = _train_with_seeds(model, parsed)
        else:
            records = {run.seed: _evaluate_only(model, parsed, device)}
        if read_launcher_rank() == 0:
            print(_write_results(model, records, output, stage))


def _evaluate_only(
    model: FinetuneModel, parsed: Sequence[Arguments], device: torch.device
) -> Record:
    """Score (--do_eval) and predict (--do_predict) with a model that is not trained; collective.

    Predictions are written into OUT/predictions.

    Args:
        parsed: see `finetune`.
        device: device of this rank.
    Returns:
        the entry of the seed in results.json.
    """
    run, _, _, stage, args = parsed[:5]
    predictors = make_predictors(model, model.make_module(run.seed).to(device), device)
    record: Record = {}
    if stage.do_eval:
        scores = score_splits(model, predictors, run)
        record["last"] = record["best"] = _make_evaluation(model, scores, predictors, 0)
    if stage.do_predict:
        folder = Path(run.output_dir) / "predictions"
        scores = predict_splits(model, predictors, run, args.predict_split, folder)
        record |= make_predictions_record(model, scores)
    return record


def _train_with_seeds(
    model: FinetuneModel, parsed: Sequence[Arguments]
) -> dict[int, Record] | None:
    """Train once with --seed, or once for each of --seeds in OUT/seed-S; collective.

    Args:
        model: the model and its tasks.
        parsed: see `finetune`; not changed.
    Returns:
        the entries of results.json by seed; None with --print_groups.
    """
    run, _, _, stage, *_ = parsed
    seeds = stage.seeds
    records = {}
    for seed in map(int, seeds or [run.seed]):
        folder = Path(run.output_dir) / f"seed-{seed}" if seeds else Path(run.output_dir)
        arguments = copy.deepcopy(tuple(parsed))
        set_values(arguments[0], {"seed": seed, "output_dir": str(folder)}, "--seeds")
        set_values(arguments[3], {"seeds": None}, "--seeds")
        record = _train_once(model, arguments, folder)
        if record is None:
            return None
        records[seed] = record
    return records


def _train_once(model: FinetuneModel, parsed: Sequence[Arguments], folder: Path) -> Record | None:
    """Train with one seed, score on the way, predict with the best model; collective.

    --max_steps of `parsed` is set if the epochs decide it.

    Args:
        parsed: see `finetune`.
        folder: --output_dir of `parsed`; it gets tokenizer, model, predictions and results.json.
    Returns:
        the entry of the seed in results.json; None with --print_groups.
    """
    run, safety, optim, stage, args = parsed[:5]
    names = tuple(task.spec.name for task in model.tasks)
    topology = DomainTopology(read_launcher_world_size(), names, Sharing.DENSE)
    settings = resolve_settings(run, optim, safety, topology, model.config.hidden_size)
    batches = model.make_batches(settings.make_batch_division(read_launcher_rank()), run.seed)
    _set_max_steps(run, stage, model.compute_steps_per_epoch(batches))
    best = BestModel(folder, partial(find_selection_value, model))

    def write_tokenizer() -> None:
        """Write OUT/tokenizer, which the export copies, on rank 0."""
        if dist.get_rank() == 0:
            shutil.rmtree(folder / "tokenizer", ignore_errors=True)
            model.tokenizer.save_pretrained(folder / "tokenizer")

    def make_evaluate(running: ActiveRun) -> Callable[[int], None]:
        """Make the evaluation on dev, which goes on from those that a resumed run has; collective.

        Without --do_eval it does nothing.
        """
        if not stage.do_eval:
            return lambda step: None
        best.load_evaluations(running.state.step)
        return _DevEvaluation(model, run, running, best)

    spec = RunSpec(
        config=model.config,
        topology=topology,
        data_digest=batches.digest,
        tokenizer=folder / "tokenizer",
        card=make_finetuned_card(model),
        groups=names,
        unit="tokens"
        if not model.has_many_tasks and model.tasks[0].spec.kind == "token"
        else "examples",
        make_batches=lambda division: batches,
        make_model=partial(model.make_module, run.seed, folder),
        make_objective=model.make_objective,
        make_evaluate=make_evaluate,
        prepare_output=write_tokenizer,
        make_row_selector=partial(model.make_row_selector, batches),
        write_model=best.write_model,
    )
    finished = execute_run(spec, parsed, workers=args.dataloader_num_workers)
    if finished is None:
        return None
    record: Record = {"step": finished.state.step}
    if best.evaluations:
        record |= {"best": best.best, "last": best.evaluations[-1]}
        record |= make_peaks_record(model, best.evaluations)
    if stage.do_predict:
        module = model.load_module(folder / "model").to(finished.device)
        predictors = make_predictors(model, module, finished.device)
        scores = predict_splits(model, predictors, run, args.predict_split, folder / "predictions")
        record |= make_predictions_record(model, scores)
    if dist.get_rank() == 0:
        finished.monitor.close()
        if model.has_many_tasks:
            plot_task_shares(folder / "metrics.jsonl", folder / SHARES_PLOT)
        write_json(folder / RESULTS, {**make_tasks_record(model), "seed": run.seed, **record})
    return record


def _set_batch_sizes(run: RunArgs, model: FinetuneModel) -> None:
    """Set batch sizes that were not given, in `run`, to 32 N rows, where N is `model.instances`.

    A model of many tasks has N = 1 and keeps the defaults of `run`.

    Raises:
        UserError: if a batch of evaluation does not fill its groups of N rows.
    """
    for flag in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        if find_origin(run, flag) == "default" and not model.has_many_tasks:
            set_values(run, {flag: 32 * model.instances}, "32 x --num_instances")
    check_fills_instance_groups(
        "--per_device_eval_batch_size", run.per_device_eval_batch_size, model.instances
    )


def _set_max_steps(run: RunArgs, stage: StageArgs, steps_per_epoch: float) -> None:
    """Set --max_steps in `run` to the steps of --num_train_epochs, unless it was given.

    Args:
        steps_per_epoch: need not be a whole number; the product is rounded up.
    """
    if find_origin(run, "max_steps") == "default":
        # A rounding error of the product must not add a step.
        steps = math.ceil(stage.num_train_epochs * steps_per_epoch - 1e-9)
        set_values(run, {"max_steps": steps}, f"--num_train_epochs {stage.num_train_epochs:g}")


class _DevEvaluation:
    """Evaluation during training: scores the dev splits, logs the scores, publishes the best model.

    Every rank calls it; rank 0 saves the records of all evaluations.

    Args:
        model, run: model and flags of the run, whose engine, monitor and exporter are in `running`.
        best: gets every evaluation.
    """

    def __init__(self, model: FinetuneModel, run: RunArgs, running: ActiveRun, best: BestModel):
        """Make a predictor for each task, which reads the weights in training."""
        self.model, self.run, self.running, self.best = model, run, running, best
        self.predictors = make_predictors(model, running.engine.module, running.device)

    def __call__(self, step: int) -> None:
        """Score after `step` steps, log, publish the model if it is the best so far; collective."""
        scores = score_splits(self.model, self.predictors, self.run)
        evaluation = _make_evaluation(self.model, scores, self.predictors, step)
        values_by_split: dict[tuple[str, str], dict[str, float]] = {}
        for task, splits in scores.items():
            for split, values in splits.items():
                for name, value in values.items():
                    if isinstance(value, float):
                        values_by_split.setdefault((split, name), {})[task] = value
        for (split, name), values in values_by_split.items():
            self.running.monitor.log_scores(step, values, split, kind=name)
        if self.model.has_many_tasks:
            average = {AVERAGE: evaluation["score"]}
            self.running.monitor.log_scores(step, average, "dev", kind="score")
        if self.best.add_evaluation(evaluation):
            publish_model(self.running.export, self.running.output / "model")
        if dist.get_rank() == 0:
            self.best.save_evaluations()


def _make_evaluation(
    model: FinetuneModel, scores: TaskScores, predictors: Sequence[Predictor], step: int
) -> Record:
    """Return the record of an evaluation, with the rows per second of this rank's forward passes.

    Args:
        scores: scores of the dev splits by task and split.
        predictors: one per task, which computed the scores.
        step: finished steps.
    """
    speed = float(np.mean([predictor.instances_per_second for predictor in predictors]))
    return make_evaluation_record(model, scores, step, speed)


def _write_results(
    model: FinetuneModel, records: Mapping[int, Record], output: Path, stage: StageArgs
) -> str:
    """Write OUT/results.json with the entries of all seeds, their means and deviations.

    Args:
        records: entries by seed.
        output: OUT, created if needed.
        stage: flags of the stages, for the name of the model and the list of files.
    Returns:
        the table and a list of the files, to print.
    """
    rows = {f"seed {seed}": make_table_row(model, record) for seed, record in records.items()}
    rows = {name: row for name, row in rows.items() if row is not None}
    spec = model.tasks[0].spec
    record = {**make_tasks_record(model), "model": stage.model or stage.config_name}
    if not model.has_many_tasks:
        record["metric"] = spec.metrics[0]
    record["seeds"] = {str(seed): run for seed, run in records.items()}
    means: Mapping[str, float] = {}
    if rows:
        means, deviations = compute_mean_and_deviation(list(rows.values()))
        record |= {"mean": means, "deviation": deviations}
    evaluations = [run["best"] for run in records.values() if "best" in run]
    if evaluations:
        speeds = [best["instances_per_second"] for best in evaluations]
        record["task_score"] = float(np.mean([get_task_score(model, best) for best in evaluations]))
        record["instances_per_second"] = float(np.mean(speeds))
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / RESULTS, record)
    if means and len(records) > 1:
        rows["mean"], rows["deviation"] = means, deviations
    table = (
        format_score_table(rows, "task score" if model.has_many_tasks else spec.name)
        if means
        else "nothing was scored"
    )
    return "\n".join(["", table, "", _format_output_files(model, output, stage)])


def _format_output_files(model: FinetuneModel, output: Path, stage: StageArgs) -> str:
    """Format the names and paths of the output files of a run, one per line, for the console.

    Args:
        output: OUT, folder of the run.
        stage: flags of the stages that were run; with --seeds only results.json is listed.
    """
    files = [("numbers", output / RESULTS)]
    if stage.do_train and not stage.seeds:
        files.append(("model", output / "model"))
        if model.has_many_tasks:
            files.append(("task shares", output / SHARES_PLOT))
    if stage.do_predict and not stage.seeds:
        files.append(("predictions", output / "predictions"))
    return "\n".join(f"{name:11}  {path}" for name, path in files)
