"""Objectives: from a model and a batch to a loss. The loop knows nothing else about a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import deepspeed
import torch
from torch import Tensor
from torch.nn import functional

from megamod.models.lm.routing import Routing, compute_balance_losses, record_routing

if TYPE_CHECKING:
    from megamod.models.mux.types import MuxOutput

Batch = dict[str, object]
"""Fields of a micro-batch by name; see the class docstrings for those that an objective reads."""


@dataclass(frozen=True)
class BatchScore:
    """Loss and metrics of a micro-batch.

    Attributes:
        loss: differentiable scalar: each summed loss divided by its entry of `item_totals`, unless
            the class of the objective says otherwise.
        total: [E] float32, summed loss by group that the log shows (domain, task), in nats, or of
            squared errors.
        items: [E] float32, number of items (target tokens, rows) in each sum.
        further: further metrics by name: [2] float32, sum and count; the log shows sum / count.
    """

    loss: Tensor
    total: Tensor
    items: Tensor
    further: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """Computes losses of batches. A loss may have several terms, each a mean over its items."""

    def count_items(self, batch: Batch) -> Sequence[float]:
        """Count the items (tokens, rows) of each term in a batch, before any forward pass."""
        ...

    def compute_loss(
        self, engine: deepspeed.DeepSpeedEngine, batch: Batch, item_totals: Sequence[float]
    ) -> BatchScore:
        """Run the model on a micro-batch.

        Args:
            engine: with the model.
            batch: of the data that the objective is for.
            item_totals: divide the summed loss of each term.
        """
        ...


class CausalLMObjective:
    """Next-token cross entropy with equal weight for every target token.

    Batches are those of `megamod.data.lm.batches`.

    Args:
        domains: names by number.
        device: device of the model.
        selects_expert: True if the model selects an expert by the domain of the batch.
    """

    def __init__(self, domains: tuple[str, ...], device: torch.device, selects_expert: bool):
        self.domains = domains
        self.device = device
        self.selects_expert = selects_expert

    def count_items(self, batch: Batch) -> Sequence[float]:
        """Count the target tokens of a batch."""
        return (batch["tokens"],)

    def compute_loss(
        self, engine: deepspeed.DeepSpeedEngine, batch: Batch, item_totals: Sequence[float]
    ) -> BatchScore:
        """Run the model on a micro-batch; the sums of the result are by domain.

        Also those of batches that mix domains. Arguments as in `Objective.compute_loss`.
        """
        labels = batch["labels"].to(self.device, non_blocking=True)
        input_ids = batch["input_ids"].to(self.device, non_blocking=True)
        mask = batch.get("attention_mask")
        if mask is not None:
            mask = mask.to(self.device, non_blocking=True)
        else:
            # Explicit positions spare the model the search for padding.
            positions = torch.arange(input_ids.shape[1], device=self.device).expand_as(input_ids)
        output = engine(
            input_ids,
            attention_mask=mask,
            position_ids=None if mask is not None else positions,
            shift_labels=labels,
            num_items_in_batch=item_totals[0],
            domain=self.domains[batch["domain"]] if self.selects_expert else None,
        )
        domains = batch["domains"].to(self.device, non_blocking=True)
        totals = torch.zeros(2, len(self.domains), device=self.device)
        totals[0].index_add_(0, domains, -output.token_log_probs.sum(1))
        totals[1].index_add_(0, domains, (labels != -100).sum(1).float())
        return BatchScore(output.loss, totals[0], totals[1])


class MixtureLMObjective(CausalLMObjective):
    """Next-token cross entropy of a mixture of experts, plus its load-balance loss.

    The logged loss is the cross entropy alone. Further metrics are the mean load-balance loss
    `balance_loss`, that of each layer, and for each domain the share `load/DOMAIN/EXPERT` of its
    tokens' assignments that an expert gets, over all layers.

    Args:
        domains, device: as in `CausalLMObjective`.
        coefficient: weight of the load-balance loss, a mean over layers and micro-batches.
        experts: names by number.
    """

    def __init__(
        self,
        domains: tuple[str, ...],
        device: torch.device,
        coefficient: float,
        experts: Sequence[str],
    ):
        super().__init__(domains, device, selects_expert=False)
        self.coefficient = coefficient
        self.experts = tuple(experts)

    def compute_loss(
        self, engine: deepspeed.DeepSpeedEngine, batch: Batch, item_totals: Sequence[float]
    ) -> BatchScore:
        """Run the model, and add the weighted load-balance loss to its loss.

        Arguments as in `Objective.compute_loss`.
        """
        with record_routing(engine.module) as layers:
            scored = super().compute_loss(engine, batch, item_totals)
        is_target = (batch["labels"] != -100).to(self.device, non_blocking=True)
        balance = compute_balance_losses(layers, is_target.flatten())
        loss = scored.loss + self.coefficient * balance.mean()
        further = {"balance_loss": stack_sum_and_count(balance.mean(), 1)}
        further |= {
            f"balance_loss/layer{n}": stack_sum_and_count(value, 1)
            for n, value in enumerate(balance)
        }
        return replace(
            scored, loss=loss, further=further | self._count_loads(layers, batch, is_target)
        )

    def _count_loads(
        self, layers: Sequence[Routing], batch: Batch, is_target: Tensor
    ) -> dict[str, Tensor]:
        """Count how often each expert was selected for the tokens of each domain.

        Args:
            layers: routing of each layer; its experts are [B * T, K].
            batch: its `domains` [B] are read.
            is_target: [B, T] bool, tokens that count.
        Returns:
            by `load/DOMAIN/EXPERT` [2]: the count of the expert, and that of all experts.
        """
        domains = batch["domains"].to(self.device, non_blocking=True)
        rows = domains[:, None].expand(is_target.shape).flatten()
        loads = torch.zeros(len(self.domains) * len(self.experts), device=self.device)
        for routing in layers:
            cells = rows[:, None] * len(self.experts) + routing.experts
            ones = is_target.flatten()[:, None].expand(cells.shape).flatten().float()
            loads.index_add_(0, cells.flatten(), ones)
        loads = loads.view(len(self.domains), len(self.experts))
        return {
            f"load/{domain}/{expert}": torch.stack((loads[d, e], loads[d].sum()))
            for d, domain in enumerate(self.domains)
            for e, expert in enumerate(self.experts)
        }


class ClassificationObjective:
    """Cross entropy of rows or tokens, or squared error of values.

    Args:
        inputs: names of the fields of a batch that the model takes; it returns `logits` [R, C] or
            [R, L, C].
        device: batches are moved to it.
        regression: True for values, with C = 1.
        retrieved_per_token: tokens that a multiplexed model retrieves as a second term of the loss,
            per real token of a batch; 0: none, and the loss is that of the logits alone.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        device: torch.device,
        regression: bool,
        retrieved_per_token: float = 0.0,
    ):
        self.inputs = tuple(inputs)
        self.device = device
        self.regression = regression
        self.retrieved_per_token = retrieved_per_token

    def count_items(self, batch: Batch) -> Sequence[float]:
        """Count the labels of a batch, and with retrieval the tokens expected to be retrieved."""
        if not self.retrieved_per_token:
            return (batch["items"],)
        # The expected number, because the model draws the tokens that it retrieves.
        return batch["items"], self.retrieved_per_token * float(batch["attention_mask"].sum())

    def compute_loss(
        self, engine: deepspeed.DeepSpeedEngine, batch: Batch, item_totals: Sequence[float]
    ) -> BatchScore:
        """Run the model; without retrieval the loss is computed here, from its logits.

        A batch has the fields of `EncodedRows.gather_batch`; `inputs`, `labels` and `items` are
        read, with retrieval also `attention_mask`. Other arguments as in `Objective.compute_loss`.
        """
        fields = {
            name: batch[name].to(self.device, non_blocking=True)
            for name in (*self.inputs, "labels")
        }
        count = torch.tensor([float(batch["items"])], device=self.device)
        if self.retrieved_per_token:
            return self._score_with_retrieval(
                engine(
                    **fields, num_items_in_batch=item_totals[0], num_retrieval_items=item_totals[1]
                ),
                item_totals[0],
                count,
            )
        labels = fields.pop("labels")
        logits = engine(**fields).logits.float()
        if self.regression:
            total = functional.mse_loss(logits.flatten(), labels, reduction="sum")
        else:
            total = functional.cross_entropy(
                logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum"
            )
        return BatchScore(total / item_totals[0], total.detach()[None], count)

    def _score_with_retrieval(
        self, output: "MuxOutput", item_total: float, count: Tensor
    ) -> BatchScore:
        """Score a batch from the losses in the model's output.

        `item_total` divided the task loss; `count` [1] is the number of labels in the batch.
        """
        total = (output.task_loss.detach() * item_total)[None]
        right = torch.stack((output.retrieval_correct, output.retrieval_count)).float()
        return BatchScore(output.loss, total, count, {"retrieval_accuracy": right})


class MultiTaskObjective:
    """Mean over the tasks in a step of the mean loss of each task.

    A task with one row has the weight of one with thirty (Pilault et al. 2021, and its release).

    Args:
        inputs: names of the fields of a batch that the model takes.
        tasks: names.
        device: batches are moved to it.
        reduction: "global": the mean is over tasks and rows of the whole step, whatever the ranks
            and micro-batches; "local": over those of each micro-batch, as in the release.
    """

    def __init__(
        self, inputs: Sequence[str], tasks: Sequence[str], device: torch.device, reduction: str
    ):
        self.inputs, self.tasks = tuple(inputs), tuple(tasks)
        self.device = device
        self.reduction = reduction

    def count_items(self, batch: Batch) -> Sequence[float]:
        """Count the items of each task: rows or labelled tokens."""
        return batch["items"]

    def compute_loss(
        self, engine: deepspeed.DeepSpeedEngine, batch: Batch, item_totals: Sequence[float]
    ) -> BatchScore:
        """Run the model; further metrics are each task's share of the rows, `share/TASK`.

        A batch has the fields of `TaskMixture.gather_batch`. Other arguments as in
        `Objective.compute_loss`.
        """
        names = (*self.inputs, "task_ids", "labels")
        names += ("token_labels",) if "token_labels" in batch else ()
        fields = {name: batch[name].to(self.device, non_blocking=True) for name in names}
        if self.reduction == "global":
            fields["num_items_in_batch"] = torch.tensor(item_totals, device=self.device)
        output = engine(**fields)
        rows = torch.bincount(fields["task_ids"], minlength=len(self.tasks)).float()
        shares = {
            f"share/{task}": torch.stack((count, rows.sum()))
            for task, count in zip(self.tasks, rows, strict=True)
        }
        return BatchScore(output.loss, output.task_totals.detach(), output.task_items, shares)


def stack_sum_and_count(total: Tensor, count: float) -> Tensor:
    """Stack a summed loss or metric, detached, and its count of items: [2] float32."""
    return torch.stack((total.detach().float(), total.new_tensor(float(count)).float()))
