"""Reports of perplexities: text tables, JSON files and plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megamod.evaluation.perplexity import (
    DENSE,
    Score,
    ScoreMatrix,
    compute_perplexities,
    select_own_scores,
)
from megamod.evaluation.plots import plot_matrix, plot_training_curves
from megamod.files import format_json, write_json
from megamod.tables import format_matrix, format_table


def write_perplexity_report(
    output: Path, matrix: ScoreMatrix, split: str, step: int, dense: str = DENSE
) -> str:
    """Write perplexity.json, loss.png and, with experts, experts.png into the folder of a run.

    Args:
        output: folder of a finished run, with its metrics.jsonl.
        matrix: scores of experts (rows) on domains (columns).
        split: name of the scored split.
        step: finished steps.
        dense: name of a model without experts in the text to print, not in the file.
    Returns:
        the text to print: table of perplexities, mean over domains, paths of all results.
    Raises:
        UserError: if there is no metrics.jsonl; perplexity.json is written already then.
    """
    output = Path(output)
    table = compute_perplexities(matrix)
    own_domain = select_own_scores(matrix)
    mean = average_perplexity(own_domain)
    write_json(
        output / "perplexity.json",
        {
            "step": step,
            "split": split,
            "perplexity": table,
            "mean_of_own": mean,
            "bits_per_byte": {domain: score.bits_per_byte for domain, score in own_domain.items()},
            "tokens": {domain: score.tokens for domain, score in own_domain.items()},
        },
    )
    plot_training_curves(output / "metrics.jsonl", output / "loss.png")
    outputs = {
        "model": output / "model",
        "checkpoints": output / "checkpoints",
        "numbers": output / "perplexity.json",
        "log": output / "metrics.jsonl",
        "loss curves": output / "loss.png",
    }
    if DENSE not in matrix:
        title = f"{split} perplexity after {step} steps"
        plot_matrix(table, output / "experts.png", title)
        outputs["experts by domain"] = output / "experts.png"
    stars = " (* best of the column)" if len(table) > 1 else ""
    rows = {dense if name == DENSE else name: row for name, row in table.items()}
    lines = [f"\n{split} perplexity after {step} steps{stars}", format_matrix(rows)]
    if len(own_domain) > 1:
        experts = ", each under its own expert" if DENSE not in matrix else ""
        lines.append(f"mean over domains{experts}: {mean:.2f}")
    lines += ["", format_table([(name, str(path)) for name, path in outputs.items()])]
    return "\n".join(lines)


def average_perplexity(scores: Mapping[str, Score]) -> float:
    """Compute the arithmetic mean of the perplexities of at least one domain."""
    return sum(score.perplexity for score in scores.values()) / len(scores)


def format_comparison(models: Mapping[str, ScoreMatrix], domains: Sequence[str], split: str) -> str:
    """Format tables of several models' scores; columns are domains.

    A model whose experts were scored on other domains too has a table with a row per expert. Two
    further tables compare all models with each domain under its own expert: perplexity and, if the
    bytes are known, bits per byte.

    Args:
        models: scores by name of the model.
        domains: columns of the two comparing tables.
        split: name of the scored split, for titles.
    """
    parts = [
        f"{split} perplexity of {name}, by expert\n{format_matrix(compute_perplexities(matrix))}"
        for name, matrix in models.items()
        if not _has_own_domains_only(matrix) and set(matrix) != {DENSE}
    ]
    own_domain = {}
    for name, matrix in models.items():
        if scores := select_own_scores(matrix):
            own_domain[name] = {domain: scores[domain] for domain in domains if domain in scores}
    if own_domain:
        rows = {
            name: {d: s.perplexity for d, s in scores.items()}
            | {"mean": average_perplexity(scores)}
            for name, scores in own_domain.items()
        }
        text = format_matrix(rows, corner="model \\ text")
        parts.append(f"{split} perplexity, each domain under its own expert\n{text}")
    if own_domain and all(s.bytes for scores in own_domain.values() for s in scores.values()):
        rows = {
            name: {d: s.bits_per_byte for d, s in scores.items()}
            for name, scores in own_domain.items()
        }
        rows = {name: row | {"mean": sum(row.values()) / len(row)} for name, row in rows.items()}
        text = format_matrix(rows, corner="model \\ text", digits=3)
        parts.append(f"{split} bits per byte, each domain under its own expert\n{text}")
    return "\n\n".join(parts)


def make_comparison_record(models: Mapping[str, ScoreMatrix]) -> dict[str, object]:
    """Make the JSON value of several models' scores: by model, expert and domain, with means.

    A perplexity that overflows is inf, which `files.format_json` writes as null; nll / tokens is
    its logarithm.

    Args:
        models: scores by name of the model.
    """
    record: dict[str, object] = {}
    for name, matrix in models.items():
        own_domain = select_own_scores(matrix)
        rows = {expert: row for expert, row in matrix.items() if row}
        record[name] = {
            "perplexity": {e: {d: s.perplexity for d, s in r.items()} for e, r in rows.items()},
            "bits_per_byte": {
                e: {d: s.bits_per_byte for d, s in r.items()} for e, r in rows.items()
            },
            "nll": {e: {d: s.nll for d, s in r.items()} for e, r in rows.items()},
            "tokens": {d: s.tokens for row in rows.values() for d, s in row.items()},
            "bytes": {d: s.bytes for row in rows.values() for d, s in row.items()},
            "own": {d: s.perplexity for d, s in own_domain.items()},
            "mean_of_own": average_perplexity(own_domain) if own_domain else None,
        }
    return record


def format_score_lines(models: Mapping[str, ScoreMatrix], split: str) -> str:
    """Format JSON lines of one score each: a model's expert on a domain.

    The fields model, dataset and ppl are those of the DEMix release. A perplexity that overflows is
    null; nll / tokens is its logarithm. The expert of a dense model is null.

    Args:
        models: scores by name of the model.
        split: name of the scored split.
    """
    lines = [
        {
            "model": model,
            "expert": None if expert == DENSE else expert,
            "dataset": domain,
            "split": split,
            "ppl": score.perplexity,
            "bits_per_byte": score.bits_per_byte,
            "nll": score.nll,
            "tokens": score.tokens,
        }
        for model, matrix in models.items()
        for expert, row in matrix.items()
        for domain, score in row.items()
    ]
    return "".join(f"{format_json(line)}\n" for line in lines)


def make_heat_map(models: Mapping[str, ScoreMatrix]) -> dict[str, dict[str, float]]:
    """Make the perplexities of one heat map, by row and domain, from the scores of several models.

    A dense model, and one whose experts were scored only on their own domains, is one row with the
    model's name; other models have a row per expert, whose name starts with the model's if there
    are several models.

    Args:
        models: scores by name of the model.
    """
    rows: dict[str, dict[str, float]] = {}
    for name, matrix in models.items():
        if DENSE in matrix or _has_own_domains_only(matrix):
            rows[name] = {d: s.perplexity for d, s in select_own_scores(matrix).items()}
            continue
        for expert, row in compute_perplexities(matrix).items():
            rows[expert if len(models) == 1 else f"{name} {expert}"] = row
    return {name: row for name, row in rows.items() if row}


def _has_own_domains_only(matrix: ScoreMatrix) -> bool:
    """Return True if no expert was scored on another domain than the one it is named after."""
    return all(expert == domain for expert, row in matrix.items() for domain in row)
