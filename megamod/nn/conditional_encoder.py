"""Encoder of CA-MTL: BERT blocks conditioned on the task of each row.

Source: Pilault et al. 2021 (CA-MTL), section 2 and figure 2; names and order of its release.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from megamod.nn.conditioning import (
    Adapter,
    Bottleneck,
    ConditionalLayerNorm,
    Film,
    compute_block_bias,
    compute_block_shape,
)
from megamod.nn.encoder import EncoderLayer


class ConditionalLayer(EncoderLayer):
    """BERT's block with conditional attention.

    Args:
        config: configuration of CA-MTL.
        norms: condition the LayerNorms too.
        adapter: end the block with an adapter.
    """

    def __init__(self, config: PreTrainedConfig, norms: bool, adapter: bool = False):
        super().__init__(config)
        size, eps, length = config.hidden_size, config.layer_norm_eps, config.max_seq_length
        _, width = compute_block_shape(size, length)
        attention = self.attention["self"]
        attention.register_parameter(
            "random_weight_matrix", nn.Parameter(torch.zeros(length, width))
        )
        attention["cond_block_diag_attn"] = Film(size, width)
        self.norms = norms
        if norms:
            for part in (self.attention["output"], self.output):
                part["LayerNorm"] = ConditionalLayerNorm(size, eps)
        self.adapter = Adapter(size, eps) if adapter else None

    def forward(
        self, x: Tensor, mask: Tensor | None, task_vectors: Tensor, row_task_ids: Tensor
    ) -> Tensor:
        """Apply the block.

        Args:
            x: [B, L, D].
            mask: float, broadcastable to [B, 1, L, L], added to attention scores.
            task_vectors: [T, D], a vector per task.
            row_task_ids: [B], task of each row.
        Returns:
            [B, L, D].
        """
        attention = self.attention["self"]
        factor, shift = attention["cond_block_diag_attn"](task_vectors)
        bias = compute_block_bias(attention.random_weight_matrix, factor, shift, x.shape[1])
        bias = bias[row_task_ids][:, None]
        conditions = (task_vectors, row_task_ids) if self.norms else ()
        attended = self.attend(
            x, bias if mask is None else bias + mask.to(bias.dtype), conditions=conditions
        )
        x = self.apply_feed_forward(attended, conditions)
        # The adapter's residual is the state after attention, not the one after the block.
        return x if self.adapter is None else self.adapter(x, attended, task_vectors, row_task_ids)


class ConditionalEncoder(nn.Module):
    """Stack of conditional blocks, by `config.variant`.

    "base": the upper half of the blocks has conditional norms, and the last block an adapter.
    "large": conditional norms as in "base"; each block's output is passed through a bottleneck, the
    bottlenecks' outputs are summed, and this sum is the result.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        depth, size = config.num_hidden_layers, config.hidden_size
        lower = depth // 2 + depth % 2
        base = config.variant == "base"
        self.task_transformation = nn.Linear(size, size)
        self.layer = nn.ModuleList(
            ConditionalLayer(config, i >= lower, adapter=base and i == depth - 1)
            for i in range(depth)
        )
        if not base:
            self.adapter_layer = nn.ModuleList(Bottleneck(size) for _ in range(depth))
        self.gradient_checkpointing = False

    def forward(
        self, x: Tensor, mask: Tensor | None, task_vectors: Tensor, row_task_ids: Tensor
    ) -> Tensor:
        """Apply all blocks: [B, L, D] -> [B, L, D].

        Args:
            x, mask, row_task_ids: as in `ConditionalLayer.forward`.
            task_vectors: [T, D], embeddings of the tasks; the blocks get a linear layer of them.
        """
        task_vectors = self.task_transformation(task_vectors)
        total = None
        for number, layer in enumerate(self.layer):
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(
                    layer.__call__, x, mask, task_vectors, row_task_ids
                )
            else:
                x = layer(x, mask, task_vectors, row_task_ids)
            if hasattr(self, "adapter_layer"):
                state = x if total is None else x + total
                total = self.adapter_layer[number](state, task_vectors, row_task_ids)
        return x if total is None else total
