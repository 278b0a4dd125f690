"""The causal language model of DEMix and Branch-Train-Merge: dense, or with experts per domain.

A pre-norm GPT in fairseq's arithmetic (scaled embeddings, learned positions with an offset of two,
exact GELU, tied output). Which parts exist once per domain is the config field `untie`; the code
below is the same for all of them.
"""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from megamod_kernels import linear_cross_entropy
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from megamod.dist.scope import EXPERTS_COMPONENT, convert_to_dense_name, parse_expert_domain
from megamod.errors import UserError
from megamod.models.calls import (
    BoundedGeneration,
    check_extra_arguments,
    format_output,
    select_logit_positions,
)
from megamod.models.lm.adapter import select_expert
from megamod.models.lm.configuration import DemixConfig, DemixMoeConfig
from megamod.models.lm.demix_init import initialise_module_weights
from megamod.models.lm.demix_model import DemixModel, DemixPreTrainedModel
from megamod.models.lm.documents import compute_document_mask, compute_document_positions
from megamod.nn.demix import (
    DomainExperts,
    get_selected_expert,
    iterate_domain_experts,
)


@dataclass
class DemixOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` plus the score of each token.

    token_log_probs: [B, L] float32, log-probability of each label (0 where the label is -100), if
    there are labels. With `shift_labels` there are no `logits`: they are never held at once.
    """

    token_log_probs: Tensor | None = None


class OutputHead(nn.Linear):
    """Output matrix; with labels it returns their loss, computing logits chunk by chunk.

    Args:
        hidden_size, vocab_size: D and V.
    """

    def __init__(self, hidden_size: int, vocab_size: int):
        super().__init__(hidden_size, vocab_size, bias=False)

    def forward(
        self, hidden: Tensor, labels: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute logits of states, or with labels their loss without storing all logits.

        Args:
            hidden: [B, L, D].
            labels: [B, L], one for each state (already shifted); -100 is not scored.

        Returns:
            without labels: logits [B, L, V]. With labels: the summed loss in nats, and the labels'
            log-probabilities [B, L], without gradient and 0 where the label is -100.
        """
        if labels is None:
            return super().forward(hidden)
        return linear_cross_entropy(hidden, self.weight, labels)


class DemixForCausalLM(DemixPreTrainedModel, BoundedGeneration, GenerationMixin):
    """Next-token prediction, with the output matrix tied to the embeddings.

    Source: Gururangan et al. 2022 (DEMix); Li et al. 2022 (Branch-Train-Merge). The arithmetic is
    that of fairseq's `transformer_lm_gpt3` presets.

    Args:
        local_domains: domains whose experts this process holds; None: all of `config.domains`.
    Raises:
        UserError: if `config.domain` names a domain without an expert here.
    """

    # Id that ends a document: with `shift_labels` attention stops at it. None: nowhere.
    document_end: int | None = None
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embeddings.tokens.weight"}

    def __init__(self, config: DemixConfig, local_domains: Sequence[str] | None = None):
        super().__init__(config)
        domains = config.domains if local_domains is None else list(local_domains)
        self.model = DemixModel(config, local_domains)
        has_head_per_domain = config.untie in ("input_output", "transformer_output")

        def make_head() -> OutputHead:
            """Make an output matrix: the only one, or that of one domain."""
            return OutputHead(config.hidden_size, config.vocab_size)

        self.lm_head = DomainExperts(make_head, domains) if has_head_per_domain else make_head()
        if config.untie == "input_output":
            self._tied_weights_keys = {
                f"lm_head.{EXPERTS_COMPONENT}.{domain}.weight": (
                    f"model.embeddings.{EXPERTS_COMPONENT}.{domain}.tokens.weight"
                )
                for domain in domains
            }
        if config.domain is not None:
            if config.untie == "none":
                raise UserError(f"domain {config.domain!r}: the model is dense and has no experts")
            self.set_domain(str(config.domain))
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Return the output matrix; with one per domain, the selected domain's, else the first."""
        return get_selected_expert(self.lm_head)

    def resize_token_embeddings(self, *args: object, **kwargs: object) -> nn.Module:
        """Resize the embeddings, and the output matrix, as `PreTrainedModel` does.

        Arguments and result are those of that method.
        """
        changes = bool(args) or kwargs.get("new_num_tokens") is not None
        if changes and isinstance(self.lm_head, DomainExperts):
            raise ValueError(
                f"untie {self.config.untie!r}: every domain has a vocabulary matrix of its own; "
                "these cannot be resized"
            )
        return super().resize_token_embeddings(*args, **kwargs)

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
        """Compute states before the output matrix, [B, L, D], of `input_ids` [B, L].

        Arguments as in `DemixModel.forward`.
        """
        return self.model(input_ids, attention_mask, position_ids, past_key_values)[0]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Compute logits [..., V] of states [..., D] of `compute_hidden_states`."""
        return self.lm_head(hidden)

    def score_states(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Score labels of states; arguments and result as in `OutputHead.forward`."""
        return self.lm_head(hidden, labels)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        domain: str | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **more: object,
    ) -> DemixOutput | tuple:
        """Predict the next token of every position; other arguments as in `DemixModel.forward`.

        Args:
            labels: [B, L] the input itself, -100 where ignored; shifted by one inside.
            num_items_in_batch: divisor of the summed loss; None for the number of labels.
            domain: name of the expert that this and all following calls use; None: as before.
            use_cache: None: as the configuration says, but not in training or with labels.
            logits_to_keep: compute logits for the last so many positions only; 0 for all. A tensor:
                at these positions. Not used with labels.
            more: `shift_labels` [B, L], the token that follows each position: in place of labels,
                for a loss without logits. It is no parameter of its own, because Trainer takes
                every parameter with "label" in its name for a field that all batches have.
        Returns:
            `DemixOutput`: logits [B, L, V]; with labels also the loss (nats) and log-probabilities;
            with `shift_labels` these alone. A tuple if `return_dict` is False.
        Raises:
            UserError: if this process does not hold the expert of `domain`.
            ValueError: as in `DemixModel.forward`.
        """
        shift_labels = more.pop("shift_labels", None)
        check_extra_arguments(self, more)
        if domain is not None:
            self.set_domain(domain)
        if use_cache is None:
            scored = labels is not None or shift_labels is not None
            use_cache = self.config.use_cache and not self.training and not scored
        if shift_labels is not None and self.document_end is not None:
            position_ids = compute_document_positions(input_ids, self.document_end)
            attention_mask = compute_document_mask(position_ids)
        states = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            return_dict=True,
        )
        hidden = states.last_hidden_state
        output = DemixOutput(
            past_key_values=states.past_key_values, hidden_states=states.hidden_states
        )
        if shift_labels is not None:
            output["loss"], output["token_log_probs"] = score_labels(
                self, hidden, shift_labels, num_items_in_batch
            )
        elif labels is not None:
            shift_labels = shift_labels_left(labels)
            output["logits"] = self.lm_head(hidden)
            losses = nn.functional.cross_entropy(
                output.logits.float().transpose(1, 2), shift_labels, reduction="none"
            )
            output["token_log_probs"] = -losses.detach()
            output["loss"] = losses.sum() / get_loss_divisor(shift_labels, num_items_in_batch)
        else:
            output["logits"] = self.lm_head(select_logit_positions(hidden, logits_to_keep))
        return format_output(self, output, return_dict)


class DemixMoeForCausalLM(DemixForCausalLM):
    """Next-token prediction by a GPT whose feed-forwards are mixtures of experts."""

    config: DemixMoeConfig
    _keys_to_ignore_on_load_unexpected = None  # every process holds all experts


@contextmanager
def restrict_config_to_local_domains(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, let `model.config.domains` list only the domains this process holds.

    A folder that is saved in the block has weights of these alone, and loads by its config.json. A
    model without experts is left as it is.
    """
    config, group = model.config, next(iterate_domain_experts(model), None)
    domains = getattr(config, "domains", None)
    if group is not None:
        config.domains = list(group.experts)
    try:
        yield
    finally:
        if group is not None:
            config.domains = domains


def shift_labels_left(labels: Tensor) -> Tensor:
    """Shift labels [B, L] to the positions that predict them; -100 for the last one."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


def get_loss_divisor(labels: Tensor, num_items: Tensor | float | None) -> Tensor | float:
    """Return the divisor of a summed loss.

    `num_items`, or if that is None the number of labels except -100, at least 1.
    """
    return (labels != -100).sum().clamp(min=1) if num_items is None else num_items


def score_labels(
    model: "DemixForCausalLM",
    hidden: Tensor,
    shift_labels: Tensor,
    num_items_in_batch: Tensor | float | None,
) -> tuple[Tensor, Tensor]:
    """Compute the loss of labels from the states before the output matrix.

    Args:
        model: one with `score_states`, also a stock model with `HostMixin`.
        hidden: [B, L, D].
        shift_labels: [B, L], the token that follows each position; -100 is not scored.
        num_items_in_batch: divisor of the summed loss; None for the number of labels.
    Returns:
        the loss in nats per item, and the log-probabilities [B, L], 0 where the label is -100.
    """
    total, log_probs = model.score_states(hidden, shift_labels)
    return total / get_loss_divisor(shift_labels, num_items_in_batch), log_probs


@torch.no_grad()
def initialise_lm_weights(model: DemixForCausalLM, seed: int) -> None:
    """Initialise all weights, each a pure function of the seed and its module's dense name.

    All experts of a domain-wise module start equal, and every rank starts with the same shared
    weights, whichever experts it holds (the DEMix release gets this from one seed everywhere). An
    output matrix that is not tied starts as a copy of the embeddings. The model is changed in
    place.
    """
    for name, module in model.named_modules():
        weight_name = convert_to_dense_name(f"{name}.weight").encode()
        generator = torch.Generator().manual_seed(zlib.crc32(weight_name, seed))
        initialise_module_weights(module, model.config, generator)
    model.tie_weights()
    embeddings = model.model.embeddings
    for parameter, tensor in model.lm_head.named_parameters():
        # An output matrix that is not tied starts where a tied one would.
        domain = parse_expert_domain(f"lm_head.{parameter}")
        source = embeddings.experts[domain] if isinstance(embeddings, DomainExperts) else embeddings
        tensor.copy_(source.tokens.weight)
