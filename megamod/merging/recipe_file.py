"""Reader of mergekit recipes in YAML.

A parameter is one number for all tensors; a list, which is a gradient over the layers; or a list of
`{filter, value}`, of which the first applies whose filter is part of the tensor's name.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from megamod.errors import UserError, shorten
from megamod.merging.recipe import (
    GREEDY_SOUP,
    InputModel,
    MergeRecipe,
    PartSource,
    RecipePart,
    resolve_recipe_path,
    split_adapter,
)
from megamod.merging.settings import Setting
from megamod.merging.vocabulary import UNION, TokenizerBlock, read_vocabulary_request
from megamod.schemas import Items, Key, Schema, read_checked_file

DTYPES = ("float32", "float16", "bfloat16", "float64")
"""Names of the dtypes that a recipe may round or store weights in."""
_WITH_STATISTICS = ("fisher", "regmean")
# Our own blocks, and the methods that read them; none: all methods.
_BLOCKS = {"align": (), "evaluation": (GREEDY_SOUP,), "calibration": _WITH_STATISTICS}


def _check_layer_range(layers: tuple[int, ...]) -> tuple[int, ...]:
    """Return a `layer_range`; raise ValueError, for pydantic, if it is no [FIRST, LAST + 1]."""
    if len(layers) != 2 or not 0 <= layers[0] < layers[1]:
        raise ValueError(f"{[*layers]} is not [FIRST, LAST + 1], as in [0, 12]")
    return layers


_Parameters = Annotated[
    dict[Key, Any], BeforeValidator(lambda value: {} if value is None else value)
]
_Block = dict[str, Any]


class _ModelEntry(Schema):
    """One model as a recipe names it, with its own parameters and text."""

    model: str
    parameters: _Parameters = Field({})
    member: str | None = None
    statistics: str | None = None
    calibration: _Block | None = None


class _SliceSource(_ModelEntry):
    """Consecutive layers of a model, `layer_range` from the first to that after the last."""

    layer_range: Annotated[Items[int], AfterValidator(_check_layer_range)]


class _Slice(Schema):
    """Layers of the result that are merged from the layers of one or more models."""

    sources: Items[_SliceSource] = Field(min_length=1)
    parameters: _Parameters = Field({})
    base_model: str | None = None

    @model_validator(mode="after")
    def _check_equal_depths(self) -> "_Slice":
        """Refuse sources with different numbers of layers, by a ValueError for pydantic."""
        lengths = [source.layer_range[1] - source.layer_range[0] for source in self.sources]
        if len(set(lengths)) > 1:
            raise ValueError(f"sources have {lengths} layers; all of a slice need equally many")
        return self


class _Module(Schema):
    """Content of a module, or of a recipe without modules: either models or slices."""

    models: Annotated[Items[_ModelEntry], Field(min_length=1)] | None = None
    slices: Annotated[Items[_Slice], Field(min_length=1)] | None = None
    parameters: _Parameters = Field({})

    @model_validator(mode="after")
    def _check_exactly_one_form(self) -> "_Module":
        """Refuse none or several of models, slices and, in a recipe, modules, by a ValueError."""
        forms = [key for key in ("models", "slices", "modules") if key in type(self).model_fields]
        present = [key for key in forms if getattr(self, key) is not None]
        if len(present) != 1:
            state = "all of " + ", ".join(present) if present else "none of " + ", ".join(forms)
            raise ValueError(f"has {state}; give exactly one")
        return self


class _RecipeFile(_Module):
    """The whole file: models, slices or modules, and the settings of the merge."""

    merge_method: str
    base_model: str | None = None
    modules: Annotated[dict[Key, _Module], Field(min_length=1)] | None = None
    dtype: Literal[DTYPES] | None = None
    out_dtype: Literal[DTYPES] | None = None
    tokenizer_source: str | None = None
    tokenizer: TokenizerBlock | None = None
    chat_template: Literal["auto"] | None = None
    align: _Block | None = None
    evaluation: _Block | None = None
    calibration: _Block | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> "_RecipeFile":
        """Refuse keys that do not go together, by a ValueError that names them, for pydantic.

        They are slices in one of several modules, two keys for the tokenizer, and a block of
        `_BLOCKS` with a method that does not read it.
        """
        for name, module in (self.modules or {}).items():
            if module.slices is not None and len(self.modules) > 1:
                raise ValueError(
                    f"modules.{name}: one of several modules cannot have slices; give models"
                )
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise ValueError("has both tokenizer and tokenizer_source; give one")
        for key, methods in _BLOCKS.items():
            if getattr(self, key) is not None and methods and self.merge_method not in methods:
                raise ValueError(f"{key} goes with {', '.join(methods)}, not {self.merge_method}")
        return self


def read_recipe(path: Path) -> MergeRecipe:
    """Read a recipe from the YAML file `path` in mergekit's format.

    Our own keys are `member: DOMAIN`, `statistics: FILE` and `calibration:` of a model, and
    `align:`, `evaluation:` and `calibration:` at the top. Relative paths are looked up in the
    working directory, then in the folder of the file. A base that is not among the models becomes
    the last input.

    Raises:
        UserError: naming the file and the key: for invalid YAML, unknown keys, values of the wrong
            kind, or keys that do not go together.
    """
    path = Path(path)
    where = f"recipe {path}"
    file = read_checked_file(path, _RecipeFile, where)
    inputs: list[InputModel] = []
    parts, module_parameters = _read_parts(file, path.parent, inputs)
    base = _register_base(file.base_model, path.parent, inputs)
    for model in inputs if file.merge_method not in _WITH_STATISTICS else ():
        for key in ("calibration", "statistics"):
            if getattr(model, key) is not None:
                allowed = f"goes with {', '.join(_WITH_STATISTICS)}, not {file.merge_method}"
                raise UserError(f"{where}, {model}: {key} {allowed}")
    recipe = MergeRecipe(
        method=file.merge_method,
        inputs=tuple(inputs),
        parameters=file.parameters,
        dtype=file.dtype,
        out_dtype=file.out_dtype,
        base=base,
        origin=where,
        parts=parts,
        module_parameters=module_parameters,
        copy_chat_template=file.chat_template is not None,
        cut_vocabularies=True,
        **{key: getattr(file, key) for key in _BLOCKS},
    )
    return _add_tokenizer(recipe, file, path)


def _read_parts(
    file: _RecipeFile, folder: Path, inputs: list[InputModel]
) -> tuple[tuple[RecipePart, ...], dict[str, Setting]]:
    """Read the parts of the result, and the parameters of a single module.

    There are no parts where whole models are merged into one.

    Args:
        folder: in which files are looked up that the working directory does not have.
        inputs: gets all models that the file names.
    """
    if file.modules is None:
        return _register_slices_or_models(file, folder, inputs), {}
    if len(file.modules) == 1:
        (module,) = file.modules.values()
        return _register_slices_or_models(module, folder, inputs), module.parameters
    parts = []
    for name, module in file.modules.items():
        sources = tuple(_register_source(entry, folder, inputs) for entry in module.models)
        parts.append(RecipePart(sources, module.parameters, module=name))
    return tuple(parts), {}


def _register_slices_or_models(
    content: _Module, folder: Path, inputs: list[InputModel]
) -> tuple[RecipePart, ...]:
    """Read `slices:` as parts, or append `models:` to the inputs and return no parts.

    Models and bases of slices are appended too, unless they are among the inputs already.

    Args:
        content: a module, or a recipe without modules.
        folder: see `_read_parts`.
        inputs: models read so far; changed in place.
    """
    inputs += [_read_input(entry, folder) for entry in content.models or ()]
    parts = []
    for entry in content.slices or ():
        sources = tuple(_register_source(source, folder, inputs) for source in entry.sources)
        base = _register_base(entry.base_model, folder, inputs)
        parts.append(RecipePart(sources, entry.parameters, base))
    return tuple(parts)


def _register_source(entry: _ModelEntry, folder: Path, inputs: list[InputModel]) -> PartSource:
    """Read a source of a part, and append its model to the inputs unless it is there already.

    The parameters of `entry` are the source's, so they do not make it another model.

    Args:
        entry: a model as a recipe names it.
        folder: see `_read_parts`.
        inputs: models read so far; changed in place.
    """
    model = replace(_read_input(entry, folder), parameters={})
    if model not in inputs:
        inputs.append(model)
    layers = getattr(entry, "layer_range", None)
    return PartSource(inputs.index(model), entry.parameters, layers)


def _read_input(entry: _ModelEntry, folder: Path) -> InputModel:
    """Read a model's entry; its files are looked up in the working directory, then in `folder`.

    Raises:
        UserError: as `split_adapter`.
    """
    path, adapter = split_adapter(entry.model, folder)
    return InputModel(
        path,
        entry.member,
        entry.parameters,
        entry.member,
        None if entry.statistics is None else resolve_recipe_path(entry.statistics, folder),
        entry.calibration,
        adapter,
    )


def _register_base(model: str | None, folder: Path, inputs: list[InputModel]) -> int | None:
    """Return the base model's number among the inputs, and append it to them if it is new.

    Args:
        model: as the recipe names it; None: no base, and the result is None.
        folder: see `_read_parts`.
    """
    if model is None:
        return None
    path, adapter = split_adapter(model, folder)
    known = [(parent.path, parent.adapter) for parent in inputs]
    if (path, adapter) not in known:
        inputs.append(InputModel(path, adapter=adapter))
        return len(known)
    return known.index((path, adapter))


def _add_tokenizer(recipe: MergeRecipe, file: _RecipeFile, path: Path) -> MergeRecipe:
    """Return the recipe with its vocabulary request and the model whose tokenizer is copied.

    Without a key for the tokenizer that is the template, and vocabularies are not united.

    Args:
        recipe, file: the recipe so far, and the file it was read from.
        path: path of the recipe; models are looked up in its folder too.
    Raises:
        UserError: if a key names a model that is not merged, or has an invalid value.
    """
    if file.tokenizer is None and file.tokenizer_source is None:
        return replace(recipe, tokenizer=recipe.template_model)

    def find_model_number(name: object, label: str) -> int | None:
        """Return the number of the model that a tokenizer key names; None for the union.

        Raises:
            UserError: beginning with `label`, the key, if `name` is none of the models.
        """
        if name in (UNION, "base"):
            return None if name == UNION else recipe.template_model
        known = [(parent.path, parent.adapter) for parent in recipe.inputs]
        model = split_adapter(name, path.parent) if isinstance(name, str) else None
        if model not in known:
            raise UserError(
                f"{label}: is {shorten(name)}; give union, base, or one of the models "
                f"{', '.join(map(str, recipe.inputs))}"
            )
        return known.index(model)

    key = "tokenizer_source" if file.tokenizer is None else "tokenizer"
    words = read_vocabulary_request(
        getattr(file, key), find_model_number, f"{recipe.origin}, {key}"
    )
    number = recipe.template_model if words.source is None else words.source
    return replace(recipe, tokenizer=number, vocabulary_request=words)
