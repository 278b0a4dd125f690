"""Measurement of one case: times of all variants in turns, and errors against float64."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from cases import Case
from clock import Clock, MachineSpeed, compute_percentiles, synchronise
from torch import Tensor

TUNED = "max-autotune-no-cudagraphs"  # mode of `torch.compile`
OUT_OF_TIME = "no time left"

Variant = Callable[..., Tensor]
Row = dict[str, object]


def make_variants(case: Case, compiled: str) -> dict[str, Variant]:
    """Make the functions to measure by name: ours, plain torch, and torch compiled.

    Args:
        case: gives the variants, and the names of those to compile.
        compiled: "none", "default", or "all" for max-autotune too.
    """
    # A variant is compiled for every shape anew, as if it were the only one of a program.
    compile_ = partial(torch.compile, dynamic=False)
    result = dict(case.variants)
    if compiled == "none":
        return result
    named = {name: case.variants[name] for name in case.compiled} | dict(case.compiled_only)
    result |= {f"compile {name}": compile_(variant) for name, variant in named.items()}
    if compiled == "all":
        tuned = {name: named[name] for name in case.compiled}
        result |= {f"max-autotune {n}": compile_(v, mode=TUNED) for n, v in tuned.items()}
    return result


def measure_case(
    case: Case,
    mode: str,
    variants: Mapping[str, Variant],
    machine_speed: MachineSpeed,
    rounds: int,
    deadline: float = float("inf"),
) -> list[Row]:
    """Measure a row for each variant, in one mode.

    A variant that raises an error, or that is not run for lack of time, has a row with "failed".

    Args:
        case: operation, inputs, and least bytes and FLOPs.
        mode: "fwd", "bwd" or "fwd_bwd".
        variants: result of `make_variants`.
        machine_speed: converts bytes and FLOPs to the floor, the least possible time.
        rounds: timed calls of each variant.
        deadline: time of `time.monotonic` after which only "ours" is run if it has not been yet;
            variants that have been run are timed all the same.
    Returns:
        rows with times in microseconds ("us" the median, "us_p20", "us_p80"), errors, and
        "share_of_floor", the floor over the median.
    """
    clock = Clock(case.device)
    exact = compute_exact_results(case, mode)
    upstream = None if mode == "fwd" else exact[-1]
    calls, rows = {}, {}
    for name, variant in variants.items():
        rows[name] = {"variant": name, "mode": mode}
        if name != "ours" and time.monotonic() > deadline:
            rows[name]["failed"] = OUT_OF_TIME
            continue
        try:
            result = _compute_results(case, variant, upstream)
            rows[name] |= compute_errors(result, exact)
            call = _make_call(case, variant, mode, upstream)
            call()
            # Twice the host's time, so that the whole call is queued before a GPU starts it.
            calls[name] = call, 2 * clock.measure_host_time(call)
        except Exception as error:
            rows[name]["failed"] = format_error(error)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (call, ahead) in calls.items():
            times[name].append(clock(call, ahead))
    floor = max(
        case.bytes[mode] / machine_speed.bytes_per_second,
        case.flops[mode] / machine_speed.flops_per_second,
    )
    for name, result in times.items():
        low, middle, high = compute_percentiles(result)
        rows[name] |= {
            "us": middle * 1e6,
            "us_p20": low * 1e6,
            "us_p80": high * 1e6,
            "host_us": calls[name][1] / 2 * 1e6,
            "bytes": case.bytes[mode],
            "flops": case.flops[mode],
            "floor_us": floor * 1e6,
            "share_of_floor": floor / middle,
        }
    return list(rows.values())


def compute_exact_results(case: Case, mode: str) -> list[Tensor]:
    """Compute the value in float64; unless `mode` is "fwd" also gradients.

    Returns:
        the value; the gradients of `case.differentiable`; and last the gradient of the value that
        they are computed from, which is drawn at random, in the dtype of the inputs.
    """
    wide = {
        name: tensor.detach().double() if tensor.is_floating_point() else tensor
        for name, tensor in case.inputs.items()
    }
    if mode == "fwd":
        with torch.no_grad():
            return [case.reference(**wide)]
    leaves = [wide[name].requires_grad_() for name in case.differentiable]
    value = case.reference(**wide)
    dtype = case.inputs[case.differentiable[0]].dtype
    upstream = torch.randn_like(value).to(dtype)  # as the variants get it: rounded
    grads = torch.autograd.grad(value, leaves, upstream.double())
    return [value.detach(), *grads, upstream]


def compute_errors(result: Sequence[Tensor], exact: Sequence[Tensor]) -> Row:
    """Compute the relative errors "error" of the value and "grad_error" of the worst gradient.

    They are norms of the difference over norms; "grad_error" is None without gradients.

    Args:
        result, exact: the value first, then its gradients; of a variant and in float64.
    """
    errors = [
        float((ours.double() - expected).norm() / expected.norm().clamp_min(1e-300))
        for ours, expected in zip(result, exact, strict=False)
    ]
    return {"error": errors[0], "grad_error": max(errors[1:], default=None)}


def format_error(error: BaseException) -> str:
    """Format the error of a failed variant in one line: its type and message."""
    said = str(error).strip().splitlines() or ["without a message"]
    return f"{type(error).__name__}: {said[0]}"[:200]


def _compute_results(case: Case, variant: Variant, upstream: Tensor | None) -> list[Tensor]:
    """Run a variant on the inputs of a case and return its value and its gradients.

    `upstream` is the gradient of the value; None: only the value is returned.
    """
    if upstream is None:
        with torch.no_grad():
            result = [variant(**case.inputs)]
    else:
        value = variant(**case.inputs)
        leaves = [case.inputs[name] for name in case.differentiable]
        result = [value.detach(), *torch.autograd.grad(value, leaves, upstream)]
    synchronise(case.device == "cuda")
    return result


def _make_call(
    case: Case, variant: Variant, mode: str, upstream: Tensor | None
) -> Callable[[], object]:
    """Make the call without arguments that is timed in a mode, "fwd", "bwd" or "fwd_bwd".

    It runs `variant` on the inputs of the case; for "bwd" the forward pass runs here, once.
    `upstream` is the gradient of the value, None for "fwd".
    """
    inputs, leaves = case.inputs, [case.inputs[name] for name in case.differentiable]

    if mode == "fwd":

        def forward() -> Tensor:
            """Run the forward pass, without a graph for gradients."""
            with torch.no_grad():
                return variant(**inputs)

        return forward
    if mode == "bwd":
        output = variant(**inputs)
        return lambda: torch.autograd.grad(output, leaves, upstream, retain_graph=True)
    return lambda: torch.autograd.grad(variant(**inputs), leaves, upstream)
