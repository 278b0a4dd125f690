"""What a finished pretraining run leaves for people: a table, plots and where they are."""

from pathlib import Path

from megamod.evaluation.perplexity import (
    DENSE,
    Matrix,
    format_matrix,
    own_scores,
    perplexities,
)
from megamod.evaluation.plots import plot_curves, plot_matrix
from megamod.files import write_json


def write_report(output: Path, matrix: Matrix, split: str, step: int) -> str:
    """Write perplexity.json, loss.png and (with experts) experts.png; return the text to print.

    Args:
        matrix: scores of experts (rows) on domains (columns).
        split: name of the split that was scored.
        step: finished steps.
    """
    output = Path(output)
    table = perplexities(matrix)
    own = own_scores(matrix)
    mean = sum(score.perplexity for score in own.values()) / len(own)
    write_json(
        output / "perplexity.json",
        {
            "step": step,
            "split": split,
            "perplexity": table,
            "mean_of_own": mean,
            "bits_per_byte": {domain: score.bits_per_byte for domain, score in own.items()},
            "tokens": {domain: score.tokens for domain, score in own.items()},
        },
    )
    plot_curves(output / "metrics.jsonl", output / "loss.png")
    places = {
        "model": output / "model",
        "checkpoints": output / "checkpoints",
        "numbers": output / "perplexity.json",
        "log": output / "metrics.jsonl",
        "loss curves": output / "loss.png",
    }
    if DENSE not in matrix:
        title = f"{split} perplexity after {step} steps"
        plot_matrix(table, output / "experts.png", title)
        places["experts by domain"] = output / "experts.png"
    width = max(map(len, places))
    return "\n".join(
        [
            f"\n{split} perplexity after {step} steps (* best of the column)",
            format_matrix(table),
            f"mean over domains, each under its own expert: {mean:.2f}\n",
            *(f"{name.ljust(width)}  {place}" for name, place in places.items()),
        ]
    )
