"""The best model of a finetuning run, by the evaluations of its dev splits."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megamod.documents import read_document
from megamod.files import write_json
from megamod.runs.finetune.records import EVALUATIONS, Evaluation, Record
from megamod.train.export import ModelExport


class BestModel:
    """Evaluations of a run so far, which are also in OUT/evaluations.json, and its best model.

    Args:
        folder: of the run; the best model so far is in its subfolder `model`.
        value: from an evaluation to its score; None if it has none.
    """

    def __init__(self, folder: Path, value: Callable[[Record], float | None]):
        self.folder, self.value = folder, value
        self.evaluations: list[Record] = []

    @property
    def best(self) -> Record | None:
        """Return the first evaluation that no later one exceeds; None if there is none."""
        return max(self.evaluations, key=self.value, default=None)

    def load(self, step: int) -> None:
        """Read the evaluations up to `step`, at which the run resumes; later ones are dropped.

        Those without a score are dropped, too. At step 0, or if evaluations.json or OUT/model is
        missing, nothing is read.

        Raises:
            UserError: if evaluations.json is malformed.
        """
        file = self.folder / EVALUATIONS
        if step and file.exists() and (self.folder / "model").is_dir():
            recorded = read_document(file, list[Evaluation])
            earlier = [
                item.model_dump(exclude_unset=True) for item in recorded if item.step <= step
            ]
            self.evaluations = [item for item in earlier if self.value(item) is not None]

    def add(self, evaluation: Record) -> bool:
        """Add an evaluation; return True if it is the best one."""
        self.evaluations.append(evaluation)
        return self.best is self.evaluations[-1]

    def save(self) -> None:
        """Write all evaluations so far to OUT/evaluations.json; for one rank alone."""
        write_json(self.folder / EVALUATIONS, self.evaluations)

    def write_model(self, export: ModelExport, folder: Path) -> None:
        """Write the model that a run publishes at its end: a copy of OUT/model, which is the best
        one, or without evaluations the present model; collective.

        Args:
            export: writes the present model.
            folder: to write into.
        """
        if not self.evaluations:
            export(folder)
        elif dist.get_rank() == 0:
            shutil.copytree(self.folder / "model", folder, dirs_exist_ok=True)
