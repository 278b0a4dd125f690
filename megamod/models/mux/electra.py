"""MUX-ELECTRA: a bare encoder, the discriminator, and classifiers of sequences and tokens."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megamod.models.calls import check_extra_arguments, format_output
from megamod.models.mux.classifier import (
    MuxBareModel,
    MuxSequenceClassifier,
    MuxTokenClassifier,
)
from megamod.models.mux.configuration import MuxElectraConfig
from megamod.models.mux.model import MuxPreTrainedModel
from megamod.models.mux.types import MuxOutput, PreparedBatch
from megamod.nn.encoder import mark_default_initialisation


class MuxElectraPreTrainedModel(MuxPreTrainedModel):
    """Settings in which MUX-ELECTRA differs from MUX-BERT."""

    config: MuxElectraConfig
    base_model_prefix = "electra"
    ties_vocabulary: ClassVar[bool] = False
    overwrites_cls: ClassVar[bool] = False
    residual_retrieval: ClassVar[bool] = True
    _keys_to_ignore_on_load_unexpected = (
        *MuxPreTrainedModel._keys_to_ignore_on_load_unexpected,
        r"^generator\.",
        r"^discriminator_predictions\.",
    )


class MuxElectraModel(MuxElectraPreTrainedModel, MuxBareModel):
    """MUX-ELECTRA without a head: multiplexer, encoder and demultiplexer."""

    def __init__(self, config: MuxElectraConfig):
        super().__init__(config)
        self.add_demultiplexer()
        self.post_init()


class DiscriminatorHead(nn.Module):
    """Logit per state: dense, gelu, dense; states of `size` features."""

    def __init__(self, size: int):
        super().__init__()
        self.dense = mark_default_initialisation(nn.Linear(size, size))
        self.dense_prediction = mark_default_initialisation(nn.Linear(size, 1))

    def forward(self, states: Tensor) -> Tensor:
        """Compute a logit per state: [..., D] -> [...]."""
        return self.dense_prediction(F.gelu(self.dense(states)))[..., 0]


class MuxElectraForPreTraining(MuxElectraPreTrainedModel):
    """Discriminator: detects replaced tokens of every instance.

    Source: Murahari et al. 2023, section 3.2; Clark et al. 2020.
    """

    pretraining: ClassVar[bool] = True
    sees_segments: ClassVar[bool] = True
    overwrites_cls: ClassVar[bool] = True
    retrieves_padding: ClassVar[bool] = True
    multiplexers_of_others: ClassVar[tuple[str, ...]] = ()
    accepts_loss_kwargs: ClassVar[bool] = False  # Trainer counts labels, the loss all real tokens
    _keys_to_ignore_on_load_unexpected = (r"position_ids$", r"^generator\.")

    def __init__(self, config: MuxElectraConfig):
        super().__init__(config)
        self.add_demultiplexer()
        self.add_retrieval_head()
        self.discriminator_predictions = DiscriminatorHead(config.hidden_size)
        self._finish_init()

    def _finish_init(self) -> None:
        """Run `post_init`; a subclass creates its further modules before."""
        self.post_init()

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
        """Detect the replaced tokens of any number of rows.

        Args:
            input_ids: [R, S].
            attention_mask: [R, S]; the loss counts tokens where it is not 0.
            token_type_ids, position_ids: [R, S], of the tokens.
            labels: [R, S], 1 where a token was replaced; with labels there is a loss.
            num_items_in_batch, num_retrieval_items, retrieved_instances: see `MuxMaskedLM.forward`.
        Returns:
            `MuxOutput` (a tuple if `return_dict` is False), with logits [R, S], positive where a
            token seems replaced; with a prefix [R, S - N - 1], of the tokens that are not dropped.
            With labels and `task_loss_coeff` 0 there are no logits.
        Raises:
            ValueError: if there are no ids or no rows, if rows are too long or too short for a
                prefix, or if the model does not take an argument of `more`.
        """
        check_extra_arguments(self, more)
        batch = self.prepare_batch(input_ids, attention_mask, token_type_ids, position_ids)
        output = self.discriminate(
            batch, labels, num_items_in_batch, retrieved_instances, num_retrieval_items
        )
        return format_output(self, output, return_dict)

    def discriminate(
        self,
        batch: PreparedBatch,
        labels: Tensor | None,
        num_items: Tensor | float | None,
        retrieved_instances: Tensor | None,
        num_retrieval_items: Tensor | float | None,
    ) -> MuxOutput:
        """Detect the replaced tokens of a prepared batch.

        Args:
            batch: result of `prepare_batch`; its attention mask selects the tokens that count, and
                without a mask all do.
            labels: [R, S], 1 where a token was replaced; None: no loss.
            num_items, num_retrieval_items: divisors of the summed losses of detection and of
                retrieval; None for the numbers of items in this batch.
            retrieved_instances: [B, T], see `draw_retrieved_instances`; None to draw them.
        Returns:
            the same output as `forward`, never as a tuple.
        """
        hidden = self.encode(batch)
        needs_logits = labels is None or self.config.task_loss_coeff > 0
        output = MuxOutput()
        if needs_logits:
            states = self.demultiplex(hidden, slice(self.config.prefix_length, None))
            output["logits"] = self.discriminator_predictions(states).flatten(0, 1)[: batch.rows]
        if labels is None:
            return output
        if needs_logits:
            length = output.logits.shape[1]
            scores = F.binary_cross_entropy_with_logits(
                output.logits.float(), labels[:, :length].float(), reduction="none"
            )
            counted = torch.ones_like(labels) if batch.mask is None else batch.mask != 0
            counted = counted[: batch.rows, :length]
            count = counted.sum().clamp(min=1) if num_items is None else num_items
            output["task_loss"] = (scores * counted).sum() / count
        if self.config.retrieval_loss_coeff > 0:
            self.add_retrieval_loss(
                output, hidden, batch.ids, retrieved_instances, num_retrieval_items
            )
        output["loss"] = self.combine_losses(output.task_loss, output.retrieval_loss)
        return output


class ElectraClassifier(nn.Module):
    """Dense, gelu, projection, dropout before both: from `size` features to `labels` logits."""

    def __init__(self, size: int, labels: int, dropout: float):
        super().__init__()
        self.dense = mark_default_initialisation(nn.Linear(size, size))
        self.dropout = nn.Dropout(dropout)
        self.out_proj = mark_default_initialisation(nn.Linear(size, labels))

    def forward(self, states: Tensor) -> Tensor:
        """Compute logits of classes: states [..., D] -> [..., C]."""
        return self.out_proj(self.dropout(F.gelu(self.dense(self.dropout(states)))))


class MuxElectraForSequenceClassification(MuxElectraPreTrainedModel, MuxSequenceClassifier):
    """Two layers over the first state of every instance."""

    masks_instances: ClassVar[bool] = False
    retrieval_start: ClassVar[int] = 1

    def __init__(self, config: MuxElectraConfig):
        super().__init__(config)
        self.add_demultiplexer()
        self.add_retrieval_head_if_used()
        self.classifier = ElectraClassifier(
            config.hidden_size, config.num_labels, config.hidden_dropout_prob
        )
        self.post_init()

    def compute_class_logits(self, states: Tensor) -> Tensor:
        """Compute logits of states: [..., D] -> [..., C]; `classifier` applies the dropout."""
        return self.classifier(states)


class MuxElectraForTokenClassification(MuxElectraPreTrainedModel, MuxTokenClassifier):
    """A linear layer over every state of every instance."""

    def __init__(self, config: MuxElectraConfig):
        super().__init__(config)
        self.add_demultiplexer()
        self.add_retrieval_head_if_used()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = mark_default_initialisation(
            nn.Linear(config.hidden_size, config.num_labels)
        )
        self.post_init()
