"""Configuration of a mixture of experts from that of its dense experts."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, get_origin

from megamod.errors import UserError
from megamod.models.lm.moe_families import (
    MOE_FAMILIES,
    MOE_OF_DENSE,
    NEUTRAL,
    WITHOUT_EFFECT,
    WITHOUT_MOE,
    MoeFamily,
)
from megamod.states.forest import read_model_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_CARRIED = ("head_dim",)  # read by the classes, and not among the declared fields of all of them
_ROTARY = "rope_parameters"  # understood by every class, declared or not
_FULL = "full_attention"


def find_moe_family(folder: Path, config: Mapping[str, object]) -> tuple[str, MoeFamily]:
    """Find the model type and family of the mixture that holds experts of a dense model.

    Args:
        folder: folder of the dense model, for messages; `config`: its config.json.
    Raises:
        UserError: if transformers has no class with the same layers.
    """
    kind = str(config.get("model_type"))
    if kind in MOE_OF_DENSE:
        return MOE_OF_DENSE[kind], MOE_FAMILIES[MOE_OF_DENSE[kind]]
    reason = WITHOUT_MOE.get(kind, "no mixture-of-experts class of transformers has its layers")
    raise UserError(
        f"{folder} is a {kind}, which does not become a mixture of experts: {reason}; families "
        f"that do are {', '.join(MOE_OF_DENSE)}"
    )


def read_moe_config(folder: Path) -> tuple[dict[str, object], MoeFamily]:
    """Read config.json of a mixture of experts.

    Returns:
        its content, and the family of its `model_type`.
    Raises:
        UserError: if the folder holds a model of another kind, or there is no such file.
    """
    config = read_model_config(folder)
    kind = config.get("model_type")
    if kind not in MOE_FAMILIES:
        raise UserError(
            f"{folder} is a {kind}, not one of the mixtures that `megamod to-moe` writes: "
            f"{', '.join(MOE_FAMILIES)}"
        )
    return config, MOE_FAMILIES[kind]


def build_moe_config(
    folder: Path, config: Mapping[str, object], experts: int, experts_per_token: int
) -> dict[str, object]:
    """Build config.json of the mixture, every field written out, as defaults of classes differ.

    Args:
        folder: folder of the dense model, for messages; `config`: its config.json.
        experts: number E of experts.
        experts_per_token: number of experts that the router selects for a token.
    Raises:
        UserError: as `find_moe_family`, or naming the first field that the mixture cannot have.
    """
    # Imported late: transformers takes seconds to load, in which the caller hashes the experts.
    from megamod.models.config_classes import load_config_class

    kind, family = find_moe_family(folder, config)
    dense = load_config_class(config["model_type"]).from_dict(dict(config))
    sparse_class = load_config_class(kind)
    values, known = dense.to_dict(), _list_declared_fields(sparse_class)
    fields: dict[str, object] = {}
    for name in (*_list_declared_fields(type(dense)), *_CARRIED):
        value = values.get(name, getattr(dense, name, None))
        if name == "use_sliding_window" and value:
            _raise_unsupported_field(folder, kind, name, value)
        if name in known or (name in _CARRIED and value is not None):
            fields[name] = value
        elif name == "layer_types":
            if value is not None and set(value) != {_FULL}:
                _raise_unsupported_field(folder, kind, name, sorted(set(value)))
        elif name in (*WITHOUT_EFFECT, *_CARRIED, _ROTARY):
            continue
        elif value not in NEUTRAL.get(name, ()):
            _raise_unsupported_field(folder, kind, name, value)
    rotary = getattr(dense, _ROTARY, None)
    if rotary is not None:
        fields[_ROTARY] = rotary
        if "rope_theta" in known:
            fields["rope_theta"] = rotary["rope_theta"]
    fields |= {
        family.count: experts,
        family.experts_per_token: experts_per_token,
        family.width: values["intermediate_size"],
        **family.constants,
    }
    sparse = sparse_class(**fields)
    result = json.loads(sparse.to_json_string(use_diff=False))
    result.pop("transformers_version", None)
    dtype = config.get("dtype", config.get("torch_dtype"))
    return result | {"architectures": [family.architecture], "dtype": dtype}


def _list_declared_fields(kind: "type[PreTrainedConfig]") -> list[str]:
    """List the declared fields of a configuration class, `kind`, sorted.

    Fields that every class of transformers has are not among them.
    """
    from transformers import PreTrainedConfig

    classes = kind.__mro__[: kind.__mro__.index(PreTrainedConfig)]
    return sorted(
        {
            name
            for base in classes
            for name, annotation in getattr(base, "__annotations__", {}).items()
            if get_origin(annotation) is not ClassVar
        }
    )


def _raise_unsupported_field(folder: Path, kind: str, name: str, value: object) -> None:
    """Raise UserError for a field of the dense model that a mixture of type `kind` cannot have.

    Args:
        folder: folder of the dense model, for the message.
        name, value: the field.
    """
    raise UserError(
        f"{folder}: {name} is {value!r}, which a {kind} cannot have, so its layers would not "
        "compute the same"
    )
