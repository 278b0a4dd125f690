"""Figures of the page about runs that no command draws by itself."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megamod.evaluation.plots import Numbers, import_pyplot, select_colours


def plot_losses_of_runs(runs: Mapping[str, Sequence[tuple[float, float]]], output: Path) -> None:
    """Write a figure of the training losses of several runs by step.

    Args:
        runs: points (step, loss in nats) by name.
        output: file to write, in the format of its ending.
    """
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(9, 4.2), layout="constrained")
    for (name, points), colour in zip(runs.items(), select_colours(pyplot, len(runs)), strict=True):
        axes.plot(*zip(*points, strict=True), c=colour, lw=1.4, label=name)
    axes.set(xlabel="step", ylabel="training loss (nats)")
    figure.legend(loc="outside right center", fontsize=9, frameon=False)
    figure.savefig(output, dpi=120)
    pyplot.close(figure)


def plot_shares(rows: Numbers, output: Path, x_label: str) -> None:
    """Write a figure of the shares of experts as bars that add up to 1, one for each row.

    Args:
        rows: share of each expert, by name of the row, then of the expert.
        output: file to write, in the format of its ending.
        x_label: title of the axis of the shares.
    """
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.4 * len(rows)), layout="constrained")
    edges = [0.0] * len(rows)
    for name, colour in zip(names, select_colours(pyplot, len(names)), strict=True):
        widths = [row.get(name, 0.0) for row in rows.values()]
        axes.barh(list(rows), widths, left=edges, color=colour, label=name)
        edges = [edge + width for edge, width in zip(edges, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel=x_label, xlim=(0, max(1.0, *edges)))
    figure.legend(loc="outside right center", fontsize=9, frameon=False)
    figure.savefig(output, dpi=120)
    pyplot.close(figure)
