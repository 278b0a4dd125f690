"""MUX-BERT: a bare encoder, masked language model, and classifiers of sequences and tokens."""

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from megamod.models.mux.classifier import (
    MuxBareModel,
    MuxSequenceClassifier,
    MuxTokenClassifier,
)
from megamod.models.mux.configuration import MuxBertConfig
from megamod.models.mux.model import MuxPreTrainedModel
from megamod.models.mux.types import MixedStates, MuxOutput
from megamod.nn.retrieval import IGNORED, pairs_of_rows, token_scores


class MuxBertModel(MuxBareModel):
    """Hidden states of every instance."""

    config: MuxBertConfig

    def __init__(self, config: MuxBertConfig):
        super().__init__(config)
        self.add_demultiplexer()
        self.post_init()


class MuxMaskedLM(MuxPreTrainedModel):
    """Tokens of every instance, by the retrieval head; the task demultiplexer has no part in it."""

    pretraining: ClassVar[bool] = True
    sees_segments: ClassVar[bool] = True
    retrieves_padding: ClassVar[bool] = True
    takes_prefix_with_context: ClassVar[bool] = True
    _keys_to_ignore_on_load_unexpected = (
        *MuxPreTrainedModel._keys_to_ignore_on_load_unexpected[:1],
        r"^demultiplexer\.",
    )

    def get_output_embeddings(self) -> nn.Module:
        return self.retrieval_head.decoder

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.retrieval_head.decoder = value

    def labels_fed(self, labels: Tensor) -> Tensor:
        """Labels where the tokens are: behind the prefix, [B * N, T]."""
        length = self.config.prefix_length
        return F.pad(labels, (length, -length), value=IGNORED) if length else labels

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        retrieval_slots: Tensor | None = None,
        num_retrieval_items: Tensor | float | None = None,
        return_dict: bool | None = None,
    ) -> MuxOutput | tuple:
        """One pass over whole groups.

        Args:
            input_ids: [B * N, T]; with a prefix its last N + 1 columns are dropped.
            attention_mask: [B * N, T]; only contextual multiplexers and `mask_padding` look at it.
            token_type_ids, position_ids: [B * N, T], of the tokens.
            labels: [B * N, T] tokens to predict, -100 elsewhere.
            num_items_in_batch, num_retrieval_items: what the summed losses are divided by; None
                for the numbers of this batch.
            retrieval_slots: [B, T], see `retrieval_targets`; None to draw them.
        Returns:
            `MuxOutput`. Without labels, or with `output_logits`, logits are [B * N, T, V]. Else
            they are those of the labelled tokens, row by row, [labels, V] in evaluation, and None
            in training. A term whose coefficient is 0 is not computed.
        Raises:
            ValueError: if the rows are no whole groups, or too long.
        """
        fed = self.feed(input_ids, attention_mask, token_type_ids, position_ids)
        hidden = self.encode(fed)
        output = MuxOutput()
        if labels is None or self.config.output_logits:
            states = self.vocabulary_states(hidden, None)
            output["logits"] = self.retrieval_head.decoder(states).flatten(0, 1)
        if labels is not None:
            if self.config.task_loss_coeff > 0:
                self._score(output, hidden, self.labels_fed(labels), num_items_in_batch)
            if self.config.retrieval_loss_coeff > 0:
                self.retrieve(output, hidden, fed.ids, retrieval_slots, num_retrieval_items)
            output["loss"] = self.combined(output.task_loss, output.retrieval_loss)
        return self.returned(output, return_dict)

    def _score(
        self, output: MuxOutput, hidden: MixedStates, labels: Tensor, items: Tensor | float | None
    ) -> None:
        chosen = labels != IGNORED
        decoder, targets = self.retrieval_head.decoder, labels[chosen]
        states = self.vocabulary_states(hidden, pairs_of_rows(chosen, self.config.num_instances))
        keep = output.logits is None and not self.training
        total, _, logits = token_scores(states, decoder, targets, keep_logits=keep, count=False)
        output["task_loss"] = total / (max(targets.numel(), 1) if items is None else items)
        if keep:
            output["logits"] = logits


class MuxBertForMaskedLM(MuxMaskedLM):
    """The retrieval head as a masked language model, its matrix tied to the embeddings.

    Source: Murahari et al. 2023, section 3.2; warm-up is `task_loss_coeff` 0 and
    `retrieval_loss_coeff` 1.
    """

    config: MuxBertConfig

    def __init__(self, config: MuxBertConfig):
        super().__init__(config)
        self.add_retrieval()
        self.post_init()


class MuxBertForSequenceClassification(MuxSequenceClassifier):
    """A linear layer over the first state of every instance; segments are ignored by default."""

    config: MuxBertConfig

    def __init__(self, config: MuxBertConfig):
        super().__init__(config)
        self.add_demultiplexer()
        self.add_retrieval_if_used()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class MuxBertForTokenClassification(MuxTokenClassifier):
    """A linear layer over every state of every instance."""

    config: MuxBertConfig

    def __init__(self, config: MuxBertConfig):
        super().__init__(config)
        self.add_demultiplexer()
        self.add_retrieval_if_used()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()
