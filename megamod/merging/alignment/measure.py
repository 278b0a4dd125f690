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

from megamod.convert.sources import has_auto_class, resolve_model
from megamod.errors import UserError
from megamod.merging.alignment.calibration import Batch
from megamod.merging.alignment.groups import Group, Hook
from megamod.merging.alignment.options import Options
from megamod.merging.alignment.statistics import CrossCovariance
from megamod.models.pretrained import load_pretrained

_AUTO = (
    AutoModelForMaskedLM,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
    AutoModelForPreTraining,
)


@dataclass(frozen=True)
class Measured:
    """Statistics over all batches.

    Attributes:
        covariances: of each group.
        columns: number of tokens that counted (sentences, at sentence level).
    """

    covariances: Mapping[str, CrossCovariance]
    columns: int


def load_model(name: str, auto: type | None = None) -> PreTrainedModel:
    """The model of a folder or hub id in float32.

    Args:
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
    return load_pretrained(auto or _auto_of(source.config), source.name, "model")[0]


def _auto_of(config: PreTrainedConfig) -> type:
    """The Auto class that makes the class named in the configuration."""
    named = (config.architectures or [None])[0]
    for auto in _AUTO:
        classes = auto._model_mapping.get(type(config), None)
        classes = classes if isinstance(classes, (tuple, list)) else [classes]
        if any(kind is not None and kind.__name__ == named for kind in classes):
            return auto
    return AutoModel


@torch.no_grad()
def measure(
    first: PreTrainedModel,
    second: PreTrainedModel,
    groups: Sequence[Group],
    domains: Sequence[str],
    batches: Iterable[Batch],
    options: Options,
) -> Measured:
    """Run both models on all batches in evaluation mode and accumulate covariances of features.

    Args:
        groups: whose features are observed.
        domains: of models with experts; a batch without a domain runs through each of them.
    Raises:
        UserError: if there is no batch, or a batch does not fit the models.
    """
    device = first.device
    stacked = options.compat.stacked
    sums = {group.name: CrossCovariance(group.size, device, stacked) for group in groups}
    columns = 0
    with _evaluating(first), _evaluating(second):
        for number, batch in enumerate(batches):
            _check(batch, number, first, domains)
            rows = _Rows(batch, options, device, getattr(first.config, "num_instances", 1))
            for domain in [batch.domain] if batch.domain or not domains else domains:
                held: dict[tuple[str, Hook], Tensor] = {}

                def keep(group: Group, hook: Hook, x: Tensor, held=held, rows=rows) -> None:
                    held[group.name, hook] = rows.of(x)

                def compare(group: Group, hook: Hook, x: Tensor, held=held, rows=rows) -> None:
                    sums[group.name].add(held.pop((group.name, hook)), rows.of(x))

                _run(first, batch, domain, groups, keep)
                _run(second, batch, domain, groups, compare)
                columns += rows.count
    if columns == 0:
        raise UserError("calibration: the text has no token to compare the models on")
    return Measured(sums, columns)


class _Rows:
    """Selection of the rows of a batch that count.

    Multiplexed models mix the instances of a group into one sequence, after a prefix if they have
    one; a position counts if it does in any of the instances.
    """

    def __init__(self, batch: Batch, options: Options, device: torch.device, instances: int):
        self._level = options.calibration.sentence_level
        self._cls = 1 if options.compat.cls_at_one else 0
        self._kept = batch.kept(options.calibration.special_tokens).to(device)
        if instances > 1:
            rows, length = self._kept.shape
            whole = -(-rows // instances) * instances
            order = torch.arange(whole, device=device) % rows
            self._kept = self._kept[order].view(-1, instances, length).any(1)
        self._places: dict[int, Tensor | None] = {}
        level = self._level
        self.count = int(self._kept.sum()) if level == "none" else len(batch.lengths)

    def of(self, x: Tensor) -> Tensor:
        """Rows [n, C] that count, of features [B, L, C] or pooled features [B, C]."""
        if x.dim() == 2:
            return x
        kept = self._fit(x.shape[1])
        if self._level == "none":
            places = self._at(x.shape[1], kept)
            flat = x.flatten(0, 1)
            return flat if places is None else flat.index_select(0, places)
        if self._level == "cls":
            return x[:, self._cls]
        nonempty = kept.any(1)
        x, kept = x[nonempty], kept[nonempty, :, None]
        if self._level == "maxpool":
            return x.masked_fill(~kept, -torch.inf).amax(1)
        return (x * kept).sum(1) / kept.sum(1)

    def _fit(self, length: int) -> Tensor:
        """The mask extended by a prefix, or cut to the columns that are computed."""
        added = length - self._kept.shape[1]
        if added <= 0:
            return self._kept[:, :length]
        return torch.cat([self._kept.new_ones(len(self._kept), added), self._kept], 1)

    def _at(self, length: int, kept: Tensor) -> Tensor | None:
        if length not in self._places:
            places = None if bool(kept.all()) else kept.flatten().nonzero()[:, 0]
            self._places[length] = places
        return self._places[length]


def _run(
    model: PreTrainedModel,
    batch: Batch,
    domain: str | None,
    groups: Sequence[Group],
    see: Callable[[Group, Hook, Tensor], None],
) -> None:
    """Run one forward pass that calls `see` with the features at every hook."""
    accepted = inspect.signature(model.forward).parameters
    arguments: dict[str, object] = {"use_cache": False, "logits_to_keep": 1, "domain": domain}
    arguments = {k: v for k, v in arguments.items() if k in accepted and v is not None}
    with ExitStack() as stack:
        for group in groups:
            for hook in group.hooks:
                module = model.get_submodule(hook.module)
                stack.callback(_attach(module, group, hook, see).remove)
        model(
            input_ids=batch.input_ids.to(model.device),
            attention_mask=batch.mask.to(model.device),
            **arguments,
        )


def _attach(
    module: torch.nn.Module,
    group: Group,
    hook: Hook,
    see: Callable[[Group, Hook, Tensor], None],
) -> torch.utils.hooks.RemovableHandle:
    def features(x: Tensor) -> None:
        see(group, hook, x[..., hook.start : hook.start + group.size])

    if hook.side == "input":
        return module.register_forward_pre_hook(lambda _, inputs: features(inputs[0]))
    return module.register_forward_hook(lambda _, inputs, output: features(output))


def _check(batch: Batch, number: int, model: PreTrainedModel, domains: Sequence[str]) -> None:
    """Refuse a batch that does not fit the model.

    Raises:
        UserError: naming the batch.
    """
    config, origin = model.config, f"calibration: batch {number}"
    if batch.input_ids.numel() == 0 or int(batch.lengths.max()) < 1:
        raise UserError(f"{origin}: has no token")
    highest, words = int(batch.input_ids.max()), config.vocab_size
    if highest >= words or int(batch.input_ids.min()) < 0:
        raise UserError(
            f"{origin}: has token id {highest}; the models have ids from 0 to {words - 1}; "
            "use the tokenizer of the models"
        )
    room = getattr(config, "max_position_embeddings", None)
    if room is not None and batch.input_ids.shape[1] > room:
        raise UserError(
            f"{origin}: has {batch.input_ids.shape[1]} tokens per item; the models have {room} "
            "positions"
        )
    if batch.domain is not None and domains and batch.domain not in domains:
        raise UserError(
            f"{origin}: is of domain {batch.domain!r}; the models have {', '.join(domains)}"
        )


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode within the block."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)
