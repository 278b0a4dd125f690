"""What multiplexed encoders are fed, hand on inside, and return."""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput


@dataclass
class MuxOutput(ModelOutput):
    """What a multiplexed model returns; what was not asked for is None.

    Attributes:
        loss: coefficients times the two terms below, summed.
        logits: see the model.
        task_loss: summed loss of the task divided by its items, nats.
        retrieval_loss: the same of retrieving tokens.
        retrieval_correct, retrieval_count: tokens retrieved rightly, and all that were asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    task_loss: Tensor | None = None
    retrieval_loss: Tensor | None = None
    retrieval_correct: Tensor | None = None
    retrieval_count: Tensor | None = None


@dataclass(frozen=True)
class Fed:
    """A batch as the encoder gets it: whole groups, with a prefix where one belongs.

    Attributes:
        rows: rows of the caller's batch; those behind them only fill up the last group.
        ids: [B * N, T].
        mask: attention mask of the caller's columns [B * N, S], or None.
        token_type_ids: [B * N, T] or None.
        position_ids: as given.
    """

    rows: int
    ids: Tensor
    mask: Tensor | None
    token_type_ids: Tensor | None
    position_ids: Tensor | None


@dataclass
class MixedStates:
    """What the encoder makes of mixed sequences.

    Attributes:
        states: [B, L, D].
        norm: the encoder's last, if it is left to whoever reads the states; else None.
    """

    states: Tensor
    norm: nn.LayerNorm | None = None

    def normed(self) -> Tensor:
        """[B, L, D], behind the norm in any case."""
        return self.states if self.norm is None else self.norm(self.states)
