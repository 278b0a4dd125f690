"""Encoding of a multiplexed batch: embeddings, multiplexer, and the layers of the encoder.

With `unmixed_layers` K of the configuration the first K layers run on each instance by itself and
the multiplexer mixes their states, not embeddings. A group then costs K N + L - K layers in place
of L.
"""

from megamod_kernels.dispatch import uses_triton
from megamod_kernels.mux import multiplex
from megamod_kernels.norm_linear import uses_kernels
from torch import Tensor

from megamod.models.mux.types import MixedStates, PreparedBatch
from megamod.nn.demultiplexer import RsaDemultiplexer
from megamod.nn.encoder import EncoderEmbeddings
from megamod.nn.linear import are_standard_layers
from megamod.nn.multiplexer import MULTIPLEXERS, multiplex_contextual, multiplex_contextual_v1


class MuxEncoding:
    """Methods of `MuxPreTrainedModel` from prepared ids to mixed states."""

    def encode(
        self,
        batch: PreparedBatch,
        queries: int | None = None,
        embeddings: EncoderEmbeddings | None = None,
    ) -> MixedStates:
        """Embed, multiplex and encode a batch, the result of `prepare_batch`.

        Args:
            queries: number of first columns to compute; None for all.
            embeddings: used in place of the model's own; None: its own.
        Returns:
            [B, queries or T, D], the last norm pending if the kernels of RSA apply it.
        """
        embeddings = embeddings or self.backbone.embeddings
        if self.config.unmixed_layers:
            return self._encode_after_unmixed_layers(batch, queries, embeddings)
        mask, attended = self._make_encoder_mask(batch), None
        instance_positions, mixed_positions = self._select_positions(batch)
        table, kernels = embeddings.word_embeddings.weight, self.config.kernels
        keyed_mean = MULTIPLEXERS[self.config.muxing_variant].mix is multiplex
        if keyed_mean and uses_triton(kernels, table) and embeddings.has_standard_layers():
            inputs = (batch.ids, self.instance_embedding, batch.token_type_ids)
            inputs += (instance_positions, mixed_positions)
            if kernels == "triton" and self._first_block_takes_embeddings(queries):
                block = self.backbone.encoder.layer[0]
                mixed, attended = embeddings.embed_with_attention(*inputs, block, mask, kernels)
            else:
                mixed = embeddings.embed_multiplexed(*inputs, kernels)
        else:
            x = embeddings(batch.ids, batch.token_type_ids, instance_positions)
            mixed = self._multiplex(x.unflatten(0, (-1, self.config.num_instances)), batch.mask)
            mixed = embeddings(mixed, None, mixed_positions)
        return self._encode_mixed(self.backbone.project(mixed), mask, queries, attended)

    def _encode_after_unmixed_layers(
        self, batch: PreparedBatch, queries: int | None, embeddings: EncoderEmbeddings
    ) -> MixedStates:
        """Run the first layers on each instance by itself, multiplex, and run the other layers.

        Positions belong to the instances, and padding is masked until they are mixed, as in a stock
        encoder. Arguments and result as in `encode`.
        """
        positions, _ = self._select_positions(batch)
        x = self.backbone.project(embeddings(batch.ids, batch.token_type_ids, positions))
        mask = self._make_instance_mask(batch)
        first, encoder = self.config.unmixed_layers, self.backbone.encoder
        x = encoder(x, None if mask is None else mask[:, None, None], stop=first)
        mixed = self._multiplex(x.unflatten(0, (-1, self.config.num_instances)), batch.mask)
        mask = self._make_encoder_mask(batch)
        return self._encode_mixed(self.mixing_norm(mixed), mask, queries, start=first)

    def _encode_mixed(
        self,
        x: Tensor,
        mask: Tensor | None,
        queries: int | None,
        attended: Tensor | None = None,
        start: int = 0,
    ) -> MixedStates:
        """Run the layers from number `start` on: x [B, T, D] -> [B, queries or T, D].

        Arguments as in `Encoder.forward`. The last norm is left pending if the kernels of RSA apply
        it.
        """
        encoder = self.backbone.encoder
        rsa = isinstance(getattr(self, "demultiplexer", None), RsaDemultiplexer)
        if rsa and uses_kernels(self.config.kernels, x):
            states = encoder(x, mask, queries, attended, norm=False, start=start)
            return MixedStates(states, encoder.layer[-1].output["LayerNorm"])
        return MixedStates(encoder(x, mask, queries, attended, start=start))

    def _select_positions(self, batch: PreparedBatch) -> tuple[Tensor | None, Tensor | None]:
        """Return the positions of the instances and of the mixed sequence, None: consecutive.

        Those in the batch are of the instances if `sees_segments`, else of the mixed sequence.
        """
        return (batch.position_ids, None) if self.sees_segments else (None, batch.position_ids)

    def _first_block_takes_embeddings(self, queries: int | None) -> bool:
        """Return True if `embed_with_attention` can run the first block.

        It needs standard layers, embeddings of the hidden size, and all columns: `queries` is None,
        or a later block selects them.
        """
        backbone, layers = self.backbone, self.backbone.encoder.layer
        narrow = hasattr(backbone, "embeddings_project")
        standard = are_standard_layers(*layers[0].attention["self"].values())
        return not narrow and standard and (queries is None or len(layers) > 1)

    def _multiplex(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Multiplex embeddings x [B, N, T, D] by the configured variant; returns [B, T, D].

        `mask` [B * N, T] is the attention mask or None; only gaussian_attention_v2 uses it.
        """
        variant, key = self.config.muxing_variant, self.instance_embedding
        if variant == "gaussian_attention_v2":
            blocks = (self.muxing_attention, self.muxing_attention_2)
            mask_arguments = (mask, self.masks_instances, self.config.kernels)
            return multiplex_contextual(x, key, *blocks, *mask_arguments)
        if variant == "gaussian_attention":
            modules = (self.muxing_attention, self.cross_instances_linear)
            return multiplex_contextual_v1(x, key, *modules, self.cross_instances_layernorm)
        return MULTIPLEXERS[variant].mix(x, key, self.config.kernels)

    def _make_encoder_mask(self, batch: PreparedBatch) -> Tensor | None:
        """Make a mask of keys, bool [B, 1, 1, T], False where all instances are padding.

        None if the batch has no mask, or the model attends to padding.
        """
        mask = self._make_instance_mask(batch) if self.config.mask_padding else None
        if mask is None:
            return None
        by_group = mask.view(-1, self.config.num_instances, mask.shape[1])
        return by_group.any(1)[:, None, None, :]

    def _make_instance_mask(self, batch: PreparedBatch) -> Tensor | None:
        """Make a mask of tokens, bool [B * N, T], False at padding; None if the batch has none."""
        if batch.mask is None:
            return None
        mask = batch.mask != 0
        if length := self.config.prefix_length:
            mask = self._prepend_prefix(mask.new_ones(len(mask), length), mask)
        return mask
