"""Checks that models fit each other, from configurations and headers, before any work."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megamod.errors import UserError
from megamod.merging.tensors import TensorSource, describe_source
from megamod.states.dense import make_dense_config
from megamod.states.forest import read_model_config
from megamod.states.stream import TensorSpec
from megamod.states.token_ids import check_same_token_ids

logger = logging.getLogger(__name__)

# Fields of a configuration that change the meaning of weights of equal shape.
_MEANING = (
    *("model_type", "vocab_size", "num_attention_heads", "num_key_value_heads", "n_head"),
    *("hidden_act", "activation_function"),
)
# Fields that may differ without any effect on what the weights compute. All others are reported.
_HARMLESS = {
    *("_name_or_path", "name_or_path", "architectures", "auto_map", "transformers_version"),
    *("dtype", "torch_dtype", "use_cache", "initializer_range", "initializer_factor"),
    *("pretraining_tp", "gradient_checkpointing", "return_dict", "return_dict_in_generate"),
    *("output_hidden_states", "output_attentions", "output_router_logits", "use_flash_attn"),
    *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation"),
    *("tie_word_embeddings", "vocab_size", "max_length", "finetuning_task", "problem_type"),
    *("id2label", "label2id", "num_labels", "task_specific_params", "domains", "untie"),
    *("embd_pdrop", "resid_pdrop", "attn_pdrop", "summary_first_dropout", "unsloth_version"),
    *("unsloth_fixed", "model_max_length", "tokenizer_class", "chat_template", "kernels"),
    *("quantization_config", "compression_config", "max_position_embeddings", "n_positions"),
    *("n_ctx", "router_aux_loss_coef", "layerdrop", "layer_drop", "use_mambapy"),
    *("num_hidden_layers", "n_layer", "num_layers", "n_layers", "tokenizer_model_max_length"),
}
_HARMLESS_ENDS = ("_token_id", "_token_ids", "dropout", "dropout_prob", "_loss_coef", "_drop_rate")
_QUANTISED = ("quantization_config", "compression_config", "quantization")
_QUANTISED_FILES = ("quantize_config.json", "quant_config.json", "hqq_config.json")
_MOST = 5  # differing fields that a message lists


def check_configs_match(
    folders: Sequence[Path], *, allow_cut: bool = False, require_same_tokens: bool = True
) -> None:
    """Refuse models whose weights have different meanings; log other differences as warnings.

    Args:
        folders: folders of the models; all are compared with the first. Only their configurations
            and tokenizers are read.
        allow_cut: allow vocabularies of unequal size.
        require_same_tokens: require that equal ids are equal tokens. False allows vocabularies of
            unequal size too.
    Raises:
        UserError: naming two folders and the field of the configuration or the token in which they
            differ, or a model whose weights are quantised.
    """
    base = folders[0]
    config = make_dense_config(read_model_config(base))
    refuse_quantised_model(base, config)
    for folder in dict.fromkeys(folders[1:]):
        other = make_dense_config(read_model_config(folder))
        refuse_quantised_model(folder, other)
        base_fields, other_fields = (
            dict(_iterate_config_fields(config)),
            dict(_iterate_config_fields(other)),
        )
        for key in base_fields:
            name = key.rpartition(".")[2]
            if name not in _MEANING or (
                (allow_cut or not require_same_tokens) and name == "vocab_size"
            ):
                continue
            if key in other_fields and base_fields[key] != other_fields[key]:
                raise UserError(
                    f"{base} and {folder} cannot be merged: {key} is {base_fields[key]!r} in "
                    f"the first, {other_fields[key]!r} in the second"
                )
        if require_same_tokens:
            check_same_token_ids(
                base, folder, "; a recipe with `tokenizer_source: union` unites them"
            )
        warn_of_config_differences(base, folder)


def refuse_quantised_model(folder: Path, config: Mapping[str, object]) -> None:
    """Refuse a quantised model.

    Args:
        folder: folder of the model, in which files that quantisers write are looked for.
        config: content of its config.json.
    Raises:
        UserError: naming the key of config.json or the file that says so.
    """
    fields = _iterate_config_fields(config, leaves=False)
    keys = [key for key, value in fields if value and key.rpartition(".")[2] in _QUANTISED]
    files = [name for name in _QUANTISED_FILES if (folder / name).is_file()]
    if keys or files:
        where = f"config.json has {keys[0]}" if keys else f"there is {files[0]}"
        raise UserError(
            f"{folder}: {where}, so its weights are quantised and cannot be merged; load it with "
            "transformers, call model.dequantize() and save it, or take the unquantised model"
        )


def warn_of_config_differences(first: Path, second: Path) -> None:
    """Log a warning with the fields of two models' configurations that change the function of equal
    weights; log nothing if there are none.

    Args:
        first, second: model folders; the result of a merge has the configuration of the first.
    """
    configs = (make_dense_config(read_model_config(folder)) for folder in (first, second))
    if listed := describe_config_differences(*configs):
        logger.warning(
            "%s and %s differ in %s; the result has the values of the first, so the weights "
            "of the second are used with settings that they were not trained with",
            *(first, second, listed),
        )


def describe_config_differences(first: Mapping[str, object], second: Mapping[str, object]) -> str:
    """Describe the fields that change the function of equal weights, both values each.

    A field that one lacks has the default of its class, if that is known. "" if there are none;
    after the first `_MOST` fields only their number.

    Args:
        first, second: fields of config.json of two dense models.
    """
    differing = _list_config_differences(first, second)
    if differing:
        differing = _list_config_differences(_fill_in_defaults(first), _fill_in_defaults(second))
    listed = [f"{key} {ours!r} / {theirs!r}" for key, ours, theirs in differing]
    more = f" and {len(listed) - _MOST} more" if len(listed) > _MOST else ""
    return ", ".join(text[:160] for text in listed[:_MOST]) + more


def _list_config_differences(
    first: Mapping[str, object], second: Mapping[str, object]
) -> list[tuple[str, object, object]]:
    """List (dotted key, first value, second value) of fields that change what the weights compute.

    A field that one configuration lacks has the value None there.
    """
    ours, theirs = dict(_iterate_config_fields(first)), dict(_iterate_config_fields(second))
    return [
        (key, ours.get(key), theirs.get(key))
        for key in dict.fromkeys((*ours, *theirs))
        if ours.get(key) != theirs.get(key)
        and not _is_harmless_difference(key, ours.get(key), theirs.get(key))
    ]


def _is_harmless_difference(key: str, *values: object) -> bool:
    """Return True if a difference in a field does not change what the weights compute.

    Args:
        key: dotted key of the field.
        values: both values; lists of different lengths in a field of layers are harmless.
    """
    parts = key.split(".")
    known = any(part in _HARMLESS or part.endswith(_HARMLESS_ENDS) for part in parts)
    # Lists for each layer are checked where layers are stacked; here models have equally many.
    lengths = {len(value) for value in values if isinstance(value, list)}
    return known or (len(lengths) > 1 and "layer" in key)


def _iterate_config_fields(
    config: Mapping[str, object], prefix: str = "", *, leaves: bool = True
) -> Iterator[tuple[str, object]]:
    """Yield (dotted key, value) of a configuration and of the mappings nested in it.

    Args:
        config: a configuration, or a mapping within it.
        prefix: prefix of the keys.
        leaves: yield no mappings themselves; False: yield each before its content.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            if not leaves:
                yield f"{prefix}{key}", value
            yield from _iterate_config_fields(value, f"{prefix}{key}.", leaves=leaves)
        else:
            yield f"{prefix}{key}", value


def _fill_in_defaults(config: Mapping[str, object]) -> Mapping[str, object]:
    """Return the configuration `config` completed by the defaults of its class.

    It is returned unchanged if its class is unknown.
    """
    from megamod.merging.known_models import build_config

    built = build_config(config)
    return config if built is None else built.to_dict()


def check_tensors_mergeable(
    base: TensorSource, name: str, other: TensorSource, *, other_name: str, allow_cut: bool = False
) -> None:
    """Refuse two tensors that cannot be merged: of different shapes, or the second of integers.

    Only headers are read, and config.json with `allow_cut`.

    Args:
        name: name of the tensor in `base`; `other_name`: in `other`.
        allow_cut: allow embeddings of vocabularies of unequal size.
    Raises:
        UserError: naming the tensor and both models.
    """
    base_spec, other_spec = base.tensors[name], other.tensors[other_name]
    cuttable = (
        allow_cut
        and base_spec.shape[1:] == other_spec.shape[1:]
        and _have_row_per_token((base, base_spec), (other, other_spec))
    )
    if base_spec.shape != other_spec.shape and not cuttable:
        raise UserError(
            f"{name} has shape {list(base_spec.shape)} in {describe_source(base)}, "
            f"{list(other_spec.shape)} in {describe_source(other)}"
        )
    if not other_spec.dtype.is_floating_point:
        raise UserError(
            f"{name} has dtype {base_spec.dtype} in {describe_source(base)}, "
            f"{other_spec.dtype} in {describe_source(other)}; only floating-point tensors can be "
            "merged"
        )


def _have_row_per_token(*tensors: tuple[TensorSource, TensorSpec]) -> bool:
    """Return True if each of these tensors has a row for every token of its model."""
    return all(
        spec.shape[:1] == (get_vocab_size(read_model_config(source.folder)),)
        for source, spec in tensors
    )


def get_vocab_size(config: Mapping[str, object]) -> object:
    """Return `vocab_size` of a configuration, else of its `text_config`; None: neither has one.

    The value is as config.json has it, which need not be a number.
    """
    inner = config.get("text_config")
    return config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None)
