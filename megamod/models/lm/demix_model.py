"""Backbone of the causal language model: embeddings, decoder blocks, final norm."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from megamod.dist.scope import EXPERTS_COMPONENT
from megamod.models.calls import check_extra_arguments, check_positions, format_output
from megamod.models.lm.configuration import (
    DemixConfig,
    DemixMoeConfig,
    has_own_feed_forward,
)
from megamod.models.lm.demix_init import initialise_module_weights
from megamod.nn.attention import SelfAttention
from megamod.nn.demix import DomainExperts, get_selected_expert
from megamod.nn.encoder import was_loaded_from_file
from megamod.nn.sparse import SparseFeedForward
from megamod.nn.transformer import (
    DecoderBlock,
    Embeddings,
    FeedForward,
    compute_positions,
    make_causal_mask,
)


class DemixPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation, shared by the bare model and the language model."""

    config: DemixConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("DecoderBlock",)
    # A process that holds some of the experts has no use for the others in the folder.
    _keys_to_ignore_on_load_unexpected = (rf"\.{EXPERTS_COMPONENT}\.",)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """Initialise a module as transformers does for its own classes; the flag has no effect."""
        # For classes outside transformers modules without parameters of their own would be passed
        # over, and those are the ones that `initialise_module_weights` knows.
        super()._initialize_weights(module, is_custom_code=False)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a module from torch's global generator; experts get the weights of the first.

        transformers calls it. Weights that were loaded from a file stay as they are.
        """
        initialise_module_weights(module, self.config, None)
        if isinstance(module, DomainExperts):
            first, *others = module.experts.values()
            for other in others:
                for tensor, source in zip(other.parameters(), first.parameters(), strict=True):
                    if not was_loaded_from_file(tensor):
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

        def build_per_domain(build: Callable[[], nn.Module], is_per_domain: bool) -> nn.Module:
            """Call `build` once; with `is_per_domain`, for each domain held (`DomainExperts`)."""
            return DomainExperts(build, domains) if is_per_domain else build()

        def build_dense() -> FeedForward:
            """Build the feed-forward of a dense layer, or one expert of a sparse one."""
            return FeedForward(size, config.intermediate_size)

        def build_feed_forward() -> nn.Module:
            """Build the feed-forward of a layer: dense, or sparse with a router."""
            if not isinstance(config, DemixMoeConfig):
                return build_dense()
            return SparseFeedForward(
                build_dense, size, config.num_experts, config.num_experts_per_tok
            )

        def build_block(layer: int) -> DecoderBlock:
            """Build the block of a layer, numbered from 0."""
            is_per_domain = has_own_feed_forward(untie, layer, config.num_hidden_layers)
            return DecoderBlock(
                SelfAttention(
                    size,
                    config.num_attention_heads,
                    layer,
                    config.attention_probs_dropout_prob,
                    config._attn_implementation or "sdpa",
                ),
                build_per_domain(build_feed_forward, is_per_domain),
                size,
                config.layer_norm_eps,
                config.hidden_dropout_prob,
            )

        self.embeddings = build_per_domain(
            lambda: Embeddings(
                config.vocab_size, size, config.max_position_embeddings, config.pad_token_id
            ),
            untie == "input_output",
        )
        whole_blocks = untie in ("transformer", "transformer_output")
        self.layers = nn.ModuleList(
            build_per_domain(lambda layer=layer: build_block(layer), whole_blocks)
            for layer in range(config.num_hidden_layers)
        )
        self.final_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token table; with one per domain, the selected domain's, else the first."""
        return get_selected_expert(self.embeddings).tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token table, which `get_input_embeddings` returns, by `value`."""
        get_selected_expert(self.embeddings).tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **more: object,
    ) -> BaseModelOutputWithPast | tuple:
        """Compute hidden states after the final norm [B, L, D].

        Args:
            input_ids: [B, L] int64; or `inputs_embeds` in their place.
            attention_mask: [B, S] nonzero at real tokens, S = cached + L; without it (and without
                position_ids) padding is recognised by its id. Or [B, 1, L, S] bool with
                position_ids, True where attention is allowed.
            position_ids: [B, L], the first position being 0. Passed without a mask they promise
                that nothing is padded, which spares the search for padding.
            past_key_values: cache of earlier tokens, extended in place.
            inputs_embeds: [B, L, D] rows of the embedding table, in place of input_ids.
            use_cache: True: make a cache if there is none; False: do not return one. With gradient
                checkpointing, training neither reads nor makes one.
            output_hidden_states: None: as the configuration says.
        Returns:
            the states and the cache; with output_hidden_states also the states before each block
            and the final ones. A tuple if `return_dict` is False.
        Raises:
            ValueError: if there are not either ids or embeddings, if there are more tokens than
                positions, for a cache of fixed size, or if the model does not take an argument of
                `more`.
        """
        check_extra_arguments(self, more)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        checkpoints = self.gradient_checkpointing and self.training
        if checkpoints:
            past_key_values = None
        elif use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if getattr(past_key_values, "is_compileable", False):
            raise ValueError(
                f"{type(past_key_values).__name__} has a fixed size, which is not supported; leave "
                "cache_implementation out, or give a DynamicCache"
            )
        cached_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        batch, length = tokens.shape[:2]
        if (
            attention_mask is None
            and position_ids is None
            and cached_length == 0
            and input_ids is not None
        ):
            real = input_ids != self.config.pad_token_id
            attention_mask = None if bool(real.all()) else real
        if position_ids is None and attention_mask is not None:
            position_ids = compute_positions(attention_mask)[:, cached_length:]
        elif position_ids is None:
            position_ids = torch.arange(cached_length, cached_length + length, device=tokens.device)
            position_ids = position_ids.expand(batch, length)
        check_positions(position_ids, cached_length + length, self.config.max_position_embeddings)
        mask = self._make_mask(attention_mask, tokens, cached_length)

        x = self.embeddings(tokens, position_ids)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states = [x] if output_hidden_states else None
        for layer in self.layers:
            if checkpoints:
                x = self._gradient_checkpointing_func(layer.__call__, x, mask)
            else:
                x = layer(x, mask, past_key_values)
            if states is not None:
                states.append(x)
        x = self.final_norm(x)
        if states is not None:
            states[-1] = x
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache is not False else None,
            hidden_states=tuple(states) if states is not None else None,
        )
        return format_output(self, output, return_dict)

    @staticmethod
    def _make_mask(
        attention_mask: Tensor | None, tokens: Tensor, cached_length: int
    ) -> Tensor | None:
        """Make the attention mask [B, 1, L, S] bool; None for causal attention without a cache.

        Args:
            attention_mask: [B, S] nonzero at real tokens, S = cached + L; or [B, 1, L, S], which is
                returned as it is; or None.
            tokens: ids [B, L] or embeddings [B, L, D], for the shape.
            cached_length: tokens in the cache.
        """
        if attention_mask is None and cached_length == 0:
            return None
        if attention_mask is not None and attention_mask.dim() == 4:
            return attention_mask
        batch, length = tokens.shape[:2]
        if attention_mask is None:
            attention_mask = torch.ones(batch, cached_length + length, device=tokens.device)
        return make_causal_mask(attention_mask, length)
