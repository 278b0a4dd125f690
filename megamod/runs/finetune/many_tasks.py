"""Finetuning on many tasks at once: CA-MTL, or a plain BERT with a head per task.

Source: Pilault et al. 2021 (CA-MTL), sections 2 and 3.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from megamod.data.batches import BatchDivision
from megamod.data.tasks.classification import RowLengthLimits
from megamod.data.tasks.specs import GLUE, TaskSpec, format_some_names
from megamod.data.tasks.task_mixture import TaskMixture
from megamod.errors import UserError
from megamod.files import write_json
from megamod.flags import find_origin
from megamod.models.build import make_bert_config, set_dropout
from megamod.models.ca_mtl.configuration import CaMtlConfig
from megamod.models.ca_mtl.model import (
    CaMtlForMultiTask,
    SingleTaskModel,
    freeze_blocks,
    load_from_encoder,
)
from megamod.models.classifier_inputs import list_input_fields
from megamod.runs.finetune.args import ManyTasksArgs, TaskListArgs
from megamod.runs.finetune.labels import order_labels
from megamod.runs.finetune.model import FinetuneModel
from megamod.runs.finetune.source import load_matching_tokenizer, read_start_config
from megamod.runs.finetune.tasks import (
    FinetuneTask,
    Rows,
    encode_rows,
    find_folder_with_files,
    find_task_and_folders,
    list_splits_to_read,
    read_rows,
)
from megamod.train.objectives import MultiTaskObjective
from megamod.train.selection import UncertaintySelector

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ManyTasksModel(FinetuneModel):
    """CA-MTL with a head for each task.

    Attributes:
        tasks: in the order of their ids.
        weights: folder or hub name whose weights start the run; None: new ones.
        loads_last_block: see `load_last_block` of `load_from_encoder`.
        stage: flags of the model and of the stages.
        args: flags of the tasks and their sampling.
    """

    tasks: tuple[FinetuneTask, ...]
    config: CaMtlConfig
    tokenizer: "PreTrainedTokenizerFast"
    weights: str | None
    loads_last_block: bool
    stage: ManyTasksArgs
    args: TaskListArgs
    has_many_tasks = True
    instances = 1
    pad_to = None
    ensemble = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """Fields of a batch that the model takes."""
        return list_input_fields(self.config)

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks in the order of their ids."""
        return tuple(task.spec.name for task in self.tasks)

    def make_module(self, seed: int, folder: Path | None = None) -> CaMtlForMultiTask:
        """Build the model with the weights of the run's start; blocks may be frozen by the flags.

        Args:
            seed: seed of the weights that are not loaded.
            folder: folder of the run, which exists; rank 0 writes start.json there, the names of
                loaded, new and unused tensors. None: no file.
        Raises:
            UserError: as `load_from_encoder`, or if weights are missing and the run does not train.
        """
        torch.manual_seed(seed)
        if self.weights is None:
            model = CaMtlForMultiTask(self.config).float()
            report = {"loaded": [], "new": [n for n, _ in model.named_parameters()], "unused": []}
            logger.info("new weights: %d tensors", len(report["new"]))
        else:
            model, report = load_from_encoder(
                self.weights, self.config, load_last_block=self.loads_last_block
            )
            logger.info(
                "%s: %d tensors loaded, %d new, %d of it unused",
                self.weights,
                *(len(report[kind]) for kind in ("loaded", "new", "unused")),
            )
        if not self.stage.do_train and report["new"]:
            raise UserError(
                f"--model {self.weights}: {len(report['new'])} of its weights are missing, such as "
                f"{min(report['new'])}; train it first (--do_train)"
            )
        frozen = self.stage.parse_frozen_blocks()
        if frozen is not None:
            freeze_blocks(model, *frozen, as_released=self.stage.freeze_compat == "release")
        if folder is not None and dist.get_rank() == 0:
            write_json(folder / "start.json", {"weights": self.weights, **report})
        return model

    def load_module(self, folder: Path) -> CaMtlForMultiTask:
        """Load the model of a finished run in float32, from its model folder."""
        return CaMtlForMultiTask.from_pretrained(folder, dtype=torch.float32)

    def list_classifiers(self, module: CaMtlForMultiTask) -> list[SingleTaskModel]:
        """Return a view of the model for each task, in the order of their ids."""
        return [SingleTaskModel(module, number) for number in range(len(self.tasks))]

    def make_batches(self, division: BatchDivision, seed: int) -> TaskMixture:
        """Make the training micro-batches of a rank, mixed from the tasks as --mt_sampling says.

        Args:
            division: division of a step over the ranks, as seen from this one.
            seed: seed of the order of rows and tasks.
        """
        return TaskMixture(
            [task.encoded["train"] for task in self.tasks],
            self.args.mt_sampling,
            division,
            seed=seed,
            alpha=self.args.sampling_alpha,
        )

    def compute_steps_per_epoch(self, batches: TaskMixture) -> int:
        """Compute the steps of an epoch, see `TaskMixture.compute_steps_per_epoch`."""
        return batches.compute_steps_per_epoch(self.args.percent_of_max_data_size)

    def make_objective(self, device: torch.device) -> MultiTaskObjective:
        """Return the training loss: the mean over tasks that --task_loss_reduction selects."""
        return MultiTaskObjective(
            self.inputs, self.task_names, device, self.args.task_loss_reduction
        )

    def make_row_selector(
        self, batches: TaskMixture, device: torch.device
    ) -> UncertaintySelector | None:
        """Make the selection of the least certain rows of each step; None with another sampling.

        Args:
            batches: the training micro-batches of this rank, with candidates of every task.
            device: device of the model.
        """
        if self.args.mt_sampling != "uncertainty":
            return None
        return UncertaintySelector(
            batches,
            self.inputs,
            self.task_names,
            self.config.task_kinds,
            device,
            scope=self.args.uncertainty_selection,
            dropout=not self.args.uncertainty_eval_mode,
            rule=self.args.uncertainty_score,
            regression=self.args.uncertainty_regression,
        )


def prepare_many_tasks_model(stage: ManyTasksArgs, args: TaskListArgs) -> ManyTasksModel:
    """Read, check and encode all tasks, and check the model; no weights are loaded.

    Args:
        stage: flags of the model and of the stages.
        args: flags of the tasks.
    Raises:
        UserError: for a task, file, row, model or length that does not fit.
    """
    source, weights = read_start_config(
        stage, ("bert", "ca_mtl").__contains__, "'bert' or 'ca_mtl'"
    )
    ca_mtl_config = source if isinstance(source, CaMtlConfig) else None
    rows = [
        _read_task_rows(spec, folders, stage, args, ca_mtl_config)
        for spec, folders in _list_task_specs(stage, args, ca_mtl_config)
    ]
    specs = [spec for spec, _ in rows]
    tokenizer = load_matching_tokenizer(
        source, stage.model or stage.config_name, stage.tokenizer_name
    )
    config = ca_mtl_config or _build_config(stage, args, source, specs, len(tokenizer))
    if stage.variant not in (None, config.variant):
        raise UserError(f"--variant {stage.variant}: {stage.model} is of variant {config.variant}")
    set_dropout(config, stage.dropout)
    frozen = stage.parse_frozen_blocks()
    if frozen is not None and frozen[1] >= config.num_hidden_layers:
        raise UserError(
            f"--freeze_encoder_layers {stage.freeze_encoder_layers}: the model has blocks 0 to "
            f"{config.num_hidden_layers - 1}"
        )
    longest = _resolve_max_length(args, config.max_seq_length)
    lengths = RowLengthLimits(longest, config.max_position_embeddings, args.truncate)
    return ManyTasksModel(
        tasks=tuple(
            encode_rows(spec, sets, tokenizer, lengths, args.cache_dir) for spec, sets in rows
        ),
        config=config,
        tokenizer=tokenizer,
        weights=weights,
        loads_last_block=stage.init_top_from_pretrained or ca_mtl_config is not None,
        stage=stage,
        args=args,
    )


def _list_task_specs(
    stage: ManyTasksArgs, args: TaskListArgs, ca_mtl_config: CaMtlConfig | None
) -> list[tuple[TaskSpec, Sequence[str] | None]]:
    """List the tasks in the order of their ids, each with the folders that may have its files.

    They are those of --tasks, else those of the model, else the nine of GLUE. Folders None stand
    for the hub.

    Args:
        stage: flags of the model, for messages.
        args: flags of the tasks and their folders.
        ca_mtl_config: configuration of the CA-MTL model of --model, whose tasks decide the order;
            None: a new model around an encoder.
    Raises:
        UserError: for an unknown task, one that is listed twice, or other tasks than the model has.
    """
    specs: dict[str, tuple[TaskSpec, Sequence[str] | None]] = {}
    for name in args.tasks or (ca_mtl_config.tasks if ca_mtl_config else GLUE):
        spec, folders = find_task_and_folders(name, args.data_dir)
        if spec.name in specs:
            raise UserError(f"--tasks: {spec.name} is listed twice")
        specs[spec.name] = (spec, folders)
    if ca_mtl_config is None:
        return list(specs.values())
    if set(specs) != set(ca_mtl_config.tasks):
        raise UserError(
            f"--tasks {' '.join(specs)}: the model {stage.model} has heads for "
            f"{' '.join(ca_mtl_config.tasks)}"
        )
    return [specs[name] for name in ca_mtl_config.tasks]


def _read_task_rows(
    spec: TaskSpec,
    folders: Sequence[str] | None,
    stage: ManyTasksArgs,
    args: TaskListArgs,
    ca_mtl_config: CaMtlConfig | None,
) -> tuple[TaskSpec, Rows]:
    """Read the rows of a task that the stages of the run need.

    Args:
        spec: the task.
        folders: see `_list_task_specs`.
        stage: flags of the stages.
        args: flags of the rows.
        ca_mtl_config: see `_list_task_specs`.
    Returns:
        the task, with its labels in the order of its head, and the rows by split.
    Raises:
        UserError: for splits, files, rows or labels that do not fit.
    """
    splits = list_splits_to_read(spec, stage, args.predict_split)
    labels = _find_trained_labels(ca_mtl_config, spec) if ca_mtl_config else ()
    if labels and spec.kind != "token":
        spec = replace(spec, labels=labels)
    folder = None if folders is None else find_folder_with_files(spec, folders)
    return read_rows(spec, folder, splits, args, labels)


def _find_trained_labels(config: CaMtlConfig, spec: TaskSpec) -> tuple[str, ...]:
    """Return the labels of a task in the order of its trained head.

    A task without labels takes those of the head; a regression has none: (). The heads of a
    converted model have numbers as labels; then the task's labels are returned, in its order.

    Args:
        config: configuration of the trained CA-MTL model.
        spec: the task, one of the model's.
    Raises:
        UserError: if the task has other labels, or is of another kind.
    """
    number = config.tasks.index(spec.name)
    labels, kind = tuple(config.task_labels[number]), config.task_kinds[number]
    if _get_head_kind(spec) != kind:
        raise UserError(f"task {spec.name}: the model has a head of kind {kind} for it")
    if not spec.labels:
        return labels
    if labels == tuple(map(str, range(len(spec.labels)))):
        return spec.labels
    ordered = order_labels(labels, spec.labels)
    if ordered is None:
        raise UserError(
            f"task {spec.name} has the labels {format_some_names(spec.labels)}, the model answers "
            f"{format_some_names(labels)}"
        )
    return ordered


def _get_head_kind(spec: TaskSpec) -> str:
    """Return the kind of a task's head: "sequence", "regression" or "token".

    Tasks of pairs have a head of the kind "sequence", too.
    """
    return "sequence" if spec.kind == "pair" else spec.kind


def _build_config(
    stage: ManyTasksArgs,
    args: TaskListArgs,
    source: PreTrainedConfig | None,
    specs: Sequence[TaskSpec],
    vocab_size: int,
) -> CaMtlConfig:
    """Build the configuration of CA-MTL around an encoder.

    Args:
        stage: flags of the model, for variant and named size.
        args: flags of the tasks, for the length of rows.
        source: configuration of the encoder; None: the named size of --config_name.
        specs: tasks in the order of their ids.
        vocab_size: vocabulary size of an encoder of a named size.
    Raises:
        UserError: for settings that the configuration refuses, or a length above the positions.
    """
    source = source or make_bert_config(stage.config_name, vocab_size)
    try:
        return CaMtlConfig.make_from_encoder(
            source,
            variant=stage.variant or "base",
            tasks=[spec.name for spec in specs],
            task_kinds=[_get_head_kind(spec) for spec in specs],
            task_labels=[list(spec.labels) for spec in specs],
            max_seq_length=_resolve_max_length(args, source.max_position_embeddings),
        )
    except (ValueError, StrictDataclassError) as error:
        raise UserError(" ".join(str(error).split())) from error


def _resolve_max_length(args: TaskListArgs, most: int) -> int:
    """Return --max_seq_length in tokens; its default is reduced to the model's positions.

    Args:
        args: flags of the tasks.
        most: positions of the model.
    Raises:
        UserError: if the flag is given and larger.
    """
    if args.max_seq_length > most and find_origin(args, "max_seq_length") != "default":
        raise UserError(f"--max_seq_length {args.max_seq_length}: the model takes {most} tokens")
    return min(args.max_seq_length, most)
