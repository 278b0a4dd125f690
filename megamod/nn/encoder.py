"""Encoder of BERT, ELECTRA and RoBERTa: embeddings and post-norm blocks.

Parameters have the names of the published checkpoints (`attention.self.query`, ...).
"""

import torch
from megamod_kernels.mux_attention import mux_attention
from megamod_kernels.mux_embed import Tables, mux_embed
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from megamod.nn.linear import Linear, are_standard_layers

MASKED = -10000.0  # added to the scores of masked keys, as in BERT; finite, so all may be masked


class EncoderEmbeddings(nn.Module):
    """LN(word + segment + position), then dropout; vectors of `size` features.

    Args:
        config: its `first_position` is the row of the first token's position.
        size: features D.
    """

    def __init__(self, config: PreTrainedConfig, size: int):
        super().__init__()
        self.first_position = config.first_position
        # RoBERTa's table of positions has a row for padding; its positions start after it.
        position_padding_id = config.pad_token_id if config.first_position else None
        self.word_embeddings = nn.Embedding(
            config.vocab_size, size, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(
            config.max_position_embeddings, size, padding_idx=position_padding_id
        )
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        ids_or_vectors: Tensor,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Embed tokens, or vectors in their place.

        Args:
            ids_or_vectors: ids [R, T], or vectors [R, T, D].
            token_type_ids: [R, T]; None for segment 0 everywhere.
            position_ids: [R, T] or [1, T] rows of the position table; None for consecutive ones.
        Returns:
            [R, T, D].
        """
        if not are_standard_layers(self.position_embeddings, self.token_type_embeddings):
            if position_ids is None:
                last = self.first_position + ids_or_vectors.shape[1]
                position_ids = torch.arange(
                    self.first_position, last, device=ids_or_vectors.device
                )[None]
            if token_type_ids is None:
                token_type_ids = torch.zeros_like(position_ids)
        if position_ids is None:
            start, table = self.first_position, self.position_embeddings.weight
            added = table[start : start + ids_or_vectors.shape[1]]
        else:
            added = self.position_embeddings(position_ids)
        if token_type_ids is None:
            added = added + self.token_type_embeddings.weight[0]
        else:
            added = added + self.token_type_embeddings(token_type_ids)
        vectors = (
            ids_or_vectors
            if ids_or_vectors.is_floating_point()
            else self.word_embeddings(ids_or_vectors)
        )
        return self.dropout(self.LayerNorm(vectors + added))

    def embed_multiplexed(
        self,
        ids: Tensor,
        key: Tensor,
        token_type_ids: Tensor | None,
        instance_positions: Tensor | None,
        mixed_positions: Tensor | None,
        implementation: str,
    ) -> Tensor:
        """Embed instances, multiplex them, and embed the result: one operation, `mux_embed`.

        Args:
            ids: [B * N, T].
            key: [N, D].
            token_type_ids: [B * N, T].
            instance_positions, mixed_positions: positions of instances, [B * N, T] or [1, T], and
                of the multiplexed sequence, [B, T] or [1, T]; None for consecutive ones.
            implementation: implementation of the kernel: "triton", "reference" or "auto".
        Returns:
            [B, T, D].
        """
        dropout = self.dropout.p if self.training else 0.0
        inputs = (
            ids,
            key,
            self._collect_tables(),
            token_type_ids,
            instance_positions,
            mixed_positions,
        )
        return mux_embed(*inputs, dropout, implementation)

    def embed_with_attention(
        self,
        ids: Tensor,
        key: Tensor,
        token_type_ids: Tensor | None,
        instance_positions: Tensor | None,
        mixed_positions: Tensor | None,
        block: "EncoderLayer",
        mask: Tensor | None,
        implementation: str,
    ) -> tuple[Tensor, Tensor]:
        """Run `embed_multiplexed` and the attention of the first block as one operation.

        Args:
            ids, key, token_type_ids, instance_positions, mixed_positions, implementation: as in
                `embed_multiplexed`.
            block: the first block.
            mask: as in `EncoderLayer.attend`.
        Returns:
            the result of `embed_multiplexed`, and `attended` for the block; both [B, T, D].
        """
        projections = [
            (block.attention["self"][name].weight, block.attention["self"][name].bias)
            for name in ("query", "key", "value")
        ]
        attended, x = mux_attention(
            ids,
            key,
            self._collect_tables(),
            projections,
            block.heads,
            token_type_ids,
            instance_positions,
            mixed_positions,
            mask,
            self.dropout.p if self.training else 0.0,
            block.attention_dropout if block.training else 0.0,
            implementation,
        )
        return x, attended

    def has_standard_layers(self) -> bool:
        """Return True if kernels may use the tables and the norm without calling modules."""
        tables = (self.word_embeddings, self.position_embeddings, self.token_type_embeddings)
        return are_standard_layers(*tables, self.LayerNorm)

    def _collect_tables(self) -> Tables:
        """Collect the embedding tables, the norm and the padding ids for the kernels."""
        return Tables(
            self.word_embeddings.weight,
            self.position_embeddings.weight,
            self.token_type_embeddings.weight,
            self.LayerNorm.weight,
            self.LayerNorm.bias,
            self.LayerNorm.eps,
            self.first_position,
            self.word_embeddings.padding_idx,
            self.position_embeddings.padding_idx,
        )


class EncoderLayer(nn.Module):
    """x = LN(x + Attention(x)), then LN(x + FeedForward(x)): the post-norm block of BERT.

    Args:
        size: features D; None: the hidden size of `config`.
    Source: Devlin et al. 2019; Vaswani et al. 2017, sections 3.1 to 3.3; the exact (erf) GELU.
    """

    def __init__(self, config: PreTrainedConfig, size: int | None = None):
        super().__init__()
        size, eps = size or config.hidden_size, config.layer_norm_eps
        self.heads = config.num_attention_heads
        self.attention_dropout = config.attention_probs_dropout_prob
        projections = {name: Linear(size, size) for name in ("query", "key", "value")}
        self.attention = nn.ModuleDict(
            {
                "self": nn.ModuleDict(projections),
                "output": _make_output_layers(Linear(size, size), eps),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": Linear(size, config.intermediate_size)})
        self.output = _make_output_layers(Linear(config.intermediate_size, size), eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        queries: int | None = None,
        attended: Tensor | None = None,
        norm: bool = True,
    ) -> Tensor:
        """Apply the block: [B, L, D] -> [B, queries or L, D].

        Args:
            x, mask, queries: as in `attend`.
            attended: output of the attention heads on x [B, L, D], if it is computed already;
                `mask` and `queries` are then not used, and all L positions returned.
            norm: False leaves the final LayerNorm to the caller.
        """
        if attended is None:
            x = self.attend(x, mask, queries)
        else:
            x = self._apply_output_layers(self.attention["output"], attended, x)
        return self.apply_feed_forward(x, norm=norm)

    def attend(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        queries: int | None = None,
        conditions: tuple[Tensor, ...] = (),
    ) -> Tensor:
        """Apply attention, residual and norm: the first half of the block.

        Args:
            x: [B, L, D].
            mask: broadcastable to [B, 1, L, L] over queries and keys: bool, True where a key is
                seen, or float, added to the scores; None if all see all.
            queries: compute this many first positions only; they still attend to all of x.
            conditions: further arguments of the norm.
        Returns:
            [B, queries or L, D].
        """
        project = self.attention["self"]
        query_states = x if queries is None else x[:, :queries]
        query, key, value = (
            project[name](states).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, L, K]
            for name, states in (("query", query_states), ("key", x), ("value", x))
        )
        if mask is not None and queries is not None and mask.shape[-2] > 1:
            mask = mask[..., :queries, :]
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask if mask is None or mask.dtype == torch.bool else mask.to(query.dtype),
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        mixed = mixed.transpose(1, 2).flatten(2)
        return self._apply_output_layers(self.attention["output"], mixed, query_states, conditions)

    def apply_feed_forward(
        self, x: Tensor, conditions: tuple[Tensor, ...] = (), norm: bool = True
    ) -> Tensor:
        """Apply feed-forward, residual and norm, the second half of the block, to x [B, L, D].

        Args:
            conditions: further arguments of the norm.
            norm: False leaves the norm to the caller.
        Returns:
            [B, L, D].
        """
        update = F.gelu(self.intermediate["dense"](x))
        return self._apply_output_layers(self.output, update, x, conditions, norm)

    def _apply_output_layers(
        self,
        modules: nn.ModuleDict,
        update: Tensor,
        x: Tensor,
        conditions: tuple[Tensor, ...] = (),
        norm: bool = True,
    ) -> Tensor:
        """End a half of the block: dense layer and dropout on `update`, plus x, then the norm.

        Args:
            modules: the "dense" layer and the "LayerNorm".
            update: [B, L, K], inputs of the dense layer.
            x: [B, L, D].
            conditions: further arguments of the norm.
            norm: False leaves the norm to the caller.
        """
        total = self.dropout(modules["dense"](update)) + x
        return modules["LayerNorm"](total, *conditions) if norm else total


class Encoder(nn.Module):
    """Stack of blocks, with gradient checkpointing in training if it is switched on."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.layer = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        queries: int | None = None,
        attended: Tensor | None = None,
        norm: bool = True,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """Apply the blocks `start` to `stop` - 1, by default all: x [B, L, D] -> the same.

        Arguments as in `EncoderLayer.forward`: `mask` of all blocks, `attended` of the first block,
        `queries` and `norm` of the last of the encoder, with which the result is [B, queries or L,
        D].
        """
        for number, layer in enumerate(self.layer[start:stop], start):
            last = number == len(self.layer) - 1
            inputs = (x, mask, queries if last else None, attended, norm or not last)
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer.__call__, *inputs)
            else:
                x = layer(*inputs)
            attended = None
        return x


class EncoderModel(nn.Module):
    """Embeddings, their projection where they are narrower, and blocks.

    Args:
        config: configuration of an encoder.
        own_embeddings: False: there are no embeddings here, the caller uses another model's.
    """

    def __init__(self, config: PreTrainedConfig, own_embeddings: bool = True):
        super().__init__()
        size = getattr(config, "embedding_size", config.hidden_size)
        if own_embeddings:
            self.embeddings = EncoderEmbeddings(config, size)
        if size != config.hidden_size:
            self.embeddings_project = nn.Linear(size, config.hidden_size)
        self.encoder = Encoder(config)

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode embeddings x [B, L, D'] to states [B, L, D]; `mask` as in `Encoder.forward`."""
        return self.encoder(self.project(x), mask)

    def project(self, x: Tensor) -> Tensor:
        """Project embeddings x [B, L, D'] to the hidden size: [B, L, D].

        D' is the size of the embeddings; if it is D, x is returned as it is.
        """
        return self.embeddings_project(x) if hasattr(self, "embeddings_project") else x


def make_key_mask(attention_mask: Tensor) -> Tensor:
    """Make an additive mask of attention scores, float [R, 1, 1, L]: -10000 at padding, else 0.

    `attention_mask` [R, L] is nonzero at real tokens.
    """
    return (attention_mask == 0)[:, None, None, :] * MASKED


def compute_padding_aware_positions(input_ids: Tensor, pad_token_id: int) -> Tensor:
    """Compute rows of RoBERTa's position table, [R, T], not counting padding.

    The first token of `input_ids` [R, T] has row pad_token_id + 1, padding has row pad_token_id.
    """
    is_token = (input_ids != pad_token_id).long()
    return is_token.cumsum(1) * is_token + pad_token_id


def initialise_weights(module: nn.Module, standard_deviation: float) -> None:
    """Initialise one module in place as BERT does, without its children.

    Random weights are normal with mean 0 and `standard_deviation`, from torch's global generator.
    Layers of `mark_default_initialisation` keep torch's own initialisation. The embedding of
    padding is 0. Within `from_pretrained`, weights loaded from a file do not change.
    """
    if isinstance(module, nn.Linear):
        if getattr(module, "default_initialisation", False):
            module.reset_parameters()
            return
        nn.init.normal_(module.weight, std=standard_deviation)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=standard_deviation)
        if module.padding_idx is not None and not was_loaded_from_file(module.weight):
            nn.init.zeros_(module.weight[module.padding_idx])
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def mark_default_initialisation(linear: nn.Linear) -> nn.Linear:
    """Mark the layer `linear`, in place, to keep torch's initialisation; return it.

    Sets the attribute `default_initialisation`, which `initialise_weights` reads. MUX-ELECTRA marks
    the layers that its release leaves at torch's initialisation.
    """
    linear.default_initialisation = True
    return linear


def was_loaded_from_file(parameter: Tensor) -> bool:
    """Return True inside `from_pretrained` if the module's weights came from a file."""
    return getattr(parameter, "_is_hf_initialized", False)


def _make_output_layers(dense: nn.Linear, eps: float) -> nn.ModuleDict:
    """Make the dense layer and LayerNorm that end a half of a block."""
    norm = nn.LayerNorm(dense.out_features, eps=eps)
    return nn.ModuleDict({"dense": dense, "LayerNorm": norm})
