"""The flags of an adaptation. Light, so that a launcher can read them before anything heavy."""

from dataclasses import dataclass
from typing import Literal

from megamod.args import VERIFY_DATA, OptimArgs
from megamod.errors import UserError
from megamod.flags import Arguments, option, refuse_values_without_effect
from megamod.names import check_domain


@dataclass
class AdaptArgs(Arguments):
    """Model and text of an adaptation."""

    forest: str | None = option(
        None, "forest.json, its folder, or the folder of a model with experts (DEMix)"
    )
    model: str | None = option(
        None, "folder of a dense model, instead of --forest", alias="model_name_or_path"
    )
    data: str | None = option(None, "data-bin folder written by megamod preprocess")
    verify_data: Literal["size", "sample", "full"] = option("sample", VERIFY_DATA)
    domain: str | None = option(None, "domain of the data-bin to adapt to; names the new expert")
    method: Literal["feedforward", "full"] = option(
        "feedforward", "train the feed-forward networks alone, or everything"
    )
    start: str | None = option(
        None, "expert to start from; none: that of the highest posterior on the valid split"
    )
    prior: str | None = option(
        None, "JSON of megamod eval-ensemble with the weights that select the start"
    )
    prior_sequences: int = option(
        100, "sequences of the valid split that select the start", least=1
    )
    max_seq_length: int | None = option(
        None, "tokens per sequence; none: as many as the experts have positions", least=2
    )
    dataloader_num_workers: int = option(
        0, "processes that read data, per rank", least=0, most=1024
    )
    eval_split: Literal["valid", "test", "train"] = option("valid", "split of the evaluation")
    gradient_checkpointing: bool = option(False, "recompute blocks in the backward pass")
    attn_implementation: Literal["sdpa", "eager"] | None = option(
        None, "code path of attention; none: sdpa where the model has it"
    )

    def __post_init__(self):
        """Check the flags.

        Raises:
            UserError: for a domain that cannot be a name, or flags that contradict each other.
        """
        super().__post_init__()
        if self.domain is not None:
            check_domain(self.domain, "--domain")
        if self.forest is not None and self.model is not None:
            raise UserError(f"--forest {self.forest} and --model {self.model}: give one of the two")
        if self.start is not None and self.prior is not None:
            raise UserError(f"--start {self.start} and --prior {self.prior}: give one of the two")
        for flag in ("start", "prior"):
            value = getattr(self, flag)
            if value is not None and self.model is not None:
                raise UserError(f"--{flag} {value}: --model {self.model} is a single model")
            if value is not None:
                refuse_values_without_effect(self, ("prior_sequences",), f"--{flag} is {value}")
        if self.model is not None:
            refuse_values_without_effect(self, ("prior_sequences",), "--model is a single model")


@dataclass
class AdaptOptimArgs(OptimArgs):
    """AdamW and its schedule; a tenth of the learning rate of pretraining."""

    learning_rate: float = option(5e-5, "peak learning rate", least=0)

    def __post_init__(self):
        """Check the flags.

        Raises:
            UserError: for another optimizer than AdamW.
        """
        super().__post_init__()
        refuse_values_without_effect(self, ("optim",), "adaptation trains with AdamW")
