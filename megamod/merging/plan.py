"""What becomes of each tensor in a merge: settled from headers alone, before any work."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from megamod.errors import UserError
from megamod.merging.making import Making, common_places, of_models, places_of
from megamod.merging.methods import METHODS, PARAMETERS, Method
from megamod.merging.model_folder import merged_config
from megamod.merging.recipe import Recipe
from megamod.merging.settings import WITHOUT_EFFECT, Place, check_parameters, check_word
from megamod.merging.stacking import of_slices
from megamod.merging.tensors import Blend, Operand, TensorSource
from megamod.merging.vocabulary import Vocabulary
from megamod.states.forest import read_config
from megamod.states.stream import Spec, plan_shards
from megamod.states.weights import file_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A merge that was checked and can be carried out while its folders are open.

    Attributes:
        folders: of the models; `statistics`: what was measured of it, None: nothing yet.
        makings: how each tensor is made.
        specs: of the tensors to write; `files`: which of them go into which file.
        config: the configuration to write.
        vocabulary: that the folders have been given; None: each has its own.
    """

    recipe: Recipe
    folders: Sequence[TensorSource]
    statistics: Sequence[TensorSource | None]
    makings: dict[str, Making]
    specs: dict[str, Spec]
    files: dict[str, list[str]]
    config: dict[str, object]
    vocabulary: Vocabulary | None = None

    def describe(self) -> str:
        """What would be merged into what, as text."""
        lines = [f"{self.recipe.method} of {len(self.folders)} models"]
        for number, (one, weight) in enumerate(zip(self.recipe.inputs, self.shares(), strict=True)):
            told = f"{weight:.6g}" if weight is not None else "by tensor"
            if METHODS[self.recipe.method].base != "none" and number == self.recipe.base:
                told = "base"
            lines.append(f"  {told:>10}  {one}")
        size = sum(spec.nbytes for spec in self.specs.values())
        count = sum(spec.numel for spec in self.specs.values())
        files = f"{len(self.files)} files" if len(self.files) > 1 else next(iter(self.files))
        lines.append(f"{len(self.specs)} tensors, {count:,} parameters, {size:,} bytes in {files}")
        return "\n".join(lines)

    def shares(self) -> list[float | None]:
        """The weight of each model, in averages divided by their sum; None: no single one."""
        plain = METHODS[self.recipe.method].base == "none"
        found: list[set[float | None]] = [set() for _ in self.folders]
        for making in self.makings.values():
            if making.copied:
                continue
            overall, each = making.values
            total = sum(values.get("weight", 0) for values in each)
            divisor = total if plain and overall.get("normalize") and total else 1.0
            for (number, _), values in zip(making.sources, each, strict=True):
                found[number].add(values["weight"] / divisor if "weight" in values else None)
        return [shares.pop() if len(shares) == 1 else None for shares in found]

    def blend(self, name: str, seed: int = 0) -> Blend:
        """What the method is called with for one tensor.

        Args:
            seed: of everything that is drawn at random.
        """
        making, recipe = self.makings[name], self.recipe
        overall, each = making.values
        cast = getattr(torch, recipe.dtype) if recipe.dtype else None
        operands = [
            Operand(
                self.folders[number], theirs, values, cast, making.rows, number,
                self.statistics[number],
            )
            for (number, theirs), values in zip(making.sources, each, strict=True)
        ]  # fmt: skip
        base = None if making.base is None else operands[making.base]
        return Blend(name, operands, base, overall, seed)


def make_plan(
    recipe: Recipe,
    folders: Sequence[TensorSource],
    shard_bytes: int,
    vocabulary: Vocabulary | None = None,
    copied: Collection[str] = (),
) -> Plan:
    """Check that the open folders can be merged so, and settle what becomes of each tensor.

    Args:
        copied: tensors that are taken from the template as they are.
        vocabulary: that the folders have been given; None: each has its own.
    Raises:
        UserError: naming the folder, tensor or parameter, if they cannot.
    """
    check_word(recipe.method, tuple(METHODS), f"{recipe.origin}: there is no merge method")
    check_parameters(_all_places(recipe), PARAMETERS, recipe.method)
    _warn_of_parameters(recipe)
    template = folders[recipe.template]
    make = of_slices if recipe.slices else of_models
    makings = make(recipe, folders, copied)
    stored = recipe.out_dtype or recipe.dtype
    specs, config = {}, merged_config(read_config(template.folder), recipe, stored, vocabulary)
    for name, making in makings.items():
        number, theirs = making.sources[making.lead]
        spec = folders[number].tensors[theirs]
        if spec.dtype.is_floating_point and making.copied:
            spec = Spec(getattr(torch, stored) if stored else spec.dtype, spec.shape)
        elif spec.dtype.is_floating_point:
            rows = _rows(METHODS[recipe.method], making, folders, name)
            makings[name] = replace(making, rows=rows)
            if rows is not None and spec.shape[0] == config.get("vocab_size"):
                config["vocab_size"] = rows
            shape = spec.shape if rows is None else (rows, *spec.shape[1:])
            spec = Spec(getattr(torch, stored) if stored else spec.dtype, shape)
        specs[name] = spec
    if config.get("model_type") == "demix" and config.get("untie") != "none":
        files: dict[str, list[str]] = {}
        for name in specs:
            files.setdefault(file_of(name, has_experts=True), []).append(name)
    else:
        files = plan_shards(specs, shard_bytes)
    statistics = [None] * len(folders)
    return Plan(recipe, folders, statistics, makings, specs, files, config, vocabulary)


def _all_places(recipe: Recipe) -> list[Place]:
    """Every place where parameters stand."""
    places = [(f"{recipe.origin}, {one}", one.parameters) for one in recipe.inputs]
    for module in recipe.modules:
        places += places_of(recipe, module)
    for part in recipe.slices:
        places += [(f"{recipe.origin}, slices", part.parameters)]
        places += [
            (f"{recipe.origin}, slices, {recipe.inputs[one.model]}", one.parameters)
            for one in part.sources
        ]
    return [*places, *common_places(recipe)]


def _warn_of_parameters(recipe: Recipe) -> None:
    """Log parameters of other methods: they are allowed, as in mergekit, and have no effect."""
    method = METHODS[recipe.method]
    used = {*method.per_model, *method.overall, *WITHOUT_EFFECT}
    for where, settings in _all_places(recipe):
        for name in settings:
            if name not in used:
                logger.warning("%s, %s: has no effect with %s", where, name, recipe.method)


def _rows(method: Method, making: Making, folders: Sequence[TensorSource], name: str) -> int | None:
    """How many rows are merged where vocabularies are of unequal size; else None.

    Raises:
        UserError: if a model has fewer than the base, for methods that compare all with it.
    """
    rows = [folders[number].tensors[theirs].shape[:1] for number, theirs in making.sources]
    if len(set(rows)) == 1:
        return None
    if method.common_rows:
        return min(rows)[0]
    wanted = rows[making.lead]
    for (number, _), found in zip(making.sources, rows, strict=True):
        if found < wanted:
            raise UserError(
                f"{name} has {found[0]} rows in {folders[number].folder}, fewer than in the base, "
                f"{wanted[0]}"
            )
    return wanted[0]
