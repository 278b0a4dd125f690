"""Performance floors on a GPU, and their verdicts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Row = Mapping[str, object]


@dataclass(frozen=True)
class Floor:
    """The least speed of ours, against other variants of the same run or the least possible time.

    Attributes:
        title: of the value that is limited.
        ops, modes: operations and modes that it holds for, in bf16.
        peers: names of the variants of which the fastest is compared: its time over ours. Empty:
            the share of the floor of bytes and operations.
        limit: least value.
        instances: smallest and largest N that it holds for.
        least_bytes: of cases that are judged; in smaller ones starting a kernel takes most time.
    """

    title: str
    ops: tuple[str, ...]
    modes: tuple[str, ...]
    peers: tuple[str, ...]
    limit: float
    instances: tuple[int, int] = (1, 64)
    least_bytes: float = 0.0

    def applies_to(self, row: Row) -> bool:
        """Return True if the floor applies to a row of ours."""
        low, high = self.instances
        return (
            row["op"] in self.ops
            and row["mode"] in self.modes
            and row["dtype"] == "bf16"
            and low <= row["instances"] <= high
            and row.get("bytes", self.least_bytes) >= self.least_bytes
        )


@dataclass(frozen=True)
class Verdict:
    """Verdict of one floor for one shape.

    Attributes:
        shape: operation, shape and mode.
        title: of the value.
        value: None without a measurement.
        limit: least value; the largest if `larger` is False.
    """

    shape: str
    title: str
    value: float | None
    limit: float
    larger: bool = True

    @property
    def met(self) -> bool | None:
        """True if the floor is met; None: not measured."""
        if self.value is None:
            return None
        return self.value >= self.limit if self.larger else self.value <= self.limit

    @property
    def status(self) -> str:
        """ "MET" or "MISSED", or "not measured" without a value."""
        return {None: "not measured", True: "MET", False: "MISSED"}[self.met]

    def __str__(self) -> str:
        result = "-" if self.value is None else f"{self.value:.3g}"
        sign = ">=" if self.larger else "<="
        return f"{self.shape}: {self.title} {result}, floor {sign} {self.limit:g}: {self.status}"


DEMUX = ("rsa_demux", "rsa_demux_l3")
CONCAT = ("compile eager concat", "max-autotune eager concat")
SPLIT = ("compile eager split", "max-autotune eager split")
COMPILED = ("compile eager", "max-autotune eager")
ATTENTION = ("eager sdpa", "compile eager sdpa", "compile flex mask", "compile flex positions")
MODES = ("fwd", "bwd", "fwd_bwd")
BOTH = MODES[2:]
LARGE = 4e8  # bytes
FLOORS = (
    Floor("best compile of the concatenated form / ours", DEMUX[:1], BOTH, CONCAT, 2.0, (5, 64)),
    Floor("best compile of the concatenated form / ours", DEMUX[:1], BOTH, CONCAT, 1.6, (2, 4)),
    Floor("best compile of the concatenated form / ours", DEMUX[1:], BOTH, CONCAT, 1.5, (5, 64)),
    Floor("best compile of the split form / ours", DEMUX, BOTH, SPLIT, 1.15),
    Floor("best of SDPA and FlexAttention / ours", ("instance_attention",), BOTH, ATTENTION, 3.0),
    Floor("best compile / ours", ("mux_embed",), BOTH, COMPILED, 1.5, (5, 64)),
    Floor("best compile / ours", ("multiplex",), MODES, COMPILED, 0.97),
    Floor("share of copy bandwidth", ("multiplex",), ("fwd",), (), 0.85, least_bytes=LARGE),
)
OVERHEAD_US = 15.0  # largest overhead of a launch on the host, in microseconds


def group_by_case(rows: Iterable[Row]) -> dict[tuple[object, ...], dict[str, Row]]:
    """Group rows by operation, shape, mode and dtype, and each group by variant."""
    cases: dict[tuple[object, ...], dict[str, Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("op", "shape", "mode", "dtype"))
        cases.setdefault(key, {})[row["variant"]] = row
    return cases


def judge_floors(rows: Iterable[Row], floors: Sequence[Floor] = FLOORS) -> list[Verdict]:
    """List the verdicts of all floors that apply to rows of `measure.measure_case`.

    A floor is missed if our variant failed.
    """
    return [
        Verdict(
            " ".join(key[:3]), floor.title, _compute_limited_value(floor, variants), floor.limit
        )
        for key, variants in group_by_case(rows).items()
        for floor in floors
        if "ours" in variants and floor.applies_to(variants["ours"])
    ]


def judge_overhead(overhead: Mapping[str, float]) -> Verdict:
    """Return the verdict on the result of `overhead.measure_launch_overhead`."""
    return Verdict(
        "multiplex, tiny", "us on the host beyond a torch operation", overhead["extra_us"],
        OVERHEAD_US, larger=False,
    )  # fmt: skip


def _compute_limited_value(floor: Floor, variants: Mapping[str, Row]) -> float | None:
    """Compute the value that a floor limits; 0 if ours failed, None without a competitor's time.

    `variants` are the rows of one case by variant.
    """
    ours = variants["ours"]
    if "failed" in ours:
        return 0.0
    if not floor.peers:
        return ours["share_of_floor"]
    times = [row["us"] for name, row in variants.items() if name in floor.peers and "us" in row]
    return min(times) / ours["us"] if times else None
