"""Run two models on the same text and accumulate the covariances of their features."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from megamod.convert.sources import resolve_model
from megamod.errors import UserError
from megamod.merging.alignment.calibration import CalibrationBatch
from megamod.merging.alignment.groups import Hook, PermutationGroup
from megamod.merging.alignment.options import AlignmentOptions
from megamod.merging.alignment.statistics import CrossCovariance
from megamod.models.auto import has_auto_class
from megamod.models.pretrained import load_pretrained
from megamod.progress import show_progress

_AUTO = (
    AutoModelForMaskedLM,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
    AutoModelForPreTraining,
)


@dataclass(frozen=True)
class FeatureStatistics:
    """Statistics over all batches.

    Attributes:
        covariances: covariances of each group.
        row_count: number of tokens that counted (sentences, at sentence level).
    """

    covariances: Mapping[str, CrossCovariance]
    row_count: int


def load_model(name: str, auto: type | None = None) -> PreTrainedModel:
    """Load the model of a folder or hub id in float32, on the CPU.

    Switches the progress bars of transformers off for the process.

    Args:
        name: folder or hub id.
        auto: the Auto class of the head that is needed; None: that of the class which the
            configuration names.
    Raises:
        UserError: if there is no such model, or its type has no such head.
    """
    disable_progress_bar()  # a merge or a study has its own
    source = resolve_model(
        name,
        "model",
        lambda kind: auto is None or has_auto_class(auto, kind),
        "" if auto is None else auto.__name__.removeprefix("AutoModelFor"),
    )
    return load_pretrained(auto or _find_auto_class(source.config), source.name, "model")[0]


def _find_auto_class(config: PreTrainedConfig) -> type:
    """Find the Auto class that makes the class named first in `config.architectures`.

    `AutoModel`, which makes models without a head, if none of `_AUTO` does.
    """
    named = (config.architectures or [None])[0]
    for auto in _AUTO:
        classes = auto._model_mapping.get(type(config), None)
        classes = classes if isinstance(classes, (tuple, list)) else [classes]
        if any(kind is not None and kind.__name__ == named for kind in classes):
            return auto
    return AutoModel


@torch.no_grad()
def measure_covariances(
    first: PreTrainedModel,
    second: PreTrainedModel,
    groups: Sequence[PermutationGroup],
    domains: Sequence[str],
    batches: Iterable[CalibrationBatch],
    options: AlignmentOptions,
) -> FeatureStatistics:
    """Run both models on all batches in evaluation mode and accumulate covariances of features.

    The modes of the models are restored.

    Args:
        first, second: models of one architecture on one device; rows of a covariance are features
            of the first.
        groups: whose features are observed.
        domains: domains of models with experts; a batch without a domain runs through each of them.
        options: compatibility with the original program, and rows to select.
    Raises:
        UserError: if there is no batch, or a batch does not fit the models.
    """
    device = first.device
    stacked = options.compat.stacked
    sums = {group.name: CrossCovariance(group.size, device, stacked) for group in groups}
    row_count = 0
    with _switch_to_evaluation(first), _switch_to_evaluation(second):
        for number, batch in enumerate(show_progress(batches, "comparing features")):
            _check_batch(batch, number, first, domains)
            rows = _RowSelection(batch, options, device, getattr(first.config, "num_instances", 1))
            for domain in [batch.domain] if batch.domain or not domains else domains:
                first_features: dict[tuple[str, Hook], Tensor] = {}

                def store_features(
                    group: PermutationGroup,
                    hook: Hook,
                    x: Tensor,
                    first_features=first_features,
                    rows=rows,
                ) -> None:
                    """Store the first model's features until the second model has run."""
                    first_features[group.name, hook] = rows.select_features(group, x)

                def add_covariance(
                    group: PermutationGroup,
                    hook: Hook,
                    x: Tensor,
                    first_features=first_features,
                    rows=rows,
                ) -> None:
                    """Add the features of both models at a hook to the sums of the group."""
                    sums[group.name].add_batch(
                        first_features.pop((group.name, hook)), rows.select_features(group, x)
                    )

                _run_with_hooks(first, batch, domain, groups, store_features)
                _run_with_hooks(second, batch, domain, groups, add_covariance)
                row_count += rows.count
    if row_count == 0:
        raise UserError("calibration: the text has no token to compare the models on")
    return FeatureStatistics(sums, row_count)


class _RowSelection:
    """Selection of the rows of a batch that count in covariances.

    Multiplexed models mix the instances of a group into one sequence, after a prefix if they have
    one; a position counts if it does in any of the instances.

    Args:
        options: sentences or tokens, and special tokens.
        device: of the features.
        instances: N of a multiplexed model, else 1.
    """

    def __init__(
        self,
        batch: CalibrationBatch,
        options: AlignmentOptions,
        device: torch.device,
        instances: int,
    ):
        self._level = options.calibration.sentence_level
        self._cls = 1 if options.compat.cls_at_one else 0
        self._counted = batch.mask_counted_tokens(options.calibration.special_tokens).to(device)
        if instances > 1:
            rows, length = self._counted.shape
            whole = -(-rows // instances) * instances
            order = torch.arange(whole, device=device) % rows
            self._counted = self._counted[order].view(-1, instances, length).any(1)
        self._indices_by_length: dict[int, Tensor | None] = {}
        level = self._level
        self.count = int(self._counted.sum()) if level == "none" else len(batch.lengths)

    def select_features(self, group: PermutationGroup, x: Tensor) -> Tensor:
        """Select the rows [n, C] that count; of a `centred` group, without the mean of each row."""
        rows = self.select_rows(x)
        return rows - rows.mean(-1, keepdim=True) if group.centred else rows

    def select_rows(self, x: Tensor) -> Tensor:
        """Select the rows [n, C] that count; at sentence level reduce each item to one row.

        Args:
            x: features [B, L, C] or [B L, C]; pooled ones [B, C] are returned as they are.
        """
        if x.dim() == 2 and len(x) != len(self._counted):  # OPT has no axis of items within layers
            x = x.unflatten(0, (len(self._counted), -1))
        if x.dim() == 2:
            return x
        counted = self._fit_mask_to_length(x.shape[1])
        if self._level == "none":
            row_indices = self._find_row_indices(x.shape[1], counted)
            flat = x.flatten(0, 1)
            return flat if row_indices is None else flat.index_select(0, row_indices)
        if self._level == "cls":
            return x[:, self._cls]
        nonempty = counted.any(1)
        x, counted = x[nonempty], counted[nonempty, :, None]
        if self._level == "maxpool":
            return x.masked_fill(~counted, -torch.inf).amax(1)
        return (x * counted).sum(1) / counted.sum(1)

    def _fit_mask_to_length(self, length: int) -> Tensor:
        """Return the mask [B, length] of features of this length.

        Longer features begin with a prefix, whose positions count; of shorter ones the model did
        not compute the last.
        """
        added = length - self._counted.shape[1]
        if added <= 0:
            return self._counted[:, :length]
        return torch.cat([self._counted.new_ones(len(self._counted), added), self._counted], 1)

    def _find_row_indices(self, length: int, counted: Tensor) -> Tensor | None:
        """Return the flat indices of rows that count, cached by length; None: all rows count.

        Args:
            counted: mask [B, length] of these rows.
        """
        if length not in self._indices_by_length:
            row_indices = None if bool(counted.all()) else counted.flatten().nonzero()[:, 0]
            self._indices_by_length[length] = row_indices
        return self._indices_by_length[length]


def _run_with_hooks(
    model: PreTrainedModel,
    batch: CalibrationBatch,
    domain: str | None,
    groups: Sequence[PermutationGroup],
    observe: Callable[[PermutationGroup, Hook, Tensor], None],
) -> None:
    """Run one forward pass that calls `observe` with the features at every hook.

    Hooks are removed after it.

    Args:
        batch: token ids and attention mask.
        domain: expert to run, for a model with experts; else None.
        groups: their hooks name the modules to observe.
        observe: takes a group, one of its hooks, and features [..., C].
    """
    accepted = inspect.signature(model.forward).parameters
    arguments: dict[str, object] = {"use_cache": False, "logits_to_keep": 1, "domain": domain}
    arguments = {k: v for k, v in arguments.items() if k in accepted and v is not None}
    with ExitStack() as stack:
        for group in groups:
            for hook in group.hooks:
                module = model.get_submodule(hook.module)
                stack.callback(_register_hook(module, group, hook, observe).remove)
        model(
            input_ids=batch.input_ids.to(model.device),
            attention_mask=batch.attention_mask.to(model.device),
            **arguments,
        )


def _register_hook(
    module: torch.nn.Module,
    group: PermutationGroup,
    hook: Hook,
    observe: Callable[[PermutationGroup, Hook, Tensor], None],
) -> torch.utils.hooks.RemovableHandle:
    """Register a hook that calls `observe` with the group's columns of a module's input or output.

    Args:
        module: module with this hook.
        group, hook: the group, and its hook at the module; the first arguments of `observe`.
        observe: takes a group, a hook, and features [..., C].
    Returns:
        a handle whose `remove` unregisters it.
    """

    def observe_columns(x: Tensor) -> None:
        """Call `observe` with the columns of the group in x [..., width]."""
        observe(group, hook, x[..., hook.start : hook.start + group.size])

    if hook.side == "input":
        return module.register_forward_pre_hook(lambda _, inputs: observe_columns(inputs[0]))
    return module.register_forward_hook(lambda _, inputs, output: observe_columns(output))


def _check_batch(
    batch: CalibrationBatch, number: int, model: PreTrainedModel, domains: Sequence[str]
) -> None:
    """Refuse a batch that is empty, too long, or of ids or a domain that the model lacks.

    Args:
        number: number of the batch, for messages.
        domains: domains of the model; empty: it has no experts.
    Raises:
        UserError: naming the batch.
    """
    config, origin = model.config, f"calibration: batch {number}"
    if batch.input_ids.numel() == 0 or int(batch.lengths.max()) < 1:
        raise UserError(f"{origin}: has no token")
    highest, vocab_size = int(batch.input_ids.max()), config.vocab_size
    if highest >= vocab_size or int(batch.input_ids.min()) < 0:
        raise UserError(
            f"{origin}: has token id {highest}; the models have ids from 0 to {vocab_size - 1}; "
            "use the tokenizer of the models"
        )
    position_limit = getattr(config, "max_position_embeddings", None)
    if position_limit is not None and batch.input_ids.shape[1] > position_limit:
        raise UserError(
            f"{origin}: has {batch.input_ids.shape[1]} tokens per item; the models have "
            f"{position_limit} "
            "positions"
        )
    if batch.domain is not None and domains and batch.domain not in domains:
        raise UserError(
            f"{origin}: is of domain {batch.domain!r}; the models have {', '.join(domains)}"
        )


@contextmanager
def _switch_to_evaluation(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into evaluation mode for a `with` block, and restore its mode after it."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)
