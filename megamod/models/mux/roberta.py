"""DataMUX on RoBERTa, as first published: classifiers of sequences and tokens.

Source: Murahari et al. 2022 (DataMUX), section 3, and its release.
"""

from typing import ClassVar

from megamod_kernels.demux import Pairs
from torch import Tensor, nn
from torch.nn import functional as F

from megamod.models.mux.classifier import MuxSequenceClassifier, MuxTokenClassifier
from megamod.models.mux.configuration import MuxRobertaConfig
from megamod.models.mux.model import MuxPreTrainedModel
from megamod.models.mux.types import MixedStates, PreparedBatch
from megamod.nn.demultiplexer import MlpDemultiplexer, PrefixDemultiplexer
from megamod.nn.encoder import compute_padding_aware_positions
from megamod.nn.retrieval import IGNORED, MlpRetrievalHead, score_tokens


class PrefixSequenceHead(PrefixDemultiplexer):
    """Prefix demultiplexer, and a classifier of its output z: out_proj(gelu(dense z))."""

    def __init__(self, config: MuxRobertaConfig):
        super().__init__(config.hidden_size, config.layer_norm_eps)
        self.dense_before_out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def classify(self, states: Tensor) -> Tensor:
        """Compute logits of classes: demultiplexed states [..., D] -> [..., C]."""
        return self.out_proj(F.gelu(self.dense_before_out_proj(states)))


class PrefixTokenHead(PrefixDemultiplexer):
    """Prefix demultiplexer, and a classifier of its output z: decoder(z)."""

    def __init__(self, config: MuxRobertaConfig):
        super().__init__(config.hidden_size, config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.num_labels)

    def classify(self, states: Tensor) -> Tensor:
        """Compute logits of classes: demultiplexed states [..., D] -> [..., C]."""
        return self.decoder(states)


class MlpHead(nn.Module):
    """A network per instance, and a classifier of its output x: out_proj(LN(gelu(dense x)))."""

    def __init__(self, config: MuxRobertaConfig):
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        self.demux_module = MlpDemultiplexer(
            config.num_instances, size, eps, config.hidden_dropout_prob
        )
        self.dense_before_out_proj = nn.Linear(size, size)
        self.layernorm_presoftmax = nn.LayerNorm(size, eps=eps)
        self.out_proj = nn.Linear(size, config.num_labels)

    def forward(self, hidden: Tensor) -> Tensor:
        """Demultiplex mixed states: [B, L, D] -> [B, N, L, D]."""
        return self.demux_module(hidden)

    def classify(self, states: Tensor) -> Tensor:
        """Compute logits of classes: demultiplexed states [..., D] -> [..., C]."""
        return self.out_proj(self.layernorm_presoftmax(F.gelu(self.dense_before_out_proj(states))))


class MuxRobertaPreTrainedModel(MuxPreTrainedModel):
    """Methods and settings in which DataMUX on RoBERTa differs from MUX-BERT.

    The demultiplexer holds the classifier too, and may be a network per instance ("mlp").
    """

    config: MuxRobertaConfig
    base_model_prefix = "roberta"
    ties_vocabulary: ClassVar[bool] = False
    sees_segments: ClassVar[bool] = True

    def demultiplex(
        self, hidden: MixedStates, columns: slice, pairs: Pairs | None = None
    ) -> Tensor:
        """Demultiplex states: [R, D] for pairs, else [B, N, columns, D].

        `hidden` are states [B, T, D] of the encoder. The networks of "mlp" compute all instances,
        of which pairs then select.
        """
        if self.config.demuxing_variant == "index":
            return super().demultiplex(hidden, columns, pairs)
        states = self.demultiplexer(hidden.apply_norm()[:, columns])
        return states if pairs is None else states[pairs.group, pairs.instance, pairs.position]

    def compute_class_logits(self, states: Tensor) -> Tensor:
        """Compute logits of states: [..., D] -> [..., C]."""
        return self.demultiplexer.classify(states)

    def add_retrieval_head(self) -> None:
        """Create the retrieval head of the demultiplexer's kind; its matrix is not tied."""
        config = self.config
        if config.demuxing_variant == "index":
            super().add_retrieval_head()
            return
        self.retrieval_head = MlpRetrievalHead(
            config.num_instances,
            config.hidden_size,
            config.vocab_size,
            config.layer_norm_eps,
            config.hidden_dropout_prob,
        )

    def _score_retrieval(
        self, hidden: MixedStates, retrieved_instances: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the summed retrieval loss (nats) and the number of correct tokens, scalars.

        Arguments as in `MuxPreTrainedModel._score_retrieval`.
        """
        if self.config.demuxing_variant == "index":
            return super()._score_retrieval(hidden, retrieved_instances, targets)
        has_target = targets != IGNORED
        states = self.retrieval_head(hidden.apply_norm(), retrieved_instances)[has_target]
        decoder, labels = self.retrieval_head.decoder, targets[has_target]
        return score_tokens(states, decoder, labels, return_logits=not self.training)[:2]

    def _select_positions(self, batch: PreparedBatch) -> tuple[Tensor | None, Tensor | None]:
        """Return the positions of the instances, and None (consecutive) for the mixed sequence.

        Those of the instances are in the batch, or else do not count padding.
        """
        if batch.position_ids is not None:
            return batch.position_ids, None
        return compute_padding_aware_positions(batch.ids, self.config.pad_token_id), None


class MuxRobertaForSequenceClassification(MuxRobertaPreTrainedModel, MuxSequenceClassifier):
    """Classifier of rows, with a prefix or a network per instance."""

    masks_instances: ClassVar[bool] = False
    retrieval_start: ClassVar[int] = 1

    def __init__(self, config: MuxRobertaConfig):
        super().__init__(config)
        prefix = config.demuxing_variant == "index"
        self.demultiplexer = PrefixSequenceHead(config) if prefix else MlpHead(config)
        self.add_retrieval_head_if_used()
        self.post_init()


class MuxRobertaForTokenClassification(MuxRobertaPreTrainedModel, MuxTokenClassifier):
    """Classifier of tokens, with a prefix or a network per instance."""

    def __init__(self, config: MuxRobertaConfig):
        super().__init__(config)
        prefix = config.demuxing_variant == "index"
        self.demultiplexer = PrefixTokenHead(config) if prefix else MlpHead(config)
        self.add_retrieval_head_if_used()
        self.post_init()
