"""Checks that config.json describes the weights beside it, so that their merge can be loaded."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from megamod.errors import UserError, report_damage, shorten
from megamod.merging.tensors import TensorSource
from megamod.names import is_domain
from megamod.states.forest import read_model_config
from megamod.states.layer_names import find_layer_prefix, split_at_layer_number

# Usual fields. Text: parts of their names; switches; numbers from 0 to 1: parts of their names.
_TEXTS = ("type", "version", "_act", "activation_function", "untie", "name_or_path")
_SWITCHES = ("tie_word_embeddings", "is_decoder", "attention_bias", "mlp_bias")
_RATES = ("dropout", "_pdrop", "_eps", "epsilon", "initializer_range")
_COUNTS = ("num_", "_size", "max_position_embeddings", "n_layer", "n_head", "n_embd", "n_positions")
_OPTIONAL = ("domain", "n_inner", "_name_or_path", "sliding_window")  # may be null
_OTHER_COUNTS = ("head_dim", "pretraining_tp")
_UNTIED = ("none", "feedforward")
_LARGEST = 2**31
_OTHER_SIZES = ("d_model", "num_layers", "n_layers")
_WIDTHS, _DEPTHS = ("hidden_size", "n_embd"), ("num_hidden_layers", "n_layer")
_INNER, _HEADS = ("intermediate_size", "n_inner", "n_embd"), ("num_attention_heads", "n_head")
_POSITIONS = ("max_position_embeddings", "n_positions")
_LEAST_SHARE = 0.4  # of the ends of names that a class and a file of the same model share
_SHARE = 0.5  # of the names that a class and a file share if they name the same model alike


def check_config_fits_weights(source: TensorSource) -> None:
    """Refuse a model whose config.json its class refuses, or describes other shapes or layers.

    A configuration without a type, width and depth describes no weights and passes. A model type
    that neither transformers nor megamod knows passes, and so does a class that cannot be built
    without weights. transformers, which takes seconds to load, is asked only if a field has an
    unusual type or does not obviously agree with the weights.

    Args:
        source: an open model folder, or a view of one.
    Raises:
        UserError: naming config.json and what is wrong in it.
    """
    file, fields = source.folder / "config.json", read_model_config(source.folder)
    _check_numbers_and_dtype(file, fields)
    if "model_type" not in fields or not fields.keys() & {*_WIDTHS, *_DEPTHS, *_OTHER_SIZES}:
        return
    if _have_usual_values(fields) and _sizes_match_tensors(fields, source):
        return
    from megamod.merging.known_models import build_config_strictly, build_meta_model_strictly

    with report_damage(f"{file}: cannot be used"):
        config = build_config_strictly(fields)
        model = None if config is None else build_meta_model_strictly(config)
    if model is None:
        return
    prefix = f"{model.base_model_prefix}."
    described = {n.removeprefix(prefix): tuple(p.shape) for n, p in model.named_parameters()}
    stored = {n.removeprefix(prefix): tuple(s.shape) for n, s in source.tensors.items()}
    common = described.keys() & stored.keys()
    ends, stored_ends = _list_name_ends(described), _list_name_ends(stored)
    if len(ends & stored_ends) < _LEAST_SHARE * min(len(ends), len(stored_ends)):
        raise UserError(
            f"{file}: model_type is {fields['model_type']!r}, but the weights are those of another "
            f"model, such as {min(stored)}"
        )
    if len(common) < _SHARE * min(len(described), len(stored)):
        return  # the class renames tensors as it loads them
    for name in sorted(common):
        if described[name] != stored[name]:
            raise UserError(
                f"{file}: describes {name} with the shape {list(described[name])}, but the weights "
                f"have {list(stored[name])}"
            )
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    kept = [
        n for n in stored if not any(re.search(p, n) or re.search(p, prefix + n) for p in ignored)
    ]
    missing, further = _list_layer_prefixes(described), _list_layer_prefixes(kept)
    for layers, text in (
        (missing - _list_layer_prefixes(stored), "describes layers that the weights lack"),
        (further - missing, "does not describe all layers of the weights"),
    ):
        if layers:
            raise UserError(f"{file}: {text}, such as {min(layers)[:-1]}")


def _check_numbers_and_dtype(file: Path, fields: Mapping[str, object]) -> None:
    """Refuse values that no model class checks before it needs them.

    Args:
        file: config.json, for messages; `fields`: its content.
    Raises:
        UserError: for a number that is not finite, or a `dtype` that torch does not have.
    """
    for key, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{file}: {key} is {value}, which is not finite")
        named = isinstance(value, str) and key in ("dtype", "torch_dtype")
        if named and not isinstance(
            getattr(torch, value.removeprefix("torch."), None), torch.dtype
        ):
            raise UserError(
                f"{file}: {key} is {shorten(value)}, not a type of torch such as 'float32'"
            )


def _have_usual_values(fields: Mapping[str, object]) -> bool:
    """Return True if every field of a config.json has a usual type and value.

    `fields` is its content.
    """
    names = fields.get("architectures", []), fields.get("domains", [])
    if not all(type(part) is list and all(type(n) is str for n in part) for part in names):
        return False
    if not all(is_domain(name) for name in names[1]) or len(set(names[1])) < len(names[1]):
        return False
    kind = str(fields["model_type"]).replace("_", "").replace("-", "")
    if not any(name.lower().startswith(kind) for name in names[0]):
        return False
    return fields.get("untie", "none") in _UNTIED and all(
        _is_usual_value(key, value, fields.get("vocab_size"))
        for key, value in fields.items()
        if key not in ("architectures", "domains")
    )


def _is_usual_value(key: str, value: object, vocab_size: object) -> bool:
    """Return True if a field of a config.json that holds no names has a usual type and value.

    Args:
        key, value: the field.
        vocab_size: value of that field, which ids of tokens must be below.
    """
    if key.endswith("_token_id"):
        in_range = type(value) is int and type(vocab_size) is int and 0 <= value < vocab_size
        return value is None or in_range
    if key in _OPTIONAL and value is None:
        return True
    if any(part in key for part in _TEXTS):
        return type(value) is str and is_domain(value.replace(".", "_"))
    if key.startswith("use_") or key in _SWITCHES:
        return type(value) is bool
    if any(part in key for part in _RATES):
        return type(value) is float and 0 <= value < 1
    if any(part in key for part in _COUNTS) or key in _OTHER_COUNTS:
        return type(value) is int and 0 < value < _LARGEST
    return key == "rope_parameters" and _is_plain_rotary(value)


def _is_plain_rotary(value: object) -> bool:
    """Return True if `rope_parameters` of a config.json are rotary positions without scaling."""
    return (
        isinstance(value, dict)
        and value.keys() == {"rope_theta", "rope_type"}
        and value["rope_type"] == "default"
        and type(value["rope_theta"]) is float
        and value["rope_theta"] >= 1
    )


def _sizes_match_tensors(fields: Mapping[str, object], source: TensorSource) -> bool:
    """Return True if the sizes in a config.json obviously are those of the tensors.

    `fields` is its content, `source` the weights beside it.
    """
    shapes = [spec.shape for spec in source.tensors.values()]
    sizes = Counter(size for shape in shapes for size in set(shape))
    layers = Counter(
        split_at_layer_number(prefix)[0] for prefix in _list_layer_prefixes(source.tensors)
    )
    width = next((fields[name] for name in _WIDTHS if type(fields.get(name)) is int), 0)
    depth = next((fields[name] for name in _DEPTHS if type(fields.get(name)) is int), 0)
    inner = next((fields[name] for name in _INNER if type(fields.get(name)) is int), 0)
    heads = next((fields[name] for name in _HEADS if type(fields.get(name)) is int), 0)
    return (
        len(layers) == 1
        and [*layers.values()] == [depth]
        and sizes[width] > len(shapes) / 2
        and sizes[inner] >= depth
        and any(shape == (fields.get("vocab_size"), width) for shape in shapes)
        and heads > 0
        and width % heads == 0
        and _positions_match_tensors(fields, sizes)
        and _heads_match_tensors(fields, width // heads, heads, source)
    )


def _positions_match_tensors(fields: Mapping[str, object], sizes: Counter[int]) -> bool:
    """Return True if positions are rotary, which have no table, or a size is that of a table.

    Args:
        fields: content of a config.json.
        sizes: number of tensors with each size.
    """
    return "rope_parameters" in fields or any(
        sizes[fields[n]] + sizes[fields[n] + 2] for n in _POSITIONS if n in fields
    )


def _heads_match_tensors(
    fields: Mapping[str, object], head_size: int, heads: int, source: TensorSource
) -> bool:
    """Return True if heads of keys and values, where a config.json names them, fit the weights.

    Args:
        fields: content of the config.json.
        head_size: features of a head, if it does not name them.
        heads: heads of queries.
        source: the weights beside it.
    """
    rows = {
        kind: {spec.shape[0] for n, spec in source.tensors.items() if n.endswith(f"{kind}.weight")}
        for kind in ("q_proj", "k_proj", "v_proj")
    }
    named = "head_dim" in fields or "num_key_value_heads" in fields
    head_size = fields.get("head_dim", head_size)
    key_rows = {fields.get("num_key_value_heads", heads) * head_size}
    return not named or (
        rows["q_proj"] == {heads * head_size} and rows["k_proj"] == rows["v_proj"] == key_rows
    )


def _list_name_ends(names: Iterable[str]) -> set[str]:
    """List the last two words of names: of a module without children, and of its tensor."""
    return {".".join(name.split(".")[-2:]) for name in names}


def _list_layer_prefixes(names: Iterable[str]) -> set[str]:
    """List the prefixes of all layers that these tensors are in, such as `h.3.`."""
    return {find_layer_prefix(name) for name in names} - {""}
