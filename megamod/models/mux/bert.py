"""MUX-BERT: a bare encoder, masked language model, and classifiers of sequences and tokens."""

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from megamod.models.calls import check_extra_arguments, format_output
from megamod.models.mux.classifier import (
    MuxBareModel,
    MuxSequenceClassifier,
    MuxTokenClassifier,
)
from megamod.models.mux.configuration import MuxBertConfig
from megamod.models.mux.model import MuxPreTrainedModel
from megamod.models.mux.types import MixedStates, MuxOutput
from megamod.nn.retrieval import IGNORED, build_row_pairs, score_tokens


class MuxBertModel(MuxBareModel):
    """MUX-BERT without a head: multiplexer, encoder and demultiplexer."""

    config: MuxBertConfig

    def __init__(self, config: MuxBertConfig):
        super().__init__(config)
        self.add_demultiplexer()
        self.post_init()


class MuxMaskedLM(MuxPreTrainedModel):
    """Masked language model with the retrieval head, without a task demultiplexer.

    A subclass creates the head by `add_retrieval_head`, whose matrix predicts masked tokens too.
    """

    pretraining: ClassVar[bool] = True
    sees_segments: ClassVar[bool] = True
    retrieves_padding: ClassVar[bool] = True
    takes_prefix_with_context: ClassVar[bool] = True
    _keys_to_ignore_on_load_unexpected = (
        *MuxPreTrainedModel._keys_to_ignore_on_load_unexpected[:1],
        r"^demultiplexer\.",
    )

    def align_labels(self, labels: Tensor) -> Tensor:
        """Align labels with the columns of the mixed sequence: [R, S] -> [B * N, S].

        A prefix moves every label right by its length, and the last labels are dropped. Columns of
        the prefix, and rows that fill up the last group, have label -100.
        """
        length, rows = self.config.prefix_length, len(labels)
        added = -rows % self.config.num_instances
        return F.pad(labels, (length, -length, 0, added), value=IGNORED)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        retrieved_instances: Tensor | None = None,
        num_retrieval_items: Tensor | float | None = None,
        output_logits: bool | None = None,
        return_dict: bool | None = None,
        **more: object,
    ) -> MuxOutput | tuple:
        """Predict tokens of any number of rows.

        Args:
            input_ids: [R, S]. With a prefix and labels the last N + 1 columns are dropped, as in
                pretraining; without labels only those without a position.
            attention_mask: [R, S]; used only by contextual multiplexers and with `mask_padding`.
            token_type_ids, position_ids: [R, S], of the tokens; None: segment 0, consecutive.
            labels: [R, S] tokens to predict, -100 elsewhere.
            num_items_in_batch, num_retrieval_items: divisors of the summed losses; None for the
                numbers of items in this batch.
            retrieved_instances: [B, T], instance that each mixed position retrieves, see
                `draw_retrieved_instances`; None to draw them.
            output_logits: False: with labels, compute no logits, which is faster; None: as the
                configuration says.
        Returns:
            `MuxOutput` (a tuple if `return_dict` is False), with logits [R, S, V], 0 at columns
            that were dropped. A term of the loss whose coefficient is 0 is not computed.
        Raises:
            ValueError: if there are no rows, if they are too long or, with labels, too short for a
                prefix, or if the model does not take an argument of `more`.
        """
        check_extra_arguments(self, more)
        inputs = (input_ids, attention_mask, token_type_ids, position_ids)
        columns = input_ids.shape[1]
        if output_logits is None:
            output_logits = self.config.output_logits
        batch = self.prepare_batch(
            *(inputs if labels is not None else self._pad_for_prefix(*inputs))
        )
        hidden = self.encode(batch)
        output = MuxOutput()
        if labels is None or output_logits:
            logits = self.retrieval_head.decoder(self.compute_vocabulary_states(hidden, None))
            logits = logits.flatten(0, 1)[: batch.rows, self.config.prefix_length :]
            output["logits"] = F.pad(logits, (0, 0, 0, columns - logits.shape[1]))
        if labels is not None:
            if self.config.task_loss_coeff > 0:
                output["task_loss"] = self._compute_task_loss(
                    hidden, labels, output.logits, num_items_in_batch
                )
            if self.config.retrieval_loss_coeff > 0:
                self.add_retrieval_loss(
                    output, hidden, batch.ids, retrieved_instances, num_retrieval_items
                )
            output["loss"] = self.combine_losses(output.task_loss, output.retrieval_loss)
        return format_output(self, output, return_dict)

    def _pad_for_prefix(self, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """Append columns of padding, which the prefix then drops in place of tokens.

        As many as the prefix is long, or fewer if the position table ends before.

        Args:
            inputs: ids, attention mask, token types and positions, [R, S] each; all but the ids may
                be None, and stay so.
        Returns:
            the four in the same order, [R, S + added].
        """
        config, columns = self.config, inputs[0].shape[1]
        room = config.max_position_embeddings - config.first_position - columns
        added = max(0, min(config.prefix_length, room))
        fills = (config.pad_token_id or 0, 0, 0, 0)
        return tuple(
            field if field is None else F.pad(field, (0, added), value=fill)
            for field, fill in zip(inputs, fills, strict=True)
        )

    def _compute_task_loss(
        self,
        hidden: MixedStates,
        labels: Tensor,
        logits: Tensor | None,
        num_items: Tensor | float | None,
    ) -> Tensor:
        """Compute the cross entropy (nats) of the labels, summed and divided by `num_items`.

        Args:
            hidden: mixed states; used where `logits` is None, and then no logits are stored.
            labels: [R, S], -100 where there is none.
            logits: [R, S, V] of these labels, or None.
            num_items: the divisor; None for the number of labels, at least 1.
        """
        aligned_labels = self.align_labels(labels)
        selected = aligned_labels != IGNORED
        targets = aligned_labels[selected]
        if logits is not None:
            selected_in_rows = selected[: len(labels), self.config.prefix_length :]
            scored = logits[:, : selected_in_rows.shape[1]][selected_in_rows].float()
            total = F.cross_entropy(scored, targets, reduction="sum")
        else:
            pairs = build_row_pairs(selected, self.config.num_instances)
            states = self.compute_vocabulary_states(hidden, pairs)
            decoder = self.retrieval_head.decoder
            total = score_tokens(
                states, decoder, targets, return_logits=False, count_correct=False
            )[0]
        return total / (max(targets.numel(), 1) if num_items is None else num_items)


class MuxBertForMaskedLM(MuxMaskedLM):
    """MUX-BERT's masked language model, its matrix tied to the embeddings.

    For the retrieval warm-up set `task_loss_coeff` 0 and `retrieval_loss_coeff` 1.
    Source: Murahari et al. 2023, section 3.2.
    """

    config: MuxBertConfig

    def __init__(self, config: MuxBertConfig):
        super().__init__(config)
        self.add_retrieval_head()
        self.post_init()


class MuxBertForSequenceClassification(MuxSequenceClassifier):
    """A linear layer over the first state of every instance.

    Token types are ignored unless the configuration has `use_token_type_ids`.
    """

    config: MuxBertConfig

    def __init__(self, config: MuxBertConfig):
        super().__init__(config)
        self.add_demultiplexer()
        self.add_retrieval_head_if_used()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class MuxBertForTokenClassification(MuxTokenClassifier):
    """A linear layer over every state of every instance."""

    config: MuxBertConfig

    def __init__(self, config: MuxBertConfig):
        super().__init__(config)
        self.add_demultiplexer()
        self.add_retrieval_head_if_used()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()
