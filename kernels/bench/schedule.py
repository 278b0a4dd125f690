"""In which order things are measured, and when to stop."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from cases import CASES, parse_shape
from clock import Yard
from measure import Row, measure_case, variants_of


@dataclass(frozen=True)
class Wish:
    """One operation at one shape; `tuned` if max-autotune is worth its time."""

    op: str
    shape: str
    modes: tuple[str, ...] = ("fwd_bwd",)
    tuned: bool = False

    def __str__(self) -> str:
        return f"{self.op} {self.shape} {'/'.join(self.modes)}" + " tuned" * self.tuned


SHAPES = ("base-n2", "base-n5", "base-n10", "base-n5-s512", "large-n5")
FIRST = (  # what has a floor, at the shapes that matter most
    Wish("rsa_demux", "base-n5"),
    Wish("rsa_demux_l3", "base-n5"),
    Wish("mux_embed", "base-n5", ("fwd_bwd", "fwd")),
    Wish("multiplex", "base-n5-g512", ("fwd", "fwd_bwd")),
    Wish("slot_attention", "base-n5"),
    Wish("rsa_demux", "base-n2"),
    Wish("rsa_demux", "base-n10"),
    Wish("mux_embed", "base-n10"),
    Wish("keyed_linear", "base-n5"),
    Wish("rsa_demux", "base-n5", tuned=True),
)


def whole_program(ops: Iterable[str]) -> list[Wish]:
    """Everything, the most important first: floors, each operation once, all shapes."""
    names = list(ops)
    rest = [Wish(op, shape) for shape in ("base-n5", *SHAPES) for op in names]
    named = list(FIRST)
    for wish in rest:
        if not any((wish.op, wish.shape) == (other.op, other.shape) for other in named):
            named.append(wish)
    return [wish for wish in named if wish.op in names]


def measure_all(
    wishes: Sequence[Wish],
    *,
    device: str,
    dtype: str,
    rounds: int,
    compiled: str,
    yard: Yard,
    seconds: float,
) -> Iterable[tuple[Wish, list[Row] | None]]:
    """Rows of one wish after the other; None for those that there is no time for.

    Args:
        compiled: "none", "default", "all", or "floors": max-autotune where a wish says so.
        seconds: no wish and no variant is begun later. What is begun is finished.
    """
    deadline = time.monotonic() + seconds
    for wish in wishes:
        if time.monotonic() >= deadline:
            yield wish, None
            continue
        torch.compiler.reset()  # else a shape is compiled with the ones before in mind
        chosen = compiled
        if compiled == "floors":
            chosen = "all" if wish.tuned else "default"
        shape = parse_shape(wish.shape)
        named = {"op": wish.op, "shape": wish.shape, "instances": shape.instances, "dtype": dtype}
        case = CASES[wish.op](shape, dtype, device)
        variants = variants_of(case, chosen)
        rows: list[Row] = []
        for mode in wish.modes:
            result = measure_case(case, mode, variants, yard, rounds, deadline)
            rows += [named | row for row in result]
        del case, variants
        if device == "cuda":
            torch.cuda.empty_cache()
        yield wish, rows


def replaced(rows: Sequence[Row], newer: Sequence[Row]) -> list[Row]:
    """All rows, a case that was measured again only as it is now."""

    def case_of(row: Row) -> tuple[object, ...]:
        return row["op"], row["shape"], row["mode"], row["dtype"]

    again = {case_of(row) for row in newer}
    return [row for row in rows if case_of(row) not in again] + list(newer)
