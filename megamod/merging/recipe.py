"""What is to be merged and how: recipes as mergekit has them, and the same from flags.

A parameter may be one number for all tensors; a list, which is spread evenly over the layers and
read between its entries; or a list of `{filter, value}`, of which the first fits whose filter is
part of the tensor's name.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from megamod.errors import UserError

if TYPE_CHECKING:
    from megamod.merging.methods import Method

Setting = float | bool | Sequence["Setting"] | Mapping[str, "Setting"] | str
DTYPES = ("float32", "float16", "bfloat16", "float64")
_TOP = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype")
_TOP += ("tokenizer_source", "chat_template")
_LATER = ("slices", "modules", "tokenizer")  # mergekit's keys that are not read here
_LARGEST = 1e30
_WITHOUT_EFFECT = ("int8_mask",)  # saves mergekit memory; the values are the same


@dataclass(frozen=True)
class Input:
    """One model of a merge.

    Attributes:
        path: its folder; `member`: an expert of a DEMix folder, None for the whole.
        parameters: settings by name.
        domain: what it was trained on, to be recorded.
    """

    path: Path
    member: str | None = None
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    domain: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path} ({self.member})"


@dataclass(frozen=True)
class Recipe:
    """A whole merge.

    Attributes:
        method: a key of `METHODS`.
        parameters: settings for all models, by name.
        dtype: name of the dtype that weights are rounded to first; None: none.
        out_dtype: name of the dtype that is stored; None: `dtype`, else that of the base.
        base: number of the model whose configuration and names of tensors the result has.
        tokenizer: number of the model whose tokenizer files it has.
        origin: where all this was said, for messages.
    """

    method: str
    inputs: tuple[Input, ...]
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    base: int = 0
    tokenizer: int = 0
    origin: str = "--models"


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
    """A recipe from a YAML file as mergekit reads it; `member: DOMAIN` beside `model:` is ours.

    Folders are looked for in the working directory, then beside the file.

    Raises:
        UserError: naming the file and the key: for what is not YAML, unknown keys and values.
    """
    path = Path(path)
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
    where = f"recipe {path}"
    if not isinstance(content, dict):
        raise UserError(f"{where} is not a list of `key: value` lines")
    for key in content:
        if key in _LATER:
            raise UserError(f"{where}: {key!r} is not read here; list whole models under 'models'")
        check_word(str(key), _TOP, f"{where}: unknown key")
    method, models = content.get("merge_method"), content.get("models")
    if not isinstance(method, str):
        raise UserError(f"{where}: merge_method is {method!r}; give the name of a method")
    if not isinstance(models, list) or not models:
        raise UserError(f"{where}: 'models' is not a list of models, but {models!r}")
    inputs = tuple(
        _input(entry, f"{where}, models[{place}]", path.parent)
        for place, entry in enumerate(models)
    )
    chat = content.get("chat_template", "auto")
    if chat != "auto":
        raise UserError(f"{where}: chat_template is {chat!r}; only auto is supported")
    base = _number_of(content.get("base_model"), inputs, path, "base_model", 0)
    source = content.get("tokenizer_source")
    return Recipe(
        method=method,
        inputs=inputs,
        parameters=_parameters(content.get("parameters"), f"{where}, parameters"),
        dtype=_dtype(content.get("dtype"), f"{where}, dtype"),
        out_dtype=_dtype(content.get("out_dtype"), f"{where}, out_dtype"),
        base=base,
        tokenizer=_number_of(
            None if source == "base" else source, inputs, path, "tokenizer_source", base
        ),
        origin=where,
    )


def values_for(
    recipe: Recipe, method: "Method", name: str, depth: float
) -> tuple[dict, list[dict]]:
    """The values of all parameters for one tensor: overall ones, then those of each model.

    Args:
        name: of the tensor.
        depth: where its layer lies, from 0 for the first to 1 for the last.
    Raises:
        UserError: for an unknown parameter, one that is missing, or a value that is not a number.
    """
    known = (*method.per_model, *method.overall, *_WITHOUT_EFFECT)
    for settings in (recipe.parameters, *(one.parameters for one in recipe.inputs)):
        for word, setting in settings.items():
            check_word(word, known, f"{recipe.origin}: {recipe.method} has no parameter")
            if word in _WITHOUT_EFFECT and not isinstance(setting, bool):
                raise UserError(f"{recipe.origin}, {word}: {setting!r} is not true or false")

    def look_up(parameter: str, default: object, places: list) -> float | bool:
        for where, settings in places:
            if parameter in settings:
                value = _value(settings[parameter], name, depth, f"{where}, {parameter}")
                if value is not None and isinstance(value, bool) is not isinstance(default, bool):
                    kind = "true or false" if isinstance(default, bool) else "a number"
                    raise UserError(f"{where}, {parameter}: {value!r} is not {kind}")
                if value is not None:
                    return value
        if default is None:
            raise UserError(f"{places[0][0]}: {parameter} is missing for {name}")
        return default

    shared = [(f"{recipe.origin}, parameters", recipe.parameters)]
    overall = {p: look_up(p, default, shared) for p, default in method.overall.items()}
    each = [
        {
            p: look_up(p, default, [(f"{recipe.origin}, {one}", one.parameters), *shared])
            for p, default in method.per_model.items()
        }
        for one in recipe.inputs
    ]
    return overall, each


def depths(names: Iterable[str]) -> dict[str, float]:
    """Where the layer of each tensor lies, from 0 to 1; 0 for tensors of no layer.

    A layer's number is the first number among the parts of a name, `model.layers.3.fc1.weight`.
    """
    found = {name: re.search(r"(?:^|\.)(\d{1,6})(?:\.|$)", name) for name in names}
    layers = {name: int(match[1]) for name, match in found.items() if match}
    last = max(layers.values(), default=0)
    return {
        name: 0.0 if name not in layers else layers[name] / last if last else 1.0 for name in found
    }


def check_word(word: str, known: Sequence[str], what: str) -> None:
    """Raise UserError, naming the nearest of the known words, if this is none of them."""
    if word not in known:
        nearest = difflib.get_close_matches(word, known, n=1, cutoff=0)[0]
        raise UserError(
            f"{what} {word!r}; the nearest is {nearest!r}, there are {', '.join(known)}"
        )


def _input(entry: object, where: str, beside: Path) -> Input:
    if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
        raise UserError(f"{where}: is {entry!r}; give `model: FOLDER`")
    for key in entry:
        check_word(str(key), ("model", "parameters", "member"), f"{where}: unknown key")
    member = entry.get("member")
    if member is not None and not isinstance(member, str):
        raise UserError(f"{where}, member: {member!r} is not the name of a domain")
    settings = _parameters(entry.get("parameters"), f"{where}, parameters")
    return Input(_folder(entry["model"], beside), member, settings, member)


def _folder(text: str, beside: Path) -> Path:
    return Path(text) if Path(text).exists() or not (beside / text).exists() else beside / text


def _number_of(model: object, inputs: Sequence[Input], path: Path, key: str, default: int) -> int:
    """Which of the inputs a key of the recipe means."""
    if model is None:
        return default
    folders = [one.path for one in inputs]
    if not isinstance(model, str) or (found := _folder(model, path.parent)) not in folders:
        raise UserError(
            f"recipe {path}: {key} is {model!r}, which is none of the models "
            f"{', '.join(map(str, folders))}"
        )
    return folders.index(found)


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


def _value(setting: Setting, name: str, depth: float, where: str) -> float | bool | None:
    """A setting's value for a tensor; None if none of its filters fits."""
    if isinstance(setting, dict):
        setting = [setting]
    if not (isinstance(setting, list) and setting and isinstance(setting[0], dict)):
        return _plain_value(setting, depth, where)
    found = None
    for case in setting:
        filter_ = case.get("filter", "*") if isinstance(case, dict) else 0
        if not isinstance(filter_, str) or not {"value"} <= case.keys() <= {"filter", "value"}:
            raise UserError(f"{where}: {case!r} is not of the form {{filter: TEXT, value: NUMBER}}")
        value = _plain_value(case["value"], depth, where)
        if found is None and (filter_ == "*" or filter_ in name):
            found = value
    return found


def _plain_value(setting: object, depth: float, where: str) -> float | bool:
    """A number, the value of a list at a depth, or a truth value."""
    if isinstance(setting, list) and setting:
        stops = [_number(one, where) for one in setting]
        place = depth * (len(stops) - 1)
        low = min(int(place), len(stops) - 1)
        high = min(low + 1, len(stops) - 1)
        return stops[low] + (place - low) * (stops[high] - stops[low])
    return setting if isinstance(setting, bool) else _number(setting, where)


def _number(value: object, where: str) -> float:
    """A number that float32 can hold with room to spare; YAML 1.1 reads 1e-3 as text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= _LARGEST:
        raise UserError(f"{where}: {value!r} is not a finite number (of at most {_LARGEST:g})")
    return number
