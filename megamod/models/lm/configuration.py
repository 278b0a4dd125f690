"""Configurations of the models: written beside the weights, read back by `from_pretrained`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig

from megamod.errors import UserError, report_damage
from megamod.mixture.posterior import RULES
from megamod.names import is_domain
from megamod.states.adapter import resolve_seed_folder
from megamod.states.config_file import check_model_fits_files, read_config_file
from megamod.states.forest import HOST_TYPE

UNTIE = (
    "none",
    "feedforward",
    "feedforward_every_other",
    "feedforward_top",
    "transformer",
    "transformer_output",
    "input_output",
)
"""Which parts a causal LM holds once per domain: nothing (a dense model); the feed-forward of every
layer (DEMix), of every second layer, of the last layer; whole blocks; blocks and output matrix;
embeddings and output matrix."""

ADAPTERS = "adapters"
"""Field of a part of a forest: the fields of the `LoraConfig` of each adapter, by its name."""

SPECIAL_IDS = ("bos_token_id", "pad_token_id", "eos_token_id")


@strict
class DemixConfig(PreTrainedConfig):
    """A causal LM whose domains may own parts of it.

    Args:
        intermediate_size: width of the feed-forward; 0 stands for 4 * hidden_size.
        max_position_embeddings: longest sequence, in tokens; the table has two rows more.
        domains: names of the domains, in the order of training; their order is their numbering.
        untie: which parts exist once per domain, see `UNTIE`.
        domain: whose expert a model made from this configuration uses; None: selected later.
    Raises:
        ValueError: for an unknown `untie`, or domains that are missing, named twice, or not fit to
            be part of a parameter's name.
    """

    model_type = "demix"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "token_log_probs"]

    vocab_size: int = 50264
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 0
    max_position_embeddings: int = 1024
    layer_norm_eps: float = 1e-5
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    domains: list[str] | tuple[str, ...] = ()
    untie: str = "none"
    domain: str | None = None
    use_cache: bool = True
    bos_token_id: int | None = 0
    pad_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        """Set fields that follow from others; raise ValueError for values that do not go together.

        `kwargs` go to the base class.
        """
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        self.domains = list(self.domains)
        check_domain_names(self.domains)
        if self.untie not in UNTIE:
            raise ValueError(f"untie {self.untie!r} is unknown; choose one of {', '.join(UNTIE)}")
        if self.untie != "none" and not self.domains:
            raise ValueError(f"untie {self.untie!r} needs the names of the domains")
        if self.untie == "none" and self.domain is not None:
            raise ValueError(f"domain {self.domain!r}: the model is dense and has no experts")
        # Shared embeddings cannot be one tensor with an output matrix of each domain.
        self.tie_word_embeddings = self.tie_word_embeddings and self.untie != "transformer_output"
        super().__post_init__(**kwargs)


@strict
class DemixMoeConfig(DemixConfig):
    """A causal LM whose feed-forwards are mixtures of experts that a router selects.

    Args:
        num_experts: in each layer; `num_experts_per_tok`: selected for each token.
    Raises:
        ValueError: if fewer than one or more than all experts are selected, or `untie` is given.
    """

    model_type = "demix_moe"

    num_experts: int = 2
    num_experts_per_tok: int = 2

    def __post_init__(self, **kwargs):
        """Raise ValueError for more experts per token than there are, or with domain experts.

        `kwargs` go to the base class.
        """
        super().__post_init__(**kwargs)
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} must be from 1 to num_experts "
                f"({self.num_experts})"
            )
        if self.untie != "none":
            raise ValueError(f"untie {self.untie!r}: a mixture of experts has no domain experts")


@strict
class ForestConfig(PreTrainedConfig):
    """Several language models that predict the next token together.

    The config.json of a forest's folder needs no more than the model type; the experts are then
    read from forest.json and their own folders. Vocabulary, length and special ids are set from the
    parts.

    Args:
        parts: fields of the configuration of each model that is held, `model_type` among them
            ("demix" where it is missing); the experts of one DEMix model are in one part, and so
            are the adapters of one seed (field `adapters`).
        experts: for each expert its `domain`, the number of its `part`, and `member`: the domain or
            adapter in that part, or None if the part is the expert.
        prior: probability of each expert before any token is seen; None: all alike.
        rule: what the weights are inferred from: all tokens so far ("history") or the last one.
        temperature: divisor of the log-likelihoods of tokens, above 0 ("history" alone).
        forgetting: factor of older log-likelihoods with every token, 0 to 1 ("history" alone).
        topk: use this many experts, those with the largest prior; 0: all.
        domain: use the expert of this domain alone; it sets `prior`.
    Raises:
        ValueError: if the parts do not fit each other, or a value is not allowed.
    """

    model_type = "demix_forest"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "token_log_probs",
        "log_weights",
    ]

    parts: list[dict] | tuple[dict, ...] = ()
    experts: list[dict] | tuple[dict, ...] = ()
    prior: list[float] | tuple[float, ...] | None = None
    rule: str = "history"
    temperature: float | int = 1.0
    forgetting: float | int = 1.0
    topk: int = 0
    domain: str | None = None
    vocab_size: int = 0
    max_position_embeddings: int = 0
    # A forest has no layers of its own, so a cache made for it gets its layers as experts fill it.
    num_hidden_layers: int = 0
    use_cache: bool = True
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True  # in the parts that do

    def __post_init__(self, **kwargs):
        """Set the sizes and special ids that the experts share.

        Raise ValueError if the experts do not fit each other, or a value is out of range. `kwargs`
        go to the base class.
        """
        parts = [make_part_config(fields) for fields in self.parts]
        stock = any(part.model_type != DemixConfig.model_type for part in parts)
        # Stock models may pad the vocabulary, and need not name other special ids.
        for field in ("eos_token_id",) if stock else ("vocab_size", *SPECIAL_IDS):
            values = [getattr(part, field) for part in parts]
            if any(value != values[0] for value in values):
                raise ValueError(f"the experts do not fit each other: {field} is one of {values}")
        if parts:
            for field in SPECIAL_IDS:
                setattr(self, field, getattr(parts[0], field))
            if stock and self.pad_token_id == self.eos_token_id:
                self.pad_token_id = None  # an end of text is no padding
            self.vocab_size = min(part.vocab_size for part in parts)
            limits = [limit for part in parts if (limit := get_max_sequence_length(part))]
            self.max_position_embeddings = min(limits, default=0)
        if self.rule not in RULES:
            raise ValueError(f"rule {self.rule!r} is unknown; choose one of {', '.join(RULES)}")
        if not self.temperature > 0 or not 0 <= self.forgetting <= 1:
            raise ValueError(
                f"temperature {self.temperature} must be positive, forgetting {self.forgetting} "
                "between 0 and 1"
            )
        if self.topk < 0:
            raise ValueError(f"topk {self.topk} is negative; 0 stands for all experts")
        super().__post_init__(**kwargs)


def get_default_sequence_length(config: PreTrainedConfig) -> int:
    """Return the tokens per sequence of a model where no option says how many.

    For the project's GPT the longest that the model allows. For a stock model at most `SEQUENCE`,
    as many allow far longer ones than anyone evaluates.
    """
    longest = get_max_sequence_length(config)
    if isinstance(config, DemixConfig):
        return longest
    return min(longest or SEQUENCE, SEQUENCE)


def make_part_config(fields: Mapping[str, object]) -> PreTrainedConfig:
    """Make the configuration of a part of a forest, without its adapters.

    Args:
        fields: an entry of `ForestConfig.parts`; "demix" if there is no `model_type`.
    Raises:
        ValueError: for an unknown model type.
    """
    kind = _find_config_class(fields.get("model_type", DemixConfig.model_type))
    return kind.from_dict({name: value for name, value in fields.items() if name != ADAPTERS})


def _find_config_class(kind: object) -> type[PreTrainedConfig]:
    """Find the configuration class of a model type, `kind`; raise ValueError if it is unknown."""
    # The mapping is imported late: making it imports this module.
    from transformers import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        raise ValueError(f"model_type {kind!r} is unknown to transformers")
    return CONFIG_MAPPING[kind]


def read_lm_config(folder: Path, flag: str | None = None) -> PreTrainedConfig:
    """Read the configuration of a causal language model from its folder.

    For the folder of a LoRA adapter it is the configuration of the seed model that it names.

    Args:
        flag: option that named the folder, for messages; None: the folder alone is named.
    Raises:
        UserError: if config.json is missing or damaged, belongs to another kind of model, or needs
            code that is not part of transformers.
    """
    where = str(folder) if flag is None else f"{flag} {folder}"
    with report_damage(f"{where}: config.json cannot be used"):
        folder = resolve_seed_folder(Path(folder))
        try:
            read_config_file(folder)
        except UserError as error:
            raise UserError(f"{where}: config.json cannot be used: {error}") from error
        fields, _ = PreTrainedConfig.get_config_dict(folder)
        kind = fields.get("model_type")
        _check_is_causal_lm(where, kind, fields)
        config = _find_config_class(kind).from_dict(fields)
        check_model_fits_files(config.to_dict(), folder)  # with the defaults of the family
        return config


def _check_is_causal_lm(where: str, kind: object, fields: Mapping[str, object]) -> None:
    """Raise UserError unless a model type is a causal language model's.

    Args:
        where: beginning of the message.
        kind: `model_type` of config.json, or None.
        fields: all of config.json.
    """
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if kind in (DemixConfig.model_type, DemixMoeConfig.model_type, HOST_TYPE):
        return
    if kind not in CONFIG_MAPPING_NAMES:
        code = ", and code in folders is never run" if "auto_map" in fields else ""
        raise UserError(
            f"{where}: config.json has model_type {kind!r}, which transformers does not know{code}"
        )
    name = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    seq_to_seq = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    causal = isinstance(name, str) and name.endswith(("ForCausalLM", "LMHeadModel"))
    if not causal or kind in masked or kind in seq_to_seq:
        raise UserError(
            f"{where}: config.json has model_type {kind!r}; a causal language model is needed, "
            "such as llama, gpt2 or demix"
        )


LmConfig = PreTrainedConfig
"""Configuration of a causal language model: `DemixConfig`, or one of a stock family."""

SEQUENCE = 1024  # tokens of a sequence of a stock model, where nothing says how many


def get_domains(config: PreTrainedConfig) -> list[str]:
    """Return the domains of a language model's configuration; stock ones name none."""
    return list(getattr(config, "domains", ()))


def get_untie(config: PreTrainedConfig) -> str:
    """Return the value of `untie` (see `UNTIE`); "none" for a stock configuration."""
    return getattr(config, "untie", "none")


def get_max_sequence_length(config: PreTrainedConfig) -> int | None:
    """Return the longest sequence of a model in tokens; None if its configuration has no limit."""
    for name in ("max_position_embeddings", "max_seq_len"):
        if getattr(config, name, None):
            return getattr(config, name)
    return None


def has_own_feed_forward(untie: str, layer_index: int, layer_count: int) -> bool:
    """Return True if the layer has a feed-forward per domain and shares the rest.

    Args:
        untie: see `UNTIE`; the values for whole blocks or matrices give False.
        layer_index, layer_count: number of the layer, from 0, and of all layers.
    """
    return (
        untie == "feedforward"
        or (untie == "feedforward_every_other" and layer_index % 2 == 1)
        or (untie == "feedforward_top" and layer_index == layer_count - 1)
    )


def check_domain_names(domains: Sequence[str]) -> None:
    """Raise ValueError for a domain that is listed twice or cannot be part of a tensor's name."""
    for domain in domains:
        if not is_domain(domain) or hasattr(nn.ModuleDict, domain):
            raise ValueError(
                f"domain {domain!r}: a name is made of letters, digits, _ and - (at most 100), "
                "and is not the name of a method of torch modules"
            )
    doubled = {domain for domain in domains if domains.count(domain) > 1}
    if doubled:
        raise ValueError(f"domain {sorted(doubled)[0]!r} is named twice")
