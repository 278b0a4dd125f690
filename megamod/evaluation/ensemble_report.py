"""Scores of mixtures as text tables, JSON and JSON lines."""

from collections.abc import Mapping

from megamod.evaluation.ensemble import DomainResult, MixingProtocol
from megamod.evaluation.perplexity import Score
from megamod.files import format_json
from megamod.tables import format_matrix, format_table

Results = Mapping[str, DomainResult]
SHOWN = 6  # experts of a prior in a table; the rest are summed


def format_priors(results: Results) -> str:
    """Format a table of the priors: a row per text with its `SHOWN` heaviest experts and the rest.

    Texts without a prior have no row; without any the result is "".

    Args:
        results: results of the mixtures by domain of the text.
    """
    rows = []
    for domain, result in results.items():
        if result.prior is None:
            continue
        weights = dict(zip(result.prior.domains, result.prior.weights, strict=True))
        best = sorted(weights, key=lambda name: -weights[name])
        shown = [f"{name} {weights[name]:.3f}" for name in best[:SHOWN] if weights[name] > 0]
        rest = sum(weights[name] for name in best[SHOWN:])
        shown += [f"{len(best) - SHOWN} others {rest:.3f}"] if len(best) > SHOWN else []
        rows.append((domain, ", ".join(shown)))
    return f"prior over experts, by text\n{format_table(rows)}" if rows else ""


def format_scores(results: Results, protocol: MixingProtocol) -> str:
    """Format text tables of perplexity, and of bits per byte if known.

    They compare the best single expert with the mixtures, then list every expert alone and, with
    `removal_test`, the reported mixture without each expert. Columns are the domains of the texts.

    Args:
        results: results of the mixtures by domain of the text.
        protocol: `split`, `mode` and `removal_test` count here.
    """
    alone = {domain: result.single[result.best] for domain, result in results.items()}
    rows: dict[str, dict[str, Score]] = {"best single expert": alone}
    for domain, result in results.items():
        for mode, score in result.modes.items():
            rows.setdefault(mode, {})[domain] = score
    parts = [_format_table(f"{protocol.split} perplexity", rows, bits=False)]
    best = ", ".join(f"{result.best} on {domain}" for domain, result in results.items())
    parts[0] += f"\nbest single expert: {best}"
    if all(score.bytes for row in rows.values() for score in row.values()):
        parts.append(_format_table(f"{protocol.split} bits per byte", rows, bits=True))
    rows = {}
    for domain, result in results.items():
        for name, score in result.single.items():
            rows.setdefault(name, {})[domain] = score
    parts.append(
        _format_table(f"{protocol.split} perplexity of each expert alone", rows, bits=False)
    )
    if protocol.removal_test:
        rows = {"all experts": {d: r.modes[protocol.mode] for d, r in results.items()}}
        for domain, result in results.items():
            for name, score in result.without.items():
                rows.setdefault(f"without {name}", {})[domain] = score
        title = f"{protocol.split} perplexity of {protocol.mode} without one expert"
        parts.append(_format_table(title, rows, bits=False))
    return "\n\n".join(parts)


def make_results_record(results: Results, protocol: MixingProtocol) -> dict[str, object]:
    """Make the JSON value of all results: the protocol, and priors and scores by domain.

    Unknown numbers are None; `files.format_json` writes those and numbers that are not finite as
    null.

    Args:
        results: results of the mixtures by domain of the text.
        protocol: settings that the results were computed with.
    """
    rule = protocol.rule
    return {
        "mode": protocol.mode,
        "rule": rule.name,
        "temperature": rule.temperature,
        "forgetting": rule.forgetting,
        "topk": protocol.topk,
        "split": protocol.split,
        "domains": {
            domain: _make_domain_record(result, protocol) for domain, result in results.items()
        },
    }


def format_json_lines(results: Results) -> str:
    """Format JSON lines by domain: one per batch of the estimate, then of the reported mode.

    Args:
        results: results by domain, whose `lines` are written.
    """
    return "".join(f"{format_json(line)}\n" for result in results.values() for line in result.lines)


def _make_domain_record(result: DomainResult, protocol: MixingProtocol) -> dict[str, object]:
    """Make the JSON value of one domain: its prior, and its scores if it was scored.

    Args:
        result: results on the text of the domain.
        protocol: its `mode` is the one whose scores head the record.
    """
    prior = result.prior
    record: dict[str, object] = {
        "prior": None if prior is None else dict(zip(prior.domains, prior.weights, strict=True)),
        "estimated_on": None if prior is None else prior.text,
    }
    if result.modes:
        record |= {
            **_make_score_record(result.modes[protocol.mode]),
            "best_single": result.best,
            "single": {name: _make_score_record(score) for name, score in result.single.items()},
            "modes": {mode: _make_score_record(score) for mode, score in result.modes.items()},
            "without": {name: _make_score_record(score) for name, score in result.without.items()},
        }
    return record


def _make_score_record(score: Score) -> dict[str, float | int | None]:
    """Make the JSON value of one score, with the sum and count behind its perplexity."""
    return {
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "nll": score.nll,
        "tokens": score.tokens,
    }


def _format_table(title: str, rows: Mapping[str, Mapping[str, Score]], bits: bool) -> str:
    """Format a titled table of perplexities, or with `bits` of bits per byte.

    Args:
        title: line above the table.
        rows: scores by name of the row, then domain of the text.
        bits: bits per byte instead of perplexities.
    """
    numbers = {
        name: {d: s.bits_per_byte if bits else s.perplexity for d, s in row.items()}
        for name, row in rows.items()
    }
    table = format_matrix(numbers, corner="model \\ text", digits=3 if bits else 2)
    return f"{title}\n{table}"
