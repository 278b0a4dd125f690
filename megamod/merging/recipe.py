"""What is to be merged and how: recipes as mergekit has them, and the same from flags.

A parameter may be one number for all tensors; a list, which is spread evenly over the layers and
read between its entries; or a list of `{filter, value}`, of which the first fits whose filter is
part of the tensor's name.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from megamod.errors import UserError
from megamod.merging.settings import Setting, check_word

DTYPES = ("float32", "float16", "bfloat16", "float64")
_TOP = ("merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype")
_TOP += ("out_dtype", "tokenizer_source", "tokenizer", "chat_template", "align")
_SHAPES = ("models", "slices", "modules")
_MODEL_KEYS = ("model", "parameters", "member", "statistics")


@dataclass(frozen=True)
class Input:
    """One model of a merge.

    Attributes:
        path: its folder; `member`: an expert of a DEMix folder, None for the whole.
        parameters: settings by name.
        domain: what it was trained on, to be recorded.
        statistics: file with what was measured on data, for methods that weigh by it.
    """

    path: Path
    member: str | None = None
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    domain: str | None = None
    statistics: Path | None = None

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path} ({self.member})"


@dataclass(frozen=True)
class Source:
    """Some layers of one model.

    Attributes:
        model: its number among the inputs.
        layers: the first of them, and that after the last.
        parameters: settings by name.
    """

    model: int
    layers: tuple[int, int]
    parameters: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Some layers of the result, merged from as many of each source.

    Attributes:
        sources: at least one, all of the same number of layers.
        parameters: settings by name, for all sources.
        base: number of the input that is the base here; None: that of the recipe.
    """

    sources: tuple[Source, ...]
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    base: int | None = None

    @property
    def depth(self) -> int:
        """Number of layers."""
        first, last = self.sources[0].layers
        return last - first


@dataclass(frozen=True)
class Recipe:
    """A whole merge.

    Attributes:
        method: a key of `METHODS`.
        inputs: the models; `slices`: layers to stack, else whole models are merged.
        parameters: settings for all models, by name; `module`: those that go before them.
        dtype: name of the dtype that weights are rounded to first; None: none.
        out_dtype: name of the dtype that is stored; None: `dtype`, else that of the template.
        base: number of the model that the others are compared with; None: none.
        tokenizer: number of the model whose tokenizer files the result has.
        origin: where all this was said, for messages.
        chat: whether the chat template is that of most models.
        cut: whether vocabularies of unequal size are cut to what they have in common.
        align: how to reorder the neurons of models before they are merged; None: not at all.
    """

    method: str
    inputs: tuple[Input, ...]
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    base: int | None = None
    tokenizer: int = 0
    origin: str = "--models"
    slices: tuple[Slice, ...] = ()
    module: Mapping[str, Setting] = field(default_factory=dict)
    chat: bool = False
    cut: bool = False
    align: Mapping[str, Setting] | None = None

    @property
    def template(self) -> int:
        """Number of the model whose configuration and names of tensors the result has."""
        if self.base is not None:
            return self.base
        return self.slices[0].sources[0].model if self.slices else 0


def weighted(
    sources: Iterable[tuple[Path, str | None]],
    weights: Sequence[float],
    *,
    normalize: bool = True,
    domains: Sequence[str] | None = None,
    dtype: str | None = None,
    out_dtype: str | None = None,
    origin: str = "--weights",
) -> Recipe:
    """The recipe of a weighted average.

    Args:
        sources: folder, and for an expert of a DEMix folder its domain.
        weights: of each source; `origin`: where they come from, for messages.
    Raises:
        UserError: if there are not as many weights as sources.
    """
    sources = [(Path(path), member) for path, member in sources]
    if not sources:
        raise UserError(f"{origin}: there is no model to merge")
    if len(weights) != len(sources):
        raise UserError(
            f"{origin}: gives {len(weights)} weights, but there are {len(sources)} models"
        )
    inputs = tuple(
        Input(path, member, {"weight": weight}, domains[place] if domains else member)
        for place, ((path, member), weight) in enumerate(zip(sources, weights, strict=True))
    )
    return Recipe("linear", inputs, {"normalize": normalize}, dtype, out_dtype, origin=origin)


def read_recipe(path: Path) -> Recipe:
    """A recipe from a YAML file as mergekit reads it.

    Ours are `member: DOMAIN` and `statistics: FILE` beside `model:`, and `align:` at the top.
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
    body, module = _only_module(content, where)
    inputs: list[Input] = []
    if "slices" in body:
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
    align = content.get("align")
    if align is not None and not isinstance(align, dict):
        raise UserError(f"{where}: align is {align!r}, not `name: value` lines")
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
        chat=chat is not None,
        cut=True,
        align=align,
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


def _only_module(content: Mapping, where: str) -> tuple[Mapping, dict[str, Setting]]:
    """What holds `models` or `slices`: the recipe or its only module; and the settings of that."""
    given = [key for key in _SHAPES if content.get(key) is not None]
    if len(given) != 1:
        told = "all of " + ", ".join(given) if given else "none of " + ", ".join(_SHAPES)
        raise UserError(f"{where}: has {told}; give exactly one")
    if given != ["modules"]:
        return {given[0]: content[given[0]]}, {}
    modules = content["modules"]
    if not isinstance(modules, dict) or len(modules) != 1:
        raise UserError(
            f"{where}: 'modules' is not a mapping with one module; models of several are not read"
        )
    ((name, module),) = modules.items()
    where = f"{where}, modules, {name}"
    if not isinstance(module, dict):
        raise UserError(f"{where}: is {module!r}; give 'models' or 'slices'")
    for key in module:
        check_word(str(key), ("models", "slices", "parameters"), f"{where}: unknown key")
    given = [key for key in _SHAPES if module.get(key) is not None]
    if len(given) != 1:
        raise UserError(f"{where}: give exactly one of models and slices")
    settings = _parameters(module.get("parameters"), f"{where}, parameters")
    return {given[0]: module[given[0]]}, settings


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
        plain = Input(found.path, found.member, {}, found.domain, found.statistics)
        if plain not in inputs:
            inputs.append(plain)
        span = one.get("layer_range")
        whole = isinstance(span, list) and [type(number) for number in span] == [int, int]
        if not whole or not 0 <= span[0] < span[1]:
            raise UserError(
                f"{there}: layer_range is {span!r}; give [FIRST, LAST + 1], as in [0, 12]"
            )
        sources.append(Source(inputs.index(plain), (span[0], span[1]), found.parameters))
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
    return Input(
        _folder(entry["model"], beside),
        member,
        _parameters(entry.get("parameters"), f"{where}, parameters"),
        member,
        None if statistics is None else _folder(statistics, beside),
    )


def _folder(text: str, beside: Path) -> Path:
    return Path(text) if Path(text).exists() or not (beside / text).exists() else beside / text


def _base(model: object, inputs: list[Input], beside: Path, where: str) -> int | None:
    """Which of the inputs this is; a new one becomes the last of them."""
    if model is None:
        return None
    if not isinstance(model, str):
        raise UserError(f"{where}: is {model!r}, not the name of a folder")
    path = _folder(model, beside)
    if path not in (paths := [one.path for one in inputs]):
        inputs.append(Input(path))
        return len(paths)
    return paths.index(path)


def _with_tokenizer(recipe: Recipe, content: Mapping, path: Path) -> Recipe:
    """The recipe with the number of the model that its tokenizer is taken from."""
    where, source = f"recipe {path}", content.get("tokenizer_source")
    key, tokenizer = "tokenizer_source", content.get("tokenizer")
    if tokenizer is not None:
        if source is not None:
            raise UserError(f"{where}: has both tokenizer and tokenizer_source; give one")
        if not isinstance(tokenizer, dict) or set(tokenizer) != {"source"}:
            raise UserError(f"{where}: tokenizer is {tokenizer!r}; only `source: ...` is read")
        key, source = "tokenizer, source", tokenizer["source"]
    number = recipe.template
    if source not in (None, "base"):
        paths = [one.path for one in recipe.inputs]
        found = _folder(source, path.parent) if isinstance(source, str) else None
        if found not in paths:
            reason = "made of several is not supported" if source == "union" else "is not there"
            raise UserError(
                f"{where}: {key} is {source!r}, a tokenizer that {reason}; give base, or one of "
                f"the models {', '.join(map(str, paths))}"
            )
        number = paths.index(found)
    return replace(recipe, tokenizer=number)


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
