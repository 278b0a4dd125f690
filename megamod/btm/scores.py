"""Table of the scores of a campaign: seed, experts, their mixture and their average by domain."""

from collections.abc import Mapping
from pathlib import Path

from megamod.btm.campaign import Campaign
from megamod.btm.tasks import AVERAGE, EVALUATION, SEED, WORLD, get_expert_folder
from megamod.errors import UserError
from megamod.schemas import read_json_object
from megamod.tables import format_table

SCORES = "perplexity.json"
Scores = Mapping[str, float | None]
"""Perplexities by domain; None for one that overflowed."""


def format_campaign_scores(campaign: Campaign, in_one_world: bool) -> str:
    """Format the perplexities that the jobs of a campaign have written, as a table by domain.

    The columns are the seed, each domain's own expert, the mixture and the average, with the scored
    split. Files of jobs that have not run are missing: a column without any score is skipped, and a
    missing score is blank.

    Args:
        in_one_world: the experts are in one run, OUT/experts/world.
    """
    seed = _read_scores(campaign.output / SEED / SCORES)
    mixture = _read_scores(campaign.output / EVALUATION / "mixture.json")
    average = _read_scores(campaign.output / EVALUATION / "average.json")
    experts, split = {}, "valid"
    for domain in campaign.domains:
        run = _read_scores(get_expert_folder(campaign, WORLD if in_one_world else domain) / SCORES)
        rows = run.get("perplexity", {})
        # In one world every expert has a row with its scores; a run of its own has a single row.
        experts[domain] = (rows.get(domain) or _get_first_value(rows)).get(domain)
        split = run.get("split", split)
    columns: dict[str, Scores] = {
        f"seed, {seed.get('split')}": _get_first_value(seed.get("perplexity", {})),
        f"own expert, {split}": experts,
        f"mixture, {mixture.get('split')}": {
            name: scores["perplexity"] for name, scores in mixture.get("domains", {}).items()
        },
        f"{AVERAGE}, {average.get('split')}": _get_first_value(
            _get_first_value(average.get("models", {})).get("perplexity", {})
        ),
    }
    columns = {title: scores for title, scores in columns.items() if any(scores.values())}
    table = [["perplexity", *columns]]
    for domain in campaign.domains:
        scores = [column.get(domain) for column in columns.values()]
        table.append([domain, *("" if s is None else f"{s:.2f}" for s in scores)])
    return format_table(table, right_aligned_columns=range(1, len(columns) + 1))


def _read_scores(path: Path) -> dict:
    """Read a file of scores; an empty object if it is missing or cannot be read."""
    try:
        return read_json_object(path)
    except (OSError, UserError):
        return {}


def _get_first_value(rows: Mapping) -> Mapping:
    """Return the first value of a mapping; {} if it is empty.

    Scores of a model without experts have one row, as files about a single model have one model.
    """
    return next(iter(rows.values()), {})
