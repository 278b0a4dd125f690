"""Language models with new weights or those of a folder, and the experts that a rank holds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from megamod.dist.scope import convert_to_dense_name
from megamod.errors import UserError, report_damage
from megamod.models.lm.adapter import add_adapter
from megamod.models.lm.configuration import (
    HOST_TYPE,
    DemixConfig,
    DemixMoeConfig,
    LmConfig,
    read_lm_config,
)
from megamod.models.lm.demix import (
    DemixForCausalLM,
    DemixMoeForCausalLM,
    DemixOutput,
    initialise_lm_weights,
)
from megamod.models.lm.host import find_stock_class, make_dense_class, make_host_classes
from megamod.models.pretrained import check_all_layers_used
from megamod.states.adapter import is_adapter, resolve_seed_folder
from megamod.states.weight_files import has_weights
from megamod.states.weights import assign_to_experts, check_finite, read_weights


class LanguageModel(Protocol):
    """Interface of every causal language model here: the project's GPT and stock classes."""

    config: LmConfig

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        domain: str | None = None,
    ) -> DemixOutput:
        """Run a forward pass: logits, or with `shift_labels` the loss and log-probabilities.

        Args:
            input_ids: [B, L].
            attention_mask, position_ids: [B, L]; None: no padding, consecutive positions.
            shift_labels: [B, L], the token that follows each position; -100 is not scored.
            num_items_in_batch: divisor of the summed loss; None: the number of labels.
            domain: expert or adapter that this and all following calls use; None: as before.
        """
        ...

    def set_domain(self, domain: str) -> None:
        """Select the expert, or the adapter, of `domain` for this and all following calls.

        Raises:
            UserError: if this process does not hold it.
        """
        ...

    def compute_hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """Compute the states [B, L, D] that `compute_logits` and `score_states` take.

        They are logits [B, L, V] for a family that is not in `HOSTS`.

        Args:
            input_ids: [B, L].
            attention_mask: [B, S], S cached and new tokens, 0 at padding; None: all are real.
            position_ids: [B, L]; None: consecutive.
            past_key_values: keys and values of earlier tokens, extended in place; None: none.
        """
        ...

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Compute logits [..., V] of the result of `compute_hidden_states`."""
        ...

    def score_states(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Score labels [B, L] of states, already shifted; -100 is not scored.

        `hidden` is a result of `compute_hidden_states`.

        Returns:
            the summed loss (nats), and the log-probabilities [B, L], 0 where the label is -100.
        """
        ...


def build_lm(
    config: LmConfig,
    *,
    seed: int,
    init_from: str | Path | None = None,
    local_domains: Sequence[str] | None = None,
    flag: str = "--init_from",
) -> LanguageModel:
    """Build a language model with float32 weights, new or loaded from a folder.

    Args:
        config: configuration of the model to build; with experts if it has domains.
        seed: random seed of new weights; shared weights depend on it alone, and not on the experts
            that are held.
        init_from: model folder to take the weights from; None: new weights. Each expert starts as a
            copy of a dense folder's feed-forward; a folder with experts must have all domains held.
        local_domains: domains whose experts this process holds; None: all.
        flag: option that named the folder, for messages.
    Raises:
        UserError: if the folder's family, names or shapes do not fit, or a weight is not finite.
    """
    if config.model_type != DemixConfig.model_type:
        if init_from is None:
            return _build_host(config, seed, local_domains)
        folder = Path(init_from)
        return load_lm(folder, config, local_domains, dtype=torch.float32, flag=flag)
    model = DemixForCausalLM(config, local_domains)
    if init_from is None:
        initialise_lm_weights(model, seed)
        return model
    state = read_weights(Path(init_from))
    parameters = dict(model.named_parameters())
    if not all(name in state for name in parameters):
        state = assign_to_experts(state, parameters)
    for name, parameter in parameters.items():
        if state[name].shape != parameter.shape:
            raise UserError(
                f"{flag} {init_from}: {convert_to_dense_name(name)} has shape "
                f"{tuple(state[name].shape)}, the model needs {tuple(parameter.shape)}"
            )
        parameter.data.copy_(state[name])
    check_finite(parameters.items(), f"{flag} {init_from}")
    model.tie_weights()
    return model


def select_lm_class(config: LmConfig) -> type:
    """Return the model class of a configuration; it is called with `(config, local_domains)`.

    Raises:
        ValueError: if transformers has no causal language model for it.
    """
    if config.model_type == DemixConfig.model_type:
        return DemixForCausalLM
    if config.model_type == DemixMoeConfig.model_type:
        return DemixMoeForCausalLM
    if config.model_type == HOST_TYPE:
        return make_host_classes(config.host)[1]
    return make_dense_class(find_stock_class(config))


def _build_host(config: LmConfig, seed: int, local_domains: Sequence[str] | None) -> LanguageModel:
    """Build a stock model with new weights; with domains, all its experts start equal.

    The weights are drawn before the experts are copied, so shared ones are those of a dense model.
    torch's global generator is left as it was.

    Args:
        config: of the model.
        seed: seed of the weights.
        local_domains: domains whose experts this process holds; None: all.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = select_lm_class(config)(config, ())
    if config.model_type == HOST_TYPE:
        model.untie_feed_forwards(config.domains if local_domains is None else local_domains)
    return model


def load_lm(
    folder: Path,
    config: LmConfig | None = None,
    local_domains: Sequence[str] | None = None,
    flag: str | None = None,
    **kwargs: object,
) -> LanguageModel:
    """Load a language model from a folder.

    If the folder holds a LoRA adapter, the model it was trained on (named in the adapter's config)
    is loaded and the adapter is put into it.

    Args:
        folder: folder of a model or a LoRA adapter.
        config: configuration to load the weights into; None: the folder's own. If it has experts
            and the folder is dense, each expert of a stock model starts as a copy of the dense
            feed-forward.
        local_domains: domains whose experts to load; None: all.
        flag: option that named the folder, for messages.
        kwargs: passed to `from_pretrained`, such as dtype.
    Raises:
        UserError: if the folder is no language model or of another family than `config`, cannot be
            read, if a weight is missing or not finite, or if the adapter does not fit.
    """
    if is_adapter(folder):
        model = load_lm(resolve_seed_folder(folder), config, local_domains, flag, **kwargs)
        add_adapter(model, folder)
        return model
    saved = read_lm_config(folder, flag)
    config = saved if config is None else config
    where = str(folder) if flag is None else f"{flag} {folder}"
    check_same_family(where, saved, config)
    if not has_weights(folder):
        raise UserError(f"{where}: cannot be read as a model: it holds no weights")
    split = config.model_type == HOST_TYPE and saved.model_type != HOST_TYPE
    with report_damage(f"{where}: cannot be read as a model"):
        try:
            model, report = select_lm_class(config).from_pretrained(
                folder,
                () if split else local_domains,
                config=config,
                output_loading_info=True,
                **kwargs,
            )
        except UserError as error:  # of the model's class, which does not know the folder
            raise UserError(f"{where}: {error}") from error
    if report["missing_keys"]:
        raise UserError(f"{where}: the weights lack {min(report['missing_keys'])}")
    check_all_layers_used(model, report["unexpected_keys"], where)
    check_finite(model.named_parameters(), where)
    if split:
        model.untie_feed_forwards(config.domains if local_domains is None else local_domains)
    return model


def check_same_family(where: str, saved: LmConfig, config: LmConfig) -> None:
    """Raise UserError if a folder's model is of another family than the model to start from it.

    Args:
        where: beginning of the message: the folder and the option that named it.
        saved: configuration of the folder.
        config: configuration of the model to start.
    """
    theirs, ours = (getattr(c, "host", c.model_type) for c in (saved, config))
    if theirs != ours:
        raise UserError(f"{where} is a {theirs}, the model of this run a {ours}")
