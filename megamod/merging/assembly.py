"""Assembly of the result: for each of its tensors, the sources, parameters and base."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megamod.errors import UserError
from megamod.merging.compatibility import check_tensors_mergeable
from megamod.merging.layer_settings import count_layers
from megamod.merging.methods.table import METHODS
from megamod.merging.naming import check_equal_integers
from megamod.merging.recipe import MergeRecipe, RecipePart
from megamod.merging.settings import (
    ParameterLookup,
    compute_relative_depth,
    compute_relative_depths,
    look_up_parameters,
)
from megamod.merging.tensors import TOWER, TensorSource, Values, describe_source
from megamod.states.forest import read_model_config
from megamod.states.layer_names import split_at_layer_number


@dataclass(frozen=True)
class TensorPlan:
    """Plan of one tensor of the result.

    Attributes:
        sources: number of each model that takes part, and the tensor's name in it.
        lead_source: index in `sources` of the one whose shape and dtype the result has.
        base_source: index of the source that the others are compared with; None: there is no base.
        values: parameters of the whole merge, and of each source.
        merged_rows: number of rows that are merged; None: all.
        copied: the result is the tensor of the only source, whatever the method.
    """

    sources: Sequence[tuple[int, str]]
    lead_source: int
    base_source: int | None
    values: tuple[Values, Sequence[Values]]
    merged_rows: int | None = None
    copied: bool = False


@dataclass(frozen=True)
class _TargetTensor:
    """A tensor to assemble.

    Attributes:
        part: part of the recipe that it belongs to.
        name: its name in the result; `source_names`: its name in each source of the part.
        depth: relative depth of its layer.
        copy_of: number of the model that it is copied from, whatever the method; None: merge it.
    """

    part: RecipePart
    name: str
    source_names: Sequence[str]
    depth: float = 0.0
    copy_of: int | None = None


def plan_tensors(
    recipe: MergeRecipe, folders: Sequence[TensorSource], copied: Collection[str] = ()
) -> dict[str, TensorPlan]:
    """Plan every tensor of the result, from headers alone.

    Args:
        folders: folders of the models, under common names.
        copied: names of tensors that are taken from the template as they are; where layers are
            stacked, from the leading source of the first or last part.
    Returns:
        plans by name of the tensor, in the order in which the result stores them.
    Raises:
        UserError: naming the part of the recipe, the folder or the tensor, if they do not fit.
    """
    parts = recipe.all_parts
    for part in parts:
        _check_model_count(recipe, part)
    iterate_targets = (
        _iterate_targets_of_stacked_layers
        if recipe.is_stacked
        else _iterate_targets_of_whole_models
    )
    targets = iterate_targets(recipe, parts, folders, copied)
    return {target.name: _plan_tensor(recipe, folders, target) for target in targets}


def _check_model_count(recipe: MergeRecipe, part: RecipePart) -> None:
    """Refuse a part of a recipe with a number of models that the method does not support.

    Raises:
        UserError: naming the part; also if the method needs a base and the part has none.
    """
    method, where = METHODS[recipe.method], recipe.describe_part(part)
    models = [source.model for source in part.sources]
    base = _find_base_number(recipe, part)
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


def _find_base_number(recipe: MergeRecipe, part: RecipePart) -> int | None:
    """Return the number of the model that the others of a part are compared with.

    None: the method of the recipe compares with none.
    """
    if METHODS[recipe.method].base == "none":
        return None
    return recipe.base if part.base is None else part.base


def _iterate_targets_of_whole_models(
    recipe: MergeRecipe,
    parts: Sequence[RecipePart],
    folders: Sequence[TensorSource],
    copied: Collection[str],
) -> Iterator[_TargetTensor]:
    """Yield a target for each tensor of the template, in its order, for a merge of whole models.

    Integers and the tensors in `copied` are copied from the template; all others are merged.

    Args:
        recipe, folders, copied: see `plan_tensors`.
        parts: all parts of the recipe, one per module.
    Raises:
        UserError: if a merged tensor differs in shape or kind of dtype, or modules do not cover the
            tensors.
    """
    template = folders[recipe.template_model]
    merged = [
        name
        for name, spec in template.tensors.items()
        if spec.dtype.is_floating_point and name not in copied
    ]
    for folder in folders:
        for name in merged:
            check_tensors_mergeable(
                template, name, folder, other_name=name, allow_cut=recipe.cut_vocabularies
            )
    part_by_tensor = _map_tensors_to_parts(recipe, parts, merged)
    depth: dict[str, float] = {}
    for number in range(len(parts)):
        depth |= compute_relative_depths(name for name in merged if part_by_tensor[name] == number)
    for name in template.tensors:
        if name in part_by_tensor:
            part = parts[part_by_tensor[name]]
            yield _TargetTensor(part, name, [name] * len(part.sources), depth[name])
        else:
            yield _TargetTensor(parts[0], name, [name], copy_of=recipe.template_model)


def _map_tensors_to_parts(
    recipe: MergeRecipe, parts: Sequence[RecipePart], names: Iterable[str]
) -> Mapping[str, int]:
    """Map each tensor to the number of its part: the module that comes first in its name.

    Of modules that begin at the same word the longest counts; a tensor in none belongs to the
    module called `default`. Without modules all belong to part 0.

    Args:
        parts: all parts of the recipe, one per module.
        names: names of the tensors.
    Raises:
        UserError: if a tensor is in no module and none is called `default`, or a module has none.
    """
    modules = [part.module for part in parts]
    if modules == [None]:
        return dict.fromkeys(names, 0)
    part_by_tensor: dict[str, int] = {}
    for name in names:
        prefix = f".{(split_at_layer_number(name) or (name, 0, ''))[0]}."
        matches = [
            (prefix.find(f".{module}."), -len(module), number)
            for number, module in enumerate(modules)
            if f".{module}." in prefix
        ]
        if not matches and "default" not in modules:
            raise UserError(
                f"{recipe.origin}, modules: {name} is in none of {', '.join(modules)}; a module "
                "called 'default' takes all other tensors"
            )
        part_by_tensor[name] = min(matches)[2] if matches else modules.index("default")
    if parts_without_tensors := sorted(set(range(len(parts))) - set(part_by_tensor.values())):
        raise UserError(
            f"{recipe.origin}, modules: {modules[parts_without_tensors[0]]} has no tensor"
        )
    return part_by_tensor


def _iterate_targets_of_stacked_layers(
    recipe: MergeRecipe,
    parts: Sequence[RecipePart],
    folders: Sequence[TensorSource],
    copied: Collection[str],
) -> Iterator[_TargetTensor]:
    """Yield a target for each tensor of a model whose layers are stacked from `parts`.

    Tensors before the layers come from the first part, those after them from the last. Integers,
    and the tensors in `copied`, are copied from the leading source of their part.

    Args:
        recipe, folders, copied: see `plan_tensors`.
        parts: slices of the recipe, from the first layers to the last.
    Raises:
        UserError: if the leading model of a part lacks a layer that its slice names, or the first
            one has no stack of layers or several.
    """
    leads = [part.sources[recipe.find_lead_source(part)] for part in parts]
    prefix = _find_layer_prefix(recipe, folders[leads[0].model])

    def iterate_targets_outside_layers(number: int, before: bool) -> Iterator[_TargetTensor]:
        """Yield targets from part `number` for its tensors before the layers, or after them."""
        part, model = parts[number], leads[number].model
        for name, spec in folders[model].tensors.items():
            if _parse_layer_number(name, prefix) is None and _is_before_layers(name) is before:
                copy_of = None
                if name in copied or not spec.dtype.is_floating_point:
                    copy_of = model
                yield _TargetTensor(part, name, [name] * len(part.sources), copy_of=copy_of)

    yield from iterate_targets_outside_layers(0, before=True)
    offset = 0
    for part, lead in zip(parts, leads, strict=True):
        stored = folders[lead.model]
        for layer in range(part.depth):
            names = [
                n
                for n in stored.tensors
                if _parse_layer_number(n, prefix) == lead.layers[0] + layer
            ]
            if not names:
                raise UserError(
                    f"{recipe.origin}: layer_range {list(lead.layers)}: "
                    f"{describe_source(stored)} has "
                    f"{_count_stored_layers(stored, prefix)} layers"
                )
            for name in names:
                suffix = split_at_layer_number(name)[2]
                integers = not stored.tensors[name].dtype.is_floating_point
                yield _TargetTensor(
                    part,
                    f"{prefix}{offset + layer}{suffix}",
                    [f"{prefix}{source.layers[0] + layer}{suffix}" for source in part.sources],
                    compute_relative_depth(layer, part.depth),
                    lead.model if integers else None,
                )
        offset += part.depth
    yield from iterate_targets_outside_layers(-1, before=False)


def _find_layer_prefix(recipe: MergeRecipe, folder: TensorSource) -> str:
    """Find the name prefix of the layers of the language model, such as `model.layers.`.

    Of several stacks in a folder, those in towers do not count; of the others it is the one that
    has as many layers as config.json says.

    Raises:
        UserError: beginning with the recipe's origin, if there are no layers, or several stacks of
            which it is not clear which is that of the language model.
    """
    numbers: dict[str, set[int]] = {}
    for name in folder.tensors:
        if (parts := split_at_layer_number(name)) is not None:
            numbers.setdefault(parts[0], set()).add(parts[1])
    prefixes = [prefix for prefix in numbers if not TOWER.search(prefix)] or list(numbers)
    if len(prefixes) > 1:
        depth = count_layers(read_model_config(folder.folder))
        prefixes = [p for p in prefixes if depth and numbers[p] >= set(range(depth))]
    if len(prefixes) != 1:
        stacks = (
            f"several stacks of layers, {', '.join(sorted(numbers))}" if numbers else "no layers"
        )
        raise UserError(
            f"{recipe.origin}: {describe_source(folder)} has {stacks}; slices are made of one stack"
        )
    return prefixes[0]


def _parse_layer_number(name: str, prefix: str) -> int | None:
    """Parse the layer number in a tensor's name after `prefix`; None: it has another prefix."""
    parts = split_at_layer_number(name)
    return parts[1] if parts is not None and parts[0] == prefix else None


def _count_stored_layers(folder: TensorSource, prefix: str) -> int:
    """Count the layers that a folder stores under a name prefix: the highest number plus 1."""
    numbers = [n for name in folder.tensors if (n := _parse_layer_number(name, prefix)) is not None]
    return max(numbers, default=-1) + 1


def _is_before_layers(name: str) -> bool:
    """Return True if a tensor's name says that it is used before the layers: it is the name of an
    embedding, its norm, or a tower.
    """
    parts = name.split(".")
    return bool(TOWER.search(name)) or any(
        part in ("wte", "wpe") or ("embed" in part and part != "embed_out") for part in parts
    )


def _plan_tensor(
    recipe: MergeRecipe, folders: Sequence[TensorSource], target: _TargetTensor
) -> TensorPlan:
    """Plan one tensor of the result, after a check that its sources can be merged.

    Args:
        recipe: the whole recipe.
        folders: folders of all models of the recipe.
        target: its name, part and sources.
    Raises:
        UserError: naming the tensor and two models, or a parameter that is missing.
    """
    part, lead = target.part, recipe.find_lead_source(target.part)
    models = [source.model for source in part.sources]
    if target.copy_of is not None:
        name = target.source_names[lead] if recipe.is_stacked else target.name
        if recipe.is_stacked:
            _check_copied_integers(folders, models, target.source_names, lead)
        return TensorPlan([(target.copy_of, name)], 0, None, ({}, [{}]), copied=True)
    first, name = folders[models[lead]], target.source_names[lead]
    for model, source_name in zip(models, target.source_names, strict=True):
        if source_name not in folders[model].tensors:
            parts, stored = split_at_layer_number(source_name), describe_source(folders[model])
            layers = (
                f"; it has {_count_stored_layers(folders[model], parts[0])} layers" if parts else ""
            )
            raise UserError(f"{recipe.describe_part(part)}: {stored} has no {source_name}{layers}")
        check_tensors_mergeable(
            first, name, folders[model], other_name=source_name, allow_cut=recipe.cut_vocabularies
        )
    method, base = METHODS[recipe.method], _find_base_number(recipe, part)
    common = recipe.list_scopes(part)
    lookups = [
        ParameterLookup(
            source_name, [recipe.make_source_scope(part, source), *common], source.model == base
        )
        for source, source_name in zip(part.sources, target.source_names, strict=True)
    ]
    values = look_up_parameters(method, target.depth, ParameterLookup(target.name, common), lookups)
    index = models.index(base) if base in models else None
    return TensorPlan(list(zip(models, target.source_names, strict=True)), lead, index, values)


def _check_copied_integers(
    folders: Sequence[TensorSource], models: Sequence[int], names: Sequence[str], lead: int
) -> None:
    """Refuse integers of a layer that differ between the sources that have them.

    Only those of the leading source are stored, as integers have no mean. A floating-point tensor
    passes unchecked.

    Args:
        folders: of all models of the recipe.
        models: number of the model of each source; `names`: the tensor's name in it.
        lead: index of the leading source.
    Raises:
        UserError: naming the tensor and two models.
    """
    first, name = folders[models[lead]], names[lead]
    if first.tensors[name].dtype.is_floating_point:
        return
    for model, source_name in zip(models, names, strict=True):
        if source_name in folders[model].tensors:
            check_equal_integers(first, name, folders[model], source_name)
