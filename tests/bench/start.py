"""Seconds until `megamod --help` and the help of every verb are printed; medians of five.

    python tests/bench/start.py

The second column is processor time, which other work on the machine changes less.
"""

import resource
import subprocess
import sys
import time
from statistics import median

from megamod.commands import list_verbs
from megamod.tables import format_table

REPEATS = 5


def measure_start(*words: str) -> tuple[str, str]:
    """Return the medians of wall and processor time of a call, in seconds."""
    walls, processor = [], []
    for _ in range(REPEATS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "megamod", *words], stdout=subprocess.DEVNULL, check=True
        )
        walls.append(time.perf_counter() - begin)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return f"{median(walls):.2f}", f"{median(processor):.2f}"


if __name__ == "__main__":
    rows = [("megamod", "wall", "processor"), ("--help", *measure_start("--help"))]
    rows += [(verb, *measure_start(verb, "--help")) for verb in list_verbs()]
    print(format_table(rows, right_aligned_columns=(1, 2)))
