"""Inputs, intermediate states and outputs of multiplexed encoders."""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput


@dataclass
class MuxOutput(ModelOutput):
    """Output of a multiplexed model; fields that are not computed are None.

    Attributes:
        loss: sum of the two terms below times their coefficients.
        logits: shape as in the `forward` of the model's class.
        task_loss: summed loss of the task divided by its items, nats.
        retrieval_loss: summed loss of token retrieval divided by its items, nats.
        retrieval_correct, retrieval_count: numbers of correctly retrieved and of all target tokens.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    task_loss: Tensor | None = None
    retrieval_loss: Tensor | None = None
    retrieval_correct: Tensor | None = None
    retrieval_count: Tensor | None = None


@dataclass(frozen=True)
class PreparedBatch:
    """A batch of whole groups, with the prefix if the model has one: B groups of N rows.

    Attributes:
        rows: rows of the caller's batch; later ones only fill up the last group.
        ids: [B * N, T].
        mask: attention mask of the caller's columns [B * N, S], or None.
        token_type_ids: [B * N, T] or None.
        position_ids: as passed by the caller, rows that fill up the last group included; or None.
    """

    rows: int
    ids: Tensor
    mask: Tensor | None
    token_type_ids: Tensor | None
    position_ids: Tensor | None


@dataclass
class MixedStates:
    """Hidden states of mixed sequences.

    Attributes:
        states: [B, L, D].
        norm: the encoder's last LayerNorm, if it is not yet applied to `states`; otherwise None.
    """

    states: Tensor
    norm: nn.LayerNorm | None = None

    def apply_norm(self) -> Tensor:
        """Apply the norm, if it is not yet applied: [B, L, D]."""
        return self.states if self.norm is None else self.norm(self.states)
