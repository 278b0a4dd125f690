"""Plots of runs: loss curves, the domain-by-expert heat map, scores of multiplexed models."""

from collections.abc import Mapping, Sequence
from math import ceil, inf, isfinite, nan
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from megamod.errors import UserError
from megamod.evaluation.seeds import Estimate
from megamod.states.metrics_file import parse_metrics_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Numbers = Mapping[str, Mapping[str, float]]


def read_metrics(path: Path) -> list[dict[str, object]]:
    """Read the records of a metrics.jsonl in order, without its damaged lines.

    A run that was killed may have left one.

    Raises:
        UserError: if the file is missing.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no such metrics file") from None
    return [record for line in lines if (record := parse_metrics_line(line)) is not None]


def plot_training_curves(metrics: Path, output: Path) -> None:
    """Write a PNG of training loss and held-out perplexity by step, with a line per domain.

    Without records of one or the other its panel is empty.

    Args:
        metrics: metrics.jsonl of a run.
        output: file to write.
    Raises:
        UserError: if `metrics` is missing.
    """
    records = read_metrics(metrics)
    from matplotlib import ticker

    trained = [r for r in records if "loss" in r]
    scored = [r for r in records if "perplexity" in r]
    names = dict.fromkeys(d for r in trained for d in r["loss_by_domain"])
    names |= dict.fromkeys(d for r in scored for d in r["perplexity"])
    pyplot = import_pyplot()
    colours = dict(zip(names, select_colours(pyplot, len(names)), strict=True))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    line = "-" if len(trained) > 1 else "o"  # a line of one point is invisible
    if len(names) > 1:
        left.plot([r["step"] for r in trained], [r["loss"] for r in trained], f"k{line}", lw=2)
    left.set(xlabel="step", ylabel="training loss (nats per token)")
    split = scored[0]["split"] if scored else "held-out"
    right.set(xlabel="step", ylabel=f"{split} perplexity (log scale)", yscale="log")
    for domain, colour in colours.items():
        for axes, rows, key, mark in (
            (left, trained, "loss_by_domain", line),
            (right, scored, "perplexity", "o-"),
        ):
            points = [(r["step"], r[key][domain]) for r in rows if domain in r[key]]
            if points:
                axes.plot(*zip(*points, strict=True), mark, c=colour, lw=1.2, ms=4)
    right.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter(ticker.NullFormatter())
    for axes in (left, right):
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
    handles = [pyplot.Line2D([], [], color=colour) for colour in colours.values()]
    labels = list(colours)
    if len(names) > 1:
        handles.append(pyplot.Line2D([], [], color="k", lw=2))
        labels.append("all domains")
    if labels:
        figure.legend(handles, labels, loc="outside right center", fontsize=9, frameon=False)
    figure.savefig(output, dpi=120)
    pyplot.close(figure)


def compute_ratios_to_best(matrix: Numbers, columns: list[str]) -> list[list[float]]:
    """Divide each number by the smallest of its column.

    Args:
        matrix: numbers by row, then column; cells may be missing.
        columns: the columns to compute, all of which some row has.
    Returns:
        a list per row of `matrix`, in the order of `columns`; NaN for missing cells.
    """
    best = {c: min(row[c] for row in matrix.values() if c in row) for c in columns}
    return [[row[c] / best[c] if c in row else nan for c in columns] for row in matrix.values()]


def plot_matrix(matrix: Numbers, output: Path, title: str) -> None:
    """Write a PNG heat map of perplexities with a row per expert and a column per domain.

    Colours show the ratio to the best expert of each column, which separates good and bad experts
    from easy and hard domains. The worst tenth of all cells shares one colour.

    Args:
        matrix: perplexities by expert, then domain; cells may be missing.
        output: file to write.
    """
    columns = list({c: None for row in matrix.values() for c in row})
    shades = compute_ratios_to_best(matrix, columns)
    finite = sorted(x for row in shades for x in row if isfinite(x)) or [1.0]
    top = max(1.05, finite[ceil(0.9 * len(finite)) - 1])
    longest = max(map(len, matrix))
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(
        figsize=(2.4 + 0.09 * longest + 0.85 * len(columns), 2.2 + 0.42 * len(matrix)),
        layout="constrained",
    )
    colours = pyplot.get_cmap("YlOrRd").with_extremes(bad="white")
    image = axes.imshow(shades, cmap=colours, vmin=1.0, vmax=top, aspect="auto")
    for y, row in enumerate(matrix.values()):
        for x, column in enumerate(columns):
            axes.text(
                x,
                y,
                _format_number(row.get(column)),
                ha="center",
                va="center",
                fontsize=9,
                color="white" if shades[y][x] > 1 + 0.6 * (top - 1) else "black",
                fontweight="bold" if shades[y][x] == 1 and len(matrix) > 1 else "normal",
            )
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(matrix)), list(matrix))
    axes.set(xlabel="domain of the text", ylabel="expert")
    figure.suptitle(title, fontsize=12)
    figure.colorbar(
        image,
        label="ratio to the best of the column",
        extend="max" if finite[-1] > top else "neither",
        format="{x:.3g}",
    )
    figure.savefig(output, dpi=120)
    pyplot.close(figure)


def plot_scores_by_instances(
    lines: Mapping[str, Mapping[int, tuple[float, float]]], output: Path
) -> None:
    """Write a PNG of scores against N, the instances that share a forward pass.

    Args:
        lines: mean over seeds and standard deviation, by name of the line, then N.
        output: file to write.
    """
    pyplot = import_pyplot()
    colours = select_colours(pyplot, len(lines))
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for (name, points), colour in zip(lines.items(), colours, strict=True):
        counts = sorted(points)
        means, deviations = zip(*(points[count] for count in counts), strict=True)
        axes.errorbar(
            counts, means, deviations, fmt="o-", c=colour, lw=1.2, ms=4, capsize=3, label=name
        )
    axes.set(xlabel="instances that share a forward pass", ylabel="score on dev")
    axes.set_xticks(sorted({count for points in lines.values() for count in points}))
    figure.legend(loc="outside right center", fontsize=9, frameon=False)
    figure.savefig(output, dpi=120)
    pyplot.close(figure)


def plot_trade_off(
    tasks: Mapping[str, Mapping[str, Mapping[int, tuple[float, float]]]], output: Path
) -> None:
    """Write a PNG of score against throughput with a panel per task and a line per model over N.

    Args:
        tasks: instances per second and score, by task, model, then N.
        output: file to write.
    """
    from matplotlib import ticker

    names = list(dict.fromkeys(name for lines in tasks.values() for name in lines))
    panel_columns = min(3, len(tasks))
    panel_rows = ceil(len(tasks) / panel_columns)
    pyplot = import_pyplot()
    colours = dict(zip(names, select_colours(pyplot, len(names)), strict=True))
    figure, grid = pyplot.subplots(
        panel_rows, panel_columns, figsize=(2.4 + 3.8 * panel_columns, 0.4 + 3.2 * panel_rows),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    panels = grid.flat
    for (task, lines), axes in zip(tasks.items(), panels, strict=False):
        axes.set(title=task, xlabel="instances per second (log scale)", ylabel="score on dev")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        axes.margins(0.15)
        for name, points in lines.items():
            counts = sorted(points)
            line = [points[count] for count in counts]
            axes.plot(*zip(*line, strict=True), "o-", c=colours[name], lw=1.2, ms=4)
            for count, point in zip(counts, line, strict=True):
                axes.annotate(f"N = {count}", point, (3, 3), textcoords="offset points", fontsize=8)
    for axes in panels:
        axes.remove()
    handles = [pyplot.Line2D([], [], color=colour, marker="o", ms=4) for colour in colours.values()]
    figure.legend(handles, names, loc="outside right center", fontsize=9, frameon=False)
    figure.savefig(output, dpi=120)
    pyplot.close(figure)


def plot_posterior(shares: Mapping[str, Sequence[float]], output: Path, title: str) -> None:
    """Write a PNG of the experts' weights along a text, stacked to 1, the largest at the bottom.

    With more than ten experts, those with small weights share one grey area.

    Args:
        shares: weight for predicting each token, from 0 to 1, by expert; lists of equal length.
        output: file to write.
    """
    heaviest = sorted(shares, key=lambda name: -sum(shares[name]))
    named, others = (heaviest, []) if len(heaviest) <= 10 else (heaviest[:9], heaviest[9:])
    rows = {name: list(shares[name]) for name in named}
    pyplot = import_pyplot()
    # The colour of an expert depends on its index among all experts, not on its weight in the text.
    palette = dict(zip(shares, select_colours(pyplot, len(shares)), strict=True))
    colours = [palette[name] for name in named]
    if others:
        columns = zip(*(shares[name] for name in others), strict=True)
        rows[f"{len(others)} others"] = [sum(column) for column in columns]
        colours.append((0.8, 0.8, 0.8))
    length = len(next(iter(rows.values())))
    figure, axes = pyplot.subplots(figsize=(11, 3.6), layout="constrained")
    # A weight applies to one token, so steps are drawn, and the last one is repeated for its width.
    steps = [[*row, row[-1]] for row in rows.values()]
    axes.stackplot(range(length + 1), steps, colors=colours, labels=list(rows), step="post")
    axes.set(xlim=(0, length), ylim=(0, 1), xlabel="token", ylabel="weight of the expert")
    axes.set_title(title, fontsize=11)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles[::-1], labels[::-1], loc="outside right center", fontsize=9, frameon=False
    )
    figure.savefig(output, dpi=120)
    pyplot.close(figure)


def plot_attribution(
    experts: Sequence[str],
    documents: Sequence[Sequence[float]],
    tokens: Sequence[str],
    token_shares: Sequence[Sequence[float]],
    output: Path,
) -> None:
    """Write a PNG of the experts' shares: bars of N documents, heat map of the first one's tokens.

    Args:
        experts: names of the E experts.
        documents: [N][E] shares of the documents, each with sum 1.
        tokens: text of the T tokens of the first document, of which up to 64 are drawn.
        token_shares: [T][E] shares of these tokens, from 0 to 1.
        output: file to write.
    """
    pyplot = import_pyplot()
    shown = min(len(tokens), 64)
    figure, (upper, lower) = pyplot.subplots(
        2, 1, figsize=(max(7.0, 0.2 * shown), 6.5), layout="constrained"
    )
    lower_edge = [0.0] * len(documents)
    numbers = range(1, len(documents) + 1)
    for expert, name in enumerate(experts):
        heights = [shares[expert] for shares in documents]
        colour = select_colours(pyplot, len(experts))[expert]
        upper.bar(numbers, heights, bottom=lower_edge, label=name, color=colour)
        lower_edge = [low + height for low, height in zip(lower_edge, heights, strict=True)]
    upper.set(xlabel="document", ylabel="share", ylim=(0, 1), xticks=list(numbers))
    upper.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    grid = [[row[expert] for row in token_shares[:shown]] for expert in range(len(experts))]
    image = lower.imshow(grid, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    labels = [token.strip() or "_" for token in tokens[:shown]]
    # A dollar sign would begin a formula.
    labels = [label.replace("$", r"\$") for label in labels]
    lower.set_xticks(range(shown), labels, rotation=90, fontsize=7)
    lower.set_yticks(range(len(experts)), list(experts))
    lower.set(xlabel=f"first {shown} tokens of document 1")
    figure.colorbar(image, label="share")
    figure.savefig(output, dpi=120)
    pyplot.close(figure)


def plot_task_shares(metrics: Path, output: Path) -> None:
    """Write a PNG of the share of each task in the training rows, by step, stacked.

    Args:
        metrics: metrics.jsonl of a run, whose records have shares as "share/TASK"; without any the
            plot is empty.
        output: file to write.
    Raises:
        UserError: if `metrics` is missing.
    """
    records = [r for r in read_metrics(metrics) if any(key.startswith("share/") for key in r)]
    names = dict.fromkeys(
        key.removeprefix("share/") for r in records for key in r if key.startswith("share/")
    )
    from matplotlib import ticker

    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    steps = [0, *(r["step"] for r in records)]
    shares = [[r.get(f"share/{name}", 0.0) for r in records] for name in names]
    # A share covers the steps since the previous record, so it is drawn to the left of its step.
    axes.stackplot(
        steps,
        [[row[0], *row] for row in shares] if records else [],
        labels=list(names),
        colors=select_colours(pyplot, len(names)),
        step="pre",
    )
    axes.set(xlabel="step", ylabel="share of the rows", ylim=(0, 1), xlim=(0, steps[-1] or 1))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False)
    figure.savefig(output, dpi=120)
    pyplot.close(figure)


def plot_losses_along_line(
    variants: Mapping[str, Sequence[Mapping[str, Sequence[float]]]], output: Path, title: str
) -> None:
    """Write a PNG of losses on the line between two models, with a curve per alignment method.

    Args:
        variants: by name of the method, a mapping per pair of models with "weights" of the first
            model and "losses" (nats). For several pairs, which have the same weights, the mean is
            drawn, with a band from the lowest to the highest.
        output: file to write.
    """
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    colours = select_colours(pyplot, len(variants))
    for (name, pairs), colour in zip(variants.items(), colours, strict=True):
        weights = pairs[0]["weights"]
        columns = list(zip(*(pair["losses"] for pair in pairs), strict=True))
        means = [sum(column) / len(column) for column in columns]
        axes.plot(weights, means, "o-", c=colour, lw=1.4, ms=3, label=name)
        if len(pairs) > 1:
            lowest, highest = (list(map(pick, columns)) for pick in (min, max))
            axes.fill_between(weights, lowest, highest, color=colour, alpha=0.15, lw=0)
    axes.set(title=title, xlabel="weight of the first model", ylabel="loss (nats)")
    figure.legend(loc="outside right center", fontsize=9, frameon=False)
    figure.savefig(output, dpi=120)
    pyplot.close(figure)


def plot_barriers(tasks: Mapping[str, Mapping[str, tuple[float, float]]], output: Path) -> None:
    """Write a PNG of barriers with a group of bars per task and a bar per alignment method.

    Args:
        tasks: mean barrier over pairs of models and its standard error (nats), by task, then name
            of the method; bars may be missing.
        output: file to write.
    """
    names = list(dict.fromkeys(name for bars in tasks.values() for name in bars))
    pyplot = import_pyplot()
    width = 0.8 / len(names)
    figure, axes = pyplot.subplots(
        figsize=(3 + 0.5 * len(tasks) * len(names), 4.2), layout="constrained"
    )
    for number, (name, colour) in enumerate(
        zip(names, select_colours(pyplot, len(names)), strict=True)
    ):
        points = [
            (position + (number - (len(names) - 1) / 2) * width, *bars[name])
            for position, bars in enumerate(tasks.values())
            if name in bars
        ]
        positions, means, errors = zip(*points, strict=True)
        axes.bar(positions, means, width, yerr=errors, color=colour, capsize=3, label=name)
    axes.set_xticks(range(len(tasks)), list(tasks))
    axes.set(ylabel="barrier (nats)")
    figure.legend(loc="outside right center", fontsize=9, frameon=False)
    figure.savefig(output, dpi=120)
    pyplot.close(figure)


def plot_ratios(
    lines: Mapping[str, Sequence[tuple[float, Estimate]]], output: Path, x_label: str, y_label: str
) -> None:
    """Write a PNG of ratios to a baseline with their intervals; the baseline is the line at 1.

    Args:
        lines: by name, points (x, ratio); x is above 0, as its axis is logarithmic. If all have
            the same x, the names are the other axis.
        output: file to write.
        x_label, y_label: titles of the axes.
    """
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    if len({x for points in lines.values() for x, _ in points}) == 1:
        _draw_ratios_by_name(axes, {name: points[0][1] for name, points in lines.items()}, y_label)
    else:
        axes.axhline(1.0, color="black", lw=0.8)
        colours = select_colours(pyplot, len(lines))
        for (name, points), colour in zip(lines.items(), colours, strict=True):
            means = [(x, ratio.mean) for x, ratio in points]
            axes.plot(*zip(*means, strict=True), "o-", c=colour, lw=1.4, ms=4, label=name)
            for x, ratio in points:
                if ratio.low is not None:
                    axes.vlines(x, ratio.low, ratio.high, color=colour, lw=1.4)
        axes.set(xlabel=x_label, ylabel=y_label, xscale="log")
        figure.legend(loc="outside right center", fontsize=9, frameon=False)
    figure.savefig(output, dpi=120)
    pyplot.close(figure)


def _draw_ratios_by_name(axes: "Axes", ratios: Mapping[str, Estimate], label: str) -> None:
    """Draw ratios with intervals, one per name, first at the top; `label` titles the x-axis."""
    axes.axvline(1.0, color="black", lw=0.8)
    for position, ratio in enumerate(ratios.values()):
        axes.plot(ratio.mean, position, "o", c="tab:blue", ms=5)
        if ratio.low is not None:
            axes.hlines(position, ratio.low, ratio.high, color="tab:blue", lw=1.4)
    axes.set_yticks(range(len(ratios)), list(ratios))
    axes.invert_yaxis()
    axes.set(xlabel=label)


def _format_number(x: float | None) -> str:
    """Format a number for a cell of the heat map; a dash if it is missing."""
    if x is None:
        return "–"
    return f"{x:.1f}" if x < 10_000 or x == inf else f"{x:.1e}"


def select_colours(pyplot: ModuleType, count: int) -> list[tuple[float, ...]]:
    """Select `count` distinct colours: up to ten from a palette, more from a continuous scale."""
    if count <= 10:
        return list(pyplot.get_cmap("tab10").colors[:count])
    return [pyplot.get_cmap("turbo")(number / (count - 1)) for number in range(count)]


def import_pyplot() -> ModuleType:
    """Import matplotlib.pyplot; the process gets a backend that needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
