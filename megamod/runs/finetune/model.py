"""A model and the tasks that a run finetunes it on."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn
from transformers import PreTrainedConfig

from megamod.data.batches import BatchDivision, StepBatches
from megamod.data.tasks.classification import TrainRows
from megamod.data.tasks.task_mixture import TaskMixture
from megamod.runs.finetune.tasks import FinetuneTask
from megamod.train.loop import SelectBatches
from megamod.train.objectives import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class FinetuneModel(Protocol):
    """A model and its tasks, whatever kind of model it is.

    Attributes:
        tasks: in the order of their ids; one task is a list of one.
        has_many_tasks: the model is made for any number of tasks, even if it has one.
        config: configuration of the model, with the labels of the tasks.
        inputs: names of the fields of a batch that the model takes.
        instances: N, rows that share a forward pass.
        pad_to: see `EncodedRows.gather_batch`.
        ensemble: see `iterate_held_out_rows`.
    """

    tasks: Sequence[FinetuneTask]
    has_many_tasks: bool
    config: PreTrainedConfig
    tokenizer: "PreTrainedTokenizerFast"
    inputs: Sequence[str]
    instances: int
    pad_to: int | None
    ensemble: bool

    def make_module(self, seed: int, folder: Path | None = None) -> nn.Module:
        """Build the model in float32 on the CPU; weights that its checkpoint lacks are drawn.

        Args:
            seed: seed of these weights.
            folder: folder of the run that trains it; rank 0 may write a record there. None: no
                record.
        Raises:
            UserError: if the weights cannot be loaded, or are not complete and not to be trained.
        """
        ...

    def load_module(self, folder: Path) -> nn.Module:
        """Load the model of a finished run in float32 on the CPU, from its model folder.

        Raises:
            UserError: if the weights cannot be loaded or are not complete.
        """
        ...

    def list_classifiers(self, module: nn.Module) -> Sequence[nn.Module]:
        """Return for each task a module that computes the `logits` of a batch.

        Args:
            module: the model; the modules share its weights.
        Returns:
            modules whose `logits` are [R, C] of R rows, or [R, L, C] of their tokens.
        """
        ...

    def make_batches(self, division: BatchDivision, seed: int) -> TrainRows | TaskMixture:
        """Return the training micro-batches of a rank, with a `digest` of all rows.

        Args:
            division: division of the global batch over the ranks, as seen from this one.
            seed: seed of the order of the rows.
        Raises:
            UserError: if rows cannot be divided so.
        """
        ...

    def compute_steps_per_epoch(self, batches: StepBatches) -> float:
        """Compute the steps of an epoch over `batches`, which need not be a whole number."""
        ...

    def make_objective(self, device: torch.device) -> Objective:
        """Make the training loss of a batch, for a model on `device`."""
        ...

    def make_row_selector(self, batches: StepBatches, device: torch.device) -> SelectBatches | None:
        """Make the selection among the rows of a step; None: all rows are trained on.

        Args:
            batches: the micro-batches of `make_batches`.
            device: device of the model.
        """
        ...
