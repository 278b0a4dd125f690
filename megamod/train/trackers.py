"""Curves of a run in TensorBoard or Weights & Biases, as `--report_to` says."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from megamod.errors import UserError
from megamod.files import write_atomic
from megamod.run_recipe import read_run_recipe

RUN_ID = "wandb_id.txt"
"""File in the folder of a run with its name at Weights & Biases, the same when it resumes."""


class Tracker(Protocol):
    """A program that draws curves."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to the curve of each name in `values`, at a step.

        Raises:
            OSError: if it cannot be written.
        """
        ...

    def close(self) -> None:
        """Write the points that are still buffered, and end."""
        ...


class TensorBoardTracker:
    """Writes the files of TensorBoard into `tb` in the folder of a run.

    Args:
        folder: of the run.
        first_step: finished steps of a resumed run, else 0; later points are dropped.
    """

    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tb"), purge_step=first_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point at a step to the curve of each name in `values`, and flush it to the disk."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        """Write what is left and close the files."""
        self.writer.close()


class WandbTracker:
    """Sends curves and settings to Weights & Biases, or writes them to `wandb` in a run's folder.

    Project, mode and so on come from the environment variables of wandb, such as WANDB_PROJECT
    (default: megamod) and WANDB_MODE=offline.

    Args:
        folder: of the run, with run.yaml, which becomes the configuration.
    Raises:
        UserError: if wandb refuses to start.
    """

    def __init__(self, folder: Path):
        import wandb

        file = folder / RUN_ID
        if not file.is_file():
            write_atomic(file, uuid4().hex + "\n")
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "megamod"),
                name=os.environ.get("WANDB_NAME", folder.absolute().name),
                id=os.environ.get("WANDB_RUN_ID", file.read_text(encoding="utf-8").strip()),
                resume="allow",
                dir=str(folder),
                config=read_run_recipe(folder),
            )
        except wandb.Error as error:
            raise UserError(
                f"--report_to wandb: {str(error).rstrip('.')}; log in with `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from error
        # A resumed run repeats steps, which wandb refuses for the count that it keeps itself.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point at a step to the curve of each name in `values`; wandb sends it later."""
        self.run.log({**values, "step": step})

    def close(self) -> None:
        """Send what is left and end the run of wandb."""
        self.run.finish()


def check_tracker(name: str) -> None:
    """Raise UserError if `name`, a value of --report_to, needs a package that is not installed."""
    if name == "wandb" and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "--report_to wandb: wandb is not installed; pip install 'megamod[wandb]', or give "
            "--report_to tensorboard"
        )


def open_tracker(name: str, folder: Path, first_step: int) -> Tracker | None:
    """Open the tracker of a run; None for the name "none".

    Args:
        name: value of --report_to.
        folder: of the run, which exists.
        first_step: finished steps of a resumed run, else 0.
    Raises:
        UserError: see `WandbTracker`.
    """
    if name == "wandb":
        return WandbTracker(folder)
    return TensorBoardTracker(folder, first_step) if name == "tensorboard" else None
