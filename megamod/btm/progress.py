"""Progress of all jobs: read from the metrics of their runs, shown as a table or line by line."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from megamod.states.metrics_file import parse_metrics_line
from megamod.tables import format_table

TAIL_BYTES = 16_384  # of metrics.jsonl are read, its last ones
COLUMNS = ("job", "state", "step", "loss", "tokens/s", "ppl", "restarts", "slots")


@dataclass
class ProgressRow:
    """A job's row of the table; None: not known yet.

    Attributes:
        name: name of the job.
        state: one word, such as "waiting" or the title of the running program.
        last: last step of its run; 0: it has no steps.
        step: finished steps.
        loss: training loss, in nats per token.
        rate: tokens per second.
        perplexity: mean over domains of the last evaluation.
        restarts: restarts after crashes.
        slots: hosts and slots as in `format_include`; "" while it waits.
    """

    name: str
    state: str
    last: int = 0
    step: int | None = None
    loss: float | None = None
    rate: float | None = None
    perplexity: float | None = None
    restarts: int = 0
    slots: str = ""

    def format_cells(self) -> tuple[str, ...]:
        """Format the values as texts in the order of `COLUMNS`; an unknown value is blank."""
        step = "" if not self.last else f"{self.step or 0}/{self.last}"
        numbers = ((self.loss, ".4f"), (self.rate, ",.0f"), (self.perplexity, ".4g"))
        values = ["" if value is None else format(value, form) for value, form in numbers]
        return self.name, self.state, step, *values, str(self.restarts), self.slots


def update_progress_row(folder: Path | None, row: ProgressRow) -> None:
    """Set step, loss, rate and perplexity of `row`, in place, from the end of a metrics.jsonl.

    Values that the last `TAIL_BYTES` of the file do not contain are left as they are.

    Args:
        folder: folder of the run; None, or a folder without the file: the row does not change.
    """
    path = folder / "metrics.jsonl" if folder else None
    if path is None or not path.exists():
        return
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        lines = file.read().splitlines()
    for line in lines:
        record = parse_metrics_line(line)
        if record is None:  # truncated at either end of the window
            continue
        if isinstance(record.get("perplexity"), dict):
            scores = [score for score in record["perplexity"].values() if score is not None]
            row.perplexity = sum(scores) / len(scores) if scores else None
        elif "loss" in record:
            row.step, row.loss = record["step"], record["loss"]
            row.rate = record.get("tokens_per_second")


def format_jobs(rows: Sequence[ProgressRow]) -> str:
    """Format a table of jobs with a line per row: `COLUMNS`, with numbers aligned at the right."""
    return format_table(
        [COLUMNS, *(row.format_cells() for row in rows)],
        right_aligned_columns=range(2, len(COLUMNS) - 1),
    )


class Screen:
    """Shows the table: redrawn in place on a terminal, elsewhere one line per change.

    Args:
        stream: file that it is written to.
        redraw_seconds: shortest time between two drawings on a terminal.
    """

    def __init__(self, stream: TextIO = sys.stdout, redraw_seconds: float = 1.0):
        """Start with an empty screen; see the class for the arguments."""
        self.stream = stream
        self.every = redraw_seconds
        self.height = 0
        self.drawn = 0.0
        self.shown: dict[str, tuple[str, int]] = {}

    def show_jobs(self, rows: Sequence[ProgressRow], redraw_now: bool = False) -> None:
        """Show the rows: on a terminal as a table, elsewhere a line for each change of state or
        restarts.

        Args:
            redraw_now: draw the table even if the last drawing is less than `redraw_seconds` ago.
        """
        if not self.stream.isatty():
            for row in rows:
                if self.shown.get(row.name) != (row.state, row.restarts):
                    self.shown[row.name] = (row.state, row.restarts)
                    named = zip(COLUMNS[2:], row.format_cells()[2:], strict=True)
                    further = [f"{name} {cell}" for name, cell in named if cell not in ("", "0")]
                    print("  ".join([row.name, row.state, *further]), file=self.stream, flush=True)
            return
        if not redraw_now and time.monotonic() - self.drawn < self.every:
            return
        text = format_jobs(rows)
        up = f"\x1b[{self.height}F\x1b[J" if self.height else ""
        print(up + text, file=self.stream, flush=True)
        self.height, self.drawn = text.count("\n") + 1, time.monotonic()

    def print_message(self, text: str) -> None:
        """Print a message that stays above the table, which is drawn again below it."""
        print(text, file=self.stream, flush=True)
        self.height = 0
