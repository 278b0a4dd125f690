"""Reader of mergekit recipes in YAML.

A parameter is one number for all tensors; a list, which is a gradient over the layers; or a list of
`{filter, value}`, of which the first applies whose filter is part of the tensor's name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from megamod.errors import UserError
from megamod.merging.recipe import (
    GREEDY_SOUP,
    InputModel,
    MergeRecipe,
    PartSource,
    RecipePart,
    find_path,
    split_adapter,
)
from megamod.merging.settings import Setting, check_known_word
from megamod.merging.vocabulary import UNION, read_vocabulary_request

DTYPES = ("float32", "float16", "bfloat16", "float64")
_TOP = ("merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype")
_TOP += ("out_dtype", "tokenizer_source", "tokenizer", "chat_template")
_TOP += ("align", "evaluation", "calibration")
_SHAPES = ("models", "slices", "modules")
_MODEL_KEYS = ("model", "parameters", "member", "statistics", "calibration")
_WITH_STATISTICS = ("fisher", "regmean")
# Our own blocks, and the methods that read them; none: all methods.
_BLOCKS = {"align": (), "evaluation": (GREEDY_SOUP,), "calibration": _WITH_STATISTICS}


def read_recipe(path: Path) -> MergeRecipe:
    """Read a recipe from a YAML file in mergekit's format.

    Our own keys are `member: DOMAIN`, `statistics: FILE` and `calibration:` of a model, and
    `align:`, `evaluation:` and `calibration:` at the top. Relative paths are looked up in the
    working directory, then in the folder of the file. A base that is not among the models becomes
    the last input.

    Raises:
        UserError: naming the file and the key: for invalid YAML, unknown keys and values.
    """
    path = Path(path)
    content, where = _read_yaml(path), f"recipe {path}"
    method = content.get("merge_method")
    if not isinstance(method, str):
        raise UserError(f"{where}: merge_method is {method!r}; give the name of a method")
    inputs: list[InputModel] = []
    parts, module_parameters = _read_parts(content, where, path.parent, inputs)
    base = _read_base_index(content.get("base_model"), inputs, path.parent, f"{where}, base_model")
    chat = content.get("chat_template")
    if chat not in (None, "auto"):
        raise UserError(f"{where}: chat_template is {chat!r}; only auto is supported")
    blocks = {key: content.get(key) for key in _BLOCKS}
    _check_blocks(blocks, inputs, method, where)
    recipe = MergeRecipe(
        method=method,
        inputs=tuple(inputs),
        parameters=_check_parameter_block(content.get("parameters"), f"{where}, parameters"),
        dtype=_check_dtype(content.get("dtype"), f"{where}, dtype"),
        out_dtype=_check_dtype(content.get("out_dtype"), f"{where}, out_dtype"),
        base=base,
        origin=where,
        parts=parts,
        module_parameters=module_parameters,
        copy_chat_template=chat is not None,
        cut_vocabularies=True,
        **blocks,
    )
    return _read_tokenizer(recipe, content, path)


def _read_yaml(path: Path) -> dict:
    """Read a recipe file as a dictionary with known keys; raise UserError with file, line and
    column.
    """
    try:
        content = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise UserError(f"recipe {path} cannot be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"recipe {path}{where} is not YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"recipe {path} is not a list of `key: value` lines")
    for key in content:
        check_known_word(str(key), _TOP, f"recipe {path}: unknown key")
    return content


def _check_blocks(
    blocks: Mapping[str, object], inputs: Sequence[InputModel], method: str, where: str
) -> None:
    """Refuse our own blocks, and keys of models, that the method does not read."""
    for key, block in blocks.items():
        if block is not None and not isinstance(block, dict):
            raise UserError(f"{where}: {key} is {block!r}, not `name: value` lines")
        if block is not None and _BLOCKS[key] and method not in _BLOCKS[key]:
            raise UserError(f"{where}: {key} goes with {', '.join(_BLOCKS[key])}, not {method}")
    for model in inputs if method not in _WITH_STATISTICS else ():
        for key in ("calibration", "statistics"):
            if getattr(model, key) is not None:
                allowed = ", ".join(_WITH_STATISTICS)
                raise UserError(f"{where}, {model}: {key} goes with {allowed}, not {method}")


def _read_parts(
    content: Mapping, where: str, folder: Path, inputs: list[InputModel]
) -> tuple[tuple[RecipePart, ...], dict[str, Setting]]:
    """Read the parts, and the parameters of a single module; models are added to the inputs.

    There are no parts where whole models are merged into one.
    """
    shape = _find_only_key(content, _SHAPES, where)
    if shape != "modules":
        return _read_slices_or_models(content, shape, where, folder, inputs), {}
    modules = content["modules"]
    if not isinstance(modules, dict) or not modules:
        raise UserError(f"{where}: 'modules' is not a mapping from names to modules: {modules!r}")
    parts = []
    for name, module in modules.items():
        label = f"{where}, modules, {name}"
        if not isinstance(module, dict):
            raise UserError(f"{label}: is {module!r}; give 'models' or 'slices'")
        for key in module:
            check_known_word(str(key), ("models", "slices", "parameters"), f"{label}: unknown key")
        shape = _find_only_key(module, ("models", "slices"), label)
        parameters = _check_parameter_block(module.get("parameters"), f"{label}, parameters")
        if len(modules) == 1:
            return _read_slices_or_models(module, shape, where, folder, inputs), parameters
        if shape == "slices":
            raise UserError(f"{label}: one of several modules cannot have slices; give 'models'")
        sources = []
        for number, entry in enumerate(_check_list(module["models"], "models", label)):
            model = _read_input(entry, f"{label}, models[{number}]", folder, _MODEL_KEYS)
            sources.append(PartSource(_find_or_add_input(model, inputs), model.parameters))
        parts.append(RecipePart(tuple(sources), parameters, module=str(name)))
    return tuple(parts), {}


def _read_slices_or_models(
    content: Mapping, shape: str, where: str, folder: Path, inputs: list[InputModel]
) -> tuple[RecipePart, ...]:
    """Read `slices` as parts, or `models` as inputs."""
    entries = _check_list(content[shape], shape, where)
    if shape == "slices":
        return tuple(
            _read_slice(entry, f"{where}, slices[{number}]", folder, inputs)
            for number, entry in enumerate(entries)
        )
    for number, entry in enumerate(entries):
        inputs.append(_read_input(entry, f"{where}, models[{number}]", folder, _MODEL_KEYS))
    return ()


def _find_only_key(content: Mapping, keys: Sequence[str], where: str) -> str:
    """Return the only one of these keys that the content has.

    Raises:
        UserError: if there are several, or none.
    """
    present = [key for key in keys if content.get(key) is not None]
    if len(present) != 1:
        state = "all of " + ", ".join(present) if present else "none of " + ", ".join(keys)
        raise UserError(f"{where}: has {state}; give exactly one")
    return present[0]


def _find_or_add_input(model: InputModel, inputs: list[InputModel]) -> int:
    """Return a model's number among the inputs, whatever its parameters; append it if it is new."""
    plain = replace(model, parameters={})
    if plain not in inputs:
        inputs.append(plain)
    return inputs.index(plain)


def _check_list(entries: object, key: str, where: str) -> list:
    """Return `entries`; raise UserError if it is not a list with at least one entry."""
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{where}: '{key}' is not a list of {key}, but {entries!r}")
    return entries


def _read_slice(entry: object, where: str, folder: Path, inputs: list[InputModel]) -> RecipePart:
    """Read a slice; its models are added to the inputs."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: is {entry!r}; give `sources:`")
    for key in entry:
        check_known_word(str(key), ("sources", "parameters", "base_model"), f"{where}: unknown key")
    sources = []
    for number, item in enumerate(_check_list(entry.get("sources"), "sources", where)):
        label = f"{where}, sources[{number}]"
        model = _read_input(item, label, folder, (*_MODEL_KEYS, "layer_range"))
        span = item.get("layer_range")
        valid = isinstance(span, list) and [type(bound) for bound in span] == [int, int]
        if not valid or not 0 <= span[0] < span[1]:
            raise UserError(
                f"{label}: layer_range is {span!r}; give [FIRST, LAST + 1], as in [0, 12]"
            )
        sources.append(
            PartSource(_find_or_add_input(model, inputs), model.parameters, (span[0], span[1]))
        )
    lengths = [source.layers[1] - source.layers[0] for source in sources]
    if len(set(lengths)) > 1:
        raise UserError(f"{where}: sources have {lengths} layers; all of a slice need equally many")
    base = _read_base_index(entry.get("base_model"), inputs, folder, f"{where}, base_model")
    parameters = _check_parameter_block(entry.get("parameters"), f"{where}, parameters")
    return RecipePart(tuple(sources), parameters, base)


def _read_input(entry: object, where: str, folder: Path, keys: Sequence[str]) -> InputModel:
    """Read one model of a recipe; raise UserError for keys not in `keys` and values of the wrong
    kind.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
        raise UserError(f"{where}: is {entry!r}; give `model: FOLDER`")
    for key in entry:
        check_known_word(str(key), keys, f"{where}: unknown key")
    member, statistics = entry.get("member"), entry.get("statistics")
    if member is not None and not isinstance(member, str):
        raise UserError(f"{where}, member: {member!r} is not the name of a domain")
    if statistics is not None and not isinstance(statistics, str):
        raise UserError(f"{where}, statistics: {statistics!r} is not the name of a file")
    calibration = entry.get("calibration")
    if calibration is not None and not isinstance(calibration, dict):
        raise UserError(f"{where}, calibration: is {calibration!r}, not `name: value` lines")
    path, adapter = split_adapter(entry["model"], folder)
    return InputModel(
        path,
        member,
        _check_parameter_block(entry.get("parameters"), f"{where}, parameters"),
        member,
        None if statistics is None else find_path(statistics, folder),
        calibration,
        adapter,
    )


def _read_base_index(
    model: object, inputs: list[InputModel], folder: Path, where: str
) -> int | None:
    """Return the base model's number among the inputs, appending it if it is new; None: no base."""
    if model is None:
        return None
    if not isinstance(model, str):
        raise UserError(f"{where}: is {model!r}, not the name of a folder")
    path, adapter = split_adapter(model, folder)
    known = [(parent.path, parent.adapter) for parent in inputs]
    if (path, adapter) not in known:
        inputs.append(InputModel(path, adapter=adapter))
        return len(known)
    return known.index((path, adapter))


def _read_tokenizer(recipe: MergeRecipe, content: Mapping, path: Path) -> MergeRecipe:
    """Return the recipe with its vocabulary request and the model whose tokenizer files are
    copied.
    """
    where, block = f"recipe {path}", content.get("tokenizer")
    source = content.get("tokenizer_source")
    if block is not None and source is not None:
        raise UserError(f"{where}: has both tokenizer and tokenizer_source; give one")
    if block is not None and not isinstance(block, dict):
        raise UserError(f"{where}: tokenizer is {block!r}, not `source: ...` and `tokens: ...`")
    if block is None and source is None:
        return replace(recipe, tokenizer=recipe.template_model)

    def find_model_number(name: object, label: str) -> int | None:
        """Return the number of the model that a tokenizer key names; None for the union."""
        if name in (UNION, "base"):
            return None if name == UNION else recipe.template_model
        known = [(parent.path, parent.adapter) for parent in recipe.inputs]
        model = split_adapter(name, path.parent) if isinstance(name, str) else None
        if model not in known:
            raise UserError(
                f"{label}: is {name!r}; give union, base, or one of the models "
                f"{', '.join(map(str, recipe.inputs))}"
            )
        return known.index(model)

    key = "tokenizer_source" if block is None else "tokenizer"
    words = read_vocabulary_request(
        source if block is None else block, find_model_number, f"{where}, {key}"
    )
    number = recipe.template_model if words.source is None else words.source
    return replace(recipe, tokenizer=number, vocabulary_request=words)


def _check_parameter_block(content: object, where: str) -> dict[str, Setting]:
    """Return a `parameters:` block as a dictionary, empty if absent; raise UserError for another
    kind.
    """
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{where}: is {content!r}, not `name: value` lines")
    return {str(key): value for key, value in content.items()}


def _check_dtype(name: object, where: str) -> str | None:
    """Return a dtype name, or None if absent; raise UserError if it is unknown."""
    if name is not None and name not in DTYPES:
        raise UserError(f"{where}: {name!r} is not one of {', '.join(DTYPES)}")
    return name
