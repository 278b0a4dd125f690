"""How each tensor is made where layers of several models are stacked."""

from collections.abc import Collection, Iterable, Sequence

from megamod.errors import UserError
from megamod.merging.compatibility import check_shapes
from megamod.merging.layer_settings import count_layers
from megamod.merging.making import Making, asked_of, check_count, common_places, copy_of
from megamod.merging.methods import METHODS
from megamod.merging.naming import check_equal_integers
from megamod.merging.recipe import Recipe, Slice, Source
from megamod.merging.settings import Asked, layer_of, place_of, values_for
from megamod.merging.tensors import TOWER, TensorSource, label
from megamod.states.forest import read_config


def of_slices(
    recipe: Recipe, folders: Sequence[TensorSource], copied: Collection[str] = ()
) -> dict[str, Making]:
    """Layers stacked; what lies before them is that of the first slice, the rest of the last.

    Args:
        folders: of the models, under common names.
        copied: tensors of no layer that are taken from the leading model of a slice as they are.
    """
    first, last = recipe.slices[0], recipe.slices[-1]
    stack = _stack(recipe, folders[first.leading(recipe.base).model])
    makings = {}

    def outside(part: Slice, before: bool) -> None:
        source = folders[part.leading(recipe.base).model]
        for name in source.tensors:
            if _in_stack(name, stack) is None and _before_layers(name) is before:
                makings[name] = _of_sources(
                    recipe, part, folders, name, (), 0.0, name, name in copied
                )

    outside(first, before=True)
    done = 0
    for part in recipe.slices:
        lead = part.leading(recipe.base)
        for layer in range(part.depth):
            offsets = [source.layers[0] + layer for source in part.sources]
            for name in _layer(recipe, lead, folders[lead.model], layer, stack):
                result = f"{stack}{done + layer}{layer_of(name)[2]}"
                depth = place_of(layer, part.depth)
                makings[result] = _of_sources(recipe, part, folders, name, offsets, depth, result)
        done += part.depth
    outside(last, before=False)
    return makings


def _stack(recipe: Recipe, folder: TensorSource) -> str:
    """What the names of the layers that are stacked begin with.

    Raises:
        UserError: if there are several stacks, and it cannot be seen which is the language model.
    """
    numbers: dict[str, set[int]] = {}
    for name in folder.tensors:
        if (part := layer_of(name)) is not None:
            numbers.setdefault(part[0], set()).add(part[1])
    stacks = [stack for stack in numbers if not TOWER.search(stack)] or list(numbers)
    if len(stacks) > 1:
        depth = count_layers(read_config(folder.folder))
        stacks = [one for one in stacks if depth and numbers[one] >= set(range(depth))]
    if len(stacks) != 1:
        raise UserError(
            f"{recipe.origin}: {label(folder)} has several stacks of layers, "
            f"{', '.join(sorted(numbers)) or 'none at all'}; slices are made of one"
        )
    return stacks[0]


def _in_stack(name: str, stack: str) -> int | None:
    """Number of a tensor's layer in the stack; None outside of it."""
    part = layer_of(name)
    return part[1] if part is not None and part[0] == stack else None


def _before_layers(name: str) -> bool:
    """True for tensors of no layer that come before them: embeddings, their norms, towers."""
    parts = name.split(".")
    return bool(TOWER.search(name)) or any(
        part in ("wte", "wpe") or ("embed" in part and part != "embed_out") for part in parts
    )


def _layer(
    recipe: Recipe, source: Source, folder: TensorSource, layer: int, stack: str
) -> Iterable[str]:
    """Tensors of one layer of a source.

    Raises:
        UserError: if there are none.
    """
    wanted = source.layers[0] + layer
    names = [name for name in folder.tensors if _in_stack(name, stack) == wanted]
    if not names:
        raise UserError(
            f"{recipe.origin}: layer_range {list(source.layers)}: {label(folder)} has "
            f"{_count_stored(folder, stack)} layers"
        )
    return names


def _of_sources(
    recipe: Recipe,
    part: Slice,
    folders: Sequence[TensorSource],
    name: str,
    layers: Sequence[int],
    depth: float,
    result: str,
    copied: bool = False,
) -> Making:
    """One tensor of a slice.

    Args:
        name: in the source that leads; `result`: in the result.
        layers: number of its layer in each source; empty: it is in none.
        copied: take it from the source that leads.
    """
    method, lead = METHODS[recipe.method], part.sources.index(part.leading(recipe.base))
    number = recipe.base if part.base is None else part.base
    models = [source.model for source in part.sources]
    where = f"{recipe.origin}, slices"
    check_count(recipe, models, number if method.base != "none" else None, where)
    base = models.index(number) if method.base != "none" and number in models else None
    ours, split = folders[models[lead]], layer_of(name)
    names = [f"{split[0]}{n}{split[2]}" for n in layers] or [name] * len(models)
    integers = not ours.tensors[name].dtype.is_floating_point
    for model, theirs in zip(models, names, strict=True) if not copied else ():
        if theirs in folders[model].tensors:
            if integers:
                check_equal_integers(ours, name, folders[model], theirs)
            else:
                check_shapes(ours, name, folders[model], theirs=theirs, cut=recipe.cut)
        elif not integers:
            raise UserError(
                f"{where}: {label(folders[model])} has no {theirs}"
                + (f"; it has {_count_stored(folders[model], split[0])} layers" if layers else "")
            )
    if copied or integers:
        return copy_of(models[lead], name)
    common = [(where, part.parameters), *common_places(recipe)]
    places = [
        [(f"{where}, {recipe.inputs[source.model]}", source.parameters), *common]
        for source in part.sources
    ]
    values = values_for(method, depth, Asked(result, common), asked_of(method, names, base, places))
    return Making(list(zip(models, names, strict=True)), lead, base, values)


def _count_stored(folder: TensorSource, stack: str) -> int:
    numbers = [n for name in folder.tensors if (n := _in_stack(name, stack)) is not None]
    return max(numbers, default=-1) + 1
