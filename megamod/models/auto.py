"""Resolve a preset, folder or hub name to the configuration of a language model to train.

Also asks the Auto classes of transformers about model types of every kind.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import CONFIG_MAPPING, PreTrainedConfig

from megamod.errors import UserError
from megamod.models.lm.configuration import (
    DemixConfig,
    get_domains,
    get_max_sequence_length,
    get_untie,
    read_lm_config,
)
from megamod.models.lm.host import make_host_classes
from megamod.models.lm.hosts import HOSTS, UNTIE_OF_HOSTS
from megamod.models.lm.load import check_same_family
from megamod.models.presets import PRESETS
from megamod.states.adapter import is_adapter, resolve_seed_folder
from megamod.states.hub import try_download_from_hub
from megamod.states.weight_files import has_weights


def has_auto_class(auto: type, model_type: str) -> bool:
    """Return True if `auto`, an Auto class of transformers, has a class for this model type."""
    try:
        return auto._model_mapping.get(CONFIG_MAPPING[model_type], None) is not None
    except KeyError:
        return False


def resolve_model_folder(model: str, flag: str = "--model") -> Path | None:
    """Resolve a model to its folder, or to the local copy of a hub repository; None for a preset.

    A preset of that name comes first, then a folder with config.json, then the hub, from which a
    missing copy is downloaded.

    Args:
        model: value of the option `flag`.
        flag: name of the option, for messages.
    Raises:
        UserError: if it is none of the three, cannot be downloaded, or is the folder of a LoRA
            adapter.
    """
    if model in PRESETS["demix"]:
        return None
    if is_adapter(Path(model)):
        raise UserError(
            f"{flag} {model} is a LoRA adapter of {resolve_seed_folder(Path(model))}: name that "
            "folder, or merge the adapter into it with megamod merge"
        )
    if (Path(model) / "config.json").is_file():
        return Path(model)
    downloaded, reason = try_download_from_hub(model)
    if downloaded is not None:
        return downloaded
    reason = reason and f"; {reason}"
    raise UserError(
        f"{flag} {model!r} is no folder with config.json, no repository of the hub and none of "
        f"{', '.join(PRESETS['demix'])}{reason}"
    )


def find_start_folder(
    model: str, init_from: str | None, from_scratch: bool, config: PreTrainedConfig
) -> tuple[Path, str] | None:
    """Find the folder whose weights start a run, and the flag that named it; None for new weights.

    --init_from wins; else it is the folder of --model, unless --from_scratch is given or the folder
    holds nothing but a configuration. A preset has no weights.

    Args:
        model, init_from, from_scratch: values of the three options; --init_from may be None.
        config: configuration of the model to train.
    Raises:
        UserError: as `resolve_model_folder`; if the model in the folder is of another family, has a
            smaller vocabulary (stock models) or experts by another --untie, or lacks the expert of
            a domain; if config.json is missing or damaged, or a weight file that an index lists is
            missing.
    """
    flag = "--model" if init_from is None else "--init_from"
    if init_from is None and from_scratch:
        return None
    folder = resolve_model_folder(model if init_from is None else init_from, flag)
    if folder is None or not (has_weights(folder) or init_from is not None):
        return None
    saved = read_lm_config(folder, flag)
    check_same_family(f"{flag} {folder}", saved, config)
    if config.model_type != DemixConfig.model_type and saved.vocab_size < config.vocab_size:
        raise UserError(
            f"{flag} {folder}: its weights have a vocabulary of {saved.vocab_size}, which "
            f"--vocab_multiple would pad to {config.vocab_size}; give --from_scratch"
        )
    saved_untie = get_untie(saved)
    if saved_untie != "none":
        missing = [name for name in get_domains(config) if name not in get_domains(saved)]
        if get_untie(config) != saved_untie:
            raise UserError(
                f"{flag} {folder} has experts of {', '.join(get_domains(saved))}: train it with "
                f"--untie {saved_untie}, or give --from_scratch"
            )
        if missing:
            raise UserError(
                f"{flag} {folder} has no expert of domain {missing[0]!r}; there are "
                f"{', '.join(get_domains(saved))}"
            )
    return folder, flag


def make_lm_config(
    model: str,
    *,
    vocab_size: int,
    special_ids: dict[str, int],
    domains: Sequence[str],
    untie: str,
    max_positions: int,
    attn_implementation: str | None,
    overrides: dict[str, int | None],
    vocab_multiple: int | None = None,
    anchored: bool = False,
) -> PreTrainedConfig:
    """Make the configuration of a language model to train.

    Args:
        model: a preset, or the folder or hub name of a model.
        vocab_size, special_ids: size and ids of the data's vocabulary; the ids are bos_token_id,
            pad_token_id and eos_token_id.
        domains: names of the data's domains, in the order of their numbers.
        untie: value of --untie; "all" (an independent model per domain) makes a dense one.
        max_positions: tokens per sequence; a folder's model may have more positions and keeps them.
        attn_implementation: None for the best that the class supports.
        overrides: fields that replace the preset's, where not None; not for a folder.
        vocab_multiple: the vocabulary of a stock model is padded to a multiple of this.
        anchored: experts compute beside the frozen feed-forwards of the model; only stock models
            have such experts.
    Returns:
        a `DemixConfig`, a stock configuration, or for a stock model with experts one of
        `make_host_classes`.
    Raises:
        UserError: if the preset or folder is unknown, does not fit the data, or cannot have experts
            by `untie`; if a stock model is quantised; for `overrides` of a folder, sizes that do
            not fit each other, and `vocab_multiple` with the project's GPT.
    """
    changes = {field: value for field, value in overrides.items() if value is not None}
    untie = "none" if untie == "all" else untie
    folder = resolve_model_folder(model)
    if folder is not None:
        if changes:
            raise UserError(f"--{next(iter(changes))} cannot change the model in {model}")
        config = read_lm_config(folder, "--model")
        _check_folder_fits_data(model, config, vocab_size, special_ids, max_positions)
        if config.model_type != DemixConfig.model_type:
            if vocab_multiple is not None:
                config.vocab_size = -(-config.vocab_size // vocab_multiple) * vocab_multiple
            return _make_host_config(model, config, domains, untie, attn_implementation, anchored)
        max_positions = config.max_position_embeddings
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
        shape = {name: getattr(config, name) for name in names}
    else:
        shape = PRESETS["demix"][model] | changes
    if vocab_multiple is not None:
        raise UserError(
            f"--vocab_multiple {vocab_multiple} pads stock models; the vocabulary of the project's "
            "GPT is that of the data"
        )
    try:
        return DemixConfig(
            **shape,
            **special_ids,
            vocab_size=vocab_size,
            domains=list(domains),
            untie=untie,
            max_position_embeddings=max_positions,
            attn_implementation=attn_implementation or "sdpa",
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def _check_folder_fits_data(
    model: str,
    config: PreTrainedConfig,
    vocab_size: int,
    special_ids: Mapping[str, int],
    max_positions: int,
) -> None:
    """Raise UserError if a folder's model lacks ids or positions that the data need.

    The project's GPT needs the vocabulary of the data exactly; a stock model may have more ids.

    Args:
        model: value of --model, for messages; `config`: configuration in that folder.
        vocab_size, special_ids, max_positions: those of the data, as in `make_lm_config`.
    """
    ours, limit = config.model_type == DemixConfig.model_type, get_max_sequence_length(config)
    fits = config.vocab_size == vocab_size if ours else config.vocab_size >= vocab_size
    if not fits or max_positions > (limit or max_positions):
        raise UserError(
            f"--model {model} has a vocabulary of {config.vocab_size} and {limit} positions; the "
            f"data need {vocab_size} and {max_positions}"
        )
    if not ours:
        check_vocabulary_fits(f"--model {model}", config, vocab_size, special_ids)


def check_vocabulary_fits(
    where: str, config: PreTrainedConfig, vocab_size: int, special_ids: Mapping[str, int]
) -> None:
    """Refuse data whose ids a stock model does not have, or whose texts end with another id.

    The model's vocabulary may be larger than the data's, as output matrices are padded. A
    configuration without an end-of-text id goes with every such id.

    Args:
        where: beginning of the message: the model and the option that named it.
        config: configuration of the model.
        vocab_size, special_ids: size and ids of the data's vocabulary; of the ids only
            "eos_token_id" is read.
    Raises:
        UserError: with the number of the model and that of the data.
    """
    if config.vocab_size < vocab_size:
        raise UserError(
            f"{where} has a vocabulary of {config.vocab_size}; the data need {vocab_size}"
        )
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if ends != [None] and special_ids["eos_token_id"] not in ends:
        raise UserError(
            f"{where} ends a text with id {', '.join(map(str, ends))}, the data with id "
            f"{special_ids['eos_token_id']}: make them with megamod preprocess and its "
            "tokenizer"
        )


def _make_host_config(
    model: str,
    config: PreTrainedConfig,
    domains: Sequence[str],
    untie: str,
    attn_implementation: str | None,
    anchored: bool,
) -> PreTrainedConfig:
    """Make the configuration of a stock model, with experts if `untie` is not "none".

    Args:
        model: value of --model, for messages.
        config: configuration in its folder; without experts it is returned, with
            `attn_implementation` set, and else it is not changed.
        domains, untie, attn_implementation, anchored: as in `make_lm_config`.
    Raises:
        UserError: for a quantised model, or one that cannot be untied so.
    """
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"--model {model} is quantised (quantization_config) and cannot be trained: dequantise "
            "it first"
        )
    if untie == "none":
        if get_untie(config) != "none":
            raise UserError(
                f"--model {model} has experts of {', '.join(get_domains(config))}: train it with "
                f"--untie {get_untie(config)}, or take one out with megamod convert --format expert"
            )
        if attn_implementation is not None:
            config._attn_implementation = attn_implementation
        return config
    if untie not in UNTIE_OF_HOSTS:
        raise UserError(
            f"--untie {untie}: layers of a {config.model_type} cannot be untied so; choose "
            f"{', '.join(UNTIE_OF_HOSTS)} or all"
        )
    if get_untie(config) not in ("none", untie):
        raise UserError(f"--untie {untie}: the model in {model} has experts by {config.untie}")
    check_host_family(f"--untie {untie}: {model}", config)
    kind = getattr(config, "host", config.model_type)
    fields = {**config.to_dict(), "domains": list(domains), "untie": untie, "host": kind}
    if anchored:
        fields["anchored"] = True
    for name in ("model_type", "architectures", "transformers_version"):
        fields.pop(name, None)
    try:
        return make_host_classes(kind)[0](**fields, attn_implementation=attn_implementation)
    except ValueError as error:
        raise UserError(str(error)) from error


def check_document_masking(config: PreTrainedConfig) -> None:
    """Raise UserError if a language model's attention cannot stop at the ends of documents.

    `config` is that of the model. Attention can stop in the project's GPT and in the families of
    `HOSTS`, except for a Falcon with ALiBi.
    """
    kind = getattr(config, "host", config.model_type)
    if not isinstance(config, DemixConfig) and kind not in HOSTS:
        raise UserError(
            f"--mask_documents: attention of a {kind} cannot stop at the ends of documents; leave "
            "the flag out"
        )
    if kind == "falcon" and config.alibi:
        raise UserError(
            "--mask_documents: a falcon with ALiBi counts positions in its mask; leave the flag out"
        )


def check_host_family(where: str, config: PreTrainedConfig) -> None:
    """Raise UserError if the feed-forwards of a stock model are not known or not dense.

    `where` begins the message: an option, or the model's folder. `config` is that of the model.
    """
    if getattr(config, "host", config.model_type) in HOSTS:
        return
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if any(getattr(config, name, None) for name in names):
        raise UserError(
            f"{where} is a {config.model_type}, a mixture of experts, and has experts of its own; "
            "train it with --untie none or all"
        )
    raise UserError(
        f"{where} is a {config.model_type}, whose feed-forward layers are not known; train it with "
        "--untie none or all"
    )
