"""What a finetuning run makes of its held-out rows: scores, predictions, and the best model."""

import copy
import json
import math
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from megamod.args import Arguments, RunArgs, origin_of
from megamod.data.tasks.classification import held_out_rows
from megamod.dist.process import all_reduce
from megamod.evaluation.glue import (
    Scores,
    accuracy_by_slot,
    answers_of,
    score_texts,
    submission,
)
from megamod.evaluation.ner import (
    conll_text,
    entity_counts,
    has_runs,
    score_words,
    word_accuracy_by_slot,
)
from megamod.evaluation.predict import Predictor, labels_of_words
from megamod.files import write_atomic, write_json
from megamod.flags import change
from megamod.runs.finetune.args import StageArgs
from megamod.runs.finetune.problem import Problem
from megamod.train.export import ModelExport

RESULTS = "results.json"
EVALUATIONS = "evaluations.json"
Evaluation = dict[str, object]


class Best:
    """Scores of a run so far, kept beside it, and the best of them.

    Args:
        folder: of the run.
        value: how good an evaluation is; None if it does not tell.
    """

    def __init__(self, folder: Path, value: Callable[[Evaluation], float | None]):
        self.folder, self.value = folder, value
        self.evaluations: list[Evaluation] = []

    @property
    def best(self) -> Evaluation | None:
        """The first evaluation that no later one is better than."""
        return max(self.evaluations, key=self.value, default=None)

    def load(self, step: int) -> None:
        """Take up what a run that resumes behind `step` has scored until then."""
        file = self.folder / EVALUATIONS
        if step and file.exists() and (self.folder / "model").is_dir():
            kept = json.loads(file.read_text(encoding="utf-8"))
            kept = [one for one in kept if self.value(one) is not None]
            self.evaluations = [one for one in kept if one["step"] <= step]

    def add(self, evaluation: Evaluation) -> bool:
        """Take in an evaluation; True if it is the best one."""
        self.evaluations.append(evaluation)
        return self.best is self.evaluations[-1]

    def save(self) -> None:
        """Write all evaluations."""
        write_json(self.folder / EVALUATIONS, self.evaluations)

    def write_model(self, export: ModelExport, folder: Path) -> None:
        """OUT/model holds the best model at the end, which is there already, or the last one."""
        if not self.evaluations:
            export(folder)
        elif dist.get_rank() == 0:
            shutil.copytree(self.folder / "model", folder, dirs_exist_ok=True)


def train_with_seeds(
    parsed: Sequence[Arguments],
    train: Callable[[tuple[Arguments, ...], Path], Evaluation | None],
) -> dict[int, Evaluation] | None:
    """One run, or one for each of --seeds in a folder of its own.

    Args:
        parsed: all arguments.
        train: from the arguments of a run and its folder to what is to be said of it.
    Returns:
        that, by seed; None if only the groups were asked for.
    """
    run = next(part for part in parsed if isinstance(part, RunArgs))
    seeds = next(part for part in parsed if isinstance(part, StageArgs)).seeds
    runs = {}
    for seed in map(int, seeds or [run.seed]):
        folder = Path(run.output_dir) / f"seed-{seed}" if seeds else Path(run.output_dir)
        done = train(_with_seed(parsed, seed, folder), folder)
        if done is None:
            return None
        runs[seed] = done
    return runs


def _with_seed(parsed: Sequence[Arguments], seed: int, folder: Path) -> tuple[Arguments, ...]:
    own = copy.deepcopy(tuple(parsed))
    for part in own:
        if isinstance(part, RunArgs):
            change(part, {"seed": seed, "output_dir": str(folder)}, "--seeds")
        if isinstance(part, StageArgs):
            change(part, {"seeds": None}, "--seeds")
    return own


def steps_of_epochs(run: RunArgs, stage: StageArgs, epoch: float) -> None:
    """Where --max_steps is not given, set it to as many epochs as are wanted.

    Args:
        epoch: steps of one, perhaps no whole number.
    """
    if origin_of(run, "max_steps") == "default":
        steps = math.ceil(stage.num_train_epochs * epoch - 1e-9)
        change(run, {"max_steps": steps}, f"--num_train_epochs {stage.num_train_epochs:g}")


def told_places(output: Path, stage: StageArgs, *more: tuple[str, str]) -> str:
    """Where everything of a run is, a line each.

    Args:
        more: names and files below OUT that a trained run has besides.
    """
    places = [("numbers", output / RESULTS)]
    if stage.do_train and not stage.seeds:
        places += [("model", output / "model"), *((name, output / file) for name, file in more)]
    if stage.do_predict and not stage.seeds:
        places.append(("predictions", output / "predictions"))
    return "\n".join(f"{name:11}  {place}" for name, place in places)


def predictor_of(problem: Problem, module: nn.Module, device: torch.device) -> Predictor:
    """What answers the rows of a problem, the work divided among all ranks."""
    return Predictor(
        module, problem.inputs, device, dist.get_rank(), dist.get_world_size(), all_reduce
    )


def score_split(
    problem: Problem, split: str, predictor: Predictor, run: RunArgs
) -> tuple[Scores | None, np.ndarray | list[list[str]]]:
    """Scores (None if labels are hidden), and logits of rows or labels of words; collective."""
    task, found, encoded = problem.task, problem.sets[split], problem.encoded[split]
    batches = list(
        held_out_rows(
            encoded,
            run.per_device_eval_batch_size,
            problem.instances,
            problem.pad_to,
            ensemble=problem.ensemble,
            seed=run.seed,
        )
    )
    answers = predictor(encoded, batches)
    if encoded.per_token:
        answers = labels_of_words(encoded, answers, task.labels)
        if found.labels is None:
            return None, answers
        scores = score_words(task, found.labels, answers)
        slots = partial(word_accuracy_by_slot, found.labels, answers)
        if "f1" in task.metrics:
            by_type = entity_counts(found.labels, answers, has_runs(task))
            scores["by_type"] = {kind: count.scores() for kind, count in by_type.items()}
    else:
        if found.labels is None:
            return None, answers
        scores = score_texts(task, answers, found.labels)
        slots = partial(accuracy_by_slot, answers_of(task, answers), found.labels)
    if problem.instances > 1 and not (task.regression or problem.ensemble):
        scores["accuracy_by_slot"] = slots(problem.instances)
    return scores, answers


def predict(
    problem: Problem,
    predictor: Predictor,
    run: RunArgs,
    kind: str,
    folder: Path,
    name: str = "{split}.txt",
) -> dict[str, Scores]:
    """Write predictions of the splits of a kind; scores of those whose labels are known.

    Args:
        folder: where the files come.
        name: of a file of labels per word, with {split}.
    """
    scored = {}
    task = problem.task
    for split in problem.splits(kind):
        scores, answers = score_split(problem, split, predictor, run)
        if scores is not None:
            scored[split] = scores
        if dist.get_rank() > 0:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        if task.kind == "token":
            found = problem.sets[split]
            text = conll_text(found.words, answers, found.labels)
            file = name.format(split=split)
        else:
            text = submission(task, answers)
            file = task.submission.get(split, f"{task.name}_{split}.tsv")
        write_atomic(folder / file, text)
    return scored
