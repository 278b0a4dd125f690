"""Token retrieval, the warm-up task of multiplexed encoders, and heads over the vocabulary.

For each position of a mixed sequence an instance is drawn, and the head predicts the token that
this instance has there. Masked language models use the same heads.
"""

import torch
from megamod_kernels import linear_cross_entropy
from megamod_kernels.demux import Pairs
from torch import Tensor, nn
from torch.nn import functional as F

from megamod.nn.demultiplexer import MlpDemultiplexer, SharedRsaLayers, apply_keyed_linear
from megamod.nn.linear import are_standard_layers

IGNORED = -100
_SCORED_TOGETHER = 2**24  # logits computed at once to count correct predictions: bounds the memory


def draw_retrieved_instances(
    group_count: int, length: int, instance_count: int, first_column: int, device: torch.device
) -> Tensor:
    """Draw an instance for each position, [B, T] int64; 0 before `first_column`.

    Instances are drawn uniformly from torch's global generator of the device.

    Args:
        group_count, length, instance_count: B, T and N.
        first_column: first position that is retrieved at.
        device: device of the result.
    """
    retrieved_instances = torch.randint(instance_count, (group_count, length), device=device)
    retrieved_instances[:, :first_column] = 0
    return retrieved_instances


def select_retrieval_targets(
    embedded_ids: Tensor,
    retrieved_instances: Tensor,
    *,
    first_column: int = 0,
    ignored_id: int | None = None,
    sampled: Tensor | None = None,
) -> Tensor:
    """Select the token to predict at each position.

    Args:
        embedded_ids: [B * N, T] ids as embedded, with masks, prefix and overwritten columns.
        retrieved_instances: [B, T] int64, the instance of each position.
        first_column: columns before this one have no target.
        ignored_id: a token that is no target (padding); None: every token is one.
        sampled: [B, T] bool; other positions have no target.
    Returns:
        [B, T] int64, -100 where there is no target.
    Raises:
        ValueError: if the shapes do not fit.
    Source: Murahari et al. 2022 (DataMUX), section 3.3.
    """
    if (
        retrieved_instances.dim() != 2
        or embedded_ids.shape[0] % len(retrieved_instances)
        or embedded_ids.shape[1] != retrieved_instances.shape[1]
    ):
        raise ValueError(
            f"ids {tuple(embedded_ids.shape)} and instances {tuple(retrieved_instances.shape)} do "
            "not fit: expected [B * N, T] and [B, T]"
        )
    by_instance = embedded_ids.view(len(retrieved_instances), -1, retrieved_instances.shape[1])
    targets = by_instance.gather(1, retrieved_instances[:, None])[:, 0]
    has_target = (
        torch.arange(retrieved_instances.shape[1], device=retrieved_instances.device)
        >= first_column
    )
    if ignored_id is not None:
        has_target = has_target & (targets != ignored_id)
    if sampled is not None:
        has_target = has_target & sampled
    return targets.masked_fill(~has_target, IGNORED)


def build_retrieval_pairs(retrieved_instances: Tensor, selected: Tensor) -> Pairs:
    """Build pairs at selected positions, from instances [B, T] and a mask [B, T] bool."""
    group, position = selected.nonzero(as_tuple=True)
    return Pairs(group, retrieved_instances[group, position], position)


def build_row_pairs(selected: Tensor, instance_count: int) -> Pairs:
    """Build pairs at selected positions [B * N, T] bool.

    Row r is instance r % N of group r // N, N being `instance_count`.
    """
    row, position = selected.nonzero(as_tuple=True)
    return Pairs(row // instance_count, row % instance_count, position)


def score_tokens(
    states: Tensor,
    decoder: nn.Linear,
    labels: Tensor,
    *,
    return_logits: bool,
    count_correct: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Score token predictions.

    Args:
        states: [R, D].
        decoder: linear layer from D features to V logits, with a bias.
        labels: [R] int64.
        return_logits: return the logits; otherwise they are never held all at once.
        count_correct: count correct predictions.
    Returns:
        summed loss (nats, float32), number of correct predictions or None, logits [R, V] or None.
    """
    if return_logits or not are_standard_layers(decoder):
        logits = decoder(states)
        total = F.cross_entropy(logits.float(), labels, reduction="sum")
        correct = (logits.argmax(-1) == labels).sum() if count_correct else None
        return total, correct, logits if return_logits else None
    # The bias is one more column of the matrix; columns of zeros keep rows aligned.
    extra = torch.zeros(8, decoder.out_features, dtype=states.dtype, device=states.device)
    extra = torch.cat([decoder.bias.to(states.dtype)[None], extra[1:]]).T
    ones = F.pad(states.new_ones(len(states), 1), (0, 7))
    weight = torch.cat([decoder.weight.to(states.dtype), extra], 1)
    total, _ = linear_cross_entropy(torch.cat([states, ones], 1), weight, labels)
    return total, _count_correct(states, decoder, labels) if count_correct else None, None


class RetrievalHead(nn.Module):
    """Head over the vocabulary on [key ; hidden], with the layers shared with the demultiplexer.

    Args:
        size, vocab_size: features D and logits V.
        eps: epsilon of the norm.
        layers: number of shared layers to use.
        residual: each layer but the first adds its input to its output (ELECTRA; not BERT).
    Source: Murahari et al. 2023, section 3.1, and its release.
    """

    def __init__(self, size: int, vocab_size: int, eps: float, layers: int, residual: bool):
        super().__init__()
        self.layers, self.residual = layers, residual
        self.pre_decoder = nn.Linear(size, size)
        self.pre_decoder_layer_norm = nn.LayerNorm(size, eps=eps)
        self.decoder = nn.Linear(size, vocab_size)

    def forward(self, shared: SharedRsaLayers, hidden: Tensor, pairs: Pairs | None) -> Tensor:
        """Compute inputs of `decoder`: [B, T, D] -> [R, D] for pairs, else [B, N, T, D].

        Args:
            shared: its keys and first `layers` layers are used.
            hidden: [B, T, D] mixed states.
            pairs: positions and instances to compute; None for all.
        """
        first = shared.get_dense(1)
        key = shared.demux_instance_embedding.to(hidden.dtype)
        x = shared.get_norm(1)(F.gelu(apply_keyed_linear(hidden, key, first, pairs)))
        for layer in range(2, self.layers + 1):
            x = self._add_residual(shared.get_norm(layer)(F.gelu(shared.get_dense(layer)(x))), x)
        return self._add_residual(self.pre_decoder_layer_norm(F.gelu(self.pre_decoder(x))), x)

    def _add_residual(self, update: Tensor, x: Tensor) -> Tensor:
        """Add a layer's input x to its output, if the head has residuals."""
        return update + x if self.residual else update


class PrefixRetrievalHead(nn.Module):
    """Head over [key ; hidden] to the vocabulary; the key is the instance's column of a prefix.

    Args:
        size, vocab_size: features D and logits V.
        eps: epsilon of the norm.
    """

    def __init__(self, size: int, vocab_size: int, eps: float):
        super().__init__()
        self.dense = nn.Linear(2 * size, size)
        self.layer_norm = nn.LayerNorm(size, eps=eps)
        self.decoder = nn.Linear(size, vocab_size)

    def forward(self, hidden: Tensor, instances: int, pairs: Pairs | None) -> Tensor:
        """Compute inputs of `decoder`: [B, T, D] -> [R, D] for pairs, else [B, N, T, D].

        Args:
            hidden: [B, T, D] mixed states, the N columns of the prefix first.
            instances: N.
            pairs: positions and instances to compute; None for all.
        """
        key = hidden[:, :instances]
        return self.layer_norm(F.gelu(apply_keyed_linear(hidden, key, self.dense, pairs)))


class MlpRetrievalHead(nn.Module):
    """Head over the vocabulary with a network per instance.

    Args:
        instances, size, vocab_size: N, features D and logits V.
        eps: epsilon of the norms.
        dropout: see `MlpDemultiplexer`.
    Source: the release of DataMUX.
    """

    def __init__(self, instances: int, size: int, vocab_size: int, eps: float, dropout: float):
        super().__init__()
        self.demux_module = MlpDemultiplexer(instances, size, eps, dropout)
        self.dense_pre_vocab = nn.Linear(size, size)
        self.layer_norm_pre_vocab = nn.LayerNorm(size, eps=eps)
        self.decoder = nn.Linear(size, vocab_size)

    def forward(self, hidden: Tensor, retrieved_instances: Tensor) -> Tensor:
        """Compute inputs of `decoder` for the instance of each position: [B, T, D] -> [B, T, D].

        Args:
            hidden: mixed states.
            retrieved_instances: [B, T] int64.
        """
        return self.layer_norm_pre_vocab(
            F.gelu(self.dense_pre_vocab(self.demux_module(hidden, retrieved_instances)))
        )


@torch.no_grad()
def _count_correct(states: Tensor, decoder: nn.Linear, labels: Tensor) -> Tensor:
    """Count the states [R, D] for which the label has the largest logit, chunk by chunk."""
    rows = max(1, _SCORED_TOGETHER // decoder.out_features)
    predicted = [decoder(part).argmax(-1) for part in states.split(rows)] if len(states) else []
    return (torch.cat(predicted) == labels).sum() if predicted else labels.new_zeros(())
