"""Demultiplexers: from mixed hidden states to those of each instance.

`index_pos` (RSA) has a learned key per instance; for `index` the key is the hidden state at the
instance's column of a prefix; `mlp` has a network per instance. The first two can compute selected
pairs of instance and position only.
"""

from collections.abc import Sequence

import torch
from megamod_kernels.demux import Chain, Pairs, add_pairs, rsa_demux, split_projection
from megamod_kernels.norm_linear import Norm
from torch import Tensor, nn
from torch.nn import functional as F

from megamod.nn.linear import are_standard_layers


class SharedRsaLayers(nn.Module):
    """Keys and layers shared by the RSA demultiplexer and the retrieval head.

    The norms are used by the retrieval head alone.

    Args:
        instances, size: N and D.
        layers: L, number of linear layers, each with a norm.
        eps: epsilon of the norms.
    """

    def __init__(self, instances: int, size: int, layers: int, eps: float):
        super().__init__()
        self.layers = layers
        self.demux_instance_embedding = nn.Parameter(torch.empty(instances, size))
        nn.init.normal_(self.demux_instance_embedding)
        for layer in range(1, layers + 1):
            dense = nn.Linear(2 * size if layer == 1 else size, size)
            self.add_module(f"dense_{layer}", dense)
            self.add_module(f"layer_norm_{layer}", nn.LayerNorm(size, eps=eps))

    def get_dense(self, layer: int) -> nn.Linear:
        """Return a linear layer by its number: 1 (over [key ; hidden], from 2 D features) to L."""
        return getattr(self, f"dense_{layer}")

    def get_norm(self, layer: int) -> nn.LayerNorm:
        """Return the LayerNorm of a layer by its number, 1 to L."""
        return getattr(self, f"layer_norm_{layer}")


class RsaDemultiplexer(nn.Module):
    """Residual network over [key ; hidden], with a learned key per instance.

    As in the release, layer L of the shared ones is not used, and there are no norms in between.

    Args:
        size: features D.
        eps: epsilon of the last norm.
        dropout: dropout rate of the outputs of all layers but the last, in training.
    Source: Murahari et al. 2023 (MUX-PLM), section 3.1, RSA demultiplexing.
    """

    def __init__(self, size: int, eps: float, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.pre_decoder = nn.Linear(size, size)
        self.pre_decoder_layer_norm = nn.LayerNorm(size, eps=eps)

    def forward(
        self,
        shared: SharedRsaLayers,
        hidden: Tensor,
        pairs: Pairs | None = None,
        implementation: str = "auto",
        norm: nn.LayerNorm | None = None,
    ) -> Tensor:
        """Demultiplex mixed states [B, L, D] to [R, D] for pairs, else to [B, N, L, D].

        Args:
            shared: keys and first layers.
            hidden: [B, L, D] mixed states.
            pairs: R positions and instances to compute; None for all.
            implementation: see `rsa_demux`.
            norm: the encoder's last LayerNorm, if it is not yet applied to `hidden`.
        """
        first_layer, last_norm = shared.get_dense(1), self.pre_decoder_layer_norm
        middle_layers = [shared.get_dense(layer) for layer in range(2, shared.layers)]
        layers = (
            first_layer,
            *middle_layers,
            self.pre_decoder,
            last_norm,
            *(() if norm is None else (norm,)),
        )
        if not are_standard_layers(*layers):
            states = hidden if norm is None else norm(hidden)
            return self._call_layers(
                shared.demux_instance_embedding, states, first_layer, middle_layers, pairs
            )
        pending_norm = None if norm is None else Norm(norm.weight, norm.bias, norm.eps)
        key = shared.demux_instance_embedding.to(hidden.dtype)
        parts = split_projection(
            hidden, key, first_layer.weight, first_layer.bias, pending_norm, implementation
        )
        chain = Chain(
            [(dense.weight, dense.bias) for dense in middle_layers],
            (self.pre_decoder.weight, self.pre_decoder.bias),
            (last_norm.weight, last_norm.bias),
            last_norm.eps,
        )
        dropout = self.dropout if self.training else 0.0
        return rsa_demux(*parts, chain, pairs, dropout, implementation)

    def _call_layers(
        self,
        key: Tensor,
        hidden: Tensor,
        first_layer: nn.Module,
        middle_layers: Sequence[nn.Module],
        pairs: Pairs | None,
    ) -> Tensor:
        """Compute `rsa_demux` by calls of the layers, which may have been replaced.

        Args:
            key: [N, D].
            hidden: [B, L, D], the encoder's last norm applied.
            first_layer: linear layer over [key ; hidden], from 2 D to D features.
            middle_layers: residual layers from D to D features.
            pairs: positions and instances to compute; None for all.
        Returns:
            [R, D] for pairs, else [B, N, L, D].
        """

        def apply_dropout(x: Tensor) -> Tensor:
            """Apply the demultiplexer's dropout to x, in training only."""
            return F.dropout(x, self.dropout, self.training)

        x = apply_dropout(
            F.gelu(apply_keyed_linear(hidden, key.to(hidden.dtype), first_layer, pairs))
        )
        for dense in middle_layers:
            x = apply_dropout(F.gelu(dense(x))) + x
        return self.pre_decoder_layer_norm(F.gelu(self.pre_decoder(x))) + x


class PrefixDemultiplexer(nn.Module):
    """LN(gelu(dense [key ; hidden])), the key of instance i being column i of the mixed sequence.

    Args:
        size: features D.
        eps: epsilon of the norm.
    Source: Murahari et al. 2022 (DataMUX), section 3.2, index embeddings.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.dense = nn.Linear(2 * size, size)
        self.layer_norm = nn.LayerNorm(size, eps=eps)

    def forward(
        self, hidden: Tensor, instances: int, columns: slice, pairs: Pairs | None = None
    ) -> Tensor:
        """Demultiplex columns of a mixed sequence whose first columns are the keys.

        Args:
            hidden: [B, T, D], prefix first.
            instances: N, columns of the prefix.
            columns: columns to compute; ignored with pairs.
            pairs: positions and instances to compute, in place of columns.
        Returns:
            [R, D] for pairs, else [B, N, columns, D].
        """
        selected = hidden if pairs is not None else hidden[:, columns]
        return self.layer_norm(
            F.gelu(apply_keyed_linear(selected, hidden[:, :instances], self.dense, pairs))
        )


class MlpDemultiplexer(nn.Module):
    """LN_i(gelu(dense_i(dropout(hidden)))): a network for each instance.

    Args:
        instances, size: N and D.
        eps: epsilon of the norms.
        dropout: dropout rate of the inputs, in training.
    Source: Murahari et al. 2022 (DataMUX), section 3.2, MLP demultiplexing.
    """

    def __init__(self, instances: int, size: int, eps: float, dropout: float):
        super().__init__()
        self.instances = instances
        self.dropout = nn.Dropout(dropout)
        for instance in range(instances):
            self.add_module(f"dense_{instance}", nn.Linear(size, size))
            self.add_module(f"layer_norm_{instance}", nn.LayerNorm(size, eps=eps))

    def forward(self, hidden: Tensor, retrieved_instances: Tensor | None = None) -> Tensor:
        """Compute the states of every instance, or of one instance per position.

        Args:
            hidden: [B, L, D].
            retrieved_instances: [B, L] int64, the instance of each position; None for all
                instances.
        Returns:
            [B, L, D] with `retrieved_instances`, else [B, N, L, D].
        """
        if retrieved_instances is None:
            return torch.stack([self._run_instance(i, hidden) for i in range(self.instances)], 1)
        output = torch.zeros_like(hidden)
        for instance in range(self.instances):
            output[retrieved_instances == instance] = self._run_instance(
                instance, hidden[retrieved_instances == instance]
            )
        return output

    def _run_instance(self, instance: int, hidden: Tensor) -> Tensor:
        """Run the network of an instance: [..., D] -> [..., D]."""
        dense = getattr(self, f"dense_{instance}")
        return getattr(self, f"layer_norm_{instance}")(F.gelu(dense(self.dropout(hidden))))


def apply_keyed_linear(
    hidden: Tensor, key: Tensor, dense: nn.Module, pairs: Pairs | None
) -> Tensor:
    """Apply a linear layer over [key ; hidden]; a standard layer without concatenating the two.

    Args:
        hidden: [B, L, D].
        key: [N, D], or [B, N, D] where each group has its own.
        dense: from 2 D to D features, key columns first.
        pairs: positions and instances to compute; None for all.
    Returns:
        [R, D] for pairs, else [B, N, L, D].
    """
    if not are_standard_layers(dense):
        return dense(_concatenate_keys(hidden, key, pairs))
    weight, bias = dense.weight, dense.bias
    if pairs is None or len(pairs.group) >= hidden.shape[0] * hidden.shape[1]:
        return add_pairs(*split_projection(hidden, key, weight, bias), pairs)
    # Fewer pairs than positions: gather first, so that no unused position is projected.
    gathered = hidden[pairs.group, pairs.position]
    part, keys = split_projection(gathered, key, weight, bias)
    return part + (keys[pairs.instance] if key.dim() == 2 else keys[pairs.group, pairs.instance])


def _concatenate_keys(hidden: Tensor, key: Tensor, pairs: Pairs | None) -> Tensor:
    """Concatenate [key ; hidden]: [R, 2 D] for pairs, else [B, N, L, 2 D].

    Arguments as in `apply_keyed_linear`.
    """
    key = key.expand(len(hidden), -1, -1)
    if pairs is not None:
        parts = (key[pairs.group, pairs.instance], hidden[pairs.group, pairs.position])
        return torch.cat(parts, -1)
    shape = (*key.shape[:2], *hidden.shape[1:])
    return torch.cat([key[:, :, None].expand(shape), hidden[:, None].expand(shape)], -1)
