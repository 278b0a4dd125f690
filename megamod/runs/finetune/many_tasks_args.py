"""The flags of finetuning on many tasks at once. Light, as all flags are."""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from megamod.args import option
from megamod.errors import UserError
from megamod.runs.finetune.args import RowArgs, StageArgs

NAMED = {"CA-MTL-base": ("bert-base-cased", "base"), "CA-MTL-large": ("bert-large-cased", "large")}
"""Names that the release gives to a stack on an encoder of the hub."""


@dataclass
class MixtureArgs(RowArgs):
    """Which tasks, from which files, and which of their rows come when."""

    tasks: list[str] | None = option(  # noqa: RUF009
        None,
        "names of tasks, or YAML files that describe one; none: those of --model, else GLUE's nine",
    )
    data_dir: list[str] | None = option(  # noqa: RUF009
        None, "folders of the tasks' files; each is taken from the first that has it; none: the hub"
    )
    mt_sampling: Literal["proportional", "temperature", "uniform", "sequential", "uncertainty"] = (
        option(
            "proportional",
            "proportional: all rows mixed; temperature: by size^alpha; uniform: a task per step, "
            "in turn; sequential: one task after the other; uncertainty: of as many rows of each "
            "task as a batch has, those that the model is least sure about",
        )
    )
    use_mt_uncertainty: bool = option(False, "the same as --mt_sampling uncertainty")
    uniform_mt_sampling: bool = option(False, "the same as --mt_sampling uniform")
    sampling_alpha: float = option(0.5, "exponent of --mt_sampling temperature", least=0, most=1)
    percent_of_max_data_size: float = option(
        1.0, "share of an epoch, for --mt_sampling uniform and uncertainty", least=0, most=1
    )
    uncertainty_score: Literal["release", "paper"] = option(
        "release", "entropy of a row, times the mean of its task (release) or alone (paper)"
    )
    uncertainty_regression: Literal["borrow", "mean", "release"] = option(
        "borrow",
        "what a row of a regression is worth, which has no entropy: in STS-B as much as a row of "
        "MRPC (release), else as much as one of any classification (borrow) or as their mean",
    )
    uncertainty_eval_mode: bool = option(True, "score candidates without dropout")
    uncertainty_selection: Literal["local", "global"] = option(
        "local", "choose among the candidates of each micro-batch, or of all ranks together"
    )
    task_loss_reduction: Literal["local", "global"] = option(
        "local",
        "mean over the tasks of each micro-batch, or of the step: then ranks do not matter",
    )

    def __post_init__(self):
        super().__post_init__()
        for flag, sampling in (
            ("use_mt_uncertainty", "uncertainty"),
            ("uniform_mt_sampling", "uniform"),
        ):
            if getattr(self, flag):
                if self.mt_sampling not in ("proportional", sampling):
                    raise UserError(f"--{flag} and --mt_sampling {self.mt_sampling}: give one")
                self.mt_sampling = sampling
        if self.use_mt_uncertainty and self.uniform_mt_sampling:
            raise UserError("--use_mt_uncertainty and --uniform_mt_sampling: give one of them")
        for name in self.tasks or ():
            if self.tasks.count(name) > 1:
                raise UserError(f"--tasks: {name} is there twice")


@dataclass
class ConditionedArgs(StageArgs):
    """Which model, what of it is trained, and what is done with it."""

    free_on_resume: ClassVar[frozenset[str]] = StageArgs.free_on_resume
    variant: Literal["base", "large", "plain"] | None = option(
        None,
        "conditioning that is built around the encoder; plain: none, all tasks share BERT; none: "
        "as --model says, else base",
    )
    freeze_encoder_layers: str | None = option(
        None, "A-B: do not train embeddings and blocks A to B, but what conditions them; from 0"
    )
    freeze_compat: Literal["paper", "release"] = option(
        "paper", "release: leave the attention biases of frozen blocks as they are drawn"
    )
    init_top_from_pretrained: bool = option(
        True, "give the top block of base its pretrained weights, which the release does not"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.model in NAMED:
            self.model, self.variant = NAMED[self.model]
        if self.freeze_encoder_layers is not None:
            self.frozen_blocks()  # a mistake in it shows at once

    def frozen_blocks(self) -> tuple[int, int] | None:
        """First and last block that are not trained; None: all are.

        Raises:
            UserError: if the flag is not A-B.
        """
        if self.freeze_encoder_layers is None:
            return None
        found = re.fullmatch(r"(\d{1,4})-(\d{1,4})", self.freeze_encoder_layers)
        if not found or int(found[1]) > int(found[2]):
            raise UserError(
                f"--freeze_encoder_layers {self.freeze_encoder_layers}: give two numbers of "
                "blocks, such as 0-5"
            )
        return int(found[1]), int(found[2])
