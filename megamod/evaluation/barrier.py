"""Losses on the straight line between two models, and the loss barrier on that line.

Source: Frankle et al. 2020 (Linear mode connectivity), section 2; Verma and Elbayad 2024 (Merging
text transformer models from different initializations), section 5.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

Losses = Callable[[nn.Module], Mapping[str, float]]
"""From a model to losses by name, such as those of two dev sets."""


def list_even_weights(points: int) -> list[float]:
    """List evenly spaced weights of the first model from 0 to 1."""
    return [number / (points - 1) for number in range(points)]


def compute_barrier(weights: Sequence[float], losses: Sequence[float]) -> float:
    """Compute the largest rise of the loss above the line between its ends; 0: it never rises
    above.

    Args:
        weights: of the first model, from 0 to 1.
        losses: loss at each weight.
    """
    ends = losses[0], losses[-1]
    return max(
        loss - (weight * ends[1] + (1 - weight) * ends[0])
        for weight, loss in zip(weights, losses, strict=True)
    )


def compute_barrier_over_mean(losses: Sequence[float]) -> float:
    """Compute the largest loss minus the mean of both ends."""
    return max(losses) - (losses[0] + losses[-1]) / 2


@torch.no_grad()
def compute_losses_along_line(
    model: nn.Module,
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    weights: Sequence[float],
    losses: Losses,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Compute the losses of weight * first + (1 - weight) * second by name, a list over the
    weights.

    Args:
        model: a model of the same architecture; its weights are overwritten.
        first, second: tensors of the two models by name.
        progress: called after every weight.
    """
    model.eval()
    curves: dict[str, list[float]] = {}
    state = model.state_dict()
    for weight in weights:
        for name, tensor in state.items():
            if tensor.is_floating_point():
                tensor.copy_(torch.lerp(second[name], first[name], weight))
        for name, loss in losses(model).items():
            curves.setdefault(name, []).append(loss)
        progress()
    return curves
