"""What transformers knows of a model type, without weights: defaults, parameters, layers.

Imported only where a configuration or name leaves a question open, as transformers takes seconds to
load. Code that a model folder brings along is never run.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from transformers import CONFIG_MAPPING, AutoModel, PretrainedConfig, PreTrainedModel

from megamod.errors import UserError
from megamod.merging.tensors import TOWER

_SIMPLE = (bool, int, float, str, type(None))
_INDICES = ("layer_idx", "layer_index", "layer_id", "block_idx", "idx", "layer_number", "layer_num")


def built_config(config: Mapping[str, object]) -> PretrainedConfig | None:
    """The configuration as its class completes it; None for a type that transformers does not know.

    Raises:
        UserError: if the class refuses it.
    """
    import megamod  # noqa: F401  (its models become known to transformers)

    if config.get("model_type") not in CONFIG_MAPPING:
        return None
    with _quiet():
        try:
            return CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        except Exception as error:
            raise UserError(
                f"config.json of a {config['model_type']}: transformers refuses it: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error


def built_model(config: PretrainedConfig) -> PreTrainedModel | None:
    """The model without weights, on the meta device, with the class that `architectures` names.

    None if it cannot be built.
    """
    import transformers

    name = (config.architectures or [None])[0]
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    with _quiet(), torch.device("meta"):
        for make in (getattr(kind, "_from_config", None), AutoModel.from_config):
            if make is None:
                continue
            try:
                return make(config)
            except Exception:  # whatever a class of a model raises: it tells us nothing
                continue
    return None


@lru_cache(maxsize=8)
def _parameters(text: str) -> frozenset[str] | None:
    config = built_config(json.loads(text))
    model = None if config is None else built_model(config)
    return None if model is None else frozenset(name for name, _ in model.named_parameters())


def parameter_names(config: Mapping[str, object]) -> frozenset[str] | None:
    """Names of the parameters of a model of this configuration; None if its class is not known."""
    return _parameters(json.dumps(config, sort_keys=True, default=str))


@dataclass(frozen=True)
class Module:
    """A module with parameters.

    Attributes:
        kind: "linear", "conv1d" (a linear layer with weights [in, out]) or "other".
        sharing: other modules that have the same weight.
    """

    kind: str
    sharing: tuple[str, ...]


def modules_of(config: Mapping[str, object]) -> dict[str, Module] | None:
    """Modules with parameters, by name; None if the class of the model is not known."""
    built = built_config(config)
    model = None if built is None else built_model(built)
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
        name: Module(
            kinds.get(type(module).__name__, "other"), tuple(n for n in names if n != name)
        )
        for names in by_weight.values()
        for name in names
        for module in (holders[name],)
    }


def layer_signatures(config: PretrainedConfig, count: int) -> list[dict[str, object]] | None:
    """What sets the layers of a model apart from each other; None if it cannot be built.

    Args:
        count: number of layers.
    Returns:
        for each layer the shapes of its parameters and the plain attributes of its modules, by
        name; and entries of fields of the configuration that have one for each layer.
    """
    model = built_model(config)
    stack = None if model is None else _stack(model, count)
    if stack is None:
        return None
    found = []
    for number, layer in enumerate(stack):
        signature: dict[str, object] = {
            name: tuple(parameter.shape) for name, parameter in layer.named_parameters()
        }
        for name, module in layer.named_modules():
            signature[f"{name}()"] = type(module).__name__
            for key, value in vars(module).items():
                if isinstance(value, _SIMPLE) and key not in _INDICES and key != "training":
                    signature[f"{name}.{key}"] = value
        for key, value in layer_fields(config, count):
            signature[f"config.{key}"] = value[number]
        found.append(signature)
    return found


def layer_fields(config: PretrainedConfig, count: int) -> Iterator[tuple[str, list]]:
    """Attributes of a configuration that are lists with an entry for each layer."""
    text = config.get_text_config()
    for key in sorted({*vars(text), *_properties(type(text))}):
        try:
            value = getattr(text, key)
        except Exception:  # a property that does not apply
            continue
        if isinstance(value, (list, tuple)) and len(value) == count and not key.startswith("_"):
            yield key, list(value)


def _properties(kind: type) -> list[str]:
    own = [c for c in kind.__mro__ if c is not PretrainedConfig and issubclass(c, PretrainedConfig)]
    return [key for c in own for key, value in vars(c).items() if isinstance(value, property)]


def _stack(model: PreTrainedModel, count: int) -> torch.nn.ModuleList | None:
    """The list of the layers of the language model."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    ]
    outer = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    text = [m for n, m in outer if not TOWER.search(n)]
    return text[0] if len(text) == 1 else None


@contextmanager
def _quiet() -> Iterator[None]:
    """No log lines of transformers."""
    logger = logging.getLogger("transformers")
    level, logger.level = logger.level, logging.CRITICAL
    try:
        yield
    finally:
        logger.setLevel(level)
