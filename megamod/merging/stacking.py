"""How each tensor is made where layers of several models are stacked."""

from collections.abc import Iterable, Sequence

from megamod.errors import UserError
from megamod.merging.fitting import check_shapes, counterpart
from megamod.merging.making import Making, asked_of, check_count, common_places
from megamod.merging.methods import METHODS
from megamod.merging.recipe import Recipe, Slice, Source
from megamod.merging.settings import Asked, layer_of, place_of, values_for
from megamod.states.stream import ModelFolder


def of_slices(recipe: Recipe, folders: Sequence[ModelFolder]) -> dict[str, Making]:
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
    check_count(recipe, models, number if method.base != "none" else None, where)
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
    common = [(where, part.parameters), *common_places(recipe)]
    places = [
        [(f"{where}, {recipe.inputs[source.model]}", source.parameters), *common]
        for source in part.sources
    ]
    values = values_for(method, depth, Asked(result, common), asked_of(method, names, base, places))
    return Making(list(zip(models, names, strict=True)), lead, base, values)


def _count_layers(folder: ModelFolder) -> int:
    numbers = [part[1] for name in folder.tensors if (part := layer_of(name)) is not None]
    return max(numbers, default=-1) + 1
