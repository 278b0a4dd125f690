"""Tables and plots of measured operations, and the files they are written to."""

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from clock import format_machine_speed
from floors import Verdict, group_by_case, judge_floors, judge_overhead

Row = Mapping[str, object]
BEGIN, END = "<!-- measured -->", "<!-- end of measured -->"
FIELDS = ("op", "shape", "instances", "mode", "dtype", "variant", "us", "us_p20", "us_p80")
FIELDS += ("host_us", "bytes", "flops", "floor_us", "share_of_floor", "error", "grad_error")
FIELDS += ("failed",)


def format_table(rows: Sequence[Row], header: bool = True) -> str:
    """Format rows of `measure.measure_case` as text, one line per variant.

    Below a line of titles if `header` is True.
    """
    lines = []
    if header:
        lines.append(
            f"{'op':16} {'shape':14} {'mode':8} {'variant':26} {'us':>9} {'p20..p80':>19} "
            f"{'floor':>8} {'share':>6} {'error':>8} {'of grads':>8}"
        )
    for row in rows:
        start = f"{row['op']:16} {row['shape']:14} {row['mode']:8} {row['variant']:26} "
        if "failed" in row:
            lines.append(start + f"failed: {row['failed']}")
            continue
        spread = f"{row['us_p20']:.1f}..{row['us_p80']:.1f}"
        lines.append(
            start + f"{row['us']:9.1f} {spread:>19} {row['floor_us']:8.1f} "
            f"{row['share_of_floor']:6.2f} {row['error']:8.1e} {_format_grad_error(row):>8}"
        )
    return "\n".join(lines)


def format_markdown(record: Mapping[str, object]) -> str:
    """Format a record for a document: a line per case, ours against the best of the others.

    Args:
        record: as `run.measure_requests` returns it.
    """
    result = [f"{format_machine_speed(record['yard'])}, both measured in the same run.", ""]
    result += [
        "| op | shape | mode | dtype | ours, us | share of the floor | error | of gradients | "
        "best other, us | ratio | floor |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    failed = []
    for key, variants in group_by_case(record["rows"]).items():
        failed += [
            f"{' '.join(key[:3])} {n}: {r['failed']}" for n, r in _list_failed_variants(variants)
        ]
        ours = variants.get("ours", {})
        cells = list(map(str, key))
        if "us" not in ours:
            result.append(f"| {' | '.join(cells)} | failed" + " | -" * 6 + " |")
            continue
        cells += [f"{ours['us']:.1f}", f"{ours['share_of_floor']:.2f}", f"{ours['error']:.1e}"]
        cells.append(_format_grad_error(ours))
        others = {n: row["us"] for n, row in variants.items() if n != "ours" and "us" in row}
        if others:
            best = min(others, key=others.__getitem__)
            cells += [f"{others[best]:.1f} ({best})", f"{others[best] / ours['us']:.2f}"]
        else:
            cells += ["-", "-"]
        case_verdicts = judge_floors(variants.values())
        cells.append(
            "; ".join(f"{v.status} ({v.title} {_format_limit(v)})" for v in case_verdicts) or "-"
        )
        result.append(f"| {' | '.join(cells)} |")
    if overhead := record.get("overhead"):
        result += ["", _format_overhead(overhead)]
    if failed:
        result += ["", "Without a time:", "", *(f"* {line}" for line in failed)]
    if left := record.get("not_measured"):
        result += ["", f"Not measured, no time left: {', '.join(left)}."]
    return "\n".join(result)


def format_verdicts(record: Mapping[str, object]) -> list[str]:
    """List all verdicts of a record as text."""
    return [str(verdict) for verdict in list_verdicts(record)]


def list_verdicts(record: Mapping[str, object]) -> list[Verdict]:
    """List the verdicts of a record, on all floors and on the launch overhead."""
    result = judge_floors(record["rows"])
    if overhead := record.get("overhead"):
        result.append(judge_overhead(overhead))
    return result


def replace_between_markers(path: Path, begin: str, end: str, text: str) -> None:
    """Replace the text between two markers of a document, which stay.

    Args:
        path: the document.
        begin, end: the markers.
        text: new text between them.
    Raises:
        SystemExit: if the document has not each of them once, in this order.
    """
    content = path.read_text(encoding="utf-8")
    before_begin, found_begin, after_begin = content.partition(begin)
    _, found_end, after_end = after_begin.partition(end)
    if not found_begin or not found_end or begin in after_end or end in before_begin + after_end:
        raise SystemExit(f"{path}: needs {begin} and after it {end}, each once")
    write_text(path, f"{before_begin}{begin}\n\n{text}\n\n{end}{after_end}")


def write_table_into_document(record: Mapping[str, object], path: Path) -> None:
    """Write the table of a record between the markers BEGIN and END of the document `path`.

    Raises:
        SystemExit: as `replace_between_markers`.
    """
    replace_between_markers(path, BEGIN, END, format_markdown(record))


def write_text(path: Path, text: str) -> None:
    """Write `text` to the file `path` atomically; the folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(record: Mapping[str, object], path: Path) -> None:
    """Write a record, as `run.measure_requests` returns it, to the file `path` as JSON."""
    write_text(path, json.dumps(record, indent=1) + "\n")


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write rows to the file `path` as CSV with the columns FIELDS; missing fields are empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


def plot_times(rows: Sequence[Row], path: Path) -> None:
    """Plot times and shares of the floor of every variant: a panel per operation and mode.

    Args:
        rows: as `measure.measure_case` returns them, with "op" and "shape".
        path: image file; without matplotlib, or without times, nothing is written.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        print(f"{path} was not drawn: matplotlib is not there")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if "us" in row]
    panels = list(dict.fromkeys((row["op"], row["mode"]) for row in timed))
    if not panels:
        return
    colours = _assign_colours(timed, pyplot.get_cmap("tab20"))
    figure, axes = pyplot.subplots(
        len(panels), 2, figsize=(12, 3 * len(panels)), squeeze=False, layout="constrained"
    )
    for panel, pair in zip(panels, axes, strict=True):
        local = [row for row in timed if (row["op"], row["mode"]) == panel]
        shapes = list(dict.fromkeys(row["shape"] for row in local))
        variants = list(dict.fromkeys(row["variant"] for row in local))
        width = 0.8 / len(variants)
        for axis, name in zip(pair, ("us", "share_of_floor"), strict=True):
            for number, variant in enumerate(variants):
                result = {row["shape"]: row[name] for row in local if row["variant"] == variant}
                shift = (number - (len(variants) - 1) / 2) * width
                positions = [shapes.index(shape) + shift for shape in result]
                axis.bar(positions, result.values(), width, label=variant, color=colours[variant])
            axis.set_xticks(range(len(shapes)), shapes, fontsize=8)
            axis.set_xlim(-0.6, len(shapes) - 0.4)
            axis.set_title(" ".join(panel))
        pair[0].set_ylabel("microseconds")
        pair[1].set_ylabel("share of the floor")
        pair[1].axhline(1, color="black", linewidth=0.8)
        pair[1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _assign_colours(rows: Sequence[Row], palette) -> dict[str, object]:
    """Assign a colour of `palette` to each variant of the rows, by name; ours is black."""
    others = dict.fromkeys(row["variant"] for row in rows if row["variant"] != "ours")
    return {"ours": "black"} | {name: palette(i % 20) for i, name in enumerate(others)}


def _list_failed_variants(variants: Mapping[str, Row]) -> list[tuple[str, Row]]:
    """List the names and rows of the variants without a time."""
    return [(name, row) for name, row in variants.items() if "failed" in row]


def _format_grad_error(row: Row) -> str:
    """Format the error of the worst gradient; "-" without one."""
    return "-" if row.get("grad_error") is None else f"{row['grad_error']:.1e}"


def _format_limit(verdict: Verdict) -> str:
    """Format value and limit of a floor; "?" if it was not measured."""
    return "?" if verdict.value is None else f"{verdict.value:.2f}, at least {verdict.limit:g}"


def _format_overhead(overhead: Mapping[str, float]) -> str:
    """Format the result of `overhead.measure_launch_overhead` in one line."""
    verdict = judge_overhead(overhead)
    return (
        f"launch overhead, us on the host per call against torch op: {overhead['ours_us']:.1f} "
        f"(multiplex) and {overhead['torch_us']:.1f} (mean): "
        f"{verdict.status} ({verdict.value:.1f} more, at most {verdict.limit:g})"
    )
