"""What `fisher` and `regmean` weigh by, measured in the course of a merge on text of the recipe."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from megamod.errors import UserError
from megamod.merging.by_statistics import INPUT_FIRST
from megamod.merging.calibrated import diagonal_fisher, input_grams, write_statistics
from megamod.merging.recipe import Input, Recipe
from megamod.merging.settings import check_word
from megamod.states.forest import read_config
from megamod.states.stream import ModelFolder

_KEYS = ("path", "fraction", "batch_size")
_MEASURES: dict[str, Callable[[nn.Module, Iterable[Mapping[str, Tensor]]], dict[str, Tensor]]] = {
    "fisher": diagonal_fisher,
    "regmean": input_grams,
}


def check_calibration(recipe: Recipe) -> None:
    """Refuse text that cannot be measured on, before anything is.

    Raises:
        UserError: naming the key, file or model.
    """
    if recipe.method in _MEASURES and recipe.align is not None:
        raise UserError(
            f"{recipe.origin}: align reorders features, but {recipe.method} weighs by statistics "
            "of the models as they are stored; leave out align, or merge by another method"
        )
    if recipe.method == "fisher" and recipe.words is not None:
        raise UserError(
            f"{recipe.origin}: fisher weighs by statistics of each model's own words; leave out "
            f"{recipe.words.where}"
        )
    for one in recipe.inputs:
        block = _block(one, recipe)
        if block is None:
            continue
        where = f"{recipe.origin}, {one}, calibration"
        for key in block:
            check_word(str(key), _KEYS, f"{where}: unknown key")
        if not isinstance(block.get("path"), str) or not Path(block["path"]).is_file():
            raise UserError(f"{where}: path is {block.get('path')!r}; give a file with text")
        if one.adapter is not None:
            raise UserError(f"{where}: a model with an adapter is not run on text; merge it first")
        if one.member is not None or read_config(one.path).get("untie", "none") != "none":
            raise UserError(
                f"{where}: a model with experts is not run on text; give `statistics: FILE`"
            )


def measure_statistics(recipe: Recipe, folder: Path) -> list[Path | None]:
    """For each model a file with what was measured of it: that of the recipe, or a new one.

    None where it has neither that nor text.

    Args:
        folder: where new ones are written.
    Raises:
        UserError: if a model cannot be loaded or run on its text.
    """
    found = [one.statistics for one in recipe.inputs]
    for number, one in enumerate(recipe.inputs):
        block = _block(one, recipe)
        if block is not None:
            found[number] = folder / f"{number}.safetensors"
            statistics = _measured(one, block, recipe.method)
            with ModelFolder(one.path) as stored:
                if not any(n.removesuffix(INPUT_FIRST) in stored.tensors for n in statistics):
                    raise UserError(
                        f"{one}: weights are stored under other names than the model has, such as "
                        f"{next(iter(statistics))}; load and save it, or give `statistics: FILE`"
                    )
            write_statistics(found[number], statistics)
    return found


def _block(one: Input, recipe: Recipe) -> Mapping[str, object] | None:
    """The text that a model is to be measured on: its own, or that of the recipe."""
    if one.statistics is not None or recipe.method not in _MEASURES:
        return None
    return one.calibration if one.calibration is not None else recipe.calibration


def _measured(one: Input, block: Mapping[str, object], method: str) -> dict[str, Tensor]:
    # Libraries that run models are needed here only.
    from megamod.merging.alignment.align import read_batches
    from megamod.merging.alignment.options import options_from
    from megamod.merging.alignment.running import load_model

    calibration = options_from({"calibration": dict(block)}, str(one)).calibration
    model = load_model(str(one.path))
    batches = (
        {"input_ids": batch.input_ids, "attention_mask": batch.mask}
        for batch in read_batches(str(one.path), model.config, calibration)
    )
    return _MEASURES[method](model, batches)
