"""The best model of a finetuning run, by the evaluations of its dev splits."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megamod.files import write_json
from megamod.runs.finetune.records import EVALUATIONS, Evaluation, Record
from megamod.schemas import read_checked_file
from megamod.train.export import ModelExport, recover_model


class BestModel:
    """Evaluations of a run so far, which are also in OUT/evaluations.json, and its best model.

    Args:
        folder: OUT of the run; the best model so far is in its subfolder `model`.
        find_value: from an evaluation to the number that selects the best, larger is better; None
            if it has none.
    """

    def __init__(self, folder: Path, find_value: Callable[[Record], float | None]):
        """Start without evaluations; `load_evaluations` reads those of a resumed run."""
        self.folder, self.find_value = folder, find_value
        self.evaluations: list[Record] = []

    @property
    def best(self) -> Record | None:
        """Evaluation of the largest value, of equal ones the first; None without any evaluation."""
        return max(self.evaluations, key=self.find_value, default=None)

    def load_evaluations(self, step: int) -> None:
        """Read the evaluations up to `step`, at which the run resumes; collective.

        Later ones and those without a value are dropped. At step 0, or if evaluations.json or
        OUT/model is missing, nothing is read. The file is not changed before `save_evaluations`.

        Raises:
            UserError: if evaluations.json is malformed.
        """
        if dist.get_rank() == 0:
            recover_model(self.folder / "model")
        dist.barrier()
        file = self.folder / EVALUATIONS
        if step and file.exists() and (self.folder / "model").is_dir():
            recorded = read_checked_file(file, list[Evaluation])
            earlier = [
                item.model_dump(exclude_unset=True) for item in recorded if item.step <= step
            ]
            self.evaluations = [item for item in earlier if self.find_value(item) is not None]

    def add_evaluation(self, evaluation: Record) -> bool:
        """Add an evaluation, which must have a value; return True if it is the best one so far.

        It replaces one of the same step: a run killed during an evaluation repeats it.
        """
        step = evaluation["step"]
        self.evaluations = [item for item in self.evaluations if item["step"] != step]
        self.evaluations.append(evaluation)
        return self.best is self.evaluations[-1]

    def save_evaluations(self) -> None:
        """Write all evaluations so far to OUT/evaluations.json; one rank alone may call it."""
        write_json(self.folder / EVALUATIONS, self.evaluations)

    def write_model(self, export: ModelExport, folder: Path) -> None:
        """Write the model that a run publishes at its end; collective.

        It is a copy of OUT/model, the best one so far, or without evaluations the present model.

        Args:
            export: writes the present model; it is collective.
            folder: exists, or is created.
        """
        if not self.evaluations:
            export(folder)
        elif dist.get_rank() == 0:
            shutil.copytree(self.folder / "model", folder, dirs_exist_ok=True)
