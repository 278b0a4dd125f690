"""Progress of jobs: numbers from metrics, lines for changes, a table on a terminal."""

import io
import json

from megamod.btm.progress import TAIL_BYTES, ProgressRow, Screen, format_jobs, update_progress_row


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_numbers_are_the_last_ones(tmp_path):
    step = {"step": 7, "loss": 2.5, "tokens_per_second": 1234.5}
    records = [{"step": n, "loss": 9.0, "note": "x" * 1000} for n in range(40)]
    records += [step, {"step": 7, "perplexity": {"law": 12.0, "med": None}, "split": "valid"}]
    text = "".join(json.dumps(record) + "\n" for record in records) + '{"step": 8, "lo'
    assert len(text) > 2 * TAIL_BYTES
    (tmp_path / "metrics.jsonl").write_text(text)
    row = ProgressRow("law", "train", last=10)
    update_progress_row(tmp_path, row)
    assert (row.step, row.loss, row.rate, row.perplexity) == (7, 2.5, 1234.5, 12.0)
    assert row.format_cells() == ("law", "train", "7/10", "2.5000", "1,234", "12", "0", "")
    untouched = ProgressRow("med", "waiting")
    update_progress_row(tmp_path / "nowhere", untouched)
    assert untouched == ProgressRow("med", "waiting")


def test_columns_are_aligned():
    rows = [ProgressRow("law", "train", 100, 5, 2.0), ProgressRow("anonymized", "waiting", 100)]
    lines = format_jobs(rows).splitlines()
    assert lines[0].split() == [
        "job",
        "state",
        "step",
        "loss",
        "tokens/s",
        "ppl",
        "restarts",
        "slots",
    ]
    assert lines[1].index("train") == lines[2].index("waiting") == lines[0].index("state")
    assert lines[1].index("5/100") + 5 == lines[0].index("step") + 4 == lines[2].index("0/100") + 5


def test_a_line_for_each_change():
    stream, row = io.StringIO(), ProgressRow("law", "train", 10)
    screen = Screen(stream)
    screen.show_jobs([row])
    row.step = 5
    screen.show_jobs([row])  # progress alone is no change
    row.state, row.restarts = "restarting", 1
    screen.show_jobs([row])
    assert stream.getvalue().splitlines() == [
        "law  train  step 0/10",
        "law  restarting  step 5/10  restarts 1",
    ]


def test_a_terminal_is_drawn_over():
    stream, rows = Terminal(), [ProgressRow("law", "train", 10), ProgressRow("med", "waiting", 10)]
    screen = Screen(stream, redraw_seconds=0)
    screen.show_jobs(rows)
    screen.show_jobs(rows)
    table = format_jobs(rows) + "\n"
    assert stream.getvalue() == table + "\x1b[3F\x1b[J" + table
    screen.print_message("med: crashed")
    screen.show_jobs(rows)
    assert stream.getvalue().endswith("med: crashed\n" + table)
    slow = Screen(Terminal(), redraw_seconds=60)
    slow.show_jobs(rows)
    slow.show_jobs(rows)
    assert slow.stream.getvalue() == table
    slow.show_jobs(rows, redraw_now=True)
    assert slow.stream.getvalue().count("law") == 2
