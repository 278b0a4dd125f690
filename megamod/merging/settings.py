"""Parameters of a merge for one tensor: filters, lists over the layers, and where to look first."""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megamod.errors import UserError

if TYPE_CHECKING:
    from megamod.merging.methods import Method

Setting = float | bool | Sequence["Setting"] | Mapping[str, "Setting"] | str
Place = tuple[str, Mapping[str, Setting]]
"""Settings by name, and before them what to call the place where they stand."""
_LARGEST = 1e30
_LAYER = re.compile(r"(?:^|\.)(\d{1,6})(?:\.|$)")
WITHOUT_EFFECT = ("int8_mask",)  # saves mergekit memory; the values are the same


@dataclass(frozen=True)
class Asked:
    """For whom values are looked up.

    Attributes:
        name: of the tensor in that model.
        places: settings in the order in which they are looked at.
        exempt: whether a parameter without default may be missing, as it may for the base.
    """

    name: str
    places: Sequence[Place]
    exempt: bool = False


def values_for(
    method: "Method", depth: float, whole: Asked, models: Iterable[Asked]
) -> tuple[dict[str, float | bool], list[dict[str, float | bool]]]:
    """The values of all parameters for one tensor: overall ones, then those of each model.

    Args:
        depth: where its layer lies, from 0 for the first to 1 for the last.
        whole: for parameters of the whole merge; `models`: for those of each model.
    Raises:
        UserError: for a parameter that is missing, or a value that is not a number.
    """
    overall = {p: _look_up(p, default, whole, depth) for p, default in method.overall.items()}
    each = []
    for asked in models:
        found = {p: _look_up(p, default, asked, depth) for p, default in method.per_model.items()}
        each.append({p: value for p, value in found.items() if value is not None})
    return overall, each


def check_parameters(places: Iterable[Place], known: Sequence[str], method: str) -> None:
    """Refuse parameters that no method has.

    Raises:
        UserError: naming the place, the parameter, and the nearest of those there are.
    """
    for where, settings in places:
        for word, setting in settings.items():
            check_word(word, (*known, *WITHOUT_EFFECT), f"{where}: {method} has no parameter")
            if word in WITHOUT_EFFECT and not isinstance(setting, bool):
                raise UserError(f"{where}, {word}: {setting!r} is not true or false")


def layer_of(name: str) -> tuple[str, int, str] | None:
    """What is before, the number of the layer, and what is after: `h.`, 3, `.attn.weight`.

    A layer's number is the first number among the parts of a name. None for tensors of no layer.
    """
    match = _LAYER.search(name)
    return None if match is None else (name[: match.start(1)], int(match[1]), name[match.end(1) :])


def depths(names: Iterable[str]) -> dict[str, float]:
    """Where the layer of each tensor lies, from 0 to 1; 0 for tensors of no layer."""
    layers = {name: found[1] if (found := layer_of(name)) else None for name in names}
    last = max((layer for layer in layers.values() if layer is not None), default=0)
    return {
        name: 0.0 if layer is None else place_of(layer, last + 1) for name, layer in layers.items()
    }


def place_of(layer: int, count: int) -> float:
    """Where one of so many layers lies, from 0 for the first to 1 for the last or only one."""
    return layer / (count - 1) if count > 1 else 1.0


def check_word(word: str, known: Sequence[str], what: str) -> None:
    """Raise UserError, naming the nearest of the known words, if this is none of them."""
    if word not in known:
        nearest = difflib.get_close_matches(word, known, n=1, cutoff=0)[0]
        raise UserError(
            f"{what} {word!r}; the nearest is {nearest!r}, there are {', '.join(known)}"
        )


def _look_up(parameter: str, default: object, asked: Asked, depth: float) -> float | bool | None:
    for where, settings in asked.places:
        if parameter in settings:
            value = _value(settings[parameter], asked.name, depth, f"{where}, {parameter}")
            if value is not None and isinstance(value, bool) is not isinstance(default, bool):
                kind = "true or false" if isinstance(default, bool) else "a number"
                raise UserError(f"{where}, {parameter}: {value!r} is not {kind}")
            if value is not None:
                return value
    if default is None and not asked.exempt:
        raise UserError(f"{asked.places[0][0]}: {parameter} is missing for {asked.name}")
    return default


def _value(setting: Setting, name: str, depth: float, where: str) -> float | bool | None:
    """A setting's value for a tensor; None if none of its filters fits."""
    if isinstance(setting, dict):
        setting = [setting]
    if not (isinstance(setting, list) and setting and isinstance(setting[0], dict)):
        return _plain_value(setting, depth, where)
    found = None
    for case in setting:
        filter_ = case.get("filter") if isinstance(case, dict) else 0
        filter_ = "*" if filter_ is None else filter_
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
