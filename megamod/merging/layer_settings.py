"""Per-layer settings of a configuration: when layers are stacked, each moves with its layer.

A setting is recognised by its value: a list or text with an entry for each layer, GPT-Neo's
`[[entries], repeats]`, a list of layer numbers, or the number of leading layers of a kind. Where
transformers knows the model type, every layer of the result is compared with the layer that it
comes from, on models without weights; what the configuration cannot express is refused.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megamod.errors import UserError

_SECTIONS = ("text_config", "llm_config", "language_config", "decoder")
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""Fields with the number of layers, in configurations of every family."""
_NOT_LAYERS = re.compile(r"token_ids?$|^architectures$|^domains$|^id2label$|section|_modules$")
_LEADING = re.compile(r"first_k|dense_layers|max_window_layers|first_.*layers|num_.*_layers_before")
_PERIODIC = re.compile(r"period|interval|every|layer_step|sparse_step|_offset|pattern$|layer_freq")
_LAYER_LIKE = re.compile(r"layer|idx|indices|block|attn|attention|moe|rope|pattern")
_TRIALS = 64  # most combinations of values of settings that are tried


@dataclass(frozen=True)
class LayerOrigin:
    """The source of the settings of one layer of the result.

    Attributes:
        folder: folder of the model; `config`: the fields of its config.json.
        layer: number of the layer in that model, from 0.
    """

    folder: Path
    config: Mapping[str, object]
    layer: int


def find_language_section(config: Mapping[str, object]) -> tuple[str | None, Mapping[str, object]]:
    """Find the part of a configuration that describes the language model: its key and content.

    The key is None if that is `config` itself. The content has the number of layers; it is empty if
    neither the configuration nor its class knows that number.
    """
    if any(isinstance(config.get(name), int) for name in DEPTHS):
        return None, config
    for key in _SECTIONS:
        inner = config.get(key)
        if isinstance(inner, dict) and any(isinstance(inner.get(name), int) for name in DEPTHS):
            return key, inner
    from megamod.merging.known_models import build_config

    built = build_config(config)
    depth = None if built is None else getattr(built.get_text_config(), DEPTHS[0], None)
    if not isinstance(depth, int):
        return None, {}
    key = next((k for k in _SECTIONS if isinstance(config.get(k), dict)), None)
    return key, {**(config if key is None else config[key]), DEPTHS[0]: depth}


def count_layers(config: Mapping[str, object]) -> int | None:
    """Count the layers of the language model, by its configuration or class; None: unknown."""
    _, section = find_language_section(config)
    return next((section[name] for name in DEPTHS if isinstance(section.get(name), int)), None)


def build_stacked_config(
    config: Mapping[str, object], folder: Path, origins: Sequence[LayerOrigin]
) -> dict[str, object]:
    """Build the configuration of a model that is stacked from layers.

    Args:
        config: fields of the template's config.json; `folder`: its folder, for messages.
        origins: origin of each layer of the result.
    Returns:
        a new configuration; that of the template, with its number of layers and per-layer settings
        replaced.
    Raises:
        UserError: naming the folder and the setting, if it cannot move with its layer; or if the
            number of layers is not known.
    """
    key, section = find_language_section(config)
    depth = count_layers(config)
    if depth is None:
        raise UserError(
            f"{folder}/config.json: says nowhere how many layers there are ({', '.join(DEPTHS)}), "
            "so slices cannot be stacked"
        )
    counts = {name: len(origins) for name in DEPTHS if isinstance(section.get(name), int)}
    same = all(origin.config == config for origin in origins)
    if same and [origin.layer for origin in origins] == list(range(depth)):
        return dict(config)
    models = _StackedModels(config, folder, origins)
    options = [
        [(name, value) for value in _iterate_stacked_values(name, models)]
        for name in models.sections[0]
        if name not in DEPTHS
    ]
    options = [option for option in options if option]
    problem: str | None = None
    for number, choice in enumerate(itertools.product(*options)):
        if number == _TRIALS:
            break
        moved = {**section, **counts, **dict(choice)}
        new = {**config, key: moved} if key is not None else moved
        difference = models.describe_first_difference(new)
        if difference is None:
            return new
        problem = problem or difference
    raise UserError(problem)


class _StackedModels:
    """The models whose layers are stacked, with their settings completed by their classes.

    Args:
        config: configuration of the template; `folder`: its folder.
        origins: origin of each layer of the result.
    Attributes:
        depths: number of layers of each model; 0: unknown.
        configs, folders: configuration and folder of each model, those of the template first.
        layers: for each stacked layer, the index of its model and its number there.
        sections: language settings of each model, with those of single layers that are defaults.
        signatures: description of each layer of each model; None if a class is unknown.
    """

    def __init__(self, config: Mapping[str, object], folder: Path, origins: Sequence[LayerOrigin]):
        self.folder, self.origins = folder, origins
        self.configs: list[Mapping[str, object]] = [config]
        self.folders = [folder]
        for origin in origins:
            if origin.config not in self.configs:
                self.configs.append(origin.config)
                self.folders.append(origin.folder)
        self.layers = [(self.configs.index(origin.config), origin.layer) for origin in origins]
        self.depths = [count_layers(model) or 0 for model in self.configs]
        from megamod.merging.known_models import (
            build_config,
            describe_layers,
            iterate_per_layer_fields,
        )

        built = [build_config(model) for model in self.configs]
        self.sections: list[dict[str, object]] = []
        for raw, built_config, depth in zip(self.configs, built, self.depths, strict=True):
            section = dict(find_language_section(raw)[1])
            if built_config is not None:
                stored = built_config.get_text_config().to_dict()
                listed = dict(iterate_per_layer_fields(built_config, depth))
                section = {k: v for k, v in listed.items() if k in stored} | section
            self.sections.append(section)
        self.signatures: list[list[dict[str, object]]] | None = None
        if None not in built:
            signatures = [describe_layers(*pair) for pair in zip(built, self.depths, strict=True)]
            self.signatures = None if None in signatures else signatures

    @property
    def can_compare_layers(self) -> bool:
        """True if transformers knows the model types, so that layers can be compared."""
        return self.signatures is not None

    def describe_first_difference(self, new: Mapping[str, object]) -> str | None:
        """Describe the first setting of a layer that differs from the layer that it comes from.

        Args:
            new: configuration of the stacked model.
        Returns:
            a message about the first setting that differs, or that no class describes the model;
            None: all are equal, or layers cannot be compared.
        """
        if self.signatures is None:
            return None
        from megamod.merging.known_models import build_config, describe_layers

        complete = build_config(new)
        signatures = complete and describe_layers(complete, len(self.origins))
        if signatures is None:
            return (
                f"{self.folder}: these layers cannot be stacked: no configuration of a "
                f"{new.get('model_type')} describes them"
            )
        # Dropout does not change what a model computes, and a layer's own number is another anyway.
        ignored = {
            key
            for key in self.signatures[0][0]
            if "drop" in key or all(s.get(key) == n for n, s in enumerate(self.signatures[0]))
        }
        for number, (model, layer) in enumerate(self.layers):
            ours, theirs = signatures[number], self.signatures[model][layer]
            for key in dict.fromkeys((*theirs, *ours)):
                absent = key not in ours or key not in theirs
                if key in ignored or (absent and key.startswith("config.")):
                    continue
                if ours.get(key) != theirs.get(key):
                    return (
                        f"{self.folders[model]}: layer {layer} cannot become layer {number}: "
                        f"{key.removeprefix('config.')} would be {ours.get(key)!r} there, not "
                        f"{theirs.get(key)!r}, and config.json cannot say so; choose other layers"
                    )
        return None


def _iterate_stacked_values(name: str, models: _StackedModels) -> Iterator[object]:
    """Yield the values that a setting may get in the stacked model, the most likely first.

    It yields nothing if the setting does not depend on layers. The value as it is comes last, where
    layers can be compared to see if it fits.

    Args:
        name: name of the setting in the language section of the configurations.
        models: models whose layers are stacked.
    Raises:
        UserError: if a setting of a model that transformers does not know cannot move.
    """
    value, depth = models.sections[0][name], models.depths[0]
    readings = [read for read in _READERS if read(name, value, depth) is not None]
    if not readings:
        if (
            not models.can_compare_layers
            and _PERIODIC.search(name)
            and type(value) is int
            and value > 1
        ):
            raise UserError(
                f"{models.folder}/config.json: {name} is {value}, so the kind of a layer depends "
                "on its number, which stacked layers would change; slices cannot be stacked"
            )
        return
    for read in readings:
        entries = []
        for number, section in enumerate(models.sections):
            used = any(model == number for model, _ in models.layers)
            reading = read(name, section.get(name), models.depths[number]) if used else []
            if reading is None:
                raise UserError(
                    f"{models.folders[number]}/config.json: {name} is {section.get(name)!r}, but "
                    f"{value!r} in {models.folder}; layers of both cannot be stacked"
                )
            entries.append(reading)
        moved = [entries[model][layer] for model, layer in models.layers]
        written = _WRITERS[read](moved)
        if written is None and not models.can_compare_layers:
            raise UserError(
                f"{models.folder}/config.json: {name} is {value}, the number of leading layers of "
                "a kind; in these slices such layers would not come first"
            )
        if written is not None:
            yield written
    if models.can_compare_layers:
        yield value


def _parse_layer_list(name: str, value: object, depth: int) -> list | None:
    """Read a list with one entry per layer.

    All functions of the name `_parse_...` take the name of a setting, its value and the number of
    layers, `depth`. They return one entry per layer, or None if the value is not of their kind.
    """
    listed = isinstance(value, list) and len(value) == depth and not _NOT_LAYERS.search(name)
    return value if listed else None


def _parse_repeated_lists(name: str, value: object, depth: int) -> list | None:
    """Read pairs of a list and its number of repetitions, as GPT-Neo's attention_types.

    Returns an entry per layer of a model of `depth` layers; None if the setting `name` is not of
    this kind, or `value` not of this form.
    """
    if not isinstance(value, list) or not value:
        return None
    if not all(isinstance(pair, list) and list(map(type, pair)) == [list, int] for pair in value):
        return None
    whole = [entry for entries, times in value for entry in entries * times]
    return whole if len(whole) == depth else None


def _parse_layer_letters(name: str, value: object, depth: int) -> list | None:
    """Read a text with one letter per layer, as Nemotron-H's hybrid_override_pattern.

    Arguments, and None as result, as in `_parse_repeated_lists`.
    """
    fits = isinstance(value, str) and len(value) == depth
    return list(value) if fits and _LAYER_LIKE.search(name) else None


def _parse_layer_numbers(name: str, value: object, depth: int) -> list[bool] | None:
    """Read layer numbers in ascending order, as mlp_only_layers, as one flag per layer.

    Arguments, and None as result, as in `_parse_repeated_lists`.
    """
    fits = isinstance(value, list) and all(
        type(number) is int and 0 <= number < depth for number in value
    )
    if not fits or value != sorted(set(value)) or _NOT_LAYERS.search(name):
        return None
    return [n in value for n in range(depth)] if value and _LAYER_LIKE.search(name) else None


def _parse_leading_count(name: str, value: object, depth: int) -> list[bool] | None:
    """Read a number of leading layers, as first_k_dense_replace, as one flag per layer.

    Arguments, and None as result, as in `_parse_repeated_lists`.
    """
    fits = type(value) is int and value >= 0 and _LEADING.search(name)
    return [n < value for n in range(depth)] if fits else None


def _count_leading_true(flags: list[bool]) -> int | None:
    """Count the leading True flags; None if a later flag is True as well."""
    count = sum(flags)
    return count if all(flags[:count]) else None


# Readers of a setting's value, and for each the function that writes the entries of new layers as
# such a value; None: it cannot express them.
_READERS: tuple[Callable[[str, object, int], list | None], ...] = (
    *(
        _parse_layer_list,
        _parse_repeated_lists,
        _parse_layer_letters,
        _parse_layer_numbers,
        _parse_leading_count,
    ),
)
_WRITERS: dict[Callable, Callable[[list], object]] = {
    _parse_layer_list: list,
    _parse_repeated_lists: lambda moved: [[moved, 1]],
    _parse_layer_letters: "".join,
    _parse_layer_numbers: lambda flags: [n for n, flag in enumerate(flags) if flag],
    _parse_leading_count: _count_leading_true,
}
