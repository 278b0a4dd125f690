"""Bare model and classifiers of sequences and tokens, for every family of multiplexed encoders."""

from typing import ClassVar

from megamod_kernels.demux import Pairs
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput

from megamod.models.calls import check_extra_arguments, format_output
from megamod.models.mux.model import MuxPreTrainedModel
from megamod.models.mux.types import MixedStates, MuxOutput
from megamod.nn.retrieval import IGNORED


class MuxBareModel(MuxPreTrainedModel):
    """Model without a head: from rows of ids to hidden states of every row."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_dict: bool | None = None,
        **more: object,
    ) -> BaseModelOutput | tuple:
        """Compute the demultiplexed states of any number of rows.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids: as in
                `MuxSequenceClassifier.forward`.
        Returns:
            `BaseModelOutput` with `last_hidden_state` [R, S, D], without the prefix; a tuple if
            `return_dict` is False.
        Raises:
            ValueError: if there are no ids or no rows, if rows are too long, or if the model does
                not take an argument of `more`.
        """
        check_extra_arguments(self, more)
        batch = self.prepare_batch(input_ids, attention_mask, token_type_ids, position_ids)
        states = self.demultiplex(self.encode(batch), slice(self.config.prefix_length, None))
        output = BaseModelOutput(last_hidden_state=states.flatten(0, 1)[: batch.rows])
        return format_output(self, output, return_dict)


class MuxSequenceClassifier(MuxPreTrainedModel):
    """Classification or regression of rows.

    A subclass creates the head: the modules `dropout` and `classifier`, or a `compute_class_logits`
    of its own.
    """

    masks_instances: ClassVar[bool] = True

    def compute_class_logits(self, states: Tensor) -> Tensor:
        """Compute logits of states: [..., D] -> [..., C]."""
        return self.classifier(self.dropout(states))

    def compute_row_logits(self, hidden: MixedStates) -> Tensor:
        """Compute logits of rows from their cls column: mixed states [B, T, D] -> [B, N, C]."""
        column = self.config.prefix_length - 1 if self.config.prefix_length else 0
        states = self.demultiplex(hidden, slice(column, column + 1))
        return self.compute_class_logits(states[:, :, 0])

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
        return_dict: bool | None = None,
        **more: object,
    ) -> MuxOutput | tuple:
        """Classify any number of rows.

        Args:
            input_ids: [R, S].
            attention_mask: [R, S]; used only by contextual multiplexers and with `mask_padding`.
            token_type_ids: [R, S]; used only if the configuration says so.
            position_ids: [1, T] or [B, T], of the mixed sequence, prefix included; in families with
                `sees_segments` [R, T], of the rows. None: consecutive, and in RoBERTa padding is
                not counted.
            labels: [R] classes, or values if num_labels is 1; with labels there is a loss.
            num_items_in_batch, num_retrieval_items: divisors of the summed losses; None for the
                numbers of items in this batch.
            retrieved_instances: [B, T], instance that each mixed position retrieves, see
                `draw_retrieved_instances`; None to draw them.
        Returns:
            `MuxOutput` with logits [R, C]; a tuple if `return_dict` is False.
        Raises:
            ValueError: if there are no ids or no rows, if rows are too long, if the loss of
                retrieval was switched on after the model was made, or if the model does not take an
                argument of `more`.
        """
        check_extra_arguments(self, more)
        batch = self.prepare_batch(input_ids, attention_mask, token_type_ids, position_ids)
        retrieves = labels is not None and self.config.retrieval_loss_coeff > 0
        # Only the cls column is read, which is the first one or ends the prefix.
        hidden = self.encode(batch, None if retrieves else self.config.prefix_length or 1)
        logits = self.compute_row_logits(hidden).flatten(0, 1)[: batch.rows]
        output = MuxOutput(logits=logits)
        if labels is not None:
            flat = logits.float()
            if self.config.num_labels == 1:
                total = F.mse_loss(flat.flatten(), labels.flatten().float(), reduction="sum")
            else:
                total = F.cross_entropy(flat, labels.flatten(), reduction="sum")
            items = labels.numel() if num_items_in_batch is None else num_items_in_batch
            output["task_loss"] = total / items
            if retrieves:
                self.add_retrieval_loss(
                    output, hidden, batch.ids, retrieved_instances, num_retrieval_items
                )
            output["loss"] = self.combine_losses(output.task_loss, output.retrieval_loss)
        return format_output(self, output, return_dict)


class MuxTokenClassifier(MuxPreTrainedModel):
    """Classification of tokens.

    A subclass creates the head: the modules `dropout` and `classifier`, or a `compute_class_logits`
    of its own.
    """

    def compute_class_logits(self, states: Tensor) -> Tensor:
        """Compute logits of states: [..., D] -> [..., C]."""
        return self.classifier(self.dropout(states))

    def compute_token_logits(self, hidden: MixedStates, selected: Tensor | None) -> Tensor:
        """Compute logits of tokens, without the prefix: [B * N, S, C].

        Args:
            hidden: mixed states [B, T, D] of the encoder.
            selected: [B * N, S] bool, tokens to compute logits for, 0 elsewhere; None: all.
        """
        start, N = self.config.prefix_length, self.config.num_instances
        if selected is None:
            states = self.demultiplex(hidden, slice(start, None))
            return self.compute_class_logits(states).flatten(0, 1)
        row, position = selected.nonzero(as_tuple=True)
        pairs = Pairs(row // N, row % N, position + start)
        logits = self.compute_class_logits(self.demultiplex(hidden, slice(start, None), pairs))
        dense = logits.new_zeros(*selected.shape, logits.shape[-1])
        return dense.index_put((row, position), logits)

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
        return_dict: bool | None = None,
        **more: object,
    ) -> MuxOutput | tuple:
        """Classify the tokens of any number of rows.

        Args:
            labels: [R, S] classes, -100 at tokens without a label. All other arguments are those of
                `MuxSequenceClassifier.forward`.
        Returns:
            `MuxOutput` with logits [R, S, C]; a tuple if `return_dict` is False. With an attention
            mask, logits of padding without labels are 0 in training, and in evaluation if
            `padding_logits` is off.
        Raises:
            ValueError: as in `MuxSequenceClassifier.forward`.
        """
        check_extra_arguments(self, more)
        batch = self.prepare_batch(input_ids, attention_mask, token_type_ids, position_ids)
        hidden = self.encode(batch)
        skips_padding = batch.mask is not None and (self.training or not self.config.padding_logits)
        selected = None
        if skips_padding:
            selected = batch.mask != 0
            selected[batch.rows :] = False
            if labels is not None:
                selected[: batch.rows] |= labels != IGNORED
        logits = self.compute_token_logits(hidden, selected)[: batch.rows]
        output = MuxOutput(logits=logits)
        if labels is not None:
            total = F.cross_entropy(
                logits.flatten(0, 1).float(),
                labels.flatten(),
                ignore_index=IGNORED,
                reduction="sum",
            )
            items = num_items_in_batch
            if items is None:
                items = (labels != IGNORED).sum().clamp(min=1)
            output["task_loss"] = total / items
            if self.config.retrieval_loss_coeff > 0:
                self.add_retrieval_loss(
                    output, hidden, batch.ids, retrieved_instances, num_retrieval_items
                )
            output["loss"] = self.combine_losses(output.task_loss, output.retrieval_loss)
        return format_output(self, output, return_dict)
