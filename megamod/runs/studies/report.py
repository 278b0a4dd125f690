"""Tables and plots of a study from its files of figures alone, and their place in a document.

In a Markdown file `fill_document` makes what stands between these lines, and single cells of
tables:

    <!-- study NAME -->
    <!-- end of study NAME -->
    ... <!-- cell NAME, COLUMN, LINE -->36.55 (0.893 [0.887, 0.899]; 5/5)<!-- end of cell --> ...
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from megamod.errors import UserError
from megamod.evaluation.plots import plot_losses_along_line, plot_ratios
from megamod.evaluation.seeds import Estimate, compare_to_baseline, estimate_mean
from megamod.runs.studies.records import Record, read_cell_record
from megamod.runs.studies.study_file import Study, Table

EMPTY = "–"
CELL = re.compile(
    r"(?P<begin><!-- cell (?P<study>[A-Za-z0-9_.-]+), (?P<column>[^,>]+), (?P<line>[^>]+) -->)"
    r".*?(?P<end><!-- end of cell -->)"
)
BODY = "outside_embeddings"  # parameters of a model but its embeddings, see `count_parameters`

Values = dict[int, float]
"""One value of the scores, by seed."""
StudyFigures = tuple[Study, Mapping[str, Record]]
"""A study, and the files of figures that there are, by cell."""


def read_records(study: Study, evidence: Path) -> dict[str, Record]:
    """Read the files of figures in `evidence` that exist; return them by cell.

    Raises:
        UserError: if one is malformed, or of other settings than the study has now.
    """
    records = {cell.name: read_cell_record(evidence, cell) for cell in study.cells}
    return {name: record for name, record in records.items() if record is not None}


def format_markdown(study: Study, records: Mapping[str, Record]) -> str:
    """Format a study's table in Markdown, with a caption on how to read it and the time it took.

    Cells of the table without figures hold `EMPTY`.

    Args:
        records: files of figures by cell.
    """
    table = study.file.table
    make = _list_rung_rows if table.columns == "rungs" else _list_score_rows
    head, *rows = make(study, records)
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    hours = sum(map(_read_seconds, records.values())) / 3600
    seeds = sorted({record["seed"] for record in records.values()})
    caption = "Mean over seeds"
    if table.compare == "ratio":
        caption += f"; in brackets the ratio to {_format_baseline(table.baseline)} of the same seed"
    else:
        caption += (
            f"; in brackets the difference to {_format_baseline(table.baseline)} of the same seed"
        )
    lines += [
        "",
        f"{caption}, its 95 % interval (Student's t), and with how many seeds it is below. "
        f"{len(records)} of {len(study.cells)} cells, seeds {', '.join(map(str, seeds)) or EMPTY}; "
        f"{hours:.1f} hours by the clock of one process of several on shared cores. Figures: "
        f"`docs/evidence/{study.name}/`; one cell anew: `megamod study {study.name} "
        f"--cells {study.cells[0].name} --repeat true --inputs DATA`.",
    ]
    return "\n".join(lines)


def plot_study(study: Study, records: Mapping[str, Record], output: Path) -> bool:
    """Write a PNG of a study; return False, and write nothing, if there are no figures to draw.

    It has the ratios to the baseline by the training tokens per parameter; for a study of barriers
    the losses on the line between the models.

    Args:
        records: files of figures by cell.
        output: file to write.
    """
    table, lines = study.file.table, {}
    if study.file.kind == "barriers":
        return _plot_curves(study, records, output)
    for name in table.plot:
        points = []
        for rung in study.file.rungs:
            arm, row = table.lines[name]
            tokens = [
                float(record["details"]["tokens"] / record["details"]["parameters"][BODY])
                for record in records.values()
                if record["arm"] == table.baseline[0] and record["rung"] == rung
            ]
            compared = _compare_line(table, records, arm, row, rung)
            if tokens and compared is not None:
                points.append((tokens[0], compared[0]))
        if points:
            lines[name] = points
    if not lines:
        return False
    label = f"{table.value.replace('_', ' ')}, ratio to {_format_baseline(table.baseline)}"
    plot_ratios(lines, output, "training tokens per parameter outside the embeddings", label)
    return True


def _plot_curves(study: Study, records: Mapping[str, Record], output: Path) -> bool:
    """Write a PNG of the losses on the line between models at the first rung, by alignment.

    Args:
        study: a study of barriers; the lines in its `table.plot` are drawn.
        records: files of figures by cell.
        output: file to write.
    Returns:
        False, and nothing is written, if there are no figures.
    """
    table, (rung, *_) = study.file.table, study.file.rungs
    curves = {
        name: [
            record["details"]["curve"]
            for record in records.values()
            if (record["arm"], record["rung"]) == (table.lines[name][0], rung)
        ]
        for name in table.plot
    }
    drawn = {name: pairs for name, pairs in curves.items() if pairs}
    if drawn:
        plot_losses_along_line(drawn, output, study.file.title)
    return bool(drawn)


def fill_document(text: str, studies: Mapping[str, StudyFigures]) -> str:
    """Return the text of a document with the tables and cells of these studies filled in.

    Args:
        text: Markdown with the markers of the module's docstring; those of other studies stay.
        studies: by name.
    Raises:
        UserError: if a marker of a table lacks its end, or a cell's names a line or column that
            there is not.
    """
    for name in list_studies(text):
        begin, end = f"<!-- study {name} -->", f"<!-- end of study {name} -->"
        if begin in text and end not in text.partition(begin)[2]:
            raise UserError(f"{begin} lacks its end, {end}")
        if name in studies and begin in text:
            before, _, rest = text.partition(begin)
            after = rest.partition(end)[2]
            text = f"{before}{begin}\n\n{format_markdown(*studies[name])}\n\n{end}{after}"

    def replace_cell(match: re.Match[str]) -> str:
        """Return a match of `CELL`, a pair of markers, with the present figure between them."""
        if match["study"] not in studies:
            return match[0]
        text_of_cell = format_cell(*studies[match["study"]], match["line"], match["column"])
        return f"{match['begin']}{text_of_cell}{match['end']}"

    return CELL.sub(replace_cell, text)


def list_studies(text: str) -> list[str]:
    """Return the names of the studies whose tables or cells a document has a place for."""
    names = re.findall(r"<!-- study ([A-Za-z0-9_.-]+) -->", text)
    return list(dict.fromkeys([*names, *(match["study"] for match in CELL.finditer(text))]))


def format_cell(study: Study, records: Mapping[str, Record], line: str, column: str) -> str:
    """Format one cell of a study's table, as `format_markdown` shows it.

    Args:
        records: files of figures by cell.
        line, column: titles in the table.
    Raises:
        UserError: if there is no such line or column.
    """
    make = _list_rung_rows if study.file.table.columns == "rungs" else _list_score_rows
    (_, *columns), *rows = make(study, records)
    lines = {name: dict(zip(columns, cells, strict=True)) for name, *cells in rows}
    if column not in columns or line not in lines:
        raise UserError(
            f"the table of the study {study.name} has no cell {column}, {line}; columns: "
            f"{', '.join(columns)}; lines: {', '.join(lines)}"
        )
    return lines[line][column]


def _list_rung_rows(study: Study, records: Mapping[str, Record]) -> list[list[str]]:
    """List the cells of a table with a column per rung, the head first.

    Each line is one row of one arm's scores; all but the baseline's are compared with it.

    Args:
        records: files of figures by cell.
    """
    table = study.file.table
    rows = [["", *study.file.rungs]]
    for name, (arm, row) in table.lines.items():
        cells = []
        for rung in study.file.rungs:
            values = _select_values(records, arm, rung, row, table.value)
            compared = _compare_line(table, records, arm, row, rung)
            if [arm, row] == table.baseline:
                compared = None
            cells.append(_format_values(values, compared, table))
        rows.append([name, *cells])
    return rows


def _list_score_rows(study: Study, records: Mapping[str, Record]) -> list[list[str]]:
    """List the cells of a table with a column per row of scores and one of their mean, head first.

    All are of the first rung. Only means are compared with the baseline's.

    Args:
        records: files of figures by cell.
    """
    table, (rung, *_) = study.file.table, study.file.rungs
    rows = [["", *table.rows, "mean"]]
    for name, (arm,) in table.lines.items():
        by_row = [_select_values(records, arm, rung, row, table.value) for row in table.rows]
        cells = [_format_values(values, None, table) for values in by_row]
        means = _average_rows(by_row)
        baseline_values = [
            _select_values(records, table.baseline[0], rung, r, table.value) for r in table.rows
        ]
        compared = None
        if arm != table.baseline[0]:
            compared = compare_to_baseline(
                means, _average_rows(baseline_values), table.compare == "ratio"
            )
        rows.append([name, *cells, _format_values(means, compared, table)])
    return rows


def _average_rows(by_row: Sequence[Values]) -> Values:
    """Average the values of several rows of scores by seed, over the seeds that have all rows.

    Args:
        by_row: values by seed of each row.
    """
    seeds = set.intersection(*(set(values) for values in by_row))
    return {seed: sum(values[seed] for values in by_row) / len(by_row) for seed in seeds}


def _compare_line(
    table: Table, records: Mapping[str, Record], arm: str, row: str, rung: str
) -> tuple[Estimate, int] | None:
    """Compare a row of an arm's scores at a rung with the table's baseline, by seed.

    Args:
        table: the table, whose `value` is compared with that of its baseline.
        records: files of figures by cell.
        arm, row, rung: names of the arm, the row of its scores and the rung.
    Returns:
        see `compare_to_baseline`; None if no seed has both.
    """
    values = _select_values(records, arm, rung, row, table.value)
    baseline_values = _select_values(
        records, table.baseline[0], rung, table.baseline[1], table.value
    )
    return compare_to_baseline(values, baseline_values, table.compare == "ratio")


def _select_values(
    records: Mapping[str, Record], arm: str, rung: str, row: str, value: str
) -> Values:
    """Select one value, such as "perplexity", of a row of an arm's scores at a rung, by seed.

    Seeds without it are left out.

    Args:
        records: files of figures by cell.
        value: name of the value.
    """
    return {
        record["seed"]: record["scores"][row][value]
        for record in records.values()
        if (record["arm"], record["rung"]) == (arm, rung) and value in record["scores"].get(row, {})
    }


def _format_values(values: Values, compared: tuple[Estimate, int] | None, table: Table) -> str:
    """Format a cell of the table: the mean over seeds, and in brackets its comparison.

    Args:
        values: value by seed; without any the result is `EMPTY`.
        compared: comparison with the baseline, see `compare_to_baseline`; None: the mean alone is
            shown.
        table: the table, for its decimals and kind of comparison.
    """
    if not values:
        return EMPTY
    text = f"{estimate_mean(list(values.values())).mean:.{table.digits}f}"
    if compared is None:
        return text
    ratio = table.compare == "ratio"
    result, below = compared
    return f"{text} ({result.format(3, signed=not ratio)}; {below}/{result.count})"


def _read_seconds(record: Record) -> float:
    """Return the seconds of a cell: of its run, or of its training steps if these are more.

    Its training may have been done for another cell before, and be missing in the former.
    """
    return max(record["seconds"], record["details"].get("training_seconds", 0.0))


def _format_baseline(baseline: Sequence[str]) -> str:
    """Format the arm of the baseline, and its row of scores if it names one."""
    return ", ".join(baseline)
