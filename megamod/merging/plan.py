"""What becomes of each tensor in a merge: settled from headers alone, before any work."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from megamod.errors import UserError
from megamod.merging.fitting import check_configs, check_shapes, counterpart, match_names
from megamod.merging.methods import METHODS, PARAMETERS, Method
from megamod.merging.model_folder import merged_config
from megamod.merging.operands import Blend, Operand, Values
from megamod.merging.recipe import Recipe, Slice, Source
from megamod.merging.settings import (
    Asked,
    Place,
    check_parameters,
    check_word,
    depths,
    layer_of,
    place_of,
    values_for,
)
from megamod.states.forest import read_config
from megamod.states.stream import ModelFolder, Spec, plan_shards
from megamod.states.weights import file_of


@dataclass(frozen=True)
class Making:
    """How one tensor of the result is made.

    Attributes:
        sources: number of each model that takes part, and what it calls the tensor.
        lead: which of them has the shape and dtype; a tensor of integers is copied from it.
        base: which of them the others are compared with; None: none.
        values: overall and per-source parameters.
        rows: how many rows are merged; None: all.
    """

    sources: Sequence[tuple[int, str]]
    lead: int
    base: int | None
    values: tuple[Values, Sequence[Values]]
    rows: int | None = None


@dataclass(frozen=True)
class Plan:
    """A merge that was checked and can be carried out while its folders are open.

    Attributes:
        folders: one for each model; `statistics`: what was measured of it, None: nothing.
        makings: how each tensor is made.
        specs: of the tensors to write; `files`: which of them go into which file.
        config: the configuration to write.
    """

    recipe: Recipe
    folders: Sequence[ModelFolder]
    statistics: Sequence[ModelFolder | None]
    makings: dict[str, Making]
    specs: dict[str, Spec]
    files: dict[str, list[str]]
    config: dict[str, object]

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
        for name, making in self.makings.items():
            if not self.specs[name].dtype.is_floating_point:
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
    folders: Sequence[ModelFolder],
    statistics: Sequence[ModelFolder | None],
    shard_bytes: int,
) -> Plan:
    """Check that the open folders can be merged so, and settle what becomes of each tensor.

    Raises:
        UserError: naming the folder, tensor or parameter, if they cannot.
    """
    check_word(recipe.method, tuple(METHODS), f"{recipe.origin}: there is no merge method")
    check_parameters(_all_places(recipe), PARAMETERS, recipe.method)
    template = folders[recipe.template]
    check_configs([template.folder, *(folder.folder for folder in folders)], cut=recipe.cut)
    makings = _of_slices(recipe, folders) if recipe.slices else _of_models(recipe, folders)
    stored = recipe.out_dtype or recipe.dtype
    specs, config = {}, merged_config(read_config(template.folder), recipe, stored)
    for name, making in makings.items():
        number, theirs = making.sources[making.lead]
        spec = folders[number].tensors[theirs]
        if spec.dtype.is_floating_point:
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
    return Plan(recipe, folders, statistics, makings, specs, files, config)


def _all_places(recipe: Recipe) -> list[Place]:
    """Every place where parameters stand."""
    places = [(f"{recipe.origin}, {one}", one.parameters) for one in recipe.inputs]
    for part in recipe.slices:
        places += [(f"{recipe.origin}, slices", part.parameters)]
        places += [
            (f"{recipe.origin}, slices, {recipe.inputs[one.model]}", one.parameters)
            for one in part.sources
        ]
    return [*places, *_common(recipe)]


def _common(recipe: Recipe) -> list[Place]:
    where = f"{recipe.origin}, parameters"
    return [(f"{recipe.origin}, modules", recipe.module), (where, recipe.parameters)]


def _check_count(recipe: Recipe, models: Sequence[int], base: int | None, where: str) -> None:
    """Refuse a number of models that the method has no use for, and a base that is not there."""
    method = METHODS[recipe.method]
    if method.base == "needed" and base not in models:
        raise UserError(f"{where}: {recipe.method} compares models with base_model; give it")
    compared = [one for one in models if method.base == "none" or one != base]
    least, most = method.models
    if not least <= len(compared) <= most:
        allowed = str(least) if least == most else f"at least {least}"
        beside = "" if method.base == "none" or base is None else " besides the base"
        raise UserError(
            f"{where}: {recipe.method} merges {allowed} models{beside}, not {len(compared)}"
        )


def _asked(
    method: Method, names: Sequence[str], base: int | None, places: Sequence[Sequence[Place]]
) -> list[Asked]:
    return [
        Asked(name, there, exempt=method.base != "none" and place == base)
        for place, (name, there) in enumerate(zip(names, places, strict=True))
    ]


def _of_models(recipe: Recipe, folders: Sequence[ModelFolder]) -> dict[str, Making]:
    """Whole models into one with the tensors of the template."""
    method, template = METHODS[recipe.method], folders[recipe.template]
    base = recipe.base if method.base != "none" else None
    _check_count(recipe, range(len(folders)), base, recipe.origin)
    names = [match_names(template, folder, cut=recipe.cut) for folder in folders]
    common = _common(recipe)
    places = [[(f"{recipe.origin}, {one}", one.parameters), *common] for one in recipe.inputs]
    merged = names[recipe.template]
    depth = depths(merged)
    makings = {}
    for name in template.tensors:
        if name not in merged:
            makings[name] = Making([(recipe.template, name)], 0, None, ({}, [{}]))
            continue
        theirs = [there[name] for there in names]
        values = values_for(
            method, depth[name], Asked(name, common), _asked(method, theirs, base, places)
        )
        makings[name] = Making(list(enumerate(theirs)), recipe.template, base, values)
    return makings


def _of_slices(recipe: Recipe, folders: Sequence[ModelFolder]) -> dict[str, Making]:
    """Layers stacked; what lies before them is that of the first slice, the rest of the last."""
    first, last = recipe.slices[0], recipe.slices[-1]
    makings = {}
    for name in _outside(recipe, first, folders):
        if _before_layers(name):
            makings[name] = _of_sources(recipe, first, folders, name, (), 0.0, name)
    done = 0
    for part in recipe.slices:
        lead = part.sources[_lead(recipe, part)]
        for layer in range(part.depth):
            offsets = [source.layers[0] + layer for source in part.sources]
            for name in _layer(recipe, lead, folders[lead.model], layer):
                before, _, after = layer_of(name)
                result = f"{before}{done + layer}{after}"
                depth = place_of(layer, part.depth)
                makings[result] = _of_sources(recipe, part, folders, name, offsets, depth, result)
        done += part.depth
    for name in _outside(recipe, last, folders):
        if not _before_layers(name):
            makings[name] = _of_sources(recipe, last, folders, name, (), 0.0, name)
    return makings


def _lead(recipe: Recipe, part: Slice) -> int:
    """Which source of a slice has the names and shapes: the base, else the first."""
    base = recipe.base if part.base is None else part.base
    return next((n for n, one in enumerate(part.sources) if one.model == base), 0)


def _outside(recipe: Recipe, part: Slice, folders: Sequence[ModelFolder]) -> Iterable[str]:
    """Tensors of no layer, of the model that leads a slice."""
    folder = folders[part.sources[_lead(recipe, part)].model]
    return [name for name in folder.tensors if layer_of(name) is None]


def _before_layers(name: str) -> bool:
    """Whether a tensor of no layer comes before them: embeddings, and what normalises these."""
    parts = name.split(".")
    return any(
        part in ("wte", "wpe") or ("embed" in part and part != "embed_out") for part in parts
    )


def _layer(recipe: Recipe, source: Source, folder: ModelFolder, layer: int) -> list[str]:
    """Tensors of one layer of a source.

    Raises:
        UserError: if there are none, or several stacks of layers.
    """
    found = {name: part for name in folder.tensors if (part := layer_of(name)) is not None}
    stacks = sorted({before for before, _, _ in found.values()})
    if len(stacks) > 1:
        raise UserError(
            f"{recipe.origin}: {folder.folder} has several stacks of layers, {', '.join(stacks)}; "
            "slices are made of one"
        )
    names = [name for name, part in found.items() if part[1] == source.layers[0] + layer]
    if not names:
        raise UserError(
            f"{recipe.origin}: layer_range {list(source.layers)}: {folder.folder} has "
            f"{_count_layers(folder)} layers"
        )
    return names


def _of_sources(
    recipe: Recipe,
    part: Slice,
    folders: Sequence[ModelFolder],
    name: str,
    layers: Sequence[int],
    depth: float,
    result: str,
) -> Making:
    """One tensor of a slice.

    Args:
        name: in the source that leads; `result`: in the result.
        layers: which layer of each source it belongs to; empty: to none.
    """
    method, lead = METHODS[recipe.method], _lead(recipe, part)
    number = recipe.base if part.base is None else part.base
    models = [source.model for source in part.sources]
    where = f"{recipe.origin}, slices"
    _check_count(recipe, models, number if method.base != "none" else None, where)
    base = models.index(number) if method.base != "none" and number in models else None
    ours, split = folders[models[lead]], layer_of(name)
    if not ours.tensors[name].dtype.is_floating_point:
        return Making([(models[lead], name)], 0, None, ({}, [{}]))
    names = []
    for place, model in enumerate(models):
        if split is None:
            theirs = counterpart(ours, name, folders[model], name)
        else:
            theirs = f"{split[0]}{layers[place]}{split[2]}"
        if theirs not in folders[model].tensors:
            raise UserError(
                f"{where}: {folders[model].folder} has no {theirs}; it has "
                f"{_count_layers(folders[model])} layers"
            )
        check_shapes(ours, name, folders[model], theirs, cut=recipe.cut)
        names.append(theirs)
    common = [(where, part.parameters), *_common(recipe)]
    places = [
        [(f"{where}, {recipe.inputs[source.model]}", source.parameters), *common]
        for source in part.sources
    ]
    values = values_for(method, depth, Asked(result, common), _asked(method, names, base, places))
    return Making(list(zip(models, names, strict=True)), lead, base, values)


def _count_layers(folder: ModelFolder) -> int:
    numbers = [part[1] for name in folder.tensors if (part := layer_of(name)) is not None]
    return max(numbers, default=-1) + 1


def _rows(method: Method, making: Making, folders: Sequence[ModelFolder], name: str) -> int | None:
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
