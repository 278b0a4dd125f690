"""Objective of encoders: losses of masked, replaced and retrieved tokens, and of distillation."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import deepspeed
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel

from megamod.train.objectives import Batch, BatchScore, stack_sum_and_count

if TYPE_CHECKING:
    from megamod.models.mux.types import MuxOutput

ComputeLosses = Callable[[nn.Module, Batch, Sequence[float]], dict[str, Tensor]]
"""From model, batch and divisors of the sums to "loss", a differentiable scalar, and further
[2] float32 sums with their counts by name."""


class EncoderObjective:
    """Pretraining of an encoder: masked, replaced or retrieved tokens, or a teacher's states.

    Args:
        compute_losses: `compute_masked_lm_losses`, `compute_replaced_token_losses` or
            `compute_distillation_losses` with all arguments but model, batch and divisors.
        item_fields: fields of a batch with the number of items of each sum.
        main_loss: name of the loss that the log shows.
    """

    def __init__(self, compute_losses: ComputeLosses, item_fields: Sequence[str], main_loss: str):
        self.compute_losses = compute_losses
        self.item_fields = tuple(item_fields)
        self.main_loss = main_loss

    def count_items(self, batch: Batch) -> Sequence[float]:
        """Read the numbers of items from the fields `item_fields`."""
        return tuple(batch[name] for name in self.item_fields)

    def compute_loss(
        self, engine: deepspeed.DeepSpeedEngine, batch: Batch, item_totals: Sequence[float]
    ) -> BatchScore:
        """Run the model on a micro-batch; losses besides `main_loss` become further metrics.

        Arguments and result as in `Objective.compute_loss`.
        """
        losses = self.compute_losses(engine, batch, item_totals)
        shown = losses[self.main_loss]
        further = {n: pair for n, pair in losses.items() if n not in ("loss", self.main_loss)}
        return BatchScore(losses["loss"], shown[:1], shown[1:], further)


def compute_masked_lm_losses(
    model: nn.Module,
    batch: Batch,
    item_totals: Sequence[float],
    device: torch.device,
    multiplexed: bool,
) -> dict[str, Tensor]:
    """Compute the losses of a masked LM.

    Args:
        batch: of R rows, as in `MaskedBatches`. Read are `input_ids` and `labels` [R, T] int64, the
            number `masked` of labels, and of a multiplexed model `retrieved_instances` [R / N, T]
            int64 and the number `positions` of retrieved tokens.
        item_totals: divisors in "loss" of the sums over masked and over retrieved tokens; 0 counts
            as 1.
        device: device of the model, to which the batch is copied.
        multiplexed: the model computes its losses itself, as multiplexed encoders do.
    Returns:
        "loss", a differentiable scalar; and [2] float32 sums with their counts: "task_loss" and
        "retrieval_loss" (nats), "retrieval_accuracy"; only terms with a weight.
    """
    inputs = batch["input_ids"].to(device, non_blocking=True)
    labels = batch["labels"].to(device, non_blocking=True)
    masked, positions = (count or 1.0 for count in item_totals)
    if not multiplexed:
        logits = model(input_ids=inputs).logits[labels != -100].float()
        total = functional.cross_entropy(logits, labels[labels != -100], reduction="sum")
        return {"loss": total / masked, "task_loss": stack_sum_and_count(total, batch["masked"])}
    output = model(
        input_ids=inputs,
        labels=labels,
        num_items_in_batch=masked,
        retrieved_instances=batch["retrieved_instances"].to(device, non_blocking=True),
        num_retrieval_items=positions,
        output_logits=False,
    )
    return {
        "loss": output.loss,
        **_collect_loss_terms(output, batch, (masked, batch["masked"]), positions),
    }


def compute_replaced_token_losses(
    model: nn.Module,
    batch: Batch,
    item_totals: Sequence[float],
    device: torch.device,
    config: PreTrainedConfig,
    discriminator_weight: float = 1.0,
) -> dict[str, Tensor]:
    """Compute the losses of a discriminator of replaced tokens.

    Args:
        batch: of R rows, as in `MaskedBatches`. Read are `input_ids` and `random_ids` [R, T] int64
            and the number `tokens`; of a plain ELECTRA also `mask_id`, of a multiplexed one
            `labels` [R, T] and `retrieved_instances` [R / N, T] int64, and the numbers `positions`
            and `masked`.
        item_totals: divisors in "loss" of the sums over classified, retrieved and masked tokens,
            and over those that a multiplexed generator retrieves; 0 counts as 1.
        device: device of the model, to which the batch is copied.
        config: configuration of the model; tokens of a plain ELECTRA are replaced here, at random.
        discriminator_weight: weight of a plain discriminator in "loss"; other models have it in
            their configuration.
    Returns:
        as `compute_masked_lm_losses`; "task_loss" is the discriminator's, "recall" and "precision"
        are those of replaced tokens, and "generator_loss" is present if the model has a generator.
    """
    inputs = batch["input_ids"].to(device, non_blocking=True)
    random_ids = batch["random_ids"].to(device, non_blocking=True)
    tokens, positions, masked, readable = (count or 1.0 for count in item_totals)
    if not hasattr(config, "num_instances"):
        corrupted = inputs == batch["mask_id"]
        logits = model(input_ids=torch.where(corrupted, random_ids, inputs)).logits.float()
        total = functional.binary_cross_entropy_with_logits(
            logits, corrupted.float(), reduction="sum"
        )
        losses = {
            "loss": discriminator_weight * total / tokens,
            "task_loss": stack_sum_and_count(total, batch["tokens"]),
        }
        return losses | _count_detections(logits, corrupted)
    generates = config.generator != "none"
    retrieved_instances = batch["retrieved_instances"].to(device, non_blocking=True)
    output = model(
        input_ids=inputs,
        labels=batch["labels"].to(device, non_blocking=True),
        random_ids=None if generates else random_ids,
        num_items_in_batch=tokens,
        retrieved_instances=retrieved_instances,
        num_retrieval_items=positions,
        num_generator_items=masked,
        generator_retrieved_instances=retrieved_instances,
        num_generator_retrieval_items=readable,
    )
    losses = {
        "loss": output.loss,
        **_collect_loss_terms(output, batch, (tokens, batch["tokens"]), positions),
    }
    if output.logits is not None:
        losses |= _count_detections(output.logits, output.corrupted[:, : output.logits.shape[1]])
    if generates:
        losses["generator_loss"] = stack_sum_and_count(
            output.generator_loss * masked, batch["masked"]
        )
    return losses


def compute_distillation_losses(
    model: nn.Module,
    batch: Batch,
    item_totals: Sequence[float],
    device: torch.device,
    teacher: PreTrainedModel,
    cls_token_id: int,
) -> dict[str, Tensor]:
    """Compute the distance between the states of a bare multiplexed encoder and its teacher's.

    The teacher reads every row by itself, without its padding, and gets the dtype of the model.

    Args:
        batch: of R rows, as in `MaskedBatches`. Read are `input_ids` [R, T] int64, and the number
            `unpadded` of tokens that are no padding.
        item_totals: divisor in "loss" of the sum over tokens; 0 counts as 1.
        device: device of the model, to which batch and teacher are copied.
        teacher: bare stock encoder of the same width; it is not trained.
        cls_token_id: id of the first token of every row, which the model puts there.
    Returns:
        "loss", a differentiable scalar; and [2] float32 sums with their counts over tokens:
        "task_loss", the squared difference, mean over features, and "similarity", the cosine.
    Source: Hinton et al. 2015; Sun et al. 2019 (Patient KD), section 3.2, for hidden states.
    """
    ids = batch["input_ids"].to(device, non_blocking=True, copy=True)
    ids[:, 0] = cls_token_id
    unpadded = ids != (teacher.config.pad_token_id or 0)
    teacher.to(device=device, dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        targets = teacher(input_ids=ids, attention_mask=unpadded.long())[0][unpadded].float()
    states = model(input_ids=ids, attention_mask=unpadded.long())[0][unpadded].float()
    total = (states - targets).square().mean(-1).sum()
    similarity = functional.cosine_similarity(states.detach(), targets, dim=-1).sum()
    return {
        "loss": total / (item_totals[0] or 1.0),
        "task_loss": stack_sum_and_count(total, batch["unpadded"]),
        "similarity": stack_sum_and_count(similarity, batch["unpadded"]),
    }


def _collect_loss_terms(
    output: "MuxOutput",
    batch: Batch,
    task_divisor_and_count: tuple[float, float],
    retrieval_divisor: float,
) -> dict[str, Tensor]:
    """Collect sums and counts, [2] float32, of the terms that the model computed.

    Args:
        task_divisor_and_count: divisor of `output.task_loss`, and the items of this batch.
        retrieval_divisor: divisor of `output.retrieval_loss`.
    """
    losses = {}
    if output.task_loss is not None:
        losses["task_loss"] = stack_sum_and_count(
            output.task_loss * task_divisor_and_count[0], task_divisor_and_count[1]
        )
    if output.retrieval_loss is not None:
        losses["retrieval_loss"] = stack_sum_and_count(
            output.retrieval_loss * retrieval_divisor, batch["positions"]
        )
        right = (output.retrieval_correct, output.retrieval_count)
        losses["retrieval_accuracy"] = torch.stack(right).float()
    return losses


def _count_detections(logits: Tensor, is_replaced: Tensor) -> dict[str, Tensor]:
    """Count correct detections of replaced tokens for recall and precision.

    Args:
        logits: of replacement, above 0 if a token is detected.
        is_replaced: bool, of the same shape.
    Returns:
        [2] float32 each: the correct detections, and the replaced tokens (recall) or the tokens
        predicted to be replaced (precision).
    """
    predicted = logits.detach() > 0
    right = (predicted & is_replaced).sum().float()
    return {
        "recall": torch.stack((right, is_replaced.sum().float())),
        "precision": torch.stack((right, predicted.sum().float())),
    }
