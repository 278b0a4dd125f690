"""Plots of a run: loss curves, perplexity over time, and the domain-by-expert heat map."""

import json
from collections.abc import Mapping
from pathlib import Path

from megamod.errors import UserError


def read_metrics(path: Path) -> list[dict[str, object]]:
    """Records of a metrics.jsonl, a last line that a kill cut short left out.

    Raises:
        UserError: if there is no such file, or a line before the last is not JSON.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such metrics file") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number}: not JSON: {error}") from error
    return records


def plot_curves(metrics: Path, output: Path) -> None:
    """Training loss and validation perplexity against tokens or steps, one line per domain."""
    records = read_metrics(metrics)
    trained = [r for r in records if "loss" in r]
    scored = [r for r in records if "perplexity" in r]
    figure, (left, right) = _pyplot().subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot([r["step"] for r in trained], [r["loss"] for r in trained], "k", lw=2, label="all")
    for domain in sorted({d for r in trained for d in r["loss_by_domain"]}):
        points = [
            (r["step"], r["loss_by_domain"][domain])
            for r in trained
            if domain in r["loss_by_domain"]
        ]
        left.plot(*zip(*points, strict=True), lw=1, alpha=0.8, label=domain)
    left.set(xlabel="step", ylabel="training loss (nats per token)")
    left.legend(fontsize=8)
    for domain in scored[0]["perplexity"] if scored else ():
        right.plot(
            [r["step"] for r in scored],
            [r["perplexity"][domain] for r in scored],
            "o-",
            ms=3,
            label=domain,
        )
    right.set(xlabel="step", ylabel=f"{scored[0]['split']} perplexity" if scored else "")
    if scored:
        right.set_yscale("log")
        right.legend(fontsize=8)
    figure.savefig(output, dpi=120)
    _pyplot().close(figure)


def plot_matrix(matrix: Mapping[str, Mapping[str, float]], output: Path, title: str) -> None:
    """Heat map of perplexities: a row per expert, a column per domain.

    Colours show the ratio to the best expert of each column, so that easy and hard domains can be
    told apart from good and bad experts.
    """
    rows, columns = list(matrix), list(next(iter(matrix.values())))
    best = {c: min(matrix[r][c] for r in rows) for c in columns}
    ratio = [[matrix[r][c] / best[c] for c in columns] for r in rows]
    figure, axes = _pyplot().subplots(
        figsize=(2.5 + 0.95 * len(columns), 1.8 + 0.5 * len(rows)), layout="constrained"
    )
    top = max(1.05, sorted(x for row in ratio for x in row)[int(0.9 * len(rows) * len(columns))])
    image = axes.imshow(ratio, cmap="YlOrRd", vmin=1.0, vmax=top, aspect="auto")
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            dark = ratio[y][x] > 1 + 0.6 * (top - 1)
            axes.text(
                x,
                y,
                f"{matrix[row][column]:.1f}",
                ha="center",
                va="center",
                fontsize=9,
                color="white" if dark else "black",
                fontweight="bold" if matrix[row][column] == best[column] else "normal",
            )
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="domain of the text", ylabel="expert", title=title)
    figure.colorbar(image, label="perplexity / best of the column")
    figure.savefig(output, dpi=120)
    _pyplot().close(figure)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
