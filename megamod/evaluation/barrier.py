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
    """List `points` weights of the first model, evenly spaced from 0 to 1, both included.

    Args:
        points: at least 2.
    """
    return [number / (points - 1) for number in range(points)]


def compute_barrier(weights: Sequence[float], losses: Sequence[float]) -> float:
    """Compute the loss barrier: the largest rise of the loss above the line between its ends.

    It is never negative, as the rise at both ends is 0.

    Args:
        weights: interpolation weights of the first model, the first 0 and the last 1.
        losses: loss at each weight; the result has its unit.
    Raises:
        ValueError: if there are not as many losses as weights.
    """
    ends = losses[0], losses[-1]
    return max(
        loss - (weight * ends[1] + (1 - weight) * ends[0])
        for weight, loss in zip(weights, losses, strict=True)
    )


def compute_barrier_over_mean(losses: Sequence[float]) -> float:
    """Compute the largest of the losses along a line minus the mean of its first and its last.

    Unlike `compute_barrier`, it is above 0 wherever the two ends differ.
    """
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
    """Compute the losses of the models weight * first + (1 - weight) * second.

    Args:
        model: a model of the same architecture, set to evaluation mode. Its floating-point tensors
            are overwritten and hold the model of the last weight afterwards; integers stay.
        first, second: tensors of the two models by name, all those of `model`; not changed.
        weights: interpolation weights of the first model.
        losses: computes the losses of `model`.
        progress: called after every weight.
    Returns:
        for each name in the result of `losses` a list with one loss per weight.
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
