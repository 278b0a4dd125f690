"""Assembly of the result: for each of its tensors, the sources, parameters and base."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megamod.errors import UserError
from megamod.merging.compatibility import check_shapes
from megamod.merging.layer_settings import count_layers
from megamod.merging.methods.table import METHODS
from megamod.merging.naming import check_equal_integers
from megamod.merging.recipe import Part, Recipe
from megamod.merging.settings import Lookup, depths, layer_of, relative_depth, values_for
from megamod.merging.tensors import TOWER, TensorSource, Values, label
from megamod.states.forest import read_config


@dataclass(frozen=True)
class TensorPlan:
    """Plan of one tensor of the result.

    Attributes:
        sources: number of each model that takes part, and its name of the tensor.
        lead: index of the source that has the shape and dtype.
        base: index of the source that the others are compared with; None: none.
        values: parameters of the whole merge, and of each source.
        rows: number of rows that are merged; None: all.
        copied: the tensor is that of the only source, whatever the method.
    """

    sources: Sequence[tuple[int, str]]
    lead: int
    base: int | None
    values: tuple[Values, Sequence[Values]]
    rows: int | None = None
    copied: bool = False


@dataclass(frozen=True)
class _Target:
    """A tensor to assemble.

    Attributes:
        part: that it belongs to.
        result: its name in the result; `names`: its name in each source of the part.
        depth: relative depth of its layer.
        copy_of: number of the model that it is copied from, whatever the method; None: merge it.
    """

    part: Part
    result: str
    names: Sequence[str]
    depth: float = 0.0
    copy_of: int | None = None


def assemble(
    recipe: Recipe, folders: Sequence[TensorSource], copied: Collection[str] = ()
) -> dict[str, TensorPlan]:
    """Plan every tensor of the result.

    Args:
        folders: of the models, under common names.
        copied: tensors outside of layers that are taken from the leading model as they are.
    Raises:
        UserError: naming the part of the recipe, the folder or the tensor, if they do not fit.
    """
    parts = recipe.normal_parts
    for part in parts:
        _check_count(recipe, part)
    targets = (_stacked if recipe.stacked else _whole)(recipe, parts, folders, copied)
    return {target.result: _tensor_plan(recipe, folders, target) for target in targets}


def _check_count(recipe: Recipe, part: Part) -> None:
    """Refuse a number of models that the method does not support, and a missing base."""
    method, where = METHODS[recipe.method], recipe.label(part)
    models = [source.model for source in part.sources]
    base = _base_of(recipe, part)
    if method.base == "needed" and base not in models:
        raise UserError(f"{where}: {recipe.method} compares models with base_model; give it")
    compared = [model for model in models if model != base]
    least, most = method.models
    if not least <= len(compared) <= most:
        allowed = str(least) if least == most else f"at least {least}"
        besides = "" if base is None else " besides the base"
        raise UserError(
            f"{where}: {recipe.method} merges {allowed} models{besides}, not {len(compared)}"
        )


def _base_of(recipe: Recipe, part: Part) -> int | None:
    """Number of the model that the others of a part are compared with."""
    if METHODS[recipe.method].base == "none":
        return None
    return recipe.base if part.base is None else part.base


def _whole(
    recipe: Recipe,
    parts: Sequence[Part],
    folders: Sequence[TensorSource],
    copied: Collection[str],
) -> Iterator[_Target]:
    """Targets of a merge of whole models, in the order of the template's tensors."""
    template = folders[recipe.template]
    merged = [
        name
        for name, spec in template.tensors.items()
        if spec.dtype.is_floating_point and name not in copied
    ]
    for folder in folders:
        for name in merged:
            check_shapes(template, name, folder, theirs=name, cut=recipe.cut)
    owners = _owners(recipe, parts, merged)
    depth: dict[str, float] = {}
    for number in range(len(parts)):
        depth |= depths(name for name in merged if owners[name] == number)
    for name in template.tensors:
        if name in owners:
            part = parts[owners[name]]
            yield _Target(part, name, [name] * len(part.sources), depth[name])
        else:
            yield _Target(parts[0], name, [name], copy_of=recipe.template)


def _owners(recipe: Recipe, parts: Sequence[Part], names: Iterable[str]) -> Mapping[str, int]:
    """Map each tensor to the number of its part: the module that comes first in its name.

    Raises:
        UserError: if a tensor is in no module and none is called `default`, or a module has none.
    """
    modules = [part.module for part in parts]
    if modules == [None]:
        return dict.fromkeys(names, 0)
    owners: dict[str, int] = {}
    for name in names:
        prefix = f".{(layer_of(name) or (name, 0, ''))[0]}."
        fitting = [
            (prefix.find(f".{module}."), -len(module), number)
            for number, module in enumerate(modules)
            if f".{module}." in prefix
        ]
        if not fitting and "default" not in modules:
            raise UserError(
                f"{recipe.origin}, modules: {name} is in none of {', '.join(modules)}; a module "
                "called 'default' takes all other tensors"
            )
        owners[name] = min(fitting)[2] if fitting else modules.index("default")
    if empty := sorted(set(range(len(parts))) - set(owners.values())):
        raise UserError(f"{recipe.origin}, modules: {modules[empty[0]]} has no tensor")
    return owners


def _stacked(
    recipe: Recipe,
    parts: Sequence[Part],
    folders: Sequence[TensorSource],
    copied: Collection[str],
) -> Iterator[_Target]:
    """Targets of stacked layers.

    Tensors before the layers come from the first part, those after them from the last.
    """
    leads = [part.sources[recipe.lead(part)] for part in parts]
    prefix = _layer_prefix(recipe, folders[leads[0].model])

    def outside(number: int, before: bool) -> Iterator[_Target]:
        part, model = parts[number], leads[number].model
        for name, spec in folders[model].tensors.items():
            if _layer_number(name, prefix) is None and _is_before_layers(name) is before:
                copy_of = None
                if name in copied or not spec.dtype.is_floating_point:
                    copy_of = model
                yield _Target(part, name, [name] * len(part.sources), copy_of=copy_of)

    yield from outside(0, before=True)
    offset = 0
    for part, lead in zip(parts, leads, strict=True):
        stored = folders[lead.model]
        for layer in range(part.depth):
            names = [
                n for n in stored.tensors if _layer_number(n, prefix) == lead.layers[0] + layer
            ]
            if not names:
                raise UserError(
                    f"{recipe.origin}: layer_range {list(lead.layers)}: {label(stored)} has "
                    f"{_count_stored(stored, prefix)} layers"
                )
            for name in names:
                suffix = layer_of(name)[2]
                integers = not stored.tensors[name].dtype.is_floating_point
                yield _Target(
                    part,
                    f"{prefix}{offset + layer}{suffix}",
                    [f"{prefix}{source.layers[0] + layer}{suffix}" for source in part.sources],
                    relative_depth(layer, part.depth),
                    lead.model if integers else None,
                )
        offset += part.depth
    yield from outside(-1, before=False)


def _layer_prefix(recipe: Recipe, folder: TensorSource) -> str:
    """Prefix of the names of the layers that are stacked, those of the language model.

    Raises:
        UserError: if there are several stacks of layers, and none is seen to be that.
    """
    numbers: dict[str, set[int]] = {}
    for name in folder.tensors:
        if (parts := layer_of(name)) is not None:
            numbers.setdefault(parts[0], set()).add(parts[1])
    prefixes = [prefix for prefix in numbers if not TOWER.search(prefix)] or list(numbers)
    if len(prefixes) > 1:
        depth = count_layers(read_config(folder.folder))
        prefixes = [p for p in prefixes if depth and numbers[p] >= set(range(depth))]
    if len(prefixes) != 1:
        raise UserError(
            f"{recipe.origin}: {label(folder)} has several stacks of layers, "
            f"{', '.join(sorted(numbers)) or 'none at all'}; slices are made of one"
        )
    return prefixes[0]


def _layer_number(name: str, prefix: str) -> int | None:
    """Number of a tensor's layer among those with the prefix; None outside of them."""
    parts = layer_of(name)
    return parts[1] if parts is not None and parts[0] == prefix else None


def _count_stored(folder: TensorSource, prefix: str) -> int:
    numbers = [n for name in folder.tensors if (n := _layer_number(name, prefix)) is not None]
    return max(numbers, default=-1) + 1


def _is_before_layers(name: str) -> bool:
    """True for tensors that are used before the layers: embeddings, their norms, towers."""
    parts = name.split(".")
    return bool(TOWER.search(name)) or any(
        part in ("wte", "wpe") or ("embed" in part and part != "embed_out") for part in parts
    )


def _tensor_plan(recipe: Recipe, folders: Sequence[TensorSource], target: _Target) -> TensorPlan:
    """Plan one tensor, after a check against every source."""
    part, lead = target.part, recipe.lead(target.part)
    models = [source.model for source in part.sources]
    if target.copy_of is not None:
        name = target.names[lead] if recipe.stacked else target.result
        if recipe.stacked:
            _check_copies(folders, models, target.names, lead)
        return TensorPlan([(target.copy_of, name)], 0, None, ({}, [{}]), copied=True)
    first, name = folders[models[lead]], target.names[lead]
    for model, theirs in zip(models, target.names, strict=True):
        if theirs not in folders[model].tensors:
            parts, stored = layer_of(theirs), label(folders[model])
            layers = f"; it has {_count_stored(folders[model], parts[0])} layers" if parts else ""
            raise UserError(f"{recipe.label(part)}: {stored} has no {theirs}{layers}")
        check_shapes(first, name, folders[model], theirs=theirs, cut=recipe.cut)
    method, base = METHODS[recipe.method], _base_of(recipe, part)
    common = recipe.scopes(part)
    lookups = [
        Lookup(theirs, [recipe.source_scope(part, source), *common], source.model == base)
        for source, theirs in zip(part.sources, target.names, strict=True)
    ]
    values = values_for(method, target.depth, Lookup(target.result, common), lookups)
    index = models.index(base) if base in models else None
    return TensorPlan(list(zip(models, target.names, strict=True)), lead, index, values)


def _check_copies(
    folders: Sequence[TensorSource], models: Sequence[int], names: Sequence[str], lead: int
) -> None:
    """Refuse integers of a layer that differ between the sources that have them."""
    first, name = folders[models[lead]], names[lead]
    if first.tensors[name].dtype.is_floating_point:
        return
    for model, theirs in zip(models, names, strict=True):
        if theirs in folders[model].tensors:
            check_equal_integers(first, name, folders[model], theirs)
