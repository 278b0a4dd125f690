"""Labels of a task in the order of those of a model's head."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedConfig

from megamod.data.tasks.specs import TaskSpec, format_some_names, make_label_normaliser
from megamod.errors import UserError

logger = logging.getLogger(__name__)


def list_model_labels(config: PreTrainedConfig) -> tuple[str, ...]:
    """Return the labels of a model's head in its order.

    The result is () if they have the default names, LABEL_0 and so on.
    """
    names = tuple(config.id2label[number] for number in range(config.num_labels))
    return () if names == tuple(f"LABEL_{n}" for n in range(len(names))) else names


def order_labels(names: Sequence[str], labels: Sequence[str]) -> tuple[str, ...] | None:
    """Return the labels of a task in the order of a model's, spelled as the task does.

    Args:
        names: names of the model's labels; capitals do not matter.
        labels: labels of the task.
    Returns:
        None if the two do not have the same labels.
    """
    spelled = make_label_normaliser(labels)
    ordered = tuple(spelled(name) or "" for name in names)
    return ordered if sorted(ordered) == sorted(labels) else None


def match_labels_to_model(config: PreTrainedConfig, spec: TaskSpec, *, trained: bool) -> TaskSpec:
    """Return the task with its labels in the order of the model's head.

    If the names of the model's labels are those of the task, they decide the order. A task without
    labels takes those of a trained model. Otherwise the task is returned unchanged: the head is
    new, or a trained head has default names (LABEL_0, ...), which are taken in the task's order
    with a warning unless the task's labels are the numbers from 0.

    Args:
        config: configuration of the model.
        spec: the task; its labels are empty if its files have not named them.
        trained: the head answers the task already and is not trained by this run.
    Raises:
        UserError: if the model is trained and has another set or number of labels.
    """
    names = list_model_labels(config)
    if names and trained and not (spec.labels or spec.is_regression):
        return replace(spec, labels=names)
    if names and spec.labels:
        ordered = order_labels(names, spec.labels)
        if ordered is not None:
            return replace(spec, labels=ordered)
    if not trained or not (spec.labels or spec.is_regression):
        return spec
    count = 1 if spec.is_regression else len(spec.labels)
    if config.num_labels != count or (names and not spec.is_regression):
        raise UserError(
            f"the model answers {format_some_names(names) or f'{config.num_labels} labels'}, task "
            f"{spec.name} has {format_some_names(spec.labels) or 'a number'}; "
            "train it first (--do_train)"
        )
    if any(label != str(number) for number, label in enumerate(spec.labels)):
        logger.warning(
            "the model calls its labels LABEL_0 to LABEL_%d: they are taken to be %s, in this "
            "order",
            *(count - 1, format_some_names(spec.labels)),
        )
    return spec


def set_config_labels(config: PreTrainedConfig, spec: TaskSpec) -> None:
    """Set the labels of a task and its kind of problem in the configuration of its model.

    A regression has one label, with the default name.

    Args:
        config: changed in place.
        spec: the task, with its labels in the order of the model's head.
    """
    if spec.is_regression:
        config.num_labels = 1
        config.problem_type = "regression"
    else:
        config.id2label = dict(enumerate(spec.labels))
        config.label2id = {name: number for number, name in enumerate(spec.labels)}
        config.problem_type = None if spec.kind == "token" else "single_label_classification"
