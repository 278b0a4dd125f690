"""Tasks of a finetuning run: the splits that it needs, their rows, and the rows as token ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedConfig

from megamod.data.tasks.classification import (
    EncodedRows,
    RowLengthLimits,
    encode_texts,
    encode_words,
)
from megamod.data.tasks.encoded_cache import compute_cache_key, encode_with_cache
from megamod.data.tasks.specs import TaskSpec, find_any_task, find_task_files
from megamod.data.tasks.task_file import read_task_spec
from megamod.data.tasks.text_labels import TextSet, read_text_task
from megamod.data.tasks.token_set import TokenSet
from megamod.data.tasks.word_labels import read_token_task
from megamod.errors import UserError
from megamod.flags import find_origin
from megamod.models.classifier_inputs import compute_max_row_tokens
from megamod.runs.finetune.args import RowArgs, StageArgs
from megamod.runs.finetune.labels import list_model_labels, match_labels_to_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Rows = Mapping[str, TextSet | TokenSet]
"""Rows of a task by split."""


@dataclass(frozen=True)
class FinetuneTask:
    """One task and its rows.

    Attributes:
        spec: with all labels.
        sets, encoded: by split, as read and as token ids.
    """

    spec: TaskSpec
    sets: Rows
    encoded: Mapping[str, EncodedRows]

    def list_splits(self, kind: str) -> tuple[str, ...]:
        """Return the encoded splits whose names begin with `kind`: "train", "dev" or "test"."""
        return tuple(split for split in self.encoded if split.startswith(kind))


def list_splits_to_read(spec: TaskSpec, stage: StageArgs, predicted: str) -> list[str]:
    """List the splits that the stages need: train, all splits of dev, and those to predict.

    Args:
        spec: the task.
        stage: flags of the stages.
        predicted: beginning of the names of the splits to predict.
    Raises:
        UserError: if the task has no dev split to score, or none to predict.
    """
    splits = ["train"] if stage.do_train else []
    if stage.do_eval:
        splits += spec.list_splits("dev")
        if "dev" not in splits:
            raise UserError(f"--do_eval: task {spec.name} has no split dev")
    if stage.do_predict:
        if not spec.list_splits(predicted):
            raise UserError(
                f"--predict_split {predicted}: task {spec.name} has {', '.join(spec.files)}"
            )
        splits += [split for split in spec.list_splits(predicted) if split not in splits]
    return splits


def read_and_encode_task(
    spec: TaskSpec,
    data_dir: str | None,
    splits: Sequence[str],
    config: PreTrainedConfig,
    tokenizer: "PreTrainedTokenizerFast",
    args: RowArgs,
    *,
    trained: bool,
    label_all: bool = False,
) -> FinetuneTask:
    """Read and encode a task for a classifier, with its labels in the order of the classifier's.

    Args:
        data_dir: folder of the files; None: the hub.
        splits: names of the splits to read.
        config: configuration of the classifier.
        tokenizer: tokenizer of the classifier.
        args: flags of the rows.
        trained: the model answers the task already, so its labels must be the task's; their order
            is the model's.
        label_all: see `encode_words`.
    Raises:
        UserError: for files, rows, labels and lengths that do not fit.
    """
    lengths = make_row_length_limits(config, args)
    if spec.kind == "token":
        labels = list_model_labels(config) if trained else ()
        spec, sets = read_rows(spec, data_dir, splits, args, labels)
        spec = match_labels_to_model(config, spec, trained=trained)
    else:
        spec = match_labels_to_model(config, spec, trained=trained)
        spec, sets = read_rows(spec, data_dir, splits, args)
    return encode_rows(spec, sets, tokenizer, lengths, args.cache_dir, label_all=label_all)


def read_rows(
    spec: TaskSpec,
    data_dir: str | None,
    splits: Sequence[str],
    args: RowArgs,
    labels: Sequence[str] = (),
) -> tuple[TaskSpec, Rows]:
    """Read the rows of the splits, at most --max_train_samples or --max_eval_samples of each.

    Args:
        data_dir: folder of the files; None: the hub.
        splits: names of the splits.
        args: flags of the rows.
        labels: labels of a trained model; they take the place of those of a task of labels of
            words, and have no effect for other tasks. Empty: none.
    Returns:
        the task with its labels, and the rows by split.
    Raises:
        UserError: for files, rows and labels that do not fit.
    """
    if spec.kind == "token":
        spec, sets = read_token_task(spec, data_dir, splits, repair=args.repair_iob, labels=labels)
    else:
        spec, sets = read_text_task(spec, data_dir, splits)
    return spec, {
        split: rows.take_first(
            args.max_train_samples if split == "train" else args.max_eval_samples
        )
        for split, rows in sets.items()
    }


def encode_rows(
    spec: TaskSpec,
    sets: Rows,
    tokenizer: "PreTrainedTokenizerFast",
    lengths: RowLengthLimits,
    cache_dir: str | None,
    *,
    label_all: bool = False,
) -> FinetuneTask:
    """Return the task with its rows as token ids, from the cache if it holds them.

    Args:
        spec: the task, with its labels in the order of the classifier's.
        sets: rows by split.
        lengths: limits of a row's tokens.
        cache_dir: see `encode_with_cache`; None: there is no cache.
        label_all: see `encode_words`.
    Raises:
        UserError: for rows that cannot be encoded within the limits.
    """

    def encode_split(rows: TextSet | TokenSet) -> EncodedRows:
        """Encode the rows of a split as words or as texts, by the kind of the task."""
        if isinstance(rows, TextSet):
            return encode_texts(rows, tokenizer, lengths)
        return encode_words(rows, tokenizer, lengths, spec.labels, label_all=label_all)

    def encode_cached(rows: TextSet | TokenSet) -> EncodedRows:
        """Return the rows of a split as token ids, through the cache if there is one."""
        if cache_dir is None:
            return encode_split(rows)
        key = compute_cache_key(rows, tokenizer, lengths, spec.labels, label_all)
        return encode_with_cache(Path(cache_dir), key, partial(encode_split, rows))

    encoded = {split: encode_cached(rows) for split, rows in sets.items()}
    return FinetuneTask(spec, sets, encoded)


def find_task_and_folders(
    name: str, data_dir: Sequence[str] | None
) -> tuple[TaskSpec, Sequence[str] | None]:
    """Find a task by its name or YAML file.

    Args:
        name: name of a task, or path of a YAML file that describes one.
        data_dir: folders of --data_dir; None: not given.
    Returns:
        the task, and the folders to look for its files in: `data_dir`, else the folder of the YAML
        file if the task is not on the hub, else None for the hub.
    Raises:
        UserError: if there is no such task.
    """
    if not name.endswith((".yaml", ".yml")):
        return find_any_task(name), data_dir
    spec = read_task_spec(name)
    if data_dir is None and spec.hub is None:
        data_dir = [str(Path(name).parent)]
    return spec, data_dir


def find_folder_with_files(spec: TaskSpec, folders: Sequence[str]) -> str:
    """Return the first of the folders that has files of the task.

    Raises:
        UserError: if none has.
    """
    problems = []
    for folder in folders:
        try:
            find_task_files(spec, folder)
        except UserError as error:
            problems.append(str(error))
        else:
            return folder
    raise UserError("; ".join(problems))


def make_row_length_limits(config: PreTrainedConfig, args: RowArgs) -> RowLengthLimits:
    """Return the limits, in tokens, of the rows for a model.

    The maximum is --max_seq_length; its default is reduced to the model's positions.

    Args:
        config: configuration of the model.
        args: flags of the rows.
    Raises:
        UserError: if the flag is given and the model has fewer positions.
    """
    position_limit, max_tokens = compute_max_row_tokens(config), args.max_seq_length
    if max_tokens > position_limit and find_origin(args, "max_seq_length") != "default":
        raise UserError(
            f"--max_seq_length {max_tokens}: the model has positions for {position_limit} tokens"
        )
    return RowLengthLimits(min(max_tokens, position_limit), position_limit, args.truncate)
