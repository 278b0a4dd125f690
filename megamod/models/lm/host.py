"""Stock causal language models of transformers, trained here: dense, or with an expert per domain.

`make_dense_class` and `make_host_classes` make classes from a stock one. They add the chunked loss,
the interface `megamod.models.lm.load.LanguageModel`, and `DomainExperts` in place of feed-forwards.
Names of parameters are the stock ones, so a dense model is saved as a stock folder.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Sequence

import torch
from huggingface_hub.dataclasses import strict
from megamod_kernels import linear_cross_entropy
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_outputs import ModelOutput

from megamod.dist.scope import EXPERTS_COMPONENT
from megamod.models.calls import format_output
from megamod.models.lm.adapter import select_expert
from megamod.models.lm.configuration import HOST_TYPE, check_domain_names, has_own_feed_forward
from megamod.models.lm.demix import DemixOutput, restrict_config_to_local_domains, score_labels
from megamod.models.lm.documents import (
    compute_document_positions,
    make_additive_mask,
    make_row_alibi,
)
from megamod.models.lm.hosts import DOCUMENTS_BY_MASK, HOSTS, UNTIE_OF_HOSTS, Host
from megamod.nn.anchored import AnchoredExperts
from megamod.nn.demix import DomainExperts

Scores = tuple[Tensor, Tensor]
"""Summed loss of labels in nats, and the log-probability of each; see `HostMixin.score_states`."""


class HostMixin:
    """Additions to a stock causal language model; a base class that precedes the stock class.

    Args:
        config: the stock configuration, or one made by `make_host_classes`.
        local_domains: domains whose experts are held; None: all; empty: the feed-forwards are left
            whole until `untie_feed_forwards` is called.
    Raises:
        UserError: if `config.domain` names a domain without an expert here.
    """

    config: PreTrainedConfig
    # Id that ends a document: with `shift_labels` attention stops at it. None: nowhere.
    document_end: int | None = None

    def __init__(self, config: PreTrainedConfig, local_domains: Sequence[str] | None = None):
        super().__init__(config)
        head = self.get_output_embeddings()
        if self.host is not None:
            head.__class__ = _make_scoring_head(type(head))
            head.scale, head.softcap = (
                _get_logit_scale(config, self.host),
                _get_softcap(config, self.host),
            )
        if self._family == "bloom":
            build = self.base_model.build_alibi_tensor
            self.base_model.build_alibi_tensor = functools.partial(make_row_alibi, build)
        domains = getattr(config, "domains", ()) if local_domains is None else local_domains
        if domains and config.model_type == HOST_TYPE:
            self.untie_feed_forwards(domains)
            if config.domain is not None:
                self.set_domain(str(config.domain))

    @property
    def _family(self) -> str:
        """Model type of the stock class."""
        return getattr(self.config, "host", self.config.model_type)

    @property
    def host(self) -> Host | None:
        """Row of the model's family in `HOSTS`; None if the family is not in it."""
        return HOSTS.get(self._family)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False: transformers treats this class as one of its own."""
        # The layers are those of transformers and initialise their buffers as it expects.
        return False

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Return the stock class's answer.

        transformers looks for `@use_experts_implementation` in the source of a class's module, and
        would not find it in this one: mixtures would run expert by expert.
        """
        stock = next(base for base in cls.__mro__ if base.__module__.startswith("transformers."))
        return stock._can_set_experts_implementation()

    def untie_feed_forwards(self, domains: Sequence[str]) -> None:
        """Replace each feed-forward that `config.untie` selects by `DomainExperts`, in place.

        All experts start with the weights of the replaced module, each in storage of its own. With
        `config.anchored` it is `AnchoredExperts`, whose frozen anchor is the replaced module.

        Args:
            domains: names of the experts to hold, at least one.
        """
        layers = self.get_submodule(self.host.layers)
        for number, layer in enumerate(layers):
            if not has_own_feed_forward(self.config.untie, number, len(layers)):
                continue
            for name in self.host.feed_forward:
                experts = [getattr(layer, name)]
                if self.config.anchored:
                    anchor = experts[0]
                    experts = [_copy_module(anchor) for _ in domains]
                    width = self.config.hidden_size
                    setattr(layer, name, AnchoredExperts(anchor, experts, domains, width))
                    continue
                experts += [_copy_module(experts[0]) for _ in domains[1:]]
                setattr(layer, name, DomainExperts(experts.pop, domains))

    def set_domain(self, domain: str) -> None:
        """Select the expert, or the adapter, that this and all following calls use.

        Args:
            domain: name of the domain, or of the adapter in the model, or `adapter.SEED`.
        Raises:
            UserError: if this process does not hold it.
        """
        select_expert(self, domain)

    def save_pretrained(self, *args: object, **kwargs: object) -> None:
        """Save as `PreTrainedModel` does; config.json lists only the domains this process holds."""
        with restrict_config_to_local_domains(self):
            super().save_pretrained(*args, **kwargs)

    def compute_hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """Compute the states [B, L, D] that the output matrix reads.

        A family that is not in `HOSTS` returns logits [B, L, V] instead, as the place of its output
        matrix is not known; `compute_logits` and `score_states` then take these.

        Args:
            input_ids: token ids [B, L].
            attention_mask: [B, L] over all positions, those in the cache included; or an additive
                mask [B, 1, L, L].
            position_ids: [B, L]; ignored by families that take none.
            past_key_values: cache of earlier positions, extended in place; None: no cache.
        """
        if self.host is None:
            return (
                super()
                .forward(
                    **self._make_inputs(input_ids, attention_mask, position_ids, past_key_values)
                )
                .logits
            )
        inputs = self._make_inputs(input_ids, attention_mask, position_ids, past_key_values)
        return self.base_model(**inputs)[0]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Compute logits [..., V], scaled and soft-capped, of states [..., D].

        `hidden` is a result of `compute_hidden_states`, which for a family that is not in `HOSTS`
        are the logits themselves.
        """
        if self.host is None:
            return hidden
        head = self.get_output_embeddings()
        scores = head(hidden) * head.scale
        if head.softcap is not None:
            scores = head.softcap * torch.tanh(scores / head.softcap)
        return scores

    def score_states(self, hidden: Tensor, labels: Tensor) -> Scores:
        """Score labels without keeping logits of all positions.

        Args:
            hidden: result of `compute_hidden_states`.
            labels: [...], one for each state (already shifted); -100 is not scored.
        Returns:
            the summed loss in nats, and the log-probabilities [...] of the labels, without gradient
            and 0 where the label is -100.
        """
        if self.host is not None:
            return self.get_output_embeddings()(hidden, labels)
        counted = labels != -100
        log_probs = hidden.float().log_softmax(-1)
        log_probs = log_probs.gather(-1, labels.where(counted, 0)[..., None])[..., 0]
        log_probs = log_probs.where(counted, 0.0)
        return -log_probs.sum(), log_probs.detach()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        domain: str | None = None,
        return_dict: bool | None = None,
        **others: object,
    ) -> ModelOutput | tuple:
        """Run the stock forward pass; with `shift_labels`, compute the loss without logits.

        Args:
            input_ids: [B, L].
            attention_mask: [B, S], S = cached + L, or another that the stock class takes; None: no
                padding.
            position_ids: [B, L]; ignored by families that take none.
            labels: [B, L], shifted by the stock class.
            num_items_in_batch: divisor of the summed loss; None: the number of labels.
            domain: expert to select first, for this and all following calls.
            others: `shift_labels` [B, L], labels shifted by the caller, as in
                `DemixForCausalLM.forward`; the rest is passed to the stock class.

        Returns:
            the output of the stock class; with `shift_labels` a `DemixOutput` with loss (nats) and
            log-probabilities only. A tuple if `return_dict` is False.
        Raises:
            UserError: if this process does not hold the domain's expert.
        """
        if domain is not None:
            self.set_domain(domain)
        shift_labels = others.pop("shift_labels", None)
        if shift_labels is None:
            if takes_position_ids(type(self)):
                others["position_ids"] = position_ids
            if labels is not None and num_items_in_batch is not None:
                others["num_items_in_batch"] = num_items_in_batch
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                labels=labels,
                return_dict=return_dict,
                **others,
            )
        if self.document_end is not None:  # rows are padded on the right, which nothing attends to
            position_ids = compute_document_positions(input_ids, self.document_end)
            by_mask = self._family in DOCUMENTS_BY_MASK
            attention_mask = make_additive_mask(position_ids, self.dtype) if by_mask else None
        hidden = self.compute_hidden_states(input_ids, attention_mask, position_ids)
        output = DemixOutput()
        output["loss"], output["token_log_probs"] = score_labels(
            self, hidden, shift_labels, num_items_in_batch
        )
        return format_output(self, output, return_dict)

    def _make_inputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
    ) -> dict[str, object]:
        """Make the arguments of the stock forward pass from those of `compute_hidden_states`.

        The base model takes them, and for a family that is not in `HOSTS` the stock class with its
        output matrix. `position_ids` are not among them for a family that takes none.
        """
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = attention_mask.long()  # some families do arithmetic on it
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": past_key_values is not None,
            "return_dict": True,
        }
        if takes_position_ids(type(self)):
            inputs["position_ids"] = position_ids
        return inputs

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Convert parameters and buffers as every module does, but keep the buffers' dtypes.

        Arguments are those of `nn.Module._apply`, which `to` and `half` call.
        """
        # Tables of rotary frequencies lose their meaning in half precision.
        float_buffers = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.is_floating_point()
        ]
        super()._apply(function, recurse)
        for module, name, buffer in float_buffers:
            if module._buffers[name].dtype != buffer.dtype:
                module._buffers[name] = buffer.to(module._buffers[name].device)
        return self


def find_stock_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Find the class of causal language model in transformers for a stock `config`.

    Raises:
        ValueError: if there is none.
    """
    # Imported late, as everywhere in this file: importing it imports this file.
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError as error:
        raise ValueError(f"model_type {config.model_type!r} is no causal language model") from error


@functools.cache
def make_dense_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Make a subclass of a stock class with `HostMixin`.

    It keeps the stock class's name, which `save_pretrained` writes into config.json.
    """
    return type(stock.__name__, (HostMixin, stock), {"__doc__": HostMixin.__doc__})


@functools.cache
def make_host_classes(model_type: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """Make the configuration class and the model class of a family with an expert per domain.

    The model class is registered with `AutoModelForCausalLM`. Later calls return the same classes.

    Args:
        model_type: model type of the stock family.
    Raises:
        ValueError: if the family is not in `HOSTS`.
    """
    if model_type not in HOSTS:
        raise ValueError(
            f"model_type {model_type!r} has no table of its feed-forward layers; known are "
            f"{', '.join(HOSTS)}"
        )
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    stock_config = CONFIG_MAPPING[model_type]
    stock = MODEL_FOR_CAUSAL_LM_MAPPING[stock_config]

    @strict
    class HostConfig(stock_config):
        """Fields of the stock family, those of `DemixConfig` that name experts, and the family."""

        domains: list[str] | tuple[str, ...] = ()
        untie: str = "none"
        domain: str | None = None
        host: str = model_type
        anchored: bool = False

        def __post_init__(self, **kwargs: object):
            """Raise ValueError for domains or an `untie` that the family does not support."""
            self.domains = list(self.domains)
            check_domain_names(self.domains)
            if self.untie not in UNTIE_OF_HOSTS or (self.untie != "none" and not self.domains):
                raise ValueError(
                    f"untie {self.untie!r}: a {self.host} needs domains and one of "
                    f"{', '.join(UNTIE_OF_HOSTS)}"
                )
            if self.anchored and self.untie != "feedforward":
                raise ValueError(
                    f"untie {self.untie!r}: anchored experts are the feed-forwards of all layers"
                )
            super().__post_init__(**kwargs)

    HostConfig.model_type = HOST_TYPE
    HostConfig.__name__ = HostConfig.__qualname__ = f"Demix{stock_config.__name__}"
    _register_checkpoint_renaming(stock, model_type, f"Demix{stock.__name__}")
    ignored = stock._keys_to_ignore_on_load_unexpected or ()
    model = type(
        f"Demix{stock.__name__}",
        (HostMixin, stock),
        {
            "__doc__": HostMixin.__doc__,
            "config_class": HostConfig,
            # A process that holds some of the experts has no use for the others in the folder.
            "_keys_to_ignore_on_load_unexpected": [*ignored, rf"\.{EXPERTS_COMPONENT}\."],
        },
    )
    AutoModelForCausalLM.register(HostConfig, model)
    return HostConfig, model


def takes_position_ids(model: type[PreTrainedModel]) -> bool:
    """Return True if the stock class takes `position_ids`; those with ALiBi do not."""
    stock = next(base for base in model.__mro__ if base.__module__.startswith("transformers."))
    return "position_ids" in inspect.signature(stock.forward).parameters


def _copy_module(module: nn.Module) -> nn.Module:
    """Copy a module, parameters and buffers included, so that the two share no storage."""
    # `Tensor.__deepcopy__` copies storages, and those of the fake tensors of a plan have no memory.
    weights = {
        id(p): nn.Parameter(p.detach().clone(), p.requires_grad) for p in module.parameters()
    }
    return copy.deepcopy(module, weights | {id(b): b.clone() for b in module.buffers()})


def _register_checkpoint_renaming(
    stock: type[PreTrainedModel], model_type: str, class_name: str
) -> None:
    """Register the renaming of tensors in files of the stock class, else of its model type.

    It is registered for the class `class_name` too.
    """
    renaming = get_checkpoint_conversion_mapping(stock.__name__)
    renaming = renaming or get_checkpoint_conversion_mapping(model_type)
    if renaming:
        register_checkpoint_conversion_mapping(class_name, renaming, overwrite=True)


@functools.cache
def _make_scoring_head(head: type[nn.Module]) -> type[nn.Module]:
    """Make a subclass of `head`, an output layer, that scores labels if it is called with them.

    It scores inside the module's call, so that ZeRO 3 gathers the weight. An object of it needs the
    attributes `scale` and `softcap`, which apply to logits of scores alone.
    """

    def forward(self: nn.Module, hidden: Tensor, labels: Tensor | None = None) -> Tensor | Scores:
        """Compute plain logits [..., V] of `hidden` [..., D], or scores of labels [...]."""
        if labels is None:
            return head.forward(self, hidden)
        return linear_cross_entropy(
            hidden, self.weight, labels, self.bias, self.scale, self.softcap
        )

    return type(head.__name__, (head,), {"forward": forward, "__doc__": head.__doc__})


def _get_logit_scale(config: PreTrainedConfig, host: Host) -> float:
    """Return the factor of the logits that `host` names in `config`; 1 if there is none."""
    if host.divide is not None:
        return 1 / getattr(config, host.divide)
    return 1.0 if host.multiply is None else getattr(config, host.multiply)


def _get_softcap(config: PreTrainedConfig, host: Host) -> float | None:
    """Return the bound of the logits that `host` names in `config`; None: no bound."""
    return None if host.softcap is None else getattr(config, host.softcap)
