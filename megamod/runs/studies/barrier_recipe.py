"""Settings of `megamod eval-barrier`: the YAML file of a barrier study, and the files it writes.

`barrier` runs a barrier study. The studies of `megamod study`, one kind of which measures barriers
too, are read by `study_file`. `HeldOutSettings` are also the base of the
`evaluation:` block of a merge recipe, see `soup`.
"""

import itertools
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from megamod.errors import UserError
from megamod.merging.alignment.options import EffectiveAlignmentOptions
from megamod.names import Name, parse_name
from megamod.schemas import Items, Number, Schema, read_checked_file

MLM, CLM = "mlm", "clm"  # the tasks without labels
RECORD = "study.json"  # in OUT


class HeldOutSettings(Schema):
    """Held-out data that losses are measured on.

    Attributes:
        data: text file for mlm and clm, which need one; task folder for tasks with labels; None:
            the hub.
        tokenizer: folder or hub name; None: tokenizer of the first model.
        max_seq_length: tokens per block of text; largest number of tokens per row.
        batch_size: rows per forward pass.
        max_items: blocks, or rows per split, to evaluate; None: all.
        seed: seed of the masks.
        mlm_probability: share of masked tokens.
    """

    data: str | None = None
    tokenizer: str | None = None
    max_seq_length: int = Field(128, ge=2)
    batch_size: int = Field(8, ge=1)
    max_items: int | None = Field(None, ge=1)
    seed: int = Field(42, ge=0)
    mlm_probability: float = Field(0.15, gt=0, lt=1)

    @model_validator(mode="after")
    def _check_masking(self) -> "HeldOutSettings":
        """Return the settings; a validator that pydantic calls.

        Raises:
            ValueError: if a setting that only the task mlm uses is set without this task.
        """
        for key in sorted({"seed", "mlm_probability"} & self.model_fields_set):
            if MLM not in self.tasks:
                raise ValueError(f"{key}: has no effect without the task mlm; leave it out")
        return self


def _number_models(value: object) -> object:
    """Return models by name, for pydantic: those of a list are named by their numbers from 1.

    Any other value is returned unchanged.
    """
    return dict(enumerate(value, start=1)) if isinstance(value, list) else value


def _fill_pairs(value: object, info: ValidationInfo) -> object:
    """Return the pairs of a study, for pydantic: all pairs of its models if `value` is None.

    Args:
        value: pairs in the file, returned unchanged; None: there are none.
        info: holds the models, which are validated before.
    """
    models = info.data.get("models", ())
    return tuple(itertools.combinations(models, 2)) if value is None else value


def _parse_variant_name(value: object) -> str:
    """Return the name of a variant as text; unlike other names it may have blanks within.

    Raises:
        ValueError: if it is no name.
    """
    blanks = isinstance(value, str) and value.strip() == value
    parse_name(value.replace(" ", "_") if blanks else value)
    return str(value)


_VariantName = Annotated[str, BeforeValidator(_parse_variant_name)]
_Variant = Annotated[EffectiveAlignmentOptions, BeforeValidator(lambda value: value or {})]


class BarrierStudy(HeldOutSettings):
    """Settings of a barrier study.

    Attributes:
        models: by name, a folder or hub name; {task} in it is replaced by the task.
        pairs: names of two models each; the second is aligned to the first.
        tasks: "mlm", "clm", and names of tasks with labels.
        points: models evaluated on each line, ends included.
        char_split: see `space_characters` of `read_text_blocks`.
        variants: alignment options by name; the method "identity" does not align.
    """

    models: Annotated[dict[Name, str], Field(min_length=2), BeforeValidator(_number_models)]
    pairs: Annotated[
        Items[Items[Name]], Field(min_length=1, validate_default=True), BeforeValidator(_fill_pairs)
    ] = None
    tasks: Annotated[
        Items[Name],
        BeforeValidator(lambda value: value if isinstance(value, list) else [value]),
    ] = Field((MLM,), alias="task", min_length=1)
    variants: dict[_VariantName, _Variant] = Field(min_length=1)
    points: int = Field(21, ge=2)
    char_split: bool = False

    @model_validator(mode="after")
    def _check_pairs(self) -> "BarrierStudy":
        """Return the study; raise ValueError for a pair that is not two different models of it."""
        for pair in self.pairs:
            if len(pair) != 2 or pair[0] == pair[1] or not set(pair) <= set(self.models):
                raise ValueError(f"pairs: {[*pair]} is not two of {', '.join(self.models)}")
        return self


def read_barrier_study(path: Path) -> BarrierStudy:
    """Read a barrier study from a YAML file.

        models: {a: runs/seed-1/model, b: runs/seed-2/model}   # or a list
        pairs: [[a, b]]                                        # default: all pairs
        task: mlm                                              # or clm, sst-2, wnut17, a list
        data: valid.txt
        variants:
          vanilla: {method: identity}
          ff+attn: {groups: [ff, attn], calibration: {path: train.txt, fraction: 0.1}}

    Raises:
        UserError: naming the key that is wrong and what is allowed.
    """
    return read_checked_file(path, BarrierStudy)


class RecordedStudy(Schema):
    """Content of study.json: the settings of a barrier study as JSON values, see `BarrierStudy`."""

    models: dict[str, Any]
    pairs: list[Any]
    tasks: list[Any]
    variants: dict[str, Any]
    data: Any
    tokenizer: Any
    max_seq_length: Any
    batch_size: Any
    points: Any
    max_items: Any
    seed: Any
    mlm_probability: Any
    char_split: Any


class Curve(Schema):
    """Content of a file of `curves/`: losses on the line between two models, by split.

    Attributes:
        weights: interpolation weights of the first model at each point, from 0 to 1.
        losses: in nats (squared errors of a regression), by split at each point; of text there is
            one split, "loss".
        barrier, barrier_over_mean: by split.
        costs: costs of the alignment, by permutation group.
    """

    weights: list[Number]
    losses: dict[str, list[Number]]
    barrier: dict[str, Number]
    barrier_over_mean: dict[str, Number]
    costs: dict[str, Any]


def make_study_record(study: BarrierStudy, output: Path) -> dict[str, object]:
    """Make the content of OUT/study.json, and check that it continues the study in OUT.

    Nothing is written. Models, pairs, tasks and variants may have been added or removed since the
    file in OUT, if any, but no other setting, and no model or variant of an earlier name, may
    differ.

    Args:
        output: OUT, which need not exist.
    Returns:
        the settings as JSON values.
    Raises:
        UserError: if the folder holds results of a different study, or study.json is malformed.
    """
    values = study.model_dump(mode="json")
    record = {key: values[key] for key in RecordedStudy.model_fields}
    path = output / RECORD
    if path.exists():
        previous = read_checked_file(path, RecordedStudy).model_dump()
        # Pairs, tasks, models and variants may be added; recorded ones must not change.
        fixed = [key for key in record if key not in ("models", "pairs", "tasks", "variants")]
        differs = [key for key in fixed if record[key] != previous[key]]
        for key in ("models", "variants"):
            shared = set(record[key]) & set(previous[key])
            differs += [f"{key}.{n}" for n in shared if record[key][n] != previous[key][n]]
        if differs:
            raise UserError(
                f"{output}: holds a study with another {differs[0]}; remove it or choose another "
                "--output_dir"
            )
    return record
