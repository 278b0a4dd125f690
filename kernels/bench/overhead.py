"""Host overhead of a custom operation compared with one of torch."""

import time
from collections.abc import Callable

import torch
from clock import synchronise
from megamod_kernels.mux import multiplex
from torch import Tensor

CALLS, ROUNDS = 100, 7  # a GPU's queue holds about a thousand launches


def measure_launch_overhead(
    device: str, calls: int = CALLS, rounds: int = ROUNDS
) -> dict[str, float]:
    """Measure microseconds per call of `multiplex` and `torch.mean` on a tensor of a few kilobytes.

    Neither needs a gradient. The device has so little to do that only the host's work is seen;
    both take turns, the least of all rounds counts.

    Args:
        device: "cuda" or "cpu".
        calls, rounds: calls of a round, and rounds of each of the two.
    Returns:
        "ours_us", "torch_us" and their difference "extra_us".
    """
    cuda = device == "cuda"
    x = torch.randn(2, 2, 4, 256, device=device).to(torch.bfloat16)
    key = torch.randn(2, 256, device=device)
    sides = {"ours_us": lambda: multiplex(x, key), "torch_us": lambda: x.mean(1)}
    result = dict.fromkeys(sides, float("inf"))
    with torch.no_grad():
        for call in sides.values():
            call()
        for _ in range(rounds):
            for name, call in sides.items():
                result[name] = min(result[name], _time_calls(call, calls, cuda) * 1e6)
    return result | {"extra_us": result["ours_us"] - result["torch_us"]}


def _time_calls(call: Callable[[], Tensor], calls: int, cuda: bool) -> float:
    """Return the host's seconds per call, averaged over `calls` calls; `cuda`: on a GPU."""
    synchronise(cuda)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    result = (time.perf_counter() - start) / calls
    synchronise(cuda)
    return result
