"""One HTML page about runs, in a file of its own: curves, scores, experts, settings, environment.

Everything is read from the files that commands leave in their output folders. A section is on the
page if a run has its file.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib

from megamod.errors import UserError
from megamod.evaluation.plots import (
    plot_barriers,
    plot_matrix,
    plot_trade_off,
    plot_training_curves,
    read_metrics,
)
from megamod.evaluation.run_plots import plot_losses_of_runs, plot_shares
from megamod.files import write_atomic
from megamod.run_recipe import read_run_recipe
from megamod.schemas import Number, Schema, read_checked_file, read_json_object

METRICS, MISSING = "metrics.jsonl", "–"
FILES = (
    *(METRICS, "perplexity.json", "results.json", "summary.json", "evaluation/mixture.json"),
    *("run.yaml", "env.json"),
)
"""Files of a run's folder that the page is made of."""
STYLE = """
body { font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #222 }
h1 { font-size: 1.6em } h2 { border-bottom: 1px solid #ccc; margin-top: 2em }
svg { max-width: 100%; height: auto } figure { margin: 1em 0 } figcaption { font-weight: bold }
table { border-collapse: collapse } td, th { padding: .2em .8em; text-align: right }
td:first-child, th:first-child { text-align: left } tr:nth-child(even) { background: #f5f5f5 }
tr.differs { background: #fff3cd !important } .wide { overflow-x: auto }
"""


class _SummaryRow(Schema):
    """An item of the summary.json of a sweep of finetuning runs."""

    task: str
    model: str
    num_instances: int
    seeds: int
    mean: dict[str, Number]
    deviation: dict[str, Number]


@dataclass(frozen=True)
class _RunFiles:
    """Contents of the files of a run; empty where there is no file.

    Attributes:
        name: distinct among the runs of a page.
        metrics: records of metrics.jsonl.
        scores: perplexity.json.
        results: results.json, of finetuning or of a study of barriers.
        sweep: summary.json of `megamod finetune-all`.
        mixture: result of `megamod eval-ensemble`, also of a campaign.
        settings: run.yaml.
        environment: env.json, the items of its objects as `key.item`.
    """

    name: str
    folder: Path
    metrics: Sequence[Mapping] = ()
    scores: Mapping = field(default_factory=dict)
    results: Mapping = field(default_factory=dict)
    sweep: Sequence[_SummaryRow] = ()
    mixture: Mapping = field(default_factory=dict)
    settings: Mapping = field(default_factory=dict)
    environment: Mapping = field(default_factory=dict)

    @property
    def losses(self) -> list[tuple[int, float]]:
        """Training losses by step."""
        return [(r["step"], r["loss"]) for r in self.metrics if r.get("loss") is not None]


def write_run_report(paths: Sequence[Path], output: Path) -> list[str]:
    """Write the page; return the titles of its sections.

    Args:
        paths: see `format_run_report`.
        output: HTML file to write, which is replaced.
    Raises:
        UserError: see `format_run_report`. Nothing is written then.
    """
    page, sections = format_run_report(paths)
    write_atomic(output, page)
    return sections


def format_run_report(paths: Sequence[Path], script: str = "") -> tuple[str, list[str]]:
    """Return the HTML page and the titles of its sections.

    Args:
        paths: at least one: folders of runs, campaigns, sweeps or studies of barriers; JSON files
            of mixtures.
        script: HTML at the end of the page.
    Raises:
        UserError: if a path is named twice, has nothing to report on, or a file of it is malformed.
    """
    runs = [
        _read_run_files(path, name)
        for path, name in zip(paths, _make_run_names(paths), strict=True)
    ]
    sections = {title: part for title, part in _iterate_sections(runs) if part}
    body = "".join(f"<h2>{escape(title)}</h2>\n{part}\n" for title, part in sections.items())
    names = escape(", ".join(run.name for run in runs))
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{names}</title>\n'
        f"<style>{STYLE}</style></head>\n<body>\n<h1>{names}</h1>\n{body}{script}</body></html>\n"
    )
    return page, list(sections)


def list_report_files(paths: Sequence[Path]) -> list[Path]:
    """List the files that a page about these runs is made of, whether they exist or not.

    Args:
        paths: see `format_run_report`.
    """
    return [file for path in paths for file in (path, *(path / name for name in FILES))]


def _make_run_names(paths: Sequence[Path]) -> list[str]:
    """Make a distinct name of each run: the shortest ends of the paths that all differ.

    Raises:
        UserError: for the first path that is named twice.
    """
    absolute = [path.absolute() for path in paths]
    for number, path in enumerate(paths):
        if absolute[number] in absolute[:number]:
            raise UserError(f"{path}: is named twice; name each run once")
    count = 1
    while len({path.parts[-count:] for path in absolute}) < len(absolute):
        count += 1
    return ["/".join(path.parts[-count:]) for path in absolute]


def _read_run_files(path: Path, name: str) -> _RunFiles:
    """Read the files of a run that exist; a path that is a file is a result of `eval-ensemble`.

    Args:
        name: name of the run on the page.
    Raises:
        UserError: if there is none, or one is malformed.
    """
    if path.is_file():
        mixture = read_json_object(path)
        if not isinstance(mixture.get("domains"), dict):
            raise UserError(f"{path}: is no result of megamod eval-ensemble --output")
        return _RunFiles(name, path.parent, mixture=mixture)
    run = _RunFiles(
        name=name,
        folder=path,
        metrics=read_metrics(path / METRICS) if (path / METRICS).is_file() else (),
        scores=_read_json_if_exists(path / "perplexity.json"),
        results=_read_json_if_exists(path / "results.json"),
        sweep=read_checked_file(path / "summary.json", list[_SummaryRow])
        if (path / "summary.json").is_file()
        else (),
        mixture=_read_json_if_exists(path / "evaluation" / "mixture.json"),
        settings=read_run_recipe(path),
        environment=_flatten_objects(_read_json_if_exists(path / "env.json")),
    )
    if not any((run.metrics, run.scores, run.results, run.sweep, run.mixture)):
        raise UserError(
            f"{path}: has no metrics.jsonl, perplexity.json, results.json, summary.json or "
            "evaluation/mixture.json to report on"
        )
    return run


def _read_json_if_exists(path: Path) -> dict[str, object]:
    """Read a JSON object; {} if there is no file. Raise UserError if it is malformed."""
    return read_json_object(path) if path.is_file() else {}


def _flatten_objects(record: Mapping) -> dict[str, object]:
    """Return a copy of a record with `key.item` entries instead of the objects among its values."""
    flat: dict[str, object] = {}
    for key, value in record.items():
        items = value.items() if isinstance(value, dict) else ()
        flat |= {f"{key}.{name}": item for name, item in items} or {key: value}
    return flat


def _iterate_sections(runs: Sequence[_RunFiles]) -> Iterator[tuple[str, str]]:
    """Yield title and HTML of each section of the page; the HTML is "" if no run has its data."""
    yield (
        "Scores",
        _format_comparison_table({run.name: _select_summary_numbers(run) for run in runs}),
    )
    losses = {run.name: run.losses for run in runs if run.losses}
    yield (
        "Training loss",
        _format_figure("all runs", plot_losses_of_runs, losses) if len(losses) > 1 else "",
    )
    yield (
        "Loss and perplexity by domain",
        "".join(
            _format_figure(run.name, plot_training_curves, run.folder / METRICS)
            for run in runs
            if run.losses and "loss_by_domain" in run.metrics[0]
        ),
    )
    yield (
        "Perplexity by expert and domain",
        "".join(
            _format_figure(
                run.name, plot_matrix, matrix, title=f"{run.scores.get('split')} perplexity"
            )
            for run in runs
            # A single cell compares nothing, and is among the scores.
            if sum(map(len, (matrix := _list_perplexities(run.scores)).values())) > 1
        ),
    )
    yield (
        "Posterior of the experts",
        "".join(
            _format_figure(run.name, plot_shares, priors, x_label="average weight of each expert")
            for run in runs
            if (priors := _collect_priors(run.mixture))
        ),
    )
    yield (
        "Load of the experts",
        "".join(
            _format_figure(run.name, plot_shares, loads, x_label="share of the tokens of a domain")
            for run in runs
            if (loads := _collect_expert_loads(run.metrics))
        ),
    )
    speeds = _collect_speeds_and_scores(runs)
    yield (
        "Score and throughput",
        _format_figure("dev split", plot_trade_off, speeds) if speeds else "",
    )
    yield (
        "Loss barriers",
        "".join(
            _format_figure(run.name, plot_barriers, barriers)
            for run in runs
            if (barriers := _collect_barriers(run.results))
        ),
    )
    yield "Settings", _format_comparison_table({run.name: run.settings for run in runs})
    yield "Environment", _format_comparison_table({run.name: run.environment for run in runs})


def _select_summary_numbers(run: _RunFiles) -> dict[str, object]:
    """Select the numbers of a run for the table of scores, by the name of their row.

    Numbers that the run lacks are absent.
    """
    trained = [record for record in run.metrics if "loss" in record]
    last = trained[-1] if trained else {}
    rates = [r["tokens_per_second"] for r in trained if r.get("tokens_per_second")]
    mixed = {
        name: scores.get("perplexity")
        for name, scores in _get_scores_by_domain(run.mixture).items()
    }
    numbers = {
        "steps": last.get("step"),
        "tokens": last.get("tokens"),
        "training loss": last.get("loss"),
        "tokens per second, median": sorted(rates)[len(rates) // 2] if rates else None,
        "peak memory, GB": last["memory_bytes"] / 1e9 if "memory_bytes" in last else None,
        "skipped steps": last.get("skipped"),
        "mean perplexity, each domain by its own expert": run.scores.get("mean_of_own"),
        **{f"perplexity of the mixture, {name}": score for name, score in mixed.items()},
        "task score": run.results.get("task_score"),
        "instances per second": run.results.get("instances_per_second"),
    }
    return {name: number for name, number in numbers.items() if number is not None}


def _list_perplexities(scores: Mapping) -> dict[str, dict[str, float]]:
    """Return the perplexities of a run by expert and domain, without empty cells and rows."""
    matrix = scores.get("perplexity", {})
    rows = {name: {k: v for k, v in row.items() if v is not None} for name, row in matrix.items()}
    return {name: row for name, row in rows.items() if row}


def _get_scores_by_domain(mixture: Mapping) -> Mapping[str, Mapping]:
    """Return the scores of a mixture by domain of the text; {} if there is no mixture."""
    return mixture.get("domains", {})


def _collect_priors(mixture: Mapping) -> dict[str, Mapping[str, float]]:
    """Collect the prior weights of the experts by domain of the text, where there are any.

    Args:
        mixture: content of a result of `megamod eval-ensemble`; {} without one.
    """
    return {
        name: scores["prior"]
        for name, scores in _get_scores_by_domain(mixture).items()
        if scores.get("prior")
    }


def _collect_expert_loads(metrics: Sequence[Mapping]) -> dict[str, dict[str, float]]:
    """Collect the shares of tokens of a mixture's experts, by domain of the text, then expert.

    They are those of the last record of metrics.jsonl that has any; without one the result is {}.
    """
    loads: dict[str, dict[str, float]] = {}
    for record in reversed(metrics):
        for key, share in record.items():
            if key.startswith("load/"):
                _, domain, expert = key.split("/", 2)
                loads.setdefault(domain, {})[expert] = share
        if loads:
            break
    return loads


def _collect_speeds_and_scores(
    runs: Sequence[_RunFiles],
) -> dict[str, dict[str, dict[int, tuple[float, float]]]]:
    """Collect the points (instances per second, task score) of all runs, by task, model and N.

    They come from sweeps, and from single finetuning runs under the name of the run.
    """
    tasks: dict[str, dict[str, dict[int, tuple[float, float]]]] = {}
    for run in runs:
        for row in run.sweep:
            point = (row.mean["instances_per_second"], row.mean["task_score"])
            tasks.setdefault(row.task, {}).setdefault(row.model, {})[row.num_instances] = point
        score, speed = (run.results.get(k) for k in ("task_score", "instances_per_second"))
        if score is not None and speed is not None:
            task = (run.results.get("task") or {}).get("name", "all tasks")
            count = run.results.get("num_instances") or 1
            tasks.setdefault(task, {}).setdefault(run.name, {})[count] = (speed, score)
    return tasks


def _collect_barriers(results: Mapping) -> dict[str, dict[str, tuple[float, float]]]:
    """Collect the barriers in results.json, by task and alignment: mean and standard error (nats).

    Args:
        results: content of results.json; that of another kind of run has no barriers: {}.
    """
    return {
        task: {name: tuple(result["barrier"]) for name, result in variants.items()}
        for task, variants in results.items()
        if isinstance(variants, dict)
        and variants
        and all(isinstance(result, dict) and "barrier" in result for result in variants.values())
    }


def _format_figure(caption: str, plot: Callable, data: object, **options: object) -> str:
    """Format an HTML figure with the SVG that a plot function writes; its text stays text.

    Args:
        caption: caption of the figure, plain text.
        plot: function of `plots` or `run_plots`, called with `data`, a path and `options`.
        data: first argument of `plot`.
    """
    # Ids follow from the salt, so that those of two figures differ and a page can be repeated.
    settings = {"svg.fonttype": "none", "svg.hashsalt": f"{plot.__name__} {caption}"}
    with TemporaryDirectory() as folder, matplotlib.rc_context(settings):
        file = Path(folder) / "figure.svg"
        plot(data, file, **options)
        svg = file.read_text(encoding="utf-8")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    used = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
    return f"<figure><figcaption>{escape(caption)}</figcaption>\n{svg}</figure>\n"


def _format_comparison_table(columns: Mapping[str, Mapping[str, object]]) -> str:
    """Format an HTML table with a column per run; rows in which runs differ come first, marked.

    Args:
        columns: values by run, then name of the row; without any value the result is "".
    """
    names = list(dict.fromkeys(name for values in columns.values() for name in values))
    rows = []
    for name in names:
        cells = [_format_cell(values.get(name)) for values in columns.values()]
        rows.append((len({*cells} - {MISSING}) > 1, name, cells))
    rows.sort(key=lambda row: not row[0])
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    lines = [f'<div class="wide"><table>\n<tr><th></th>{head}</tr>']
    for differs, name, cells in rows:
        mark = ' class="differs"' if differs else ""
        tail = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines.append(f"<tr{mark}><td>{escape(name)}</td>{tail}</tr>")
    return "\n".join([*lines, "</table></div>"]) if rows else ""


def _format_cell(value: object) -> str:
    """Format a value for a cell: floats with five digits, `MISSING` for None."""
    if value is None:
        return MISSING
    return f"{value:.5g}" if isinstance(value, float) else str(value)
