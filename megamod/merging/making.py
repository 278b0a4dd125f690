"""How each tensor of a merge of whole models is made."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from megamod.errors import UserError
from megamod.merging.compatibility import check_shapes
from megamod.merging.methods import METHODS, Method
from megamod.merging.recipe import Module, Recipe
from megamod.merging.settings import Asked, Place, depths, layer_of, values_for
from megamod.merging.tensors import TensorSource, Values


@dataclass(frozen=True)
class Making:
    """How one tensor of the result is made.

    Attributes:
        sources: number of each model that takes part, and what it calls the tensor.
        lead: which of them has the shape and dtype; a tensor of integers is copied from it.
        base: which of them the others are compared with; None: none.
        values: overall and per-source parameters.
        rows: how many rows are merged; None: all.
        copied: the tensor is that of the only source, whatever the method.
    """

    sources: Sequence[tuple[int, str]]
    lead: int
    base: int | None
    values: tuple[Values, Sequence[Values]]
    rows: int | None = None
    copied: bool = False


def copy_of(number: int, name: str) -> Making:
    """A tensor that is taken from one model as it is."""
    return Making([(number, name)], 0, None, ({}, [{}]), copied=True)


def common_places(recipe: Recipe) -> list[Place]:
    """Where parameters of all models stand: those of the only module, and of the recipe."""
    where = f"{recipe.origin}, parameters"
    return [(f"{recipe.origin}, modules", recipe.module), (where, recipe.parameters)]


def check_count(recipe: Recipe, models: Sequence[int], base: int | None, where: str) -> None:
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


def asked_of(
    method: Method, names: Sequence[str], base: int | None, places: Sequence[Sequence[Place]]
) -> list[Asked]:
    """For whom the values of each model are looked up.

    Args:
        names: what the models call a tensor; `base`: which of them is the base.
        places: where parameters of each model stand.
    """
    return [
        Asked(name, there, exempt=method.base != "none" and place == base)
        for place, (name, there) in enumerate(zip(names, places, strict=True))
    ]


def places_of(recipe: Recipe, module: Module) -> list[Place]:
    """Where parameters of a module stand: those of each of its models, then its own."""
    where = f"{recipe.origin}, modules, {module.name}"
    models = [(f"{where}, {recipe.inputs[number]}", own) for number, own in module.models]
    return [*models, (where, module.parameters)]


def of_models(
    recipe: Recipe, folders: Sequence[TensorSource], copied: Collection[str] = ()
) -> dict[str, Making]:
    """Whole models into one with the tensors of the template.

    Args:
        folders: of the models, under common names.
        copied: tensors that are taken from the template as they are.
    """
    method, template = METHODS[recipe.method], folders[recipe.template]
    base = recipe.base if method.base != "none" else None
    merged = [
        name
        for name, spec in template.tensors.items()
        if spec.dtype.is_floating_point and name not in copied
    ]
    for folder in folders:
        for name in merged:
            check_shapes(template, name, folder, theirs=name, cut=recipe.cut)
    makings = {
        name: copy_of(recipe.template, name) for name in template.tensors.keys() - set(merged)
    }
    if not recipe.modules:
        places = [(f"{recipe.origin}, {one}", one.parameters) for one in recipe.inputs]
        models = dict(enumerate(places))
        check_count(recipe, list(models), base, recipe.origin)
        makings |= _of_part(recipe, models, common_places(recipe), merged)
    for module, owned in _owned(recipe, merged).items():
        part = recipe.modules[module]
        *places, own = places_of(recipe, part)
        models = {number: place for (number, _), place in zip(part.models, places, strict=True)}
        if recipe.base is not None:
            models.setdefault(recipe.base, (f"{own[0]}, {recipe.inputs[recipe.base]}", {}))
        check_count(recipe, list(models), base, own[0])
        makings |= _of_part(recipe, models, [own, *common_places(recipe)], owned)
    return {name: makings[name] for name in template.tensors}


def _of_part(
    recipe: Recipe,
    models: Mapping[int, Place],
    common: Sequence[Place],
    part: Sequence[str],
) -> dict[str, Making]:
    """Some tensors of the template.

    Args:
        models: which models are merged, each with its own parameters; `common`: further ones.
        part: names of the tensors to make.
    """
    method = METHODS[recipe.method]
    base = recipe.base if method.base != "none" else None
    numbers, depth = list(models), depths(part)
    places = [[own, *common] for own in models.values()]
    anchor = numbers.index(base) if base in models else None
    lead = numbers.index(recipe.template) if recipe.template in models else 0
    makings = {}
    for name in part:
        theirs = [name] * len(numbers)
        values = values_for(
            method, depth[name], Asked(name, common), asked_of(method, theirs, anchor, places)
        )
        makings[name] = Making(list(zip(numbers, theirs, strict=True)), lead, anchor, values)
    return makings


def _owned(recipe: Recipe, names: Iterable[str]) -> dict[int, list[str]]:
    """Number of a module -> its tensors: those in whose names it comes first, before any layer.

    Raises:
        UserError: if a tensor is in none of them and none is called `default`, or a module has
            none.
    """
    owned: dict[int, list[str]] = {number: [] for number in range(len(recipe.modules))}
    called = [module.name for module in recipe.modules]
    for name in names if called else ():
        before = f".{(layer_of(name) or (name, 0, ''))[0]}."
        found = [
            (before.find(f".{module}."), -len(module), number)
            for number, module in enumerate(called)
            if f".{module}." in before
        ]
        if not found and "default" not in called:
            raise UserError(
                f"{recipe.origin}, modules: {name} is in none of {', '.join(called)}; a module "
                "called 'default' takes what is left"
            )
        owned[min(found)[2] if found else called.index("default")].append(name)
    for number, own in owned.items():
        if not own:
            raise UserError(f"{recipe.origin}, modules: {called[number]} has no tensor")
    return owned
