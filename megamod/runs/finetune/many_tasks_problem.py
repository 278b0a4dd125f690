"""What is finetuned on many tasks, put together: tasks, configuration, tokenizer, encoded rows.

As in `runs/finetune/problem.py`, what a user can get wrong shows here.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from megamod.args import origin_of
from megamod.data.tasks.classification import Lengths
from megamod.data.tasks.conll import TokenSet
from megamod.data.tasks.glue import TextSet, read_task
from megamod.data.tasks.ner import read_token_task
from megamod.data.tasks.specs import GLUE, TaskSpec, any_task, find_files, some_of
from megamod.data.tasks.task_file import read_spec
from megamod.errors import UserError
from megamod.models.build import bert_config
from megamod.models.ca_mtl.configuration import CaMtlConfig
from megamod.models.ca_mtl.model import CaMtlForMultiTask, freeze, from_encoder
from megamod.models.classifier_inputs import inputs_of
from megamod.runs.finetune.many_tasks_args import ConditionedArgs, MixtureArgs
from megamod.runs.finetune.problem import (
    Problem,
    config_of,
    encode,
    first_rows,
    in_order_of,
    set_dropout,
    tokenizer_of,
    wanted_splits,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mixture:
    """Many tasks for one model.

    Attributes:
        problems: one for each task, in the order of the ids.
        config, tokenizer: of all of them.
        weights: folder or name whose weights start the run; None: new ones.
        top: see `from_encoder`.
        frozen: first and last block that are not trained; None: all are.
        release: see `freeze`.
    """

    problems: tuple[Problem, ...]
    config: CaMtlConfig
    tokenizer: "PreTrainedTokenizerFast"
    weights: str | None
    top: bool
    frozen: tuple[int, int] | None
    release: bool

    @property
    def tasks(self) -> tuple[TaskSpec, ...]:
        """All tasks, in the order of the ids."""
        return tuple(problem.task for problem in self.problems)

    def make_model(self, seed: int) -> tuple[CaMtlForMultiTask, dict[str, list[str]]]:
        """The model in float32, parts of it perhaps frozen; and the report of `from_encoder`.

        Raises:
            UserError: if weights cannot be loaded, or blocks to freeze are not there.
        """
        torch.manual_seed(seed)
        if self.weights is None:
            model = CaMtlForMultiTask(self.config).float()
            report = {"loaded": [], "new": [n for n, _ in model.named_parameters()], "unused": []}
        else:
            model, report = from_encoder(self.weights, self.config, top=self.top)
        logger.info(
            "%s: %d tensors loaded, %d new, %d of it unused",
            self.weights or "no weights",
            *(len(report[kind]) for kind in ("loaded", "new", "unused")),
        )
        if self.frozen is not None:
            freeze(model, *self.frozen, release=self.release)
        return model, report


def prepare(stage: ConditionedArgs, args: MixtureArgs) -> Mixture:
    """Read, check and encode all tasks.

    Raises:
        UserError: for a task, file, row, model or length that does not fit.
    """
    source, weights = config_of(stage, ("bert", "ca_mtl").__contains__, "'bert' or 'ca_mtl'")
    tuned = source if isinstance(source, CaMtlConfig) else None
    read = [
        _read(task, folders, stage, args, tuned) for task, folders in _tasks(stage, args, tuned)
    ]
    tokenizer = tokenizer_of(stage)
    config = tuned or _new_config(stage, args, source, [task for task, _ in read], len(tokenizer))
    if stage.variant not in (None, config.variant):
        raise UserError(f"--variant {stage.variant}: {stage.model} is of variant {config.variant}")
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer {stage.tokenizer_name or stage.model} has {len(tokenizer)} ids, the "
            f"model {config.vocab_size}: they do not belong together"
        )
    set_dropout(config, stage.dropout)
    frozen = stage.frozen_blocks()
    if frozen is not None and frozen[1] >= config.num_hidden_layers:
        raise UserError(
            f"--freeze_encoder_layers {stage.freeze_encoder_layers}: the model has blocks 0 to "
            f"{config.num_hidden_layers - 1}"
        )
    longest = _longest(args, config.max_seq_length)
    lengths = Lengths(longest, config.max_position_embeddings, args.truncate)
    problems = [
        Problem(
            task=task,
            sets=sets,
            encoded=encode(task, sets, tokenizer, lengths, args.cache_dir),
            config=config,
            tokenizer=tokenizer,
            weights=weights,
            inputs=inputs_of(config),
            instances=1,
            retrieved=0.0,
            pad_to=None,
            ensemble=False,
        )
        for task, sets in read
    ]
    return Mixture(
        problems=tuple(problems),
        config=config,
        tokenizer=tokenizer,
        weights=weights,
        top=stage.init_top_from_pretrained or tuned is not None,
        frozen=frozen,
        release=stage.freeze_compat == "release",
    )


def _tasks(
    stage: ConditionedArgs, args: MixtureArgs, tuned: CaMtlConfig | None
) -> list[tuple[TaskSpec, list[str] | None]]:
    """Tasks in the order of their ids, and the folders to look for their files in."""
    found: dict[str, tuple[TaskSpec, list[str] | None]] = {}
    for name in args.tasks or (tuned.tasks if tuned else GLUE):
        if name.endswith((".yaml", ".yml")):
            task, folders = read_spec(name), args.data_dir
            if folders is None and task.hub is None:
                folders = [str(Path(name).parent)]
        else:
            task, folders = any_task(name), args.data_dir
        if task.name in found:
            raise UserError(f"--tasks: {task.name} is there twice")
        found[task.name] = (task, folders)
    if tuned is None:
        return list(found.values())
    if set(found) != set(tuned.tasks):
        raise UserError(
            f"--tasks {' '.join(found)}: the model {stage.model} has heads for "
            f"{' '.join(tuned.tasks)}"
        )
    return [found[name] for name in tuned.tasks]


def _read(
    task: TaskSpec,
    folders: Sequence[str] | None,
    stage: ConditionedArgs,
    args: MixtureArgs,
    tuned: CaMtlConfig | None,
) -> tuple[TaskSpec, dict[str, TextSet | TokenSet]]:
    """One task, its labels in the order of its head, and its rows."""
    wanted = wanted_splits(task, stage, args.predict_split)
    names = _labels_of(tuned, task) if tuned else ()
    folder = None if folders is None else _folder_of(task, folders)
    if task.kind == "token":
        task, sets = read_token_task(task, folder, wanted, repair=args.repair_iob, labels=names)
    else:
        if names:
            task = replace(task, labels=names)
        task, sets = read_task(task, folder, wanted)
    return task, first_rows(sets, args)


def _folder_of(task: TaskSpec, folders: Sequence[str]) -> str:
    """The first of the folders that has files of the task.

    Raises:
        UserError: if none has.
    """
    problems = []
    for folder in folders:
        try:
            find_files(task, folder)
        except UserError as error:
            problems.append(str(error))
        else:
            return folder
    raise UserError("; ".join(problems))


def _labels_of(config: CaMtlConfig, task: TaskSpec) -> tuple[str, ...]:
    """Names of the labels of a trained head; those of a converted one are only numbers.

    Raises:
        UserError: if the task has other labels, or is of another kind.
    """
    number = config.tasks.index(task.name)
    labels, kind = tuple(config.task_labels[number]), config.task_kinds[number]
    if _kind(task) != kind:
        raise UserError(f"task {task.name}: the model has a head of kind {kind} for it")
    if task.labels and labels == tuple(map(str, range(len(task.labels)))):
        return task.labels
    if not task.labels:
        return labels
    ordered = in_order_of(labels, task.labels)
    if ordered is None:
        raise UserError(
            f"task {task.name} has the labels {some_of(task.labels)}, the model answers "
            f"{some_of(labels)}"
        )
    return ordered


def _kind(task: TaskSpec) -> str:
    return "sequence" if task.kind == "pair" else task.kind


def _new_config(
    stage: ConditionedArgs,
    args: MixtureArgs,
    source: PreTrainedConfig | None,
    tasks: Sequence[TaskSpec],
    vocab_size: int,
) -> CaMtlConfig:
    """CA-MTL around an encoder."""
    if source is None:
        source = bert_config(stage.config_name, vocab_size)
    try:
        return CaMtlConfig.around(
            source,
            variant=stage.variant or "base",
            tasks=[task.name for task in tasks],
            task_kinds=[_kind(task) for task in tasks],
            task_labels=[list(task.labels) for task in tasks],
            max_seq_length=_longest(args, source.max_position_embeddings),
        )
    except (ValueError, StrictDataclassError) as error:
        raise UserError(" ".join(str(error).split())) from error


def _longest(args: MixtureArgs, most: int) -> int:
    """--max_seq_length; where it is not given, at most `most`.

    Raises:
        UserError: if it is given and larger.
    """
    if args.max_seq_length > most and origin_of(args, "max_seq_length") != "default":
        raise UserError(f"--max_seq_length {args.max_seq_length}: the model takes {most} tokens")
    return min(args.max_seq_length, most)
