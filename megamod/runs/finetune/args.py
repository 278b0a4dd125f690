"""Flags of finetuning. Light, so that a launcher can read them before anything heavy."""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from megamod.args import OptimArgs, RunArgs
from megamod.data.tasks.specs import METRICS
from megamod.errors import UserError
from megamod.flags import Arguments, option, refuse_values_without_effect

RELEASED_MODELS = {
    "CA-MTL-base": ("google-bert/bert-base-cased", "base"),
    "CA-MTL-large": ("google-bert/bert-large-cased", "large"),
}
"""By name of a model in the release of CA-MTL: its encoder on the hub, and its variant."""


@dataclass
class RowArgs(Arguments):
    """Length and number of the rows, and how they are read."""

    free_on_resume: ClassVar[frozenset[str]] = frozenset(
        (
            *("data_dir", "task_spec", "cache_dir", "max_eval_samples", "predict_split"),
            "dataloader_num_workers",
        )
    )
    # At least [CLS], one token and [SEP].
    max_seq_length: int = option(128, "tokens per row, special ones included", least=3)
    truncate: bool = option(
        False, "cut rows with more tokens than the model has positions, instead of refusing them"
    )
    max_train_samples: int | None = option(None, "use the first rows of train only", least=1)
    max_eval_samples: int | None = option(None, "score the first rows of a split only", least=1)
    predict_split: str = option("test", "predict the splits whose names begin so")
    repair_iob: bool = option(
        False, "labels of words: read an I- that begins an entity as B-, instead of refusing it"
    )
    cache_dir: str | None = option(None, "folder of a cache of token ids; none: no cache")
    dataloader_num_workers: int = option(
        0, "processes per rank that prepare batches", least=0, most=1024
    )


@dataclass
class TaskArgs(RowArgs):
    """The task and its files."""

    task: str | None = option(None, "name of the task, such as sst-2 or wnut17")
    task_spec: str | None = option(None, "YAML file that describes a task, instead of --task")
    data_dir: str | None = option(None, "folder of the task's files, or its parent; none: the hub")
    pad_to_max_length: bool | None = option(
        None, "pad every row to --max_seq_length; none: only for multiplexed models (N > 1)"
    )

    def __post_init__(self):
        """Check the flags.

        Raises:
            UserError: if both --task and --task_spec are given.
        """
        super().__post_init__()
        if self.task is not None and self.task_spec is not None:
            raise UserError(
                f"--task {self.task} and --task_spec {self.task_spec}: give one of them"
            )


@dataclass
class WordArgs(Arguments):
    """Labels of words."""

    word_column: int | None = option(
        None,
        "column of the word from 0, -1: the last; none: FORM of CoNLL-U, else the first one that "
        "does not number the words",
    )
    label_column: int | None = option(
        None,
        "column of the label from 0, -1: the last; none: UPOS of CoNLL-U, the one after the word "
        "for pos and ud_..., else the last",
    )
    label_all_tokens: bool = option(
        False, "label all tokens of a word instead of the first; B- continues as I-"
    )


@dataclass
class StageArgs(Arguments):
    """The model that a run starts from, and the stages of the run."""

    free_on_resume: ClassVar[frozenset[str]] = frozenset(
        ("do_train", "do_eval", "do_predict", "seeds", "num_train_epochs")
    )
    model: str | None = option(
        None,
        "model folder or name on the hub; a folder with config.json alone starts from scratch",
        alias="model_name_or_path",
    )
    config_name: str | None = option(
        None,
        "start from scratch: bert_tiny, bert_mini, bert_small, bert_base, bert_large, a folder",
    )
    tokenizer_name: str | None = option(None, "tokenizer folder or name; none: that of --model")
    dropout: float | None = option(
        None, "rate of all dropout, heads included; none: that of the model", least=0, most=0.9
    )
    do_train: bool = option(False, "train")
    do_eval: bool = option(False, "score the dev splits, in training every --eval_steps")
    do_predict: bool = option(False, "write predictions of --predict_split")
    seeds: list[str] | None = option(  # noqa: RUF009
        None, "train once with each seed, in OUT/seed-S; results are means and deviations"
    )
    num_train_epochs: float = option(3.0, "passes over train; --max_steps overrides it", least=0)

    def __post_init__(self):
        """Check the flags.

        Raises:
            UserError: for --seeds that are not different whole numbers below 2**32, or without
                --do_train; if no stage is selected; or if both --model and --config_name are given.
        """
        super().__post_init__()
        for seed in self.seeds or ():
            if not seed.isdecimal() or int(seed) >= 2**32 or self.seeds.count(seed) > 1:
                raise UserError(
                    f"--seeds: {seed!r} is not a whole number below {2**32} that is given once"
                )
        if self.seeds is not None and not self.do_train:
            raise UserError("--seeds: only training has a seed; give --do_train too")
        if not (self.do_train or self.do_eval or self.do_predict):
            raise UserError("nothing to do: give --do_train, --do_eval or --do_predict")
        if self.model is not None and self.config_name is not None:
            raise UserError(
                f"--model {self.model} and --config_name {self.config_name}: give one of the two"
            )


@dataclass
class OneTaskArgs(StageArgs):
    """A model with one task, and the stages of the run."""

    free_on_resume: ClassVar[frozenset[str]] = StageArgs.free_on_resume | {
        "ensemble",
        "metric_for_best_model",
    }
    num_instances: int | None = option(
        None, "instances that share a forward pass, N; none: that of the model", least=1
    )
    muxing_variant: str = option("gaussian_hadamard", "multiplexer of --config_name with N > 1")
    demuxing_variant: Literal["index_pos", "index"] = option(
        "index_pos", "demultiplexer of --config_name with N > 1"
    )
    retrieval_loss_coeff: float = option(
        0.0, "weight of the retrieval loss, added to the task's (N > 1)", least=0
    )
    retrieval_percentage: float = option(
        1.0, "share of the tokens that the retrieval loss covers", least=0, most=1
    )
    ensemble: bool = option(
        False, "score and predict by the mean over N copies of a row, in random positions"
    )
    metric_for_best_model: str | None = option(
        None, "metric on dev that chooses OUT/model; none: the first one of the task"
    )

    def __post_init__(self):
        """Check the flags.

        Raises:
            UserError: if the metric is unknown, or as `StageArgs`.
        """
        super().__post_init__()
        metric = self.metric_for_best_model
        if metric is not None and metric not in METRICS:
            raise UserError(f"--metric_for_best_model {metric} is none of {', '.join(METRICS)}")


@dataclass
class FinetuneRunArgs(RunArgs):
    """Length, batch, logging and saving; without --max_steps, --num_train_epochs is the length."""

    per_device_train_batch_size: int = option(
        32, "rows per rank and micro-batch; default: 32 x --num_instances", least=1
    )
    per_device_eval_batch_size: int = option(
        32, "rows per rank and batch; default: 32 x --num_instances", least=1
    )
    save_total_limit: int | None = option(2, "checkpoints to keep; none: all", least=1)


@dataclass
class FinetuneOptimArgs(OptimArgs):
    """AdamW and its schedule; the defaults are those of the MUX-PLM release."""

    learning_rate: float = option(5e-5, "peak learning rate", least=0)
    warmup_ratio: float = option(0.1, "warm-up as a share of all steps", least=0, most=1)
    adam_beta2: float = option(0.999, "decay of the second moment", least=0, most=0.99999)
    adam_epsilon: float = option(1e-8, "added to the root of the second moment", least=0)
    weight_decay: float = option(0.0, "decoupled weight decay of all parameters", least=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: off", least=0)

    def __post_init__(self):
        """Check the flags.

        Raises:
            UserError: for another optimizer than AdamW.
        """
        super().__post_init__()
        refuse_values_without_effect(self, ("optim",), "finetuning trains with AdamW")


@dataclass
class TaskListArgs(RowArgs):
    """Tasks, their files, and the sampling of their rows."""

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
            "proportional: all rows mixed; temperature: by size^alpha; uniform: one task per step, "
            "in turn; sequential: one task after the other; uncertainty: the rows that the model "
            "is least sure about, of a batch of each task",
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
        "score of rows of a regression, which have no entropy: that of rows of MRPC for STS-B "
        "(release), otherwise of any classification (borrow), or the mean of all others (mean)",
    )
    uncertainty_eval_mode: bool = option(True, "score candidates without dropout")
    uncertainty_selection: Literal["local", "global"] = option(
        "local", "select among the candidates of a micro-batch (local) or of all ranks (global)"
    )
    task_loss_reduction: Literal["local", "global"] = option(
        "local",
        "mean over the tasks of a micro-batch (local) or of the whole step on all ranks (global)",
    )

    def __post_init__(self):
        """Check the flags; a flag that is short for a value of --mt_sampling sets it.

        These are --use_mt_uncertainty and --uniform_mt_sampling.

        Raises:
            UserError: for flags that ask for two samplings, or a task that is listed twice.
        """
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
                raise UserError(f"--tasks: {name} is listed twice")


@dataclass
class ManyTasksArgs(StageArgs):
    """A model with many tasks, its trained parts, and the stages of the run."""

    free_on_resume: ClassVar[frozenset[str]] = StageArgs.free_on_resume
    variant: Literal["base", "large", "plain"] | None = option(
        None,
        "conditioning around the encoder; plain: no conditioning, all tasks share BERT; none: "
        "that of --model, or base",
    )
    freeze_encoder_layers: str | None = option(
        None, "A-B: freeze embeddings and blocks A to B (from 0), except their conditioning"
    )
    freeze_compat: Literal["paper", "release"] = option(
        "paper", "release: freeze the attention biases of frozen blocks too"
    )
    init_top_from_pretrained: bool = option(
        True, "load the pretrained weights of the top block of base; the release does not"
    )

    def __post_init__(self):
        """Check the flags; replace a --model of `RELEASED_MODELS` by its encoder.

        `variant` becomes that of the released model, even if --variant is given.

        Raises:
            UserError: if --freeze_encoder_layers is not A-B, or as `StageArgs`.
        """
        super().__post_init__()
        if self.model in RELEASED_MODELS:
            self.model, self.variant = RELEASED_MODELS[self.model]
        if self.freeze_encoder_layers is not None:
            self.parse_frozen_blocks()  # check the flag at once

    def parse_frozen_blocks(self) -> tuple[int, int] | None:
        """Return the first and the last frozen block, from 0, both included; None: none is frozen.

        Raises:
            UserError: if the flag is not A-B.
        """
        if self.freeze_encoder_layers is None:
            return None
        match = re.fullmatch(r"(\d{1,4})-(\d{1,4})", self.freeze_encoder_layers)
        if not match or int(match[1]) > int(match[2]):
            raise UserError(
                f"--freeze_encoder_layers {self.freeze_encoder_layers}: give two numbers of "
                "blocks, such as 0-5"
            )
        return int(match[1]), int(match[2])
