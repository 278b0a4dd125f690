"""Model types that transformers knows: defaults, parameters and layers, without weights.

Imported only if a configuration or a tensor name leaves a question open, as transformers takes
seconds to load. Code in a model folder is never run.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache

import torch
from transformers import CONFIG_MAPPING, AutoModel, PretrainedConfig, PreTrainedModel

from megamod.merging.tensors import TOWER
from megamod.models.config_classes import load_config_class

_SIMPLE = (bool, int, float, str, type(None))
# Attributes of modules with the layer's own number, which differs between layers that are alike.
_INDICES = ("layer_idx", "layer_index", "layer_id", "block_idx", "idx", "layer_number", "layer_num")


def build_config(config: Mapping[str, object]) -> PretrainedConfig | None:
    """Build the configuration object of a config.json's content.

    None if transformers and megamod have no class for its `model_type`, or the class refuses the
    content. Code in a model folder is not run.
    """
    try:
        return build_config_strictly(config)
    except Exception:  # a class of transformers may raise anything
        return None


def build_config_strictly(config: Mapping[str, object]) -> PretrainedConfig | None:
    """Build a configuration object from the fields of a config.json; None if no class is known.

    Unlike `build_config` it raises the error of a class that refuses the fields.
    """
    import megamod  # noqa: F401  (its models become known to transformers)

    if config.get("model_type") not in CONFIG_MAPPING:
        return None
    with _suppress_transformers_log():
        return load_config_class(config["model_type"]).from_dict(_restore_floats(dict(config)))


def _restore_floats(value: object) -> object:
    """Return a copy of a JSON value with every {"__float__": "Infinity"} as a float again.

    transformers writes numbers in this form that JSON cannot hold.
    """
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _restore_floats(entry) for key, entry in value.items()}
    return [_restore_floats(entry) for entry in value] if isinstance(value, list) else value


def build_meta_model(config: PretrainedConfig) -> PreTrainedModel | None:
    """Build the model of the configuration `config` on the meta device, without weights.

    It is of the class that `architectures` names, else that of `AutoModel`; None: neither builds.
    """
    try:
        return build_meta_model_strictly(config)
    except Exception:  # a model class may raise anything; the caller does without it
        return None


def build_meta_model_strictly(config: PretrainedConfig) -> PreTrainedModel | None:
    """Build a model as `build_meta_model`, but raise the error of `AutoModel` if that refuses.

    None if the model cannot be built without weights or a missing package.
    """
    import transformers

    name = (config.architectures or [None])[0]
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    with _suppress_transformers_log(), torch.device("meta"):
        if make := getattr(kind, "_from_config", None):
            with suppress(Exception):
                return make(config)
        if type(config) not in AutoModel._model_mapping:
            return None
        try:
            return AutoModel.from_config(config)
        except (ImportError, NotImplementedError, RuntimeError):
            return None


@lru_cache(maxsize=8)
def _list_parameter_names_cached(config_json: str) -> frozenset[str] | None:
    """Compute `list_parameter_names` from the JSON text of a configuration.

    A text is hashable, so results are cached by it.
    """
    config = build_config(json.loads(config_json))
    model = None if config is None else build_meta_model(config)
    return None if model is None else frozenset(name for name, _ in model.named_parameters())


def list_parameter_names(config: Mapping[str, object]) -> frozenset[str] | None:
    """List the parameter names of a model with the configuration `config`, as in config.json.

    None: its class is not known, or cannot be built. The last few results are cached.
    """
    return _list_parameter_names_cached(json.dumps(config, sort_keys=True, default=str))


@dataclass(frozen=True)
class ModuleKind:
    """Kind of a module with parameters.

    Attributes:
        kind: "linear", "conv1d" (a linear layer with weights [in, out]) or "other".
        tied_modules: names of other modules that have the same weight.
    """

    kind: str
    tied_modules: tuple[str, ...]


def map_modules_to_kinds(config: Mapping[str, object]) -> dict[str, ModuleKind] | None:
    """Map the names of the modules that directly hold parameters to their kinds.

    `config` is the model's, as in config.json. None: the class of the model is not known, or cannot
    be built.
    """
    built = build_config(config)
    model = None if built is None else build_meta_model(built)
    if model is None:
        return None
    holders = {
        name: module
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }
    by_weight: dict[int, list[str]] = {}
    for name, module in holders.items():
        by_weight.setdefault(id(getattr(module, "weight", module)), []).append(name)
    kinds = {"Linear": "linear", "Conv1D": "conv1d"}
    return {
        name: ModuleKind(
            kinds.get(type(module).__name__, "other"), tuple(n for n in names if n != name)
        )
        for names in by_weight.values()
        for name in names
        for module in (holders[name],)
    }


def describe_layers(config: PretrainedConfig, layer_count: int) -> list[dict[str, object]] | None:
    """Describe each layer of a model, so that layers can be compared.

    Args:
        config: of the model.
        layer_count: number of layers of the language model.
    Returns:
        for each layer, by name: shapes of parameters, classes and plain attributes of modules, and
        entries of per-layer fields of the configuration. None if the model cannot be built, or it
        is not clear which list of modules holds the layers.
    """
    model = build_meta_model(config)
    layers = None if model is None else _find_layers(model, layer_count)
    if layers is None:
        return None
    signatures = []
    for number, layer in enumerate(layers):
        signature: dict[str, object] = {
            name: tuple(parameter.shape) for name, parameter in layer.named_parameters()
        }
        for name, module in layer.named_modules():
            signature[f"{name}()"] = type(module).__name__
            for key, value in vars(module).items():
                if isinstance(value, _SIMPLE) and key not in _INDICES and key != "training":
                    signature[f"{name}.{key}"] = value
        for key, value in iterate_per_layer_fields(config, layer_count):
            signature[f"config.{key}"] = value[number]
        signatures.append(signature)
    return signatures


def iterate_per_layer_fields(
    config: PretrainedConfig, layer_count: int
) -> Iterator[tuple[str, list]]:
    """Yield (name, list) of the fields of `config` with one entry per layer.

    They are those of its language model, of `layer_count` layers, properties included, in the order
    of their names.
    """
    text_config = config.get_text_config()
    for key in sorted({*vars(text_config), *_list_properties(type(text_config))}):
        try:
            value = getattr(text_config, key)
        except Exception:  # a property that does not apply
            continue
        if (
            isinstance(value, (list, tuple))
            and len(value) == layer_count
            and not key.startswith("_")
        ):
            yield key, list(value)


def _list_properties(kind: type) -> list[str]:
    """List the names of the properties of a configuration class, `kind`.

    Their values follow from its fields. Properties that every class of transformers has are not
    among them.
    """
    classes = [
        c for c in kind.__mro__ if c is not PretrainedConfig and issubclass(c, PretrainedConfig)
    ]
    return [key for c in classes for key, value in vars(c).items() if isinstance(value, property)]


def _find_layers(model: PreTrainedModel, layer_count: int) -> torch.nn.ModuleList | None:
    """Find the layers of the language model: the list of `layer_count` modules that is in no other.

    None if there is no such list, or there are several outside of towers (vision, audio).
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == layer_count
    ]
    outer = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    text_lists = [m for n, m in outer if not TOWER.search(n)]
    return text_lists[0] if len(text_lists) == 1 else None


@contextmanager
def _suppress_transformers_log() -> Iterator[None]:
    """Silence transformers in a `with` block, while it builds models that are only inspected."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
