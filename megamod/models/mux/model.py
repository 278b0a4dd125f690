"""Multiplexed encoder: from ids of B * N rows to mixed hidden states.

Row r of a batch is instance r % N of group r // N; a group shares one pass through the encoder.
Parameters have the names of the published checkpoints, with shared modules named once.

Source: Murahari et al. 2023 (MUX-PLM), and its release for details the paper does not give.
"""

from typing import ClassVar

import torch
from megamod_kernels.demux import Pairs
from torch import Tensor, nn
from torch.nn import functional as F

from megamod.models.mux.configuration import MuxConfig
from megamod.models.mux.encoding import MuxEncoding
from megamod.models.mux.types import MixedStates, MuxOutput, PreparedBatch
from megamod.models.mux.vocabulary import VocabularyAccess
from megamod.models.pretrained import CheckedLoading
from megamod.nn.demultiplexer import PrefixDemultiplexer, RsaDemultiplexer, SharedRsaLayers
from megamod.nn.encoder import (
    EncoderLayer,
    EncoderModel,
    initialise_weights,
    was_loaded_from_file,
)
from megamod.nn.multiplexer import compute_key_shape, draw_keys
from megamod.nn.retrieval import (
    IGNORED,
    PrefixRetrievalHead,
    RetrievalHead,
    build_retrieval_pairs,
    draw_retrieved_instances,
    score_tokens,
    select_retrieval_targets,
)


class MuxPreTrainedModel(MuxEncoding, VocabularyAccess, CheckedLoading):
    """Embeddings, multiplexer, encoder and demultiplexer.

    Class attributes are the settings of a family or a head:
        base_model_prefix: attribute that holds the encoder; weights of a bare stock encoder are
            loaded into it.
        pretraining: a prefix replaces the last tokens.
        sees_segments: token types and positions belong to the tokens. In the release classifiers
            ignore token types, and apply positions to the mixed sequence.
        overwrites_cls: column 0 of an RSA model always holds `cls_token_id`.
        masks_instances: the contextual multiplexer masks padding among instances.
        ties_vocabulary: the retrieval head's matrix is that of the word embeddings.
        residual_retrieval: the retrieval head adds its input and uses all layers (ELECTRA).
        retrieval_start: first column of an RSA model with a retrieval target.
        retrieves_padding: padding is a target of retrieval.
        takes_prefix_with_context: a prefix goes with the multiplexer gaussian_attention_v2.
        multiplexers_of_others: values of `muxing_variant` that only other classes have.
    With `own_embeddings` False the embeddings are passed to `encode`.
    Raises ValueError for a multiplexer that the class does not have, alone or with a prefix.
    """

    config: MuxConfig
    base_model_prefix = "bert"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("EncoderLayer",)
    # A checkpoint may hold parts of pretraining or of another task, which this model lacks.
    _keys_to_ignore_on_load_unexpected = (r"position_ids$", r"^retrieval_head\.")

    pretraining: ClassVar[bool] = False
    sees_segments: ClassVar[bool] = False
    overwrites_cls: ClassVar[bool] = True
    masks_instances: ClassVar[bool] = False
    ties_vocabulary: ClassVar[bool] = True
    residual_retrieval: ClassVar[bool] = False
    retrieval_start: ClassVar[int] = 0
    retrieves_padding: ClassVar[bool] = False
    takes_prefix_with_context: ClassVar[bool] = False
    multiplexers_of_others: ClassVar[tuple[str, ...]] = ("gaussian_attention",)

    def __init__(self, config: MuxConfig, own_embeddings: bool = True):
        super().__init__(config)
        variant, N = config.muxing_variant, config.num_instances
        width = config.mixed_size
        if variant in self.multiplexers_of_others:
            raise ValueError(f"muxing_variant {variant!r} is not one of {type(self).__name__}")
        contextual = variant == "gaussian_attention_v2"
        if contextual and config.prefix_length and not self.takes_prefix_with_context:
            raise ValueError(
                f"{type(self).__name__}: gaussian_attention_v2 needs demuxing_variant 'index_pos'"
            )
        self.add_module(self.base_model_prefix, EncoderModel(config, own_embeddings))
        self.instance_embedding = nn.Parameter(
            torch.empty(compute_key_shape(variant, N, width)),
            requires_grad=bool(config.learn_muxing),
        )
        if config.unmixed_layers:
            self.mixing_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        if variant.startswith("gaussian_attention"):
            self.muxing_attention = EncoderLayer(config, width)
        if contextual:
            self.muxing_attention_2 = EncoderLayer(config, width)
        if variant == "gaussian_attention":
            self.cross_instances_linear = nn.Linear(width, width)
            self.cross_instances_layernorm = nn.LayerNorm(width)

    @classmethod
    def from_pretrained(cls, *args: object, **kwargs: object) -> "MuxPreTrainedModel | tuple":
        """Load as `CheckedLoading`; freeze `instance_embedding` again unless `learn_muxing`.

        Arguments are those of `PreTrainedModel.from_pretrained`.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        # Loading creates new parameters, all of them trainable.
        for module in (loaded[0] if isinstance(loaded, tuple) else loaded).modules():
            if isinstance(module, MuxPreTrainedModel):
                module.instance_embedding.requires_grad_(bool(module.config.learn_muxing))
        return loaded

    @property
    def accepts_loss_kwargs(self) -> bool:
        """False with a retrieval loss, as Trainer's count of labels is not that of its items."""
        return self.config.retrieval_loss_coeff == 0

    @property
    def backbone(self) -> EncoderModel:
        """Module with embeddings and encoder; its attribute is `base_model_prefix`."""
        return getattr(self, self.base_model_prefix)

    def add_demultiplexer(self) -> None:
        """Create `demultiplexer`, and for RSA `demux_module` with the layers that it shares."""
        config = self.config
        size, eps = config.hidden_size, config.layer_norm_eps
        if config.demuxing_variant == "index_pos":
            self.demux_module = SharedRsaLayers(
                config.num_instances, size, config.num_hidden_demux_layers, eps
            )
            self.demultiplexer = RsaDemultiplexer(size, eps, config.hidden_dropout_prob)
        else:
            self.demultiplexer = PrefixDemultiplexer(size, eps)

    def add_retrieval_head_if_used(self) -> None:
        """Create the retrieval head, unless its loss has coefficient 0."""
        if self.config.retrieval_loss_coeff > 0:
            self.add_retrieval_head()

    def add_retrieval_head(self) -> None:
        """Create `retrieval_head`, and `demux_module` for RSA; tie its matrix if settings do."""
        config = self.config
        if config.tie_word_embeddings and self.ties_vocabulary:
            source = f"{self.base_model_prefix}.embeddings.word_embeddings.weight"
            self._tied_weights_keys = {"retrieval_head.decoder.weight": source}
        size, eps = config.hidden_size, config.layer_norm_eps
        if config.demuxing_variant == "index":
            self.retrieval_head = PrefixRetrievalHead(size, config.vocab_size, eps)
            return
        if not hasattr(self, "demux_module"):
            self.demux_module = SharedRsaLayers(
                config.num_instances, size, config.num_hidden_demux_layers, eps
            )
        layers = config.num_hidden_demux_layers if self.residual_retrieval else 2
        self.retrieval_head = RetrievalHead(
            size, config.vocab_size, eps, layers, self.residual_retrieval
        )

    def prepare_ids(self, input_ids: Tensor) -> Tensor:
        """Prepare ids to embed: with column 0 overwritten, or with a prefix.

        Args:
            input_ids: [B * N, S] of whole groups; not changed.
        Returns:
            [B * N, T]; T is S, or S + N + 1 for classifiers with a prefix.
        Raises:
            ValueError: in pretraining, if a prefix would leave no token.
        """
        config, length = self.config, self.config.prefix_length
        if not length:
            if not self.overwrites_cls:
                return input_ids
            ids = input_ids.clone()
            ids[:, 0] = config.cls_token_id
            return ids
        N = config.num_instances
        instance = torch.arange(N, device=input_ids.device)
        prefix = input_ids.new_full((N, N + 1), config.prefix_fill_token_id)
        prefix[instance, instance] = config.prefix_first_token_id - instance
        prefix[:, N] = config.cls_token_id
        return self._prepend_prefix(prefix.repeat(len(input_ids) // N, 1), input_ids)

    def prepare_batch(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> PreparedBatch:
        """Fill up the last group with copies of rows, add prefixes, and check the length.

        Args:
            input_ids, attention_mask, token_type_ids: [R, S], the last two may be None; token types
                are dropped if neither the class nor the configuration uses them.
            position_ids: see the class's `forward`.
        Raises:
            ValueError: for a batch that is missing, empty or too long, or too short for a prefix.
        """
        if input_ids is None:
            raise ValueError(f"{type(self).__name__} needs input_ids")
        N, rows = self.config.num_instances, len(input_ids)
        if not rows:
            raise ValueError("the batch has no rows")
        if rows % N:
            order = torch.arange(-(-rows // N) * N, device=input_ids.device)
            if self.config.filler == "random":
                order[rows:] = torch.randint(rows, (len(order) - rows,), device=order.device)
            order %= rows
            input_ids, attention_mask, token_type_ids = (
                field[order] if field is not None else None
                for field in (input_ids, attention_mask, token_type_ids)
            )
            if self.sees_segments and position_ids is not None and len(position_ids) == rows:
                position_ids = position_ids[order]
        if not (self.sees_segments or self.config.use_token_type_ids):
            token_type_ids = None
        ids = self.prepare_ids(input_ids)
        added = ids.shape[1] - input_ids.shape[1]
        if added and token_type_ids is not None:
            token_type_ids = F.pad(token_type_ids, (added, 0))
        room = self.config.max_position_embeddings - self.config.first_position
        if ids.shape[1] > room:
            after = f" after a prefix of {added}" if added else ""
            raise ValueError(
                f"{input_ids.shape[1]} tokens{after} need more than the {room} positions of "
                f"max_position_embeddings {self.config.max_position_embeddings}"
            )
        return PreparedBatch(rows, ids, attention_mask, token_type_ids, position_ids)

    def demultiplex(
        self, hidden: MixedStates, columns: slice, pairs: Pairs | None = None
    ) -> Tensor:
        """Compute states of instances: [B, N, columns, D], or with R pairs only those, [R, D].

        `hidden` are states [B, T, D] of the encoder. `columns` and positions of pairs count all
        columns, the prefix included.
        """
        if self.config.prefix_length:
            return self.demultiplexer(
                hidden.apply_norm(), self.config.num_instances, columns, pairs
            )
        states = hidden.states if pairs is not None else hidden.states[:, columns]
        inputs = (states, pairs, self.config.kernels, hidden.norm)
        return self.demultiplexer(self.demux_module, *inputs)

    def compute_vocabulary_states(self, hidden: MixedStates, pairs: Pairs | None) -> Tensor:
        """Compute inputs of the retrieval head's decoder: [R, D] for pairs, else [B, N, T, D]."""
        if self.config.prefix_length:
            return self.retrieval_head(hidden.apply_norm(), self.config.num_instances, pairs)
        return self.retrieval_head(self.demux_module, hidden.apply_norm(), pairs)

    def add_retrieval_loss(
        self,
        output: MuxOutput,
        hidden: MixedStates,
        ids: Tensor,
        retrieved_instances: Tensor | None,
        num_items: Tensor | float | None,
    ) -> None:
        """Add the loss of retrieving one token per mixed position to the output of a batch.

        Args:
            output: gets `retrieval_loss`, `retrieval_correct` and `retrieval_count`, in place.
            hidden: states [B, T, D].
            ids: [B * N, T] as embedded.
            retrieved_instances: [B, T], instance of each position; None to draw them.
            num_items: divisor of the summed loss; None for the number of targets.
        Raises:
            ValueError: if the model has no retrieval head.
        """
        if not hasattr(self, "retrieval_head"):
            raise ValueError(
                "retrieval_loss_coeff was 0 when this model was made, so it has no retrieval head"
            )
        config = self.config
        start = config.prefix_length or self.retrieval_start
        groups, length = hidden.states.shape[:2]
        if retrieved_instances is None:
            retrieved_instances = draw_retrieved_instances(
                groups, length, config.num_instances, start, ids.device
            )
        sampled = None
        if not self.retrieves_padding and config.retrieval_percentage < 1:
            drawn = torch.rand(retrieved_instances.shape, device=ids.device)
            sampled = drawn < config.retrieval_percentage
        padding = None if self.retrieves_padding else config.pad_token_id
        targets = select_retrieval_targets(
            ids, retrieved_instances, first_column=start, ignored_id=padding, sampled=sampled
        )
        total, correct = self._score_retrieval(hidden, retrieved_instances, targets)
        count = (targets != IGNORED).sum()
        output["retrieval_loss"] = total / (count.clamp(min=1) if num_items is None else num_items)
        output["retrieval_correct"], output["retrieval_count"] = correct, count

    def combine_losses(
        self, task_loss: Tensor | None, retrieval_loss: Tensor | None
    ) -> Tensor | None:
        """Sum the losses that are not None, times their coefficients; None if both are None."""
        terms = (
            (self.config.task_loss_coeff, task_loss),
            (self.config.retrieval_loss_coeff, retrieval_loss),
        )
        weighted = [weight * term for weight, term in terms if term is not None]
        return sum(weighted[1:], weighted[0]) if weighted else None

    def _score_retrieval(
        self, hidden: MixedStates, retrieved_instances: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the summed retrieval loss (nats) and the number of correct tokens, scalars.

        `hidden` are states [B, T, D]; `retrieved_instances` [B, T] is the instance of each
        position, and `targets` [B, T] its token, -100 where there is none.
        """
        has_target = targets != IGNORED
        states = self.compute_vocabulary_states(
            hidden, build_retrieval_pairs(retrieved_instances, has_target)
        )
        decoder, labels = self.retrieval_head.decoder, targets[has_target]
        return score_tokens(states, decoder, labels, return_logits=not self.training)[:2]

    def _prepend_prefix(self, prefix: Tensor, tokens: Tensor) -> Tensor:
        """Prepend a prefix [B * N, P] to `tokens` [B * N, S], which are ids or a mask.

        In pretraining drop as many last columns. Raise ValueError if no token would remain.
        """
        if not self.pretraining:
            return torch.cat([prefix, tokens], 1)
        kept_columns = tokens.shape[1] - prefix.shape[1]
        if kept_columns < 1:
            raise ValueError(
                f"{tokens.shape[1]} tokens leave no room for a prefix of {prefix.shape[1]}"
            )
        return torch.cat([prefix, tokens[:, :kept_columns]], 1)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """Initialise a module as transformers does for its own classes; the flag has no effect."""
        # For classes outside transformers a module is skipped once all of its own parameters are
        # loaded, and the keys are the model's own.
        super()._initialize_weights(module, is_custom_code=False)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a module as BERT does, and draw its keys, from torch's global generator."""
        initialise_weights(module, self.config.initializer_range)
        if isinstance(module, SharedRsaLayers):
            nn.init.normal_(module.demux_instance_embedding)
        elif isinstance(module, MuxPreTrainedModel):
            key = module.instance_embedding
            if not was_loaded_from_file(key):
                config = module.config
                sizes = (config.num_instances, key.shape[-1])
                norm, epsilon = config.gaussian_hadamard_norm, config.binary_hadamard_epsilon
                key.copy_(draw_keys(config.muxing_variant, *sizes, norm=norm, epsilon=epsilon))
