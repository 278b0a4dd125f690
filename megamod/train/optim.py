"""Optimizers, and learning-rate schedules that are functions of the step."""

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn

from megamod.args import OptimArgs

Schedule = Callable[[int], float]
"""From the number of finished steps to the learning rate of the next step."""


def make_adamw(
    parameters: Iterable[nn.Parameter] | list[dict[str, object]],
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.AdamW:
    """Make AdamW with decoupled weight decay; its learning rate is 0 until it is set.

    Args:
        parameters: these, or groups of them, whose own settings replace the arguments.
        betas, eps, weight_decay: of AdamW.
    """
    return torch.optim.AdamW(
        parameters, lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay, fused=True
    )


def make_optimizer_factory(
    optim: OptimArgs,
) -> Callable[[list[dict[str, object]]], torch.optim.Optimizer]:
    """Make a function from parameter groups to the optimizer that the flags `optim` describe."""
    betas, eps = (optim.adam_beta1, optim.adam_beta2), optim.adam_epsilon
    if optim.optim == "adamw":
        return partial(make_adamw, betas=betas, eps=eps, weight_decay=optim.weight_decay)
    from megamod.train.muon import make_muon  # a second of import time

    return partial(
        make_muon,
        scale=optim.muon_learning_rate / optim.learning_rate,
        weight_decay=optim.weight_decay,
        adamw={"betas": betas, "eps": eps},
    )


def make_linear_schedule(peak_rate: float, warmup_steps: int, max_steps: int) -> Schedule:
    """Make a schedule: linear from 0 to peak over the warm-up, then linear to 0 at the last step.

    The value for n finished steps applies to the next step, so with a warm-up the first step has
    rate 0 (fairseq's polynomial_decay with power 1).

    Args:
        peak_rate: learning rate at the end of the warm-up.
        warmup_steps: steps of the warm-up; 0: there is none.
        max_steps: steps of the run.
    """

    def compute_rate(finished_steps: int) -> float:
        """Compute the learning rate of the step after `finished_steps` steps."""
        if finished_steps <= warmup_steps and warmup_steps:
            return peak_rate * finished_steps / warmup_steps
        remaining = max(0, max_steps - finished_steps) / max(1, max_steps - warmup_steps)
        return peak_rate * remaining

    return compute_rate


def make_constant_schedule(peak_rate: float, warmup_steps: int, max_steps: int) -> Schedule:
    """Make a schedule: linear from 0 to `peak_rate` over `warmup_steps`, then constant.

    `max_steps` has no effect; it is a parameter because all schedules are made alike.
    """
    return lambda finished: peak_rate * min(1.0, finished / warmup_steps if warmup_steps else 1.0)


def make_cosine_schedule(peak_rate: float, warmup_steps: int, max_steps: int) -> Schedule:
    """Make a schedule: a linear warm-up to the peak, then half a cosine to 0 at the end.

    Arguments as in `make_linear_schedule`.
    """

    def compute_rate(finished_steps: int) -> float:
        """Compute the learning rate of the step after `finished_steps` steps."""
        if finished_steps < warmup_steps:
            return peak_rate * finished_steps / warmup_steps
        progress = min(1.0, (finished_steps - warmup_steps) / max(1, max_steps - warmup_steps))
        return peak_rate * (1 + math.cos(math.pi * progress)) / 2

    return compute_rate


def make_warmup_stable_decay_schedule(
    peak_rate: float, warmup_steps: int, max_steps: int
) -> Schedule:
    """Make a schedule: linear to peak, constant, and linear to 0 over the last fifth of all steps.

    Arguments as in `make_linear_schedule`.
    Source: Hu et al. 2024 (MiniCPM), section 4; the linear decay is that of Hagele et al. 2024.
    """
    decay = max(1, max_steps // 5)

    def compute_rate(finished_steps: int) -> float:
        """Compute the learning rate of the step after `finished_steps` steps."""
        if finished_steps < warmup_steps:
            return peak_rate * finished_steps / warmup_steps
        return peak_rate * min(1.0, max(0, max_steps - finished_steps) / decay)

    return compute_rate


SCHEDULES = {
    "linear": make_linear_schedule,
    "constant": make_constant_schedule,
    "cosine": make_cosine_schedule,
    "warmup_stable_decay": make_warmup_stable_decay_schedule,
}


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every parameter group, times its `rate_scale` (Muon has one)."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("rate_scale", 1.0)
