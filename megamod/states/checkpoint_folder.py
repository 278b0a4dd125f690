"""Checkpoint folders: how they are found, their files, state.json and optimizer fragments.

    checkpoints/latest                  name of the newest checkpoint
    checkpoints/sound                   step of the newest one that finite steps followed
    checkpoints/evaluating              step of an evaluation that has not ended
    checkpoints/step-N/                 a model folder: config.json, weight files, tokenizer
                      /optimizer-R.safetensors   fragments of rank R (optimizer-R-P: part P of them)
                      /state.json       step, data position, tokens, run settings (independent
                                        models: in the folder of each)
                      /manifest.json    bytes and SHA-256 of every file, see `manifest.py`

A fragment is a range of one flattened parameter: tensors KIND/NAME for those of `KINDS` that its
optimizer has, and the offset of the range under NAME in the metadata of the file. Importing this
needs no torch.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator, model_validator
from safetensors import safe_open

from megamod.errors import UserError, report_damage, shorten
from megamod.files import sync_folder, write_atomic
from megamod.schemas import Items, Schema, read_checked_file
from megamod.states.manifest import MANIFEST, STATE, find_file_faults
from megamod.states.model_folder import is_model_folder

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

LATEST, SOUND, PENDING = "latest", "sound", "evaluating"
"""File names, see above."""
WINDOW = 100  # data steps over which steps that are not finite are counted
FULL_CHECK_BYTES = 10**11  # above this, opening a checkpoint checks sizes only; `verify` checks all
_CHECKPOINT_NAME = re.compile("step-(0|[1-9][0-9]*)")
KINDS = ("master", "exp_avg", "exp_avg_sq", "momentum")
"""Tensors of a fragment: the weight in float32; AdamW's two moments in float32, or the momentum of
Muon in the precision of its gradients."""

Fragments = Mapping[str, tuple[int, Mapping[str, "Tensor"]]]
"""By the parameter's name: offset of the range in elements, and a tensor for each kind."""


def write_latest(folder: Path, checkpoint: Path) -> None:
    """Write the name of the newest checkpoint of a run to `LATEST`; both names are then on disk.

    A file that names it already is not changed.

    Args:
        folder: folder of the run's checkpoints, `checkpoint` one in it.
    """
    file, name = folder / LATEST, f"{checkpoint.name}\n"
    if not file.is_file() or file.read_text(encoding="utf-8", errors="replace") != name:
        write_atomic(file, name)  # syncs the folder
    else:
        sync_folder(folder)


@dataclass
class TrainState:
    """Progress of a run. Everything else about it follows from its settings.

    Attributes:
        step: finished optimizer steps, skipped ones included.
        data_step: steps' worth of data taken; ahead of `step` after a rollback, and from 0 again
            in a branch.
        tokens: target tokens trained on, per domain.
        skipped: steps whose update was left out because a loss or gradient was not finite.
        mean_loss: running mean of the loss, in nats per token, for spike detection.
        nonfinite_steps: data steps that were not finite (fp16: none); when one is added, those
            before the last `WINDOW` are dropped. See `list_recent_nonfinite`.
    """

    step: int = 0
    data_step: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    skipped: int = 0
    mean_loss: float | None = None
    nonfinite_steps: list[int] = field(default_factory=list)

    def record_nonfinite_step(self) -> int:
        """Record that the loss or gradient of the last data step was not finite.

        Returns:
            number of the last `WINDOW` data steps that were not finite, this one included.
        """
        self.nonfinite_steps.append(self.data_step)
        self.nonfinite_steps = self.list_recent_nonfinite()
        return len(self.nonfinite_steps)

    def list_recent_nonfinite(self) -> list[int]:
        """List the steps that were not finite among the last `WINDOW` data steps."""
        first = self.data_step - WINDOW
        return [step for step in self.nonfinite_steps if step > first]


_Count = Annotated[int, Field(ge=0)]
# Smallest values of the loss scaler's counters; the scale itself is above 0.
_SMALLEST = {"cur_iter": 0, "last_overflow_iter": -1, "scale_window": 1, "delayed_shift": 1}
_SMALLEST |= {"cur_hysteresis": 1}
_POSITIVE = ("cur_scale", "scale_factor", "min_scale")


class _TrainStateEntry(Schema):
    """Schema of the progress in state.json, see `TrainState`."""

    step: _Count
    data_step: _Count
    tokens: dict[str, _Count]
    skipped: _Count = 0
    mean_loss: Annotated[float, Field(allow_inf_nan=False)] | None = None
    nonfinite_steps: Items[_Count] = ()

    @model_validator(mode="after")
    def _check_counts(self) -> "_TrainStateEntry":
        """Return the entry. Raise ValueError for counts that contradict each other."""
        if self.skipped > self.data_step:
            raise ValueError(f"skipped is {self.skipped}, more than data_step, {self.data_step}")
        if max(self.nonfinite_steps, default=0) > self.data_step:
            raise ValueError(f"nonfinite_steps has a step after data_step, {self.data_step}")
        return self


class _StateFile(Schema):
    """Schema of state.json, see `StateRecord`."""

    state: _TrainStateEntry
    optimizer_steps: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    loss_scaler: dict[str, bool | int | float] = Field({})
    settings: dict[str, Any] = Field({})
    world_size: Annotated[int, Field(ge=1)] = 1
    branched: bool = False

    @field_validator("loss_scaler")
    @classmethod
    def _check_loss_scaler(cls, values: dict[str, bool | int | float]) -> dict[str, object]:
        """Return the numbers. Raise ValueError for one that no loss scaler can have."""
        for name, value in values.items():
            number = type(value) is not bool and math.isfinite(value)
            if name in _POSITIVE and not (number and value > 0):
                raise ValueError(f"{name} is {value}, not a finite number above 0")
            if name in _SMALLEST and not (type(value) is int and value >= _SMALLEST[name]):
                raise ValueError(f"{name} is {value}, not a whole number from {_SMALLEST[name]}")
        return values

    @model_validator(mode="after")
    def _check_updates(self) -> "_StateFile":
        """Return the content. Raise ValueError for more updates than steps, or parts of one."""
        if self.optimizer_steps > self.state.step or self.optimizer_steps % 1:
            raise ValueError(
                f"optimizer_steps is {self.optimizer_steps:g}, not a whole number up to step, "
                f"{self.state.step}"
            )
        return self


@dataclass
class StateRecord:
    """Content of state.json.

    Attributes:
        state: progress of the run.
        optimizer_steps: updates that Adam counts, for its bias correction.
        loss_scaler: numbers of the loss scaler of fp16.
        settings: settings that a resumed run must repeat.
        world_size: ranks of the run that wrote it.
        branched: True in the first checkpoint of a branch, whose settings are only those that it
            shares with its parent.
    """

    state: TrainState = field(default_factory=TrainState)
    optimizer_steps: float = 0.0
    loss_scaler: dict[str, object] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)
    world_size: int = 1
    branched: bool = False

    def write(self, folder: Path) -> Path:
        """Write state.json into a hidden folder, which is renamed later; return its path.

        Because of that rename the file itself is not written atomically.
        """
        record = asdict(self)
        if not self.branched:
            del record["branched"]
        if not self.state.nonfinite_steps:  # the same file as before this field existed
            del record["state"]["nonfinite_steps"]
        file = folder / STATE
        file.write_text(json.dumps(record, indent=2) + "\n")
        return file

    @classmethod
    def read(cls, folder: Path) -> "StateRecord":
        """Read state.json of a folder.

        Raises:
            UserError: if it is missing or malformed.
        """
        record = read_checked_file(folder / STATE, _StateFile).model_dump()
        state = record["state"]
        state["nonfinite_steps"] = list(state["nonfinite_steps"])
        return cls(**{**record, "state": TrainState(**state)})


def format_checkpoint_name(step: int) -> str:
    """Format the name of the folder of a step's checkpoint."""
    return f"step-{step}"


def parse_checkpoint_step(checkpoint: Path) -> int:
    """Parse the step of a checkpoint from the name of its folder, `step-N` or just `N`.

    Raises ValueError for another name.
    """
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints step-N in `folder` by rising step, valid or not."""
    folders = [
        path for path in Path(folder).glob("step-*") if _CHECKPOINT_NAME.fullmatch(path.name)
    ]
    return sorted(folders, key=parse_checkpoint_step)


def find_checkpoint(folder: Path, choice: str, below: int | None = None) -> Path | None:
    """Find the checkpoint that a value of `--resume` means; None: start from step 0.

    Digests are compared too, with "auto" those of checkpoints of at most `FULL_CHECK_BYTES`. Logs a
    warning for each newer checkpoint that is not valid.

    Args:
        folder: folder of the run's checkpoints.
        choice: "auto", the valid one with the largest step, if there are any; "none"; or the path
            of a checkpoint.
        below: "auto" considers checkpoints of smaller steps only; None: all.
    Raises:
        UserError: if `choice` is a path that is not a valid checkpoint; if it is "auto" and
            checkpoints exist but none is valid; if it is "none" and checkpoints exist.
    """
    if choice not in ("auto", "none"):
        path = Path(choice)
        faults = find_file_faults(path)
        if faults:
            raise UserError(f"--resume {choice}: not a valid checkpoint: {faults[0]}")
        return path
    existing = list_checkpoints(folder)
    if below is not None:
        existing = [path for path in existing if parse_checkpoint_step(path) < below]
    if choice == "none":
        if existing:
            raise UserError(
                f"--resume none: {folder} holds checkpoints already ({existing[-1].name}); "
                "choose another --output_dir or resume"
            )
        return None
    faults: list[str] = []
    for path in reversed(existing):
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        faults = find_file_faults(path, check_digests=size <= FULL_CHECK_BYTES)
        if not faults:
            return path
        logger.warning("checkpoint %s is not valid (%s); trying the one before", path, faults[0])
    if existing:
        raise UserError(
            f"{folder}: none of {len(existing)} checkpoints is valid ({faults[0]}); "
            "remove the folder to start afresh"
        )
    return None


def is_checkpoint(path: Path) -> bool:
    """Return True if the folder has a state, or is named as a checkpoint, or has only a manifest.

    The name counts too, so that a checkpoint that lost both files is checked as one. Without a
    state, a manifest beside a model is that of a published model; checkpoints of independent models
    have models and states in folders below.
    """
    has_manifest_only = (path / MANIFEST).exists() and not is_model_folder(path)
    return has_manifest_only or (path / STATE).exists() or path in list_checkpoints(path.parent)


def is_optimizer_file(file: Path) -> bool:
    """Return True if the file name is that of optimizer fragments."""
    return file.name.startswith("optimizer-") and file.suffix == ".safetensors"


def build_optimizer_path(folder: Path, rank: int, part: int | None = None) -> Path:
    """Build the path of a rank's optimizer fragments in the checkpoint `folder`.

    Args:
        part: number of a part, where one rank writes several files; None: the only file.
    """
    return folder / f"optimizer-{rank}{'' if part is None else f'-{part}'}.safetensors"


def list_optimizer_files(folder: Path) -> list[Path]:
    """List the files of optimizer fragments in a checkpoint, sorted by name."""
    return sorted(folder.glob("optimizer-*.safetensors"))


def write_fragments(file: Path, fragments: Fragments) -> None:
    """Write optimizer fragments into one file, under the names of their parameters.

    The file is not written atomically; raises OSError if it cannot be written.
    """
    from megamod.states.weights import write_tensors

    tensors = {
        f"{kind}/{name}": tensor
        for name, (_, kinds) in fragments.items()
        for kind, tensor in kinds.items()
    }
    write_tensors(file, tensors, {name: str(start) for name, (start, _) in fragments.items()})


def read_fragments(
    file: Path, is_selected: Callable[[str], bool]
) -> Iterator[tuple[str, int, dict[str, "Tensor"]]]:
    """Read fragments of a file one by one: parameter name, offset in elements, tensors by kind.

    Tensors are 1-D and on the CPU.

    Args:
        is_selected: returns True for the names of parameters to read.
    Raises:
        UserError: if the file cannot be read, or as `read_fragment_ranges`.
    """
    with report_damage(f"{file}: cannot be read"), safe_open(file, framework="pt") as tensors:
        for name, start, _, kinds in _list_fragments(file, tensors):
            if is_selected(name):
                yield name, start, {kind: tensors.get_tensor(f"{kind}/{name}") for kind in kinds}


def read_fragment_ranges(
    folder: Path, sizes: Mapping[str, int] = MappingProxyType({})
) -> dict[str, list[tuple[int, int, Path]]]:
    """Read the ranges of each parameter that the optimizer files of a checkpoint store.

    Args:
        sizes: elements of parameters by name; those of other parameters are not known.
    Returns:
        by name: start and stop in elements of the flattened parameter, and the file, by rising
        start.
    Raises:
        UserError: if a file cannot be read; for an offset that is no number, tensors that are
            missing, of unequal length or of integers, ranges that overlap, and for one beyond the
            size of its parameter.
    """
    ranges: dict[str, list[tuple[int, int, Path]]] = {}
    for file in list_optimizer_files(folder):
        with report_damage(f"{file}: cannot be read"), safe_open(file, framework="np") as tensors:
            for name, start, size, _ in _list_fragments(file, tensors):
                ranges.setdefault(name, []).append((start, start + size, file))
    for name, rows in ranges.items():
        rows.sort()
        _, stop, file = rows[-1]
        if stop > sizes.get(name, stop):
            raise UserError(
                f"{file}: holds {stop} elements of {shorten(name)}, which has {sizes[name]}"
            )
        for (_, stop, first), (start, _, second) in pairwise(rows):
            if start < stop:
                raise UserError(
                    f"{second}: the range of {shorten(name)} from element {start} overlaps that of "
                    f"{first.name}, up to {stop}"
                )
    return ranges


def _list_fragments(file: Path, tensors: "safe_open") -> list[tuple[str, int, int, list[str]]]:
    """List the fragments in the header of an open file, by name.

    Metadata come in another order in every process, and copies must be equal bit for bit.

    Returns:
        name of the parameter, start and size of the range in elements, and the kinds of tensors.
    Raises:
        UserError: see `read_fragment_ranges`.
    """
    held, fragments = set(tensors.keys()), []
    for name, start in sorted((tensors.metadata() or {}).items()):
        kinds = [kind for kind in KINDS if f"{kind}/{name}" in held]
        if KINDS[0] not in kinds:
            raise UserError(f"{file}: has no tensor {shorten(f'{KINDS[0]}/{name}')}")
        if not (start.isascii() and start.isdecimal() and len(start) < 20):
            raise UserError(
                f"{file}: the offset of {shorten(name)} is {shorten(start)}, not a whole number"
            )
        slices = [tensors.get_slice(f"{kind}/{name}") for kind in kinds]
        shapes = [list(part.get_shape()) for part in slices]
        if len(shapes[0]) != 1 or shapes != [shapes[0]] * len(shapes):
            raise UserError(
                f"{file}: the tensors of {shorten(name)} have the shapes {shorten(shapes)}, not "
                "one length"
            )
        for part in slices:
            if part.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                raise UserError(
                    f"{file}: a tensor of {shorten(name)} holds {part.get_dtype()}, not "
                    "floating-point numbers"
                )
        fragments.append((name, int(start), shapes[0][0], kinds))
    return fragments
