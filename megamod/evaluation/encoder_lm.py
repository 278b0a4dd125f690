"""Scores of encoders on held-out text: masked, replaced and retrieved tokens."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from megamod.progress import show_progress

Losses = Callable[[nn.Module, dict[str, object]], Mapping[str, Tensor]]
"""From a model and a batch to sums and counts [2] by name."""


@torch.no_grad()
def score_encoder(
    model: nn.Module,
    batches: Iterable[dict[str, object]],
    losses: Losses,
    device: torch.device,
    reduce: Callable[[Tensor], object],
    *,
    perplexity: bool,
) -> dict[str, float]:
    """Compute mean losses (nats) and accuracies over all batches of all ranks; collective.

    Random draws of the model depend on a batch's "number" alone, so scores are the same in every
    call and for any number of ranks. The model runs in evaluation mode; its mode and the random
    state of the process are restored.

    Args:
        model: in any mode, on `device`.
        batches: batches of this rank, at least one. "number" seeds the model's draws; "weight" (1
            if missing) multiplies sums and counts, so a batch of weight 0 only keeps ranks in step.
        losses: computes sums and counts of a batch; its entry "loss" is ignored.
        device: device of the model.
        reduce: sums a tensor over all ranks, in place.
        perplexity: adds "perplexity", exp("task_loss") and at most exp(700), if there is a
            "task_loss".
    Returns:
        sum / count by name; 0 where nothing was counted.
    """
    training, sums = model.training, {}
    model.eval()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for batch in show_progress(batches, "evaluating"):
            weight = float(batch.get("weight", 1.0))
            torch.manual_seed(batch["number"])
            for name, pair in losses(model, batch).items():
                if name != "loss":
                    sums[name] = sums.get(name, 0) + weight * pair.double()
    model.train(training)
    names = sorted(sums)
    totals = torch.stack([sums[name] for name in names]).to(device)
    reduce(totals)
    means = {
        n: float(total / count.clamp(min=1))
        for n, (total, count) in zip(names, totals, strict=True)
    }
    if perplexity and "task_loss" in means:
        means["perplexity"] = math.exp(min(means["task_loss"], 700.0))
    return means
