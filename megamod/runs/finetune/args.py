"""The flags of finetuning. Light, so that a launcher can read them before anything heavy."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from megamod.args import Arguments, OptimArgs, RunArgs, option
from megamod.data.tasks.specs import METRICS
from megamod.errors import UserError


@dataclass
class RowArgs(Arguments):
    """How long rows are, and how many."""

    free_on_resume: ClassVar[frozenset[str]] = frozenset(
        (
            *("data_dir", "task_spec", "cache_dir", "max_eval_samples", "predict_split"),
            "dataloader_num_workers",
        )
    )
    max_seq_length: int = option(128, "tokens per row, special ones included", least=3)
    truncate: bool = option(
        False, "cut also rows with more tokens than the model has positions, which are refused else"
    )
    max_train_samples: int | None = option(None, "use the first rows of train only", least=1)
    max_eval_samples: int | None = option(None, "score the first rows of a split only", least=1)
    predict_split: str = option("test", "split that --do_predict answers, and others like it")
    repair_iob: bool = option(
        False, "labels of words: read an I- that begins an entity as B-, which is refused otherwise"
    )
    cache_dir: str | None = option(
        None, "folder that keeps token ids, by all that they depend on; none: they are not kept"
    )
    dataloader_num_workers: int = option(0, "processes that make batches, per rank", least=0)


@dataclass
class TaskArgs(RowArgs):
    """What is learned from which files."""

    task: str | None = option(None, "name of the task, such as sst-2 or wnut17")
    task_spec: str | None = option(None, "YAML file that describes a task, in place of --task")
    data_dir: str | None = option(
        None, "folder of the task's files, or the one above it; none: the hub"
    )
    pad_to_max_length: bool | None = option(
        None, "pad every row to --max_seq_length; none: if padding is mixed with text (N > 1)"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.task is not None and self.task_spec is not None:
            raise UserError(
                f"--task {self.task} and --task_spec {self.task_spec}: give one of them"
            )


@dataclass
class WordArgs(Arguments):
    """Labels per word."""

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
        False, "label all tokens of a word, not the first alone; B- goes on as I-"
    )


@dataclass
class StageArgs(Arguments):
    """Which model, and what is done with it."""

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
        None, "rate of all dropout, heads included; none: as the model says", least=0, most=0.9
    )
    do_train: bool = option(False, "train")
    do_eval: bool = option(False, "score the dev splits, in training every --eval_steps")
    do_predict: bool = option(False, "write predictions of --predict_split")
    seeds: list[str] | None = option(  # noqa: RUF009
        None, "train once with each seed, in OUT/seed-S; results are means and deviations"
    )
    num_train_epochs: float = option(3.0, "passes over train; --max_steps overrides it", least=0)

    def __post_init__(self):
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
class TunedArgs(StageArgs):
    """Which model, and what is done with it."""

    free_on_resume: ClassVar[frozenset[str]] = StageArgs.free_on_resume | {
        "ensemble",
        "metric_for_best_model",
    }
    num_instances: int | None = option(
        None, "instances that share a forward pass, N; none: as the model says", least=1
    )
    muxing_variant: str = option("gaussian_hadamard", "multiplexer of --config_name with N > 1")
    demuxing_variant: Literal["index_pos", "index"] = option(
        "index_pos", "demultiplexer of --config_name with N > 1"
    )
    retrieval_loss_coeff: float = option(
        0.0, "weight of retrieving every token besides the task (N > 1)", least=0
    )
    retrieval_percentage: float = option(
        1.0, "share of the tokens that are retrieved then", least=0, most=1
    )
    ensemble: bool = option(
        False, "score and predict by the mean of N copies of a row, in random places of the groups"
    )
    metric_for_best_model: str | None = option(
        None, "metric on dev that chooses OUT/model; none: the first one of the task"
    )

    def __post_init__(self):
        super().__post_init__()
        metric = self.metric_for_best_model
        if metric is not None and metric not in METRICS:
            raise UserError(f"--metric_for_best_model {metric} is none of {', '.join(METRICS)}")


@dataclass
class TunedRunArgs(RunArgs):
    """Length, batch, logging and saving; without --max_steps, epochs decide the length."""

    per_device_train_batch_size: int = option(
        32, "rows per rank and micro-batch; not given: 32 x --num_instances", least=1
    )
    per_device_eval_batch_size: int = option(
        32, "rows per rank and batch; not given: 32 x --num_instances", least=1
    )
    save_total_limit: int | None = option(2, "checkpoints to keep; none: all", least=1)


@dataclass
class TunedOptimArgs(OptimArgs):
    """AdamW and its schedule; the defaults are those of the MUX-PLM release."""

    learning_rate: float = option(5e-5, "peak learning rate", least=0)
    warmup_ratio: float = option(0.1, "warm-up as a share of all steps", least=0, most=1)
    adam_beta2: float = option(0.999, "decay of the second moment", least=0, most=0.99999)
    adam_epsilon: float = option(1e-8, "added to the root of the second moment", least=0)
    weight_decay: float = option(0.0, "decoupled weight decay of all parameters", least=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: off", least=0)
