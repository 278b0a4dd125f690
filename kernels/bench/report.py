"""Tables and plots of measured operations."""

from collections.abc import Mapping, Sequence
from pathlib import Path

Row = Mapping[str, object]
BEGIN, END = "<!-- measured -->", "<!-- end of measured -->"


def table(rows: Sequence[Row], header: bool = True) -> str:
    """One line per variant."""
    lines = []
    if header:
        lines.append(
            f"{'op':16} {'shape':14} {'mode':8} {'variant':24} {'us':>9} {'p20..p80':>19} "
            f"{'floor':>8} {'share':>6} {'error':>8}"
        )
    for row in rows:
        spread = f"{row['us_p20']:.1f}..{row['us_p80']:.1f}"
        lines.append(
            f"{row['op']:16} {row['shape']:14} {row['mode']:8} {row['variant']:24} "
            f"{row['us']:9.1f} {spread:>19} {row['floor_us']:8.1f} {row['share_of_floor']:6.2f} "
            f"{row['error']:8.1e}"
        )
    return "\n".join(lines)


def markdown(record: Mapping[str, object]) -> str:
    """The same for a document: a line per case, ours against the best of the others."""
    cases: dict[tuple[object, ...], dict[str, Row]] = {}
    for row in record["rows"]:
        key = tuple(row[name] for name in ("op", "shape", "mode", "dtype"))
        cases.setdefault(key, {})[row["variant"]] = row
    lines = [
        f"{record['device']}: copy {record['copy_gb_s']:.0f} GB/s, GEMM "
        f"{record['gemm_tflop_s']:.3g} TFLOP/s, both measured in the same run.",
        "",
        "| op | shape | mode | dtype | ours, us | share of the floor | best other, us | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, variants in cases.items():
        ours = variants["ours"]
        others = {name: row for name, row in variants.items() if name != "ours"}
        best = min(others, key=lambda name: others[name]["us"])
        lines.append(
            f"| {' | '.join(map(str, key))} | {ours['us']:.1f} | {ours['share_of_floor']:.2f} | "
            f"{others[best]['us']:.1f} ({best}) | {others[best]['us'] / ours['us']:.2f} |"
        )
    return "\n".join(lines)


def write_docs(record: Mapping[str, object], path: Path) -> None:
    """Put the table between the markers of a document."""
    text = path.read_text(encoding="utf-8")
    front, rest = text.split(BEGIN)
    _, back = rest.split(END)
    path.write_text(f"{front}{BEGIN}\n\n{markdown(record)}\n\n{END}{back}", encoding="utf-8")


def plot(rows: Sequence[Row], path: Path) -> None:
    """Times, and shares of the floor, of every variant: a panel per operation and mode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((row["op"], row["mode"]) for row in rows))
    figure, axes = pyplot.subplots(
        len(panels), 2, figsize=(12, 3 * len(panels)), squeeze=False, layout="constrained"
    )
    for panel, pair in zip(panels, axes, strict=True):
        own = [row for row in rows if (row["op"], row["mode"]) == panel]
        shapes = list(dict.fromkeys(row["shape"] for row in own))
        variants = list(dict.fromkeys(row["variant"] for row in own))
        width = 0.8 / len(variants)
        for axis, name in zip(pair, ("us", "share_of_floor"), strict=True):
            for number, variant in enumerate(variants):
                found = {row["shape"]: row[name] for row in own if row["variant"] == variant}
                shift = (number - (len(variants) - 1) / 2) * width
                places = [place + shift for place in range(len(shapes))]
                axis.bar(places, [found[shape] for shape in shapes], width, label=variant)
            axis.set_xticks(range(len(shapes)), shapes)
            axis.set_title(" ".join(panel))
        pair[0].set_ylabel("microseconds")
        pair[0].legend(fontsize=7)
        pair[1].set_ylabel("share of the floor")
        pair[1].axhline(1, color="black", linewidth=0.8)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
