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
        folder: of the run.
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
        """Read the evaluations of a run that resumes after `step`; later ones are dropped.

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
        """Write all evaluations so far to OUT/evaluations.json, which `load` reads on resume."""
        write_json(self.folder / EVALUATIONS, self.evaluations)

    def write_model(self, export: ModelExport, folder: Path) -> None:
        """Write OUT/model at the end of a run: the best model, which is there already, or the last
        one.
        """
        if not self.evaluations:
            export(folder)
        elif dist.get_rank() == 0:
            shutil.copytree(self.folder / "model", folder, dirs_exist_ok=True)
