"""The causal language model of DEMix and Branch-Train-Merge: dense, or with experts per domain.

A pre-norm GPT in fairseq's arithmetic (scaled embeddings, learned positions with an offset of two,
exact GELU, tied output). Which parts exist once per domain is the config field `untie`; the code
below is the same for all of them.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from megamod_kernels import linear_cross_entropy
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from megamod.dist.scope import MARK, dense_name, domain_of_name
from megamod.models.lm.configuration import DemixConfig, owns_feed_forward
from megamod.nn.attention import SelfAttention
from megamod.nn.demix import DomainExperts, choose_domain
from megamod.nn.transformer import (
    DecoderBlock,
    Embeddings,
    FeedForward,
    causal_mask,
    positions_of,
)


@dataclass
class DemixOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` plus what evaluation needs.

    token_log_probs: [B, L] float32, log-probability of each label (0 where the label is -100);
    present with labels, and then `logits` is None: they are never held at once.
    """

    token_log_probs: Tensor | None = None


class OutputHead(nn.Linear):
    """The output matrix. With labels it goes straight to the loss, logits chunk by chunk."""

    def __init__(self, hidden_size: int, vocab_size: int):
        super().__init__(hidden_size, vocab_size, bias=False)

    def forward(
        self, hidden: Tensor, labels: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, L, V]; with labels [B, L]: summed loss and log-probabilities [B, L]."""
        if labels is None:
            return super().forward(hidden)
        return linear_cross_entropy(hidden, self.weight, labels)


class DemixPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation, shared by the bare model and the language model."""

    config: DemixConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("DecoderBlock",)
    # A process that holds some of the experts has no use for the others in the folder.
    _keys_to_ignore_on_load_unexpected = (rf"\.{MARK}\.",)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For classes outside transformers modules without parameters of their own would be passed
        # over, and those are the ones that `_draw` knows.
        super()._initialize_weights(module, is_custom_code=False)

    def _init_weights(self, module: nn.Module) -> None:
        """Draw a module's weights from the global generator, then level the experts.

        Weights that were loaded from a file stay as they are.
        """
        _draw(module, self.config, None)
        if isinstance(module, DomainExperts):
            first, *others = module.experts.values()
            for other in others:
                for tensor, source in zip(other.parameters(), first.parameters(), strict=True):
                    if not _was_loaded(tensor):
                        tensor.copy_(source)


class DemixModel(DemixPreTrainedModel):
    """Embeddings, decoder blocks and final norm.

    Args:
        local_domains: the domains whose experts this process holds; None for all of them.
    """

    def __init__(self, config: DemixConfig, local_domains: Sequence[str] | None = None):
        super().__init__(config)
        domains = config.domains if local_domains is None else list(local_domains)
        size, untie = config.hidden_size, config.untie

        def per_domain(build: Callable[[], nn.Module], apart: bool) -> nn.Module:
            return DomainExperts(build, domains) if apart else build()

        def block(layer: int) -> DecoderBlock:
            apart = owns_feed_forward(untie, layer, config.num_hidden_layers)
            return DecoderBlock(
                SelfAttention(
                    size,
                    config.num_attention_heads,
                    layer,
                    config.attention_probs_dropout_prob,
                    config._attn_implementation or "sdpa",
                ),
                per_domain(lambda: FeedForward(size, config.intermediate_size), apart),
                size,
                config.layer_norm_eps,
                config.hidden_dropout_prob,
            )

        self.embeddings = per_domain(
            lambda: Embeddings(
                config.vocab_size, size, config.max_position_embeddings, config.pad_token_id
            ),
            untie == "input_output",
        )
        whole_blocks = untie in ("transformer", "transformer_output")
        self.layers = nn.ModuleList(
            per_domain(lambda layer=layer: block(layer), whole_blocks)
            for layer in range(config.num_hidden_layers)
        )
        self.final_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        output_hidden_states: bool = False,
    ) -> tuple[Tensor, list[Tensor] | None]:
        """Hidden states after the final norm [B, L, D], and those before it if asked for.

        Args:
            input_ids: [B, L] int64.
            attention_mask: [B, S] nonzero at real tokens, S = cached + L; without it (and without
                position_ids) padding is recognised by its id.
            position_ids: [B, L], 0 first. Given without a mask they promise that nothing is
                padded, which spares the search for padding.
        """
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        length = input_ids.shape[1]
        if attention_mask is None and position_ids is None and past == 0:
            real = input_ids != self.config.pad_token_id
            attention_mask = None if bool(real.all()) else real
        if position_ids is None and attention_mask is not None:
            position_ids = positions_of(attention_mask)[:, past:]
        elif position_ids is None:
            position_ids = torch.arange(past, past + length, device=input_ids.device)
            position_ids = position_ids.expand_as(input_ids)
        mask = self._mask(attention_mask, input_ids, past)

        x = self.embeddings(input_ids, position_ids)
        states = [x] if output_hidden_states else None
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer.__call__, x, mask)
            else:
                x = layer(x, mask, past_key_values)
            if states is not None:
                states.append(x)
        return self.final_norm(x), states

    @staticmethod
    def _mask(attention_mask: Tensor | None, input_ids: Tensor, past: int) -> Tensor | None:
        if attention_mask is None and past == 0:
            return None
        batch, length = input_ids.shape
        if attention_mask is None:
            attention_mask = torch.ones(batch, past + length, device=input_ids.device)
        return causal_mask(attention_mask, length)


class DemixForCausalLM(DemixPreTrainedModel, GenerationMixin):
    """Next-token prediction, with the output matrix tied to the embeddings.

    Source: Gururangan et al. 2022 (DEMix); Li et al. 2022 (Branch-Train-Merge). The arithmetic is
    that of fairseq's `transformer_lm_gpt3` presets.
    """

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embeddings.tokens.weight"}

    def __init__(self, config: DemixConfig, local_domains: Sequence[str] | None = None):
        super().__init__(config)
        domains = config.domains if local_domains is None else list(local_domains)
        self.model = DemixModel(config, local_domains)
        head_apart = config.untie in ("input_output", "transformer_output")

        def head() -> OutputHead:
            return OutputHead(config.hidden_size, config.vocab_size)

        self.lm_head = DomainExperts(head, domains) if head_apart else head()
        if config.untie == "input_output":
            self._tied_weights_keys = {
                f"lm_head.{MARK}.{d}.weight": f"model.embeddings.{MARK}.{d}.tokens.weight"
                for d in domains
            }
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return getattr(self.model.embeddings, "tokens", self.model.embeddings)

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embeddings.tokens = value

    def set_domain(self, domain: str) -> None:
        """Choose the expert that following calls use.

        Raises:
            ValueError: if this process does not hold the domain's expert.
        """
        choose_domain(self, domain)

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """States before the output matrix [B, L, D]; arguments as in `DemixModel.forward`."""
        return self.model(input_ids, attention_mask, position_ids, past_key_values)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of what `hidden_states` returned."""
        return self.lm_head(hidden)

    def score(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss and log-probabilities [...] of labels, -100 where nothing is predicted."""
        return self.lm_head(hidden, labels)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        domain: str | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> DemixOutput | tuple:
        """One pass; shapes as in `DemixModel.forward`.

        Args:
            labels: [B, L] the input itself, -100 where ignored; shifted by one inside.
            shift_labels: [B, L] the token that follows each position; in place of labels.
            num_items_in_batch: what the summed loss is divided by; None for the number of labels.
            domain: name of the expert to use from now on; see `set_domain`.
            logits_to_keep: compute logits for the last so many positions only; 0 for all.
        Returns:
            `DemixOutput`; with labels it has a loss (nats) and log-probabilities, else logits.
        """
        if domain is not None:
            self.set_domain(domain)
        training_pass = labels is not None or shift_labels is not None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not training_pass
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        hidden, states = self.model(
            input_ids, attention_mask, position_ids, past_key_values, bool(output_hidden_states)
        )
        output = DemixOutput(
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(states) if states is not None else None,
        )
        if not training_pass:
            output["logits"] = self.lm_head(hidden[:, -logits_to_keep:])
        else:
            output["loss"], output["token_log_probs"] = score_labels(
                self, hidden, labels, shift_labels, num_items_in_batch
            )
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()


def score_labels(
    model: "DemixForCausalLM",
    hidden: Tensor,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    num_items_in_batch: Tensor | float | None,
) -> tuple[Tensor, Tensor]:
    """Loss and log-probabilities [B, L] of hidden states; arguments as in `forward`."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    total, log_probs = model.score(hidden, shift_labels)
    if num_items_in_batch is None:
        num_items_in_batch = (shift_labels != -100).sum().clamp(min=1)
    return total / num_items_in_batch, log_probs


@torch.no_grad()
def initialise(model: DemixForCausalLM, seed: int) -> None:
    """Draw every weight as a pure function of the seed and the module's name in a dense model.

    All experts of a domain-wise module start equal, and every rank starts with the same shared
    weights, whichever experts it holds (the DEMix release gets this from one seed everywhere).
    """
    for name, module in model.named_modules():
        plain = dense_name(f"{name}.weight").encode()
        generator = torch.Generator().manual_seed(zlib.crc32(plain, seed))
        _draw(module, model.config, generator)
    model.tie_weights()
    embeddings = model.model.embeddings
    for parameter, tensor in model.lm_head.named_parameters():
        # An output matrix that is not tied starts where a tied one would.
        domain = domain_of_name(f"lm_head.{parameter}")
        source = embeddings.experts[domain] if isinstance(embeddings, DomainExperts) else embeddings
        tensor.copy_(source.tokens.weight)


def _draw(module: nn.Module, config: DemixConfig, generator: torch.Generator | None) -> None:
    """fairseq's initialisation of one module, children left alone."""
    if isinstance(module, SelfAttention):
        for projection in (module.q_proj, module.k_proj, module.v_proj):
            nn.init.xavier_uniform_(projection.weight, gain=2**-0.5, generator=generator)
            _uniform(projection.bias, projection.in_features, generator)
        nn.init.xavier_uniform_(module.out_proj.weight, generator=generator)
        nn.init.zeros_(module.out_proj.bias)
    elif isinstance(module, FeedForward):
        for linear in (module.fc1, module.fc2):
            _uniform(linear.weight, linear.in_features, generator)
            _uniform(linear.bias, linear.in_features, generator)
    elif isinstance(module, Embeddings):
        for table in (module.tokens, module.positions):
            nn.init.normal_(table.weight, std=config.hidden_size**-0.5, generator=generator)
            if not _was_loaded(table.weight):
                nn.init.zeros_(table.weight[table.padding_idx])
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def _was_loaded(parameter: Tensor) -> bool:
    """True inside `from_pretrained` for what a file held; whole tensors it guards by itself."""
    return getattr(parameter, "_is_hf_initialized", False)


def _uniform(tensor: Tensor, fan_in: int, generator: torch.Generator | None) -> None:
    """The default of torch.nn.Linear, for weights and biases alike."""
    bound = fan_in**-0.5
    nn.init.uniform_(tensor, -bound, bound, generator=generator)
