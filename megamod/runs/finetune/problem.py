"""What is finetuned, put together: task, model configuration, tokenizer and encoded rows.

Everything a user can get wrong about them shows here, before any process waits for another.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)

from megamod.args import origin_of
from megamod.convert.sources import has_head, has_weights, open_source
from megamod.data.corpus.tokenizers import load_tokenizer
from megamod.data.tasks.classification import Encoded, Lengths, encode_texts, encode_words
from megamod.data.tasks.conll import TokenSet
from megamod.data.tasks.encoded_cache import cached, key_of
from megamod.data.tasks.glue import TextSet, read_task
from megamod.data.tasks.ner import read_token_task
from megamod.data.tasks.specs import TaskSpec, some_of, speller, task_of, token_task
from megamod.data.tasks.task_file import read_spec
from megamod.errors import UserError
from megamod.models.build import bert_config
from megamod.models.classifier_inputs import inputs_of, mixes_padding, room_of
from megamod.models.presets import PRESETS
from megamod.models.pretrained import load_pretrained
from megamod.runs.finetune.args import RowArgs, StageArgs, TaskArgs, TunedArgs, WordArgs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")


@dataclass(frozen=True)
class Problem:
    """One task for one model.

    Attributes:
        sets, encoded: by split, as read and as token ids.
        weights: folder or name whose weights start the run; None: new ones.
        inputs: fields of a batch that the model takes.
        instances: N, rows that share a forward pass.
        retrieved: see `Classify`.
        pad_to: see `Encoded.gather`.
        ensemble: see `held_out_rows`.
    """

    task: TaskSpec
    sets: dict[str, TextSet | TokenSet]
    encoded: dict[str, Encoded]
    config: PreTrainedConfig
    tokenizer: "PreTrainedTokenizerFast"
    weights: str | None
    inputs: tuple[str, ...]
    instances: int
    retrieved: float
    pad_to: int | None
    ensemble: bool

    def make_model(self, seed: int) -> nn.Module:
        """A classifier in float32; what the weights lack is drawn with the seed."""
        torch.manual_seed(seed)
        if self.weights is None:
            return _auto(self.task).from_config(self.config, dtype=torch.float32)
        return load_model(self.task, self.weights, self.config)

    def splits(self, kind: str) -> tuple[str, ...]:
        """Encoded splits that begin with "train", "dev" or "test"."""
        return tuple(split for split in self.encoded if split.startswith(kind))


def load_model(task: TaskSpec, source: str, config: PreTrainedConfig | None = None) -> nn.Module:
    """A classifier of a folder or of the hub, in float32; a head of another size is drawn anew.

    Raises:
        UserError: if it cannot be loaded, or the weights are those of another model.
    """
    options = {} if config is None else {"config": config}
    return load_pretrained(_auto(task), source, "--model", ignore_mismatched_sizes=True, **options)[
        0
    ]


def prepare(tuned: TunedArgs, args: TaskArgs, words: WordArgs | None) -> Problem:
    """Read, check and encode.

    Args:
        words: given for labels per word.
    Raises:
        UserError: for a task, file, row, model or length that does not fit.
    """
    task = _task(args, words)
    config, weights = config_of(
        tuned, lambda kind: has_head(_auto(task), kind), f"a model with a head for {task.name}"
    )
    if words is None:
        task = _with_labels_of(config, task, tuned.do_train)
    data_dir = args.data_dir
    if data_dir is None and args.task_spec is not None and task.hub is None:
        data_dir = str(Path(args.task_spec).parent)
    wanted = wanted_splits(task, tuned, args.predict_split)
    if words is None:
        task, sets = read_task(task, data_dir, wanted)
    else:
        labels = () if tuned.do_train else _names(config)
        task, sets = read_token_task(task, data_dir, wanted, repair=args.repair_iob, labels=labels)
        task = _with_labels_of(config, task, tuned.do_train)
    if tuned.metric_for_best_model is not None:
        others = [name for name in task.metrics if name != tuned.metric_for_best_model]
        task = replace(task, metrics=(tuned.metric_for_best_model, *others))
    tokenizer = tokenizer_of(tuned)
    if config is None:
        config = bert_config(
            tuned.config_name,
            len(tokenizer),
            num_instances=tuned.num_instances,
            muxing_variant=tuned.muxing_variant,
            demuxing_variant=tuned.demuxing_variant,
        )
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer {tuned.tokenizer_name or tuned.model} has {len(tokenizer)} ids, the "
            f"model {tuned.model or tuned.config_name} {config.vocab_size}: they do not belong "
            "together"
        )
    instances = _instances(config, tuned)
    _set_labels(config, task)
    _set_retrieval(config, tuned)
    set_dropout(config, tuned.dropout)
    lengths = lengths_of(config, args)
    sets = first_rows(sets, args)
    label_all = words is not None and words.label_all_tokens
    encoded = encode(task, sets, tokenizer, lengths, args.cache_dir, label_all=label_all)
    fixed = args.pad_to_max_length
    fixed = mixes_padding(config) if fixed is None else fixed
    return Problem(
        task=task,
        sets=sets,
        encoded=encoded,
        config=config,
        tokenizer=tokenizer,
        weights=weights,
        inputs=inputs_of(config),
        instances=instances,
        retrieved=tuned.retrieval_percentage / instances if tuned.retrieval_loss_coeff else 0.0,
        pad_to=lengths.longest if fixed else None,
        ensemble=tuned.ensemble,
    )


def first_rows(
    sets: Mapping[str, TextSet | TokenSet], args: RowArgs
) -> dict[str, TextSet | TokenSet]:
    """As many rows of each split as are wanted."""
    return {
        split: found.first(args.max_train_samples if split == "train" else args.max_eval_samples)
        for split, found in sets.items()
    }


def encode(
    task: TaskSpec,
    sets: Mapping[str, TextSet | TokenSet],
    tokenizer: "PreTrainedTokenizerFast",
    lengths: Lengths,
    cache_dir: str | None,
    *,
    label_all: bool = False,
) -> dict[str, Encoded]:
    """Token ids of all splits.

    Args:
        cache_dir: see `cached`.
        label_all: see `encode_words`.
    """

    def encode_rows(rows: TextSet | TokenSet) -> Encoded:
        if isinstance(rows, TextSet):
            return encode_texts(rows, tokenizer, lengths)
        return encode_words(rows, tokenizer, lengths, task.labels, label_all=label_all)

    if cache_dir is None:
        return {split: encode_rows(rows) for split, rows in sets.items()}
    return {
        split: cached(
            Path(cache_dir),
            key_of(rows, tokenizer, lengths, task.labels, label_all),
            partial(encode_rows, rows),
        )
        for split, rows in sets.items()
    }


def _auto(task: TaskSpec) -> type:
    return (
        AutoModelForTokenClassification
        if task.kind == "token"
        else AutoModelForSequenceClassification
    )


def _task(args: TaskArgs, words: WordArgs | None) -> TaskSpec:
    if args.task_spec is None and args.task is None:
        raise UserError("--task is missing: name of the task; --task_spec FILE describes another")
    if args.task_spec is not None:
        task = read_spec(args.task_spec)
    elif words is not None:
        task = token_task(args.task, words.word_column, words.label_column)
    else:
        task = task_of(args.task)
    if (task.kind == "token") != (words is not None):
        raise UserError(
            f"task {task.name} is of kind {task.kind}: "
            "finetune_ner.py is for labels of words, finetune_glue.py for those of sentences"
        )
    return task


def wanted_splits(task: TaskSpec, stage: StageArgs, predicted: str) -> list[str]:
    """Splits to read; "dev" and "test" stand for all of their kind."""
    splits = []
    if stage.do_train:
        splits.append("train")
    if stage.do_eval:
        splits += task.splits("dev")
        if "dev" not in splits:
            raise UserError(f"--do_eval: task {task.name} has no split dev")
    if stage.do_predict:
        answered = [split for split in task.splits(predicted) if split not in splits]
        if not task.splits(predicted):
            raise UserError(
                f"--predict_split {predicted}: task {task.name} has {', '.join(task.files)}"
            )
        splits += answered
    return splits


def config_of(
    stage: StageArgs, accepts: Callable[[str], bool], needed: str
) -> tuple[PreTrainedConfig | None, str | None]:
    """Configuration and where the weights are; None for a size that waits for the vocabulary.

    Args:
        accepts, needed: see `open_source`.
    Raises:
        UserError: if the model is missing or of another kind.
    """
    if stage.model is None and stage.config_name is None:
        raise UserError(
            "--model is missing: a model folder or name, or --config_name for a new one"
        )
    if stage.config_name in PRESETS["bert"]:
        return None, None
    named, flag = stage.model or stage.config_name, "--model" if stage.model else "--config_name"
    if stage.model is None and not Path(named).exists() and "/" not in named:
        sizes = ", ".join(PRESETS["bert"])
        raise UserError(f"--config_name {named}: is no folder and none of {sizes}")
    source = open_source(named, flag, accepts, needed)
    if stage.model is None:
        return source.config, None
    there = has_weights(source.name)
    if not there and not stage.do_train:
        raise UserError(f"--model {named}: there are no weights in it, so it must be trained")
    return source.config, source.name if there else None


def _instances(config: PreTrainedConfig, tuned: TunedArgs) -> int:
    instances = getattr(config, "num_instances", 1)
    if tuned.num_instances not in (None, instances):
        raise UserError(
            f"--num_instances {tuned.num_instances}: the model {tuned.model or tuned.config_name} "
            f"is made for {instances}; `launchers/pretrain.py --objective masked_lm --init_from "
            "MODEL --num_instances N` makes one for N"
        )
    return instances


def tokenizer_of(stage: StageArgs) -> "PreTrainedTokenizerFast":
    """The tokenizer of --tokenizer_name, or that of the model."""
    spec = stage.tokenizer_name or stage.model
    if spec is None:
        raise UserError("--tokenizer_name is missing: a model from scratch has no tokenizer")
    try:
        found = load_tokenizer(spec).original
    except UserError as error:
        if stage.tokenizer_name is not None:
            raise
        raise UserError(
            f"{stage.model} has no tokenizer; --tokenizer_name names one, for BERT a folder with "
            "vocab.txt"
        ) from error
    if found is None or found.pad_token_id is None:
        raise UserError(f"--tokenizer_name {spec}: an encoder's tokenizer is needed, with padding")
    return found


def lengths_of(config: PreTrainedConfig, args: RowArgs) -> Lengths:
    """How long rows may be."""
    room = room_of(config)
    longest = args.max_seq_length
    if longest > room:
        if origin_of(args, "max_seq_length") != "default":
            raise UserError(
                f"--max_seq_length {longest}: the model has positions for {room} tokens"
            )
        longest = room
    return Lengths(longest, room, args.truncate)


def _names(config: PreTrainedConfig | None) -> tuple[str, ...]:
    """Labels of a trained model; none if it has names of convenience only."""
    if config is None:
        return ()
    names = tuple(config.id2label[number] for number in range(config.num_labels))
    return () if names == tuple(f"LABEL_{n}" for n in range(len(names))) else names


def _with_labels_of(config: PreTrainedConfig | None, task: TaskSpec, train: bool) -> TaskSpec:
    """The task with its labels in the order of the model's, whose head knows no other.

    Raises:
        UserError: if the model is not trained here and has another set of labels.
    """
    names = _names(config)
    if names and not task.labels and not (train or task.regression):
        return replace(task, labels=names)
    if names and task.labels:
        ordered = in_order_of(names, task.labels)
        if ordered is not None:
            return replace(task, labels=ordered)
    if train or config is None or not (task.labels or task.regression):
        return task
    count = 1 if task.regression else len(task.labels)
    if config.num_labels != count or (names and not task.regression):
        raise UserError(
            f"the model answers {some_of(names) or f'{config.num_labels} labels'}, task "
            f"{task.name} has {some_of(task.labels) or 'a number'}; train it first (--do_train)"
        )
    if any(label != str(number) for number, label in enumerate(task.labels)):
        logger.warning(
            "the model calls its labels %s: they are taken to be %s, in this order",
            *(f"LABEL_0 to LABEL_{count - 1}", some_of(task.labels)),
        )
    return task


def in_order_of(names: Sequence[str], labels: Sequence[str]) -> tuple[str, ...] | None:
    """The labels in the order of a model's names, which may differ in capitals; None: others."""
    spelled = speller(labels)
    ordered = tuple(spelled(name) or "" for name in names)
    return ordered if sorted(ordered) == sorted(labels) else None


def _set_labels(config: PreTrainedConfig, task: TaskSpec) -> None:
    if task.regression:
        config.num_labels = 1
        config.problem_type = "regression"
    else:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {name: number for number, name in enumerate(task.labels)}
        config.problem_type = None if task.kind == "token" else "single_label_classification"


def set_dropout(config: PreTrainedConfig, rate: float | None) -> None:
    """Give all dropout of the model one rate; None: leave it as it is."""
    if rate is not None:
        for name in DROPOUTS:
            if hasattr(config, name):
                setattr(config, name, rate)


def _set_retrieval(config: PreTrainedConfig, tuned: TunedArgs) -> None:
    """Weights of the two losses: what was right for a warm-up is not for a task."""
    if hasattr(config, "retrieval_loss_coeff"):
        config.task_loss_coeff = 1.0
        config.retrieval_loss_coeff = tuned.retrieval_loss_coeff
        config.retrieval_percentage = tuned.retrieval_percentage
    elif tuned.retrieval_loss_coeff:
        raise UserError(
            f"--retrieval_loss_coeff {tuned.retrieval_loss_coeff}: there is nothing to retrieve, "
            f"{tuned.model or tuned.config_name} is no multiplexed model"
        )
