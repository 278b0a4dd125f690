"""Clocks and yardsticks: interleaved times, copy bandwidth, GEMM rate, error against float64."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from cases import Case
from torch import Tensor


@dataclass(frozen=True)
class Yard:
    """What this machine can do, measured."""

    device: str
    bytes_per_second: float
    flops_per_second: float


class Clock:
    """Seconds of a call, with cold caches."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        size = 256 << 20 if self.cuda else 64 << 20
        self.flush = torch.empty(size, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        self.flush.zero_()
        if not self.cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1000


def yardsticks(device: str) -> Yard:
    """Copy bandwidth (bytes read and written) and rate of a large GEMM, the best of ten."""
    clock = Clock(device)
    cuda = device == "cuda"
    source = torch.empty(1 << 30 if cuda else 1 << 27, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    size, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    copy = min(clock(lambda: target.copy_(source)) for _ in range(10))
    gemm = min(clock(lambda: a @ b) for _ in range(10))
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    return Yard(name, 2 * source.numel() / copy, 2 * size**3 / gemm)


def measure_case(
    case: Case, mode: str, yard: Yard, rounds: int, compiled: str
) -> list[dict[str, object]]:
    """Times of all variants of a case, in turns; a row for each."""
    clock = Clock(case.device)
    variants = dict(case.variants)
    for name in case.compiled if compiled != "none" else ():
        variants[f"compile {name}"] = torch.compile(case.variants[name])
        if compiled == "all":
            variants[f"max-autotune {name}"] = torch.compile(
                case.variants[name], mode="max-autotune-no-cudagraphs"
            )
    calls = {name: _call(case, variant, mode) for name, variant in variants.items()}
    exact = case.exact()
    errors = {name: _error(case, variant, exact) for name, variant in variants.items()}
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(clock(call))
    floor = max(case.bytes[mode] / yard.bytes_per_second, case.flops[mode] / yard.flops_per_second)
    rows = []
    for name, found in times.items():
        low, middle, high = _percentiles(found)
        rows.append(
            {
                "variant": name,
                "us": middle * 1e6,
                "us_p20": low * 1e6,
                "us_p80": high * 1e6,
                "bytes": case.bytes[mode],
                "flops": case.flops[mode],
                "floor_us": floor * 1e6,
                "share_of_floor": floor / middle,
                "error": errors[name],
            }
        )
    return rows


def _call(case: Case, variant: Callable[..., Tensor], mode: str) -> Callable[[], object]:
    inputs, wanted = case.inputs, [case.inputs[name] for name in case.differentiable]

    if mode == "fwd":

        def forward() -> Tensor:
            with torch.no_grad():
                return variant(**inputs)

        return forward
    output = variant(**inputs)
    upstream = torch.randn_like(output)
    if mode == "bwd":
        return lambda: torch.autograd.grad(output, wanted, upstream, retain_graph=True)
    return lambda: torch.autograd.grad(variant(**inputs), wanted, upstream)


def _error(case: Case, variant: Callable[..., Tensor], exact: Tensor) -> float:
    """Norm of the difference over the norm, of the forward pass."""
    with torch.no_grad():
        found = variant(**case.inputs).double()
    return float((found - exact).norm() / exact.norm())


def _percentiles(times: list[float]) -> tuple[float, float, float]:
    if len(times) < 2:
        return times[0], times[0], times[0]
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]
