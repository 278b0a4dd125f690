"""From a preset, folder or hub name to a causal language model with the experts a rank needs."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from megamod.dist.scope import dense_name, domain_of_name
from megamod.errors import UserError
from megamod.models.lm.configuration import (
    HOST_TYPE,
    PRESETS,
    DemixConfig,
    domains_of,
    longest_sequence,
    read_lm_config,
    untie_of,
)
from megamod.models.lm.demix import DemixForCausalLM, DemixOutput, initialise
from megamod.models.lm.host import dense_class, host_classes, stock_class
from megamod.models.lm.hosts import HOSTS, UNTIE_OF_HOSTS
from megamod.states.weights import has_weights, read_weights, spread

HUB_FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja"]


class LanguageModel(Protocol):
    """Interface of every causal language model here: the project's GPT and stock classes."""

    config: PreTrainedConfig

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        domain: str | None = None,
    ) -> DemixOutput: ...

    def set_domain(self, domain: str) -> None: ...

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def score(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]: ...


def model_folder(model: str, flag: str = "--model") -> Path | None:
    """The folder of a model: itself, or the local copy of a hub repository; None for a preset.

    Raises:
        UserError: if the name is no preset and no folder, and the hub has no such repository.
    """
    if model in PRESETS:
        return None
    if (Path(model) / "config.json").is_file():
        return Path(model)
    reason = ""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not Path(model).exists():
        try:
            return Path(snapshot_download(model, allow_patterns=HUB_FILES))
        except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
            reason = f"; the hub: {' '.join(str(error).split())[:200]}"
    raise UserError(
        f"{flag} {model!r} is no folder with config.json, no repository of the hub and none of "
        f"{', '.join(PRESETS)}{reason}"
    )


def lm_config(
    model: str,
    *,
    vocab_size: int,
    special_ids: dict[str, int],
    domains: Sequence[str],
    untie: str,
    max_positions: int,
    attn_implementation: str | None,
    overrides: dict[str, int | None],
) -> PreTrainedConfig:
    """Configuration of a language model to train.

    Args:
        model: a preset (`PRESETS`), or the folder or hub name of a model.
        vocab_size, special_ids: of the data; the latter bos_token_id, pad_token_id, eos_token_id.
        max_positions: tokens per sequence.
        attn_implementation: None for the best that the class supports.
        overrides: fields that replace the preset's, where not None.
    Raises:
        UserError: if the preset or folder is unknown, or does not fit the data.
    """
    changes = {field: value for field, value in overrides.items() if value is not None}
    untie = "none" if untie == "all" else untie
    folder = model_folder(model)
    if folder is not None:
        if changes:
            raise UserError(f"--{next(iter(changes))} cannot change the model in {model}")
        config = read_lm_config(folder, "--model")
        _check_fits(model, config, vocab_size, special_ids, max_positions)
        if config.model_type != DemixConfig.model_type:
            return _host_config(model, config, domains, untie, attn_implementation)
        max_positions = config.max_position_embeddings
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
        shape = {name: getattr(config, name) for name in names}
    else:
        shape = PRESETS[model] | changes
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


def _check_fits(
    model: str,
    config: PreTrainedConfig,
    vocab_size: int,
    special_ids: Mapping[str, int],
    max_positions: int,
) -> None:
    """Raise UserError if a folder's model cannot read the data."""
    ours, limit = config.model_type == DemixConfig.model_type, longest_sequence(config)
    fits = config.vocab_size == vocab_size if ours else config.vocab_size >= vocab_size
    if not fits or max_positions > (limit or max_positions):
        raise UserError(
            f"--model {model} has a vocabulary of {config.vocab_size} and {limit} positions; the "
            f"data need {vocab_size} and {max_positions}"
        )
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    eos = special_ids["eos_token_id"]
    if not ours and ends != [None] and eos not in ends:
        raise UserError(
            f"--model {model} ends a text with id {', '.join(map(str, ends))}, the data with id "
            f"{eos}: make the data with launchers/preprocess.py --tokenizer {model}"
        )


def _host_config(
    model: str,
    config: PreTrainedConfig,
    domains: Sequence[str],
    untie: str,
    attn_implementation: str | None,
) -> PreTrainedConfig:
    """Configuration of a stock model, with experts if `untie` asks for them."""
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"--model {model} is quantised (quantization_config) and cannot be trained: dequantise "
            "it first"
        )
    if untie == "none":
        if untie_of(config) != "none":
            raise UserError(
                f"--model {model} has experts of {', '.join(domains_of(config))}: train it with "
                f"--untie {untie_of(config)}, or take one out with convert.py --format expert"
            )
        if attn_implementation is not None:
            config._attn_implementation = attn_implementation
        return config
    if untie not in UNTIE_OF_HOSTS:
        raise UserError(
            f"--untie {untie}: layers of a {config.model_type} cannot be untied so; choose "
            f"{', '.join(UNTIE_OF_HOSTS)} or all"
        )
    if untie_of(config) not in ("none", untie):
        raise UserError(f"--untie {untie}: the model in {model} has experts by {config.untie}")
    check_host(f"--untie {untie}: {model}", config)
    kind = getattr(config, "host", config.model_type)
    fields = {**config.to_dict(), "domains": list(domains), "untie": untie, "host": kind}
    for name in ("model_type", "architectures", "transformers_version"):
        fields.pop(name, None)
    try:
        return host_classes(kind)[0](**fields, attn_implementation=attn_implementation)
    except ValueError as error:
        raise UserError(str(error)) from error


def check_host(where: str, config: PreTrainedConfig) -> None:
    """Raise UserError if the feed-forwards of a stock model are not known or not dense."""
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


def build_lm(
    config: PreTrainedConfig,
    *,
    seed: int,
    init_from: str | Path | None = None,
    local_domains: Sequence[str] | None = None,
) -> LanguageModel:
    """A language model with float32 weights, new or those of a folder.

    Args:
        seed: of new weights; equal seeds give equal shared weights whatever experts are held.
        init_from: a model folder. A dense one gives every expert the same start; one with experts
            must have all that are asked for.
        local_domains: the domains whose experts to hold; None for all.
    Raises:
        UserError: if the folder's weights do not fit.
    """
    if config.model_type != DemixConfig.model_type:
        if init_from is None:
            return _draw_host(config, seed, local_domains)
        folder = Path(init_from)
        return load_lm(folder, config, local_domains, dtype=torch.float32, flag="--init_from")
    model = DemixForCausalLM(config, local_domains)
    if init_from is None:
        initialise(model, seed)
        return model
    state = read_weights(Path(init_from))
    parameters = dict(model.named_parameters())
    if not all(name in state for name in parameters):
        state = spread(state, parameters)
    for name, parameter in parameters.items():
        if state[name].shape != parameter.shape:
            raise UserError(
                f"--init_from {init_from}: {dense_name(name)} has shape "
                f"{tuple(state[name].shape)}, the model needs {tuple(parameter.shape)}"
            )
        parameter.data.copy_(state[name])
    model.tie_weights()
    return model


def lm_class(config: PreTrainedConfig) -> type:
    """The class of a language model with this configuration; made with `(config, local_domains)`.

    Raises:
        ValueError: if transformers has no causal language model for it.
    """
    if config.model_type == DemixConfig.model_type:
        return DemixForCausalLM
    if config.model_type == HOST_TYPE:
        return host_classes(config.host)[1]
    return dense_class(stock_class(config))


def _draw_host(
    config: PreTrainedConfig, seed: int, local_domains: Sequence[str] | None
) -> LanguageModel:
    """New weights in the order of the dense model's modules, then copied for each domain."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = lm_class(config)(config, ())
    if config.model_type == HOST_TYPE:
        model.own_feed_forwards(config.domains if local_domains is None else local_domains)
    return model


def load_lm(
    folder: Path,
    config: PreTrainedConfig | None = None,
    local_domains: Sequence[str] | None = None,
    flag: str | None = None,
    **kwargs: object,
) -> LanguageModel:
    """The model in a folder, with the experts of these domains; None for all.

    Args:
        config: what to load the weights into; None for the folder's own. One with experts takes the
            weights of a dense folder as the start of each.
        flag: the option that named the folder, for messages.
        kwargs: passed to `from_pretrained`, such as dtype.
    Raises:
        UserError: if the folder is no language model, or lacks weights.
    """
    saved = read_lm_config(folder, flag)
    config = saved if config is None else config
    where = str(folder) if flag is None else f"{flag} {folder}"
    if getattr(saved, "host", saved.model_type) != getattr(config, "host", config.model_type):
        raise UserError(f"{where}: is a {saved.model_type}, the model is a {config.model_type}")
    if not has_weights(folder):
        raise UserError(f"{where}: cannot be read as a model: it holds no weights")
    split = config.model_type == HOST_TYPE and saved.model_type != HOST_TYPE
    try:
        model, report = lm_class(config).from_pretrained(
            folder,
            () if split else local_domains,
            config=config,
            output_loading_info=True,
            **kwargs,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: cannot be read as a model: {reason}") from error
    if report["missing_keys"]:
        raise UserError(f"{where}: the weights lack {min(report['missing_keys'])}")
    if split:
        model.own_feed_forwards(config.domains if local_domains is None else local_domains)
    return model


def active_parameters(sizes: Mapping[str, int]) -> int:
    """Parameters that one token passes through: one expert of each kind, no position table.

    Args:
        sizes: elements of each parameter, by name.
    """
    one = next((domain for name in sizes if (domain := domain_of_name(name))), None)
    return sum(
        size
        for name, size in sizes.items()
        if domain_of_name(name) in (None, one) and "positions" not in name
    )
