"""All benchmarks that need no GPU: `make bench`. Ratios of things measured in turns.

With --large models of 125 million parameters are merged, which takes 4 GB of disk.

Of three repeats the middle one counts; in brackets the spread. A floor is missed only if all three
repeats miss it; then the exit code is 1.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import align  # noqa: E402
import checkpoint  # noqa: E402
import demux_split  # noqa: E402
import ensemble  # noqa: E402
import loader  # noqa: E402
import merge  # noqa: E402
import multitask_step  # noqa: E402
import mux_throughput  # noqa: E402
import step  # noqa: E402
import trainer_step  # noqa: E402

FLOORS = {  # (limit, True if larger is better)
    "step, ZeRO 1 / hand-written loop": (1.03, False),
    "step, ZeRO 0 / hand-written loop": (1.03, False),
    "DEMix step / dense step, 2 ranks": (1.02, False),
    trainer_step.TIME: (1.0, False),
    trainer_step.MEMORY: (0.8, False),
    "checkpoint / torch.save + fsync": (1.15, False),
    "loader / nanoGPT-style reader": (3.0, True),
    "seconds to the first batch at step 10^6": (1.0, False),
    ensemble.COST: (1.05, False),
    merge.SPEED: (1.0, True),
    merge.MEMORY: (1.0, False),
    **{
        mux_throughput.row_name(*row): (floor, True) for row, floor in mux_throughput.FLOORS.items()
    },
    align.TIME: (1.5, False),
    align.MEMORY: (1.0, False),
    multitask_step.STEP: (multitask_step.LIMIT, False),
    **{demux_split.row_name(row): (floor, True) for row, floor in demux_split.FLOORS.items()},
}


def measure_loader() -> dict[str, list[float]]:
    """Measure the loader's speed, the worst of its shapes, and its start in a late step."""
    return {
        "loader / nanoGPT-style reader": sorted(min(loader.measure().values())),
        "seconds to the first batch at step 10^6": loader.seconds_to_resume(),
    }


BENCHMARKS = (  # the longest one last
    *(checkpoint.measure, measure_loader, lambda: merge.measure("--large" in sys.argv)),
    *(ensemble.measure, mux_throughput.measure, demux_split.measure, multitask_step.measure),
    *(step.measure, trainer_step.measure, align.measure),
)


def main() -> int:
    """Run, print a row as soon as it is measured, and tell whether every floor was reached."""
    missed = 0
    for measure in BENCHMARKS:
        for name, ratios in measure().items():
            limit, larger = FLOORS[name]
            best = max(ratios) if larger else min(ratios)
            ok = best >= limit if larger else best <= limit
            missed += not ok
            sign = ">=" if larger else "<="
            spread = f"({ratios[0]:.3f} to {ratios[2]:.3f})"
            verdict = "" if ok else "  MISSED"
            row = f"{name:40} {ratios[1]:6.3f}  {spread}  floor {sign} {limit}{verdict}"
            print(row, flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
