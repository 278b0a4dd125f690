"""Order of the measurements, and their end when time runs out."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from cases import CASES, parse_shape
from clock import MachineSpeed
from measure import Row, make_variants, measure_case


@dataclass(frozen=True)
class Request:
    """A measurement of one operation at one shape.

    Attributes:
        op: a name in `CASES`.
        shape: as `parse_shape` reads it.
        modes: "fwd", "bwd", "fwd_bwd".
        tuned: with `compiled` "floors", max-autotune is measured too.
    """

    op: str
    shape: str
    modes: tuple[str, ...] = ("fwd_bwd",)
    tuned: bool = False

    def __str__(self) -> str:
        return f"{self.op} {self.shape} {'/'.join(self.modes)}" + " tuned" * self.tuned


SHAPES = ("base-n2", "base-n5", "base-n10", "base-n5-s512", "large-n5")
FIRST = (  # operations with a floor, at the shapes that matter most
    Request("rsa_demux", "base-n5"),
    Request("rsa_demux_l3", "base-n5"),
    Request("mux_embed", "base-n5", ("fwd_bwd", "fwd")),
    Request("multiplex", "base-n5-g512", ("fwd", "fwd_bwd")),
    Request("instance_attention", "base-n5"),
    Request("rsa_demux", "base-n2"),
    Request("rsa_demux", "base-n10"),
    Request("mux_embed", "base-n10"),
    Request("keyed_linear", "base-n5"),
    Request("rsa_demux", "base-n5", tuned=True),
)


def list_all_requests(ops: Iterable[str]) -> list[Request]:
    """List all measurements of the operations `ops`, the most important first.

    Floors come first, then each operation once, then all shapes.
    """
    names = list(ops)
    rest = [Request(op, shape) for shape in ("base-n5", *SHAPES) for op in names]
    named = list(FIRST)
    for request in rest:
        if not any((request.op, request.shape) == (other.op, other.shape) for other in named):
            named.append(request)
    return [request for request in named if request.op in names]


def measure_all(
    requests: Sequence[Request],
    *,
    device: str,
    dtype: str,
    rounds: int,
    compiled: str,
    machine_speed: MachineSpeed,
    seconds: float,
) -> Iterable[tuple[Request, list[Row] | None]]:
    """Yield each request with its rows; None for those that there is no time for.

    Args:
        requests: in the order in which they are measured.
        device, dtype: "cuda" or "cpu", and a name in `cases.DTYPES`.
        rounds, machine_speed: see `measure_case`.
        compiled: "none", "default", "all", or "floors": "all" for requests that are `tuned`, else
            "default".
        seconds: after this time no request and, but for "ours", no variant is begun. A request that
            is begun is finished.
    """
    deadline = time.monotonic() + seconds
    for request in requests:
        if time.monotonic() >= deadline:
            yield request, None
            continue
        torch.compiler.reset()  # else a shape is compiled with the ones before in mind
        compile_mode = compiled
        if compiled == "floors":
            compile_mode = "all" if request.tuned else "default"
        shape = parse_shape(request.shape)
        named = {
            "op": request.op,
            "shape": request.shape,
            "instances": shape.instances,
            "dtype": dtype,
        }
        case = CASES[request.op](shape, dtype, device)
        variants = make_variants(case, compile_mode)
        rows: list[Row] = []
        for mode in request.modes:
            result = measure_case(case, mode, variants, machine_speed, rounds, deadline)
            rows += [named | row for row in result]
        del case, variants
        if device == "cuda":
            torch.cuda.empty_cache()
        yield request, rows


def replace_cases(rows: Sequence[Row], newer: Sequence[Row]) -> list[Row]:
    """Return all rows, with those of cases that were measured again replaced by the newer ones."""

    def make_case_key(row: Row) -> tuple[object, ...]:
        """Return the operation, shape, mode and dtype of a row."""
        return row["op"], row["shape"], row["mode"], row["dtype"]

    newer_cases = {make_case_key(row) for row in newer}
    return [row for row in rows if make_case_key(row) not in newer_cases] + list(newer)
