"""Parameters of a merge for one tensor: filters, gradients over the layers, order of lookup."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megamod.errors import UserError
from megamod.schemas import check_known_word
from megamod.states.layer_names import split_at_layer_number

if TYPE_CHECKING:
    from megamod.merging.methods.table import Method

Setting = float | bool | Sequence["Setting"] | Mapping[str, "Setting"] | str
"""A parameter in a recipe: a number, truth value, list (gradient) or list of {filter, value}."""
Scope = tuple[str, Mapping[str, Setting]]
"""One level of a recipe: its label for messages, and its settings by name."""
_LARGEST = 1e30  # well within the range of float32, 3.4e38
WITHOUT_EFFECT = ("int8_mask",)  # saves memory in mergekit; the values are the same


@dataclass(frozen=True)
class ParameterLookup:
    """Lookup of the parameters of one tensor.

    Attributes:
        name: name of the tensor, for filters.
        scopes: levels of the recipe, the first that has a value wins.
        optional: required parameters may be missing, as for the base model.
    """

    name: str
    scopes: Sequence[Scope]
    optional: bool = False


def look_up_parameters(
    method: "Method", depth: float, whole: ParameterLookup, models: Iterable[ParameterLookup]
) -> tuple[dict[str, float | bool], list[dict[str, float | bool]]]:
    """Look up all parameters of a merge method for one tensor.

    Args:
        method: merge method of the recipe, whose parameters and defaults count.
        depth: relative depth of the tensor's layer, from 0 for the first to 1 for the last.
        whole: levels for the parameters of the whole merge.
        models: levels for the parameters of each model.
    Returns:
        values for the whole merge by name, and for each model; a parameter that is optional and has
        no value is missing.
    Raises:
        UserError: for a parameter that is missing, or a value that is not a number.
    """
    overall = {
        p: _look_up_parameter(p, default, whole, depth) for p, default in method.overall.items()
    }
    per_model = []
    for lookup in models:
        values = {
            p: _look_up_parameter(p, default, lookup, depth)
            for p, default in method.per_model.items()
        }
        per_model.append({p: value for p, value in values.items() if value is not None})
    return overall, per_model


def check_parameter_names(scopes: Iterable[Scope], known: Sequence[str], method: str) -> None:
    """Refuse parameter names that no method has; parameters of other methods pass.

    Args:
        scopes: all levels of a recipe.
        known: parameters of all methods.
        method: merge method of the recipe, for the message.
    Raises:
        UserError: naming the scope, the parameter and the nearest known one; or a value that is not
            true or false of one without effect.
    """
    for where, settings in scopes:
        for name, setting in settings.items():
            check_known_word(name, (*known, *WITHOUT_EFFECT), f"{where}: {method} has no parameter")
            if name in WITHOUT_EFFECT and not isinstance(setting, bool):
                raise UserError(f"{where}, {name}: {setting!r} is not true or false")


def compute_relative_depths(names: Iterable[str]) -> dict[str, float]:
    """Compute the relative depth of each tensor's layer, from 0 for the first to 1 for the last; 0
    for tensors outside of layers.

    Args:
        names: names of tensors; the highest layer number among them is that of the last layer.
    """
    layers = {name: parts[1] if (parts := split_at_layer_number(name)) else None for name in names}
    last = max((layer for layer in layers.values() if layer is not None), default=0)
    return {
        name: 0.0 if layer is None else compute_relative_depth(layer, last + 1)
        for name, layer in layers.items()
    }


def compute_relative_depth(layer: int, count: int) -> float:
    """Compute the relative depth of a layer, from 0 for the first to 1 for the last.

    Args:
        layer: its number, from 0.
        count: number of layers; the only one has depth 1.
    """
    return layer / (count - 1) if count > 1 else 1.0


def _look_up_parameter(
    parameter: str, default: object, lookup: ParameterLookup, depth: float
) -> float | bool | None:
    """Return a parameter's value from the first scope that has one for this tensor, else `default`.

    Args:
        default: None: there is none, so the parameter is required unless `lookup.optional`.
        depth: relative depth of the tensor's layer, from 0 to 1.
    Raises:
        UserError: if it is required and missing, or its value is of the wrong kind.
    """
    for where, settings in lookup.scopes:
        if parameter in settings:
            value = _evaluate_setting(
                settings[parameter], lookup.name, depth, f"{where}, {parameter}"
            )
            if value is not None and isinstance(value, bool) is not isinstance(default, bool):
                kind = "true or false" if isinstance(default, bool) else "a number"
                raise UserError(f"{where}, {parameter}: {value!r} is not {kind}")
            if value is not None:
                return value
    if default is None and not lookup.optional:
        raise UserError(f"{lookup.scopes[0][0]}: {parameter} is missing for {lookup.name}")
    return default


def _evaluate_setting(setting: Setting, name: str, depth: float, where: str) -> float | bool | None:
    """Return the value of a setting for a tensor; None if no filter matches its name.

    Args:
        setting: a number, truth value or gradient; or a list of {filter, value} (or one of these),
            of which the first that matches counts.
        name: name of the tensor.
        depth: relative depth of the tensor's layer, from 0 to 1.
        where: position in the recipe, for messages.
    Raises:
        UserError: if the setting is of another form.
    """
    if isinstance(setting, dict):
        setting = [setting]
    if not (isinstance(setting, list) and setting and isinstance(setting[0], dict)):
        return _evaluate_plain_setting(setting, depth, where)
    selected = None
    for case in setting:
        filter_ = case.get("filter") if isinstance(case, dict) else 0
        filter_ = "*" if filter_ is None else filter_
        if not isinstance(filter_, str) or not {"value"} <= case.keys() <= {"filter", "value"}:
            raise UserError(f"{where}: {case!r} is not of the form {{filter: TEXT, value: NUMBER}}")
        value = _evaluate_plain_setting(case["value"], depth, where)
        if selected is None and (filter_ == "*" or filter_ in name):
            selected = value
    return selected


def _evaluate_plain_setting(setting: object, depth: float, where: str) -> float | bool:
    """Return a setting without filters as a number or truth value.

    A list is a gradient: its entries are spread evenly from depth 0 to 1, and interpolated linearly
    at `depth`. `where` is the position in the recipe, for messages.

    Raises:
        UserError: if it is, or holds, no number.
    """
    if isinstance(setting, list) and setting:
        stops = [_parse_number(stop, where) for stop in setting]
        position = depth * (len(stops) - 1)
        low = min(int(position), len(stops) - 1)
        high = min(low + 1, len(stops) - 1)
        return stops[low] + (position - low) * (stops[high] - stops[low])
    return setting if isinstance(setting, bool) else _parse_number(setting, where)


def _parse_number(value: object, where: str) -> float:
    """Parse a number of at most `_LARGEST`, or a text of one: YAML 1.1 reads 1e-3 as text.

    Raises:
        UserError: beginning with `where`, if `value` is no such number.
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= _LARGEST:
        raise UserError(f"{where}: {value!r} is not a finite number (of at most {_LARGEST:g})")
    return number
