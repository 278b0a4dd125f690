"""Finetuning on one task: labels of sentences, pairs or words; one instance or N per pass."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)

from megamod.data.batches import BatchDivision
from megamod.data.tasks.classification import TrainRows
from megamod.data.tasks.specs import TaskSpec, find_text_task, make_token_task
from megamod.data.tasks.task_file import read_task_spec
from megamod.errors import UserError
from megamod.models.auto import has_auto_class
from megamod.models.build import make_bert_config, set_dropout
from megamod.models.classifier_inputs import (
    compute_max_row_tokens,
    list_input_fields,
    needs_fixed_length,
)
from megamod.models.pretrained import check_all_weights_loaded, load_pretrained
from megamod.runs.finetune.args import OneTaskArgs, TaskArgs, WordArgs
from megamod.runs.finetune.labels import set_config_labels
from megamod.runs.finetune.model import FinetuneModel
from megamod.runs.finetune.source import load_matching_tokenizer, read_start_config
from megamod.runs.finetune.tasks import FinetuneTask, list_splits_to_read, read_and_encode_task
from megamod.train.objectives import ClassificationObjective

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class OneTaskModel(FinetuneModel):
    """A classifier of one task.

    Attributes:
        weights: folder or hub name whose weights start the run; None: new ones.
        is_trained: before the run, which does not train, so `weights` must hold all weights.
        retrieved_per_token: see `ClassificationObjective`.
    """

    task: FinetuneTask
    config: PreTrainedConfig
    tokenizer: "PreTrainedTokenizerFast"
    weights: str | None
    is_trained: bool
    inputs: tuple[str, ...]
    instances: int
    retrieved_per_token: float
    pad_to: int | None
    ensemble: bool
    has_many_tasks = False

    @property
    def tasks(self) -> tuple[FinetuneTask]:
        """The only task."""
        return (self.task,)

    def make_module(self, seed: int, folder: Path | None = None) -> nn.Module:
        """Build the classifier with the weights of the run's start; others are drawn with the seed.

        Args:
            seed: seed of the weights that the source lacks.
            folder: without effect.
        Raises:
            UserError: if the weights cannot be loaded, or some are missing and the run does not
                train.
        """
        torch.manual_seed(seed)
        kind = select_head_class(self.task.spec)
        if self.weights is None:
            return kind.from_config(self.config, dtype=torch.float32)
        return _load_classifier(kind, self.weights, self.is_trained, config=self.config)

    def load_module(self, folder: Path) -> nn.Module:
        """Load the classifier of a finished run in float32, from its model folder.

        Raises:
            UserError: if it cannot be loaded or lacks weights.
        """
        return _load_classifier(select_head_class(self.task.spec), str(folder), True)

    def list_classifiers(self, module: nn.Module) -> list[nn.Module]:
        """Return the classifier, the only one."""
        return [module]

    def make_batches(self, division: BatchDivision, seed: int) -> TrainRows:
        """Make the training micro-batches of a rank.

        Args:
            division: division of a step over the ranks, as seen from this one.
            seed: seed of the order of the rows, another one in each epoch.
        """
        return TrainRows(
            self.task.encoded["train"],
            division,
            seed=seed,
            instances=self.instances,
            pad_to=self.pad_to,
        )

    def compute_steps_per_epoch(self, batches: TrainRows) -> float:
        """Return the rows of train divided by the global batch size, which need not be whole."""
        return len(batches.encoded) / batches.division.global_batch

    def make_objective(self, device: torch.device) -> ClassificationObjective:
        """Return the training loss of the task, with the retrieval loss if it has a weight."""
        return ClassificationObjective(
            self.inputs, device, self.task.spec.is_regression, self.retrieved_per_token
        )

    def make_row_selector(self, batches: TrainRows, device: torch.device) -> None:
        """Return None: all rows are trained on."""
        return None


def prepare_one_task_model(
    stage: OneTaskArgs, args: TaskArgs, words: WordArgs | None = None
) -> OneTaskModel:
    """Read, check and encode the task, and check the model; no weights are loaded.

    Args:
        stage: flags of the model and of the stages.
        args: flags of the task.
        words: flags of a task of labels of words; None: the task is one of texts.
    Raises:
        UserError: for a task, file, row, model or length that does not fit.
    """
    spec = _find_task_spec(args, words)
    splits = list_splits_to_read(spec, stage, args.predict_split)
    config, weights = read_start_config(
        stage,
        lambda kind: has_auto_class(select_head_class(spec), kind),
        f"a model with a head for {spec.name}",
    )
    tokenizer = load_matching_tokenizer(
        config, stage.model or stage.config_name, stage.tokenizer_name
    )
    if config is None:
        config = make_bert_config(
            stage.config_name,
            len(tokenizer),
            num_instances=stage.num_instances,
            muxing_variant=stage.muxing_variant,
            demuxing_variant=stage.demuxing_variant,
        )
    instances = _get_instance_count(config, stage)
    task = read_and_encode_task(
        spec,
        _find_data_dir(spec, args),
        splits,
        config,
        tokenizer,
        args,
        trained=not stage.do_train,
        label_all=words is not None and words.label_all_tokens,
    )
    spec = task.spec
    if stage.metric_for_best_model is not None:
        others = [name for name in spec.metrics if name != stage.metric_for_best_model]
        spec = replace(spec, metrics=(stage.metric_for_best_model, *others))
    set_config_labels(config, spec)
    _set_retrieval_loss(config, stage)
    set_dropout(config, stage.dropout)
    is_fixed = args.pad_to_max_length
    if is_fixed is None:
        is_fixed = needs_fixed_length(config)
    return OneTaskModel(
        task=replace(task, spec=spec),
        config=config,
        tokenizer=tokenizer,
        weights=weights,
        is_trained=not stage.do_train,
        inputs=list_input_fields(config),
        instances=instances,
        # A position that N instances share retrieves the token of one of them.
        retrieved_per_token=(
            stage.retrieval_percentage / instances if stage.retrieval_loss_coeff else 0.0
        ),
        pad_to=min(args.max_seq_length, compute_max_row_tokens(config)) if is_fixed else None,
        ensemble=stage.ensemble,
    )


def select_head_class(spec: TaskSpec) -> type:
    """Return the Auto class of transformers for a task."""
    if spec.kind == "token":
        return AutoModelForTokenClassification
    return AutoModelForSequenceClassification


def _load_classifier(kind: type, source: str, complete: bool, **options: object) -> nn.Module:
    """Load a classifier in float32 from a folder or the hub, for `OneTaskModel`.

    Args:
        kind: Auto class of transformers.
        source: folder or hub name.
        complete: refuse a checkpoint without all weights; otherwise missing ones, and those of
            another shape, are drawn from torch's generator.
        options: passed to `from_pretrained`.
    Raises:
        UserError: if it cannot be loaded or lacks weights.
    """
    model, report = load_pretrained(
        kind, source, "--model", ignore_mismatched_sizes=True, **options
    )
    if complete:
        check_all_weights_loaded(report, f"--model {source}")
    return model


def _find_task_spec(args: TaskArgs, words: WordArgs | None) -> TaskSpec:
    """Return the task of --task_spec or --task.

    Args:
        args: flags of the task.
        words: see `prepare_one_task_model`.
    Raises:
        UserError: if none is named, it is unknown or malformed, or labels words where `words` is
            None, or texts where it is not.
    """
    if args.task_spec is not None:
        spec = read_task_spec(args.task_spec)
    elif args.task is None:
        raise UserError("--task is missing: name of the task; --task_spec FILE describes another")
    elif words is not None:
        spec = make_token_task(args.task, words.word_column, words.label_column)
    else:
        spec = find_text_task(args.task)
    if (spec.kind == "token") != (words is not None):
        raise UserError(
            f"task {spec.name} is of kind {spec.kind}: "
            "finetune_ner.py is for labels of words, finetune_glue.py for those of sentences"
        )
    return spec


def _find_data_dir(spec: TaskSpec, args: TaskArgs) -> str | None:
    """Return the folder to look for the task's files in; None: the hub.

    It is --data_dir; without it the folder of the --task_spec file, if the task is not on the hub.

    Args:
        spec: the task.
        args: flags of the task.
    """
    if args.data_dir is None and args.task_spec is not None and spec.hub is None:
        return str(Path(args.task_spec).parent)
    return args.data_dir


def _get_instance_count(config: PreTrainedConfig, stage: OneTaskArgs) -> int:
    """Return N, the number of instances that share a forward pass of the model.

    Args:
        config: configuration of the model, which has `num_instances` if it is multiplexed.
        stage: flags of the model.
    Raises:
        UserError: if --num_instances gives another one.
    """
    instances = getattr(config, "num_instances", 1)
    if stage.num_instances not in (None, instances):
        raise UserError(
            f"--num_instances {stage.num_instances}: the model {stage.model or stage.config_name} "
            f"is made for {instances}; `megamod pretrain --objective masked_lm --init_from "
            "MODEL --num_instances N` makes one for N"
        )
    return instances


def _set_retrieval_loss(config: PreTrainedConfig, stage: OneTaskArgs) -> None:
    """Set the weights of the losses in the configuration of a model, in place.

    That of the task is 1; weight and share of tokens of the retrieval loss are those of the flags.
    A checkpoint has the values of its own pretraining, which are overwritten.

    Args:
        config: configuration of the model; of a model that is not multiplexed it does not change.
        stage: flags of the model.
    Raises:
        UserError: if --retrieval_loss_coeff is given for a model that is not multiplexed.
    """
    if hasattr(config, "retrieval_loss_coeff"):
        config.task_loss_coeff = 1.0
        config.retrieval_loss_coeff = stage.retrieval_loss_coeff
        config.retrieval_percentage = stage.retrieval_percentage
    elif stage.retrieval_loss_coeff:
        raise UserError(
            f"--retrieval_loss_coeff {stage.retrieval_loss_coeff}: "
            f"{stage.model or stage.config_name} is no multiplexed model, so no token is retrieved"
        )
