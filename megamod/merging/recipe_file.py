"""Recipes as mergekit has them, read from YAML.

A parameter may be one number for all tensors; a list, which is spread evenly over the layers and
read between its entries; or a list of `{filter, value}`, of which the first fits whose filter is
part of the tensor's name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from megamod.errors import UserError
from megamod.merging.recipe import (
    GREEDY_SOUP,
    Input,
    Module,
    Recipe,
    Slice,
    Source,
    find_path,
    split_adapter,
)
from megamod.merging.settings import Setting, check_word
from megamod.merging.vocabulary import UNION, read_words

DTYPES = ("float32", "float16", "bfloat16", "float64")
_TOP = ("merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype")
_TOP += (
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "align",
    "evaluation",
    "calibration",
)
# Ours, with the methods that read them; none: all of them.
_BLOCKS = {"align": (), "evaluation": (GREEDY_SOUP,), "calibration": ("fisher", "regmean")}
_SHAPES = ("models", "slices", "modules")
_MODEL_KEYS = ("model", "parameters", "member", "statistics", "calibration")


def read_recipe(path: Path) -> Recipe:
    """A recipe from a YAML file as mergekit reads it.

    Ours are `member: DOMAIN` and `statistics: FILE` beside `model:`, and at the top `align:`,
    `evaluation:` and `calibration:`.
    Folders are looked for in the working directory, then beside the file. A base that is none of
    the models becomes the last input.

    Raises:
        UserError: naming the file and the key: for what is not YAML, unknown keys and values.
    """
    path = Path(path)
    content, where = _read_yaml(path), f"recipe {path}"
    method = content.get("merge_method")
    if not isinstance(method, str):
        raise UserError(f"{where}: merge_method is {method!r}; give the name of a method")
    body, modules = _body(content, where)
    module = next(iter(modules.values())) if len(modules) == 1 else {}
    inputs: list[Input] = []
    parts: list[Module] = []
    if len(modules) > 1:
        parts = [
            _module(name, content["modules"][name]["models"], settings, where, path, inputs)
            for name, settings in modules.items()
        ]
        slices = ()
    elif "slices" in body:
        slices = tuple(
            _slice(entry, f"{where}, slices[{place}]", path.parent, inputs)
            for place, entry in enumerate(_listed(body["slices"], "slices", where))
        )
    else:
        slices = ()
        for place, entry in enumerate(_listed(body["models"], "models", where)):
            inputs.append(_input(entry, f"{where}, models[{place}]", path.parent, _MODEL_KEYS))
    base = _base(content.get("base_model"), inputs, path.parent, f"{where}, base_model")
    chat = content.get("chat_template")
    if chat not in (None, "auto"):
        raise UserError(f"{where}: chat_template is {chat!r}; only auto is supported")
    blocks = {key: content.get(key) for key in _BLOCKS}
    for key, block in blocks.items():
        if block is not None and not isinstance(block, dict):
            raise UserError(f"{where}: {key} is {block!r}, not `name: value` lines")
        if block is not None and _BLOCKS[key] and method not in _BLOCKS[key]:
            raise UserError(f"{where}: {key} goes with {', '.join(_BLOCKS[key])}, not {method}")
    for one in inputs:
        if one.statistics is not None and method not in _BLOCKS["calibration"]:
            allowed = ", ".join(_BLOCKS["calibration"])
            raise UserError(f"{where}, {one}: statistics goes with {allowed}, not {method}")
        if one.calibration is not None and method not in _BLOCKS["calibration"]:
            allowed = ", ".join(_BLOCKS["calibration"])
            raise UserError(f"{where}, {one}: calibration goes with {allowed}, not {method}")
    recipe = Recipe(
        method=method,
        inputs=tuple(inputs),
        parameters=_parameters(content.get("parameters"), f"{where}, parameters"),
        dtype=_dtype(content.get("dtype"), f"{where}, dtype"),
        out_dtype=_dtype(content.get("out_dtype"), f"{where}, out_dtype"),
        base=base,
        origin=where,
        slices=slices,
        module=module,
        modules=tuple(parts),
        chat=chat is not None,
        cut=True,
        **blocks,
    )
    return _with_tokenizer(recipe, content, path)


def _read_yaml(path: Path) -> dict:
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
        check_word(str(key), _TOP, f"recipe {path}: unknown key")
    return content


def _body(content: Mapping, where: str) -> tuple[Mapping, dict[str, dict[str, Setting]]]:
    """What holds `models` or `slices`: the recipe or its only module; settings of all modules."""
    given = _only_one(content, _SHAPES, where)
    if given != "modules":
        return {given: content[given]}, {}
    modules = content["modules"]
    if not isinstance(modules, dict) or not modules:
        raise UserError(f"{where}: 'modules' is not a mapping from names to modules: {modules!r}")
    settings: dict[str, dict[str, Setting]] = {}
    body: dict[str, object] = {}
    for name, module in modules.items():
        there = f"{where}, modules, {name}"
        if not isinstance(module, dict):
            raise UserError(f"{there}: is {module!r}; give 'models' or 'slices'")
        for key in module:
            check_word(str(key), ("models", "slices", "parameters"), f"{there}: unknown key")
        given = _only_one(module, ("models", "slices"), there)
        if given == "slices" and len(modules) > 1:
            raise UserError(f"{there}: one of several modules cannot have slices; give 'models'")
        body = {given: module[given]}
        settings[name] = _parameters(module.get("parameters"), f"{there}, parameters")
    return body, settings


def _only_one(content: Mapping, keys: Sequence[str], where: str) -> str:
    """The one of these keys that is given.

    Raises:
        UserError: if there are more, or none.
    """
    given = [key for key in keys if content.get(key) is not None]
    if len(given) != 1:
        told = "all of " + ", ".join(given) if given else "none of " + ", ".join(keys)
        raise UserError(f"{where}: has {told}; give exactly one")
    return given[0]


def _module(
    name: str,
    entries: object,
    settings: dict[str, Setting],
    where: str,
    path: Path,
    inputs: list[Input],
) -> Module:
    """Reads one of several modules; its models are added to the inputs where they are new."""
    where = f"{where}, modules, {name}"
    models = []
    for place, entry in enumerate(_listed(entries, "models", where)):
        found = _input(entry, f"{where}, models[{place}]", path.parent, _MODEL_KEYS)
        models.append((_number_of(found, inputs), found.parameters))
    return Module(str(name), tuple(models), settings)


def _number_of(found: Input, inputs: list[Input]) -> int:
    """Which of the inputs this is, whatever its settings; a new one becomes the last of them."""
    plain = replace(found, parameters={})
    if plain not in inputs:
        inputs.append(plain)
    return inputs.index(plain)


def _listed(entries: object, key: str, where: str) -> list:
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{where}: '{key}' is not a list of {key}, but {entries!r}")
    return entries


def _slice(entry: object, where: str, beside: Path, inputs: list[Input]) -> Slice:
    """Reads a slice; its models are added to the inputs where they are new."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: is {entry!r}; give `sources:`")
    for key in entry:
        check_word(str(key), ("sources", "parameters", "base_model"), f"{where}: unknown key")
    sources = []
    for place, one in enumerate(_listed(entry.get("sources"), "sources", where)):
        there = f"{where}, sources[{place}]"
        found = _input(one, there, beside, (*_MODEL_KEYS, "layer_range"))
        number = _number_of(found, inputs)
        span = one.get("layer_range")
        whole = isinstance(span, list) and [type(number) for number in span] == [int, int]
        if not whole or not 0 <= span[0] < span[1]:
            raise UserError(
                f"{there}: layer_range is {span!r}; give [FIRST, LAST + 1], as in [0, 12]"
            )
        sources.append(Source(number, (span[0], span[1]), found.parameters))
    lengths = [source.layers[1] - source.layers[0] for source in sources]
    if len(set(lengths)) > 1:
        raise UserError(f"{where}: sources have {lengths} layers; all of a slice need equally many")
    base = _base(entry.get("base_model"), inputs, beside, f"{where}, base_model")
    parameters = _parameters(entry.get("parameters"), f"{where}, parameters")
    return Slice(tuple(sources), parameters, base)


def _input(entry: object, where: str, beside: Path, keys: Sequence[str]) -> Input:
    if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
        raise UserError(f"{where}: is {entry!r}; give `model: FOLDER`")
    for key in entry:
        check_word(str(key), keys, f"{where}: unknown key")
    member, statistics = entry.get("member"), entry.get("statistics")
    if member is not None and not isinstance(member, str):
        raise UserError(f"{where}, member: {member!r} is not the name of a domain")
    if statistics is not None and not isinstance(statistics, str):
        raise UserError(f"{where}, statistics: {statistics!r} is not the name of a file")
    calibration = entry.get("calibration")
    if calibration is not None and not isinstance(calibration, dict):
        raise UserError(f"{where}, calibration: is {calibration!r}, not `name: value` lines")
    path, adapter = split_adapter(entry["model"], beside)
    return Input(
        path,
        member,
        _parameters(entry.get("parameters"), f"{where}, parameters"),
        member,
        None if statistics is None else find_path(statistics, beside),
        calibration,
        adapter,
    )


def _base(model: object, inputs: list[Input], beside: Path, where: str) -> int | None:
    """Which of the inputs this is; a new one becomes the last of them."""
    if model is None:
        return None
    if not isinstance(model, str):
        raise UserError(f"{where}: is {model!r}, not the name of a folder")
    path, adapter = split_adapter(model, beside)
    if (path, adapter) not in (known := [(one.path, one.adapter) for one in inputs]):
        inputs.append(Input(path, adapter=adapter))
        return len(known)
    return known.index((path, adapter))


def _with_tokenizer(recipe: Recipe, content: Mapping, path: Path) -> Recipe:
    """The recipe with its vocabulary, and the number of the model that it is made from."""
    where, block = f"recipe {path}", content.get("tokenizer")
    source = content.get("tokenizer_source")
    if block is not None and source is not None:
        raise UserError(f"{where}: has both tokenizer and tokenizer_source; give one")
    if block is not None and not isinstance(block, dict):
        raise UserError(f"{where}: tokenizer is {block!r}, not `source: ...` and `tokens: ...`")
    if block is None and source is None:
        return replace(recipe, tokenizer=recipe.template)

    def find(name: object, there: str) -> int | None:
        if name in (UNION, "base"):
            return None if name == UNION else recipe.template
        known = [(one.path, one.adapter) for one in recipe.inputs]
        found = split_adapter(name, path.parent) if isinstance(name, str) else None
        if found not in known:
            raise UserError(
                f"{there}: is {name!r}; give union, base, or one of the models "
                f"{', '.join(map(str, recipe.inputs))}"
            )
        return known.index(found)

    key = "tokenizer_source" if block is None else "tokenizer"
    words = read_words(source if block is None else block, find, f"{where}, {key}")
    number = recipe.template if words.source is None else words.source
    return replace(recipe, tokenizer=number, words=words)


def _parameters(content: object, where: str) -> dict[str, Setting]:
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{where}: is {content!r}, not `name: value` lines")
    return {str(key): value for key, value in content.items()}


def _dtype(name: object, where: str) -> str | None:
    if name is not None and name not in DTYPES:
        raise UserError(f"{where}: {name!r} is not one of {', '.join(DTYPES)}")
    return name
