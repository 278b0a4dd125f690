"""Text tables."""

from collections.abc import Collection, Mapping, Sequence


def format_table(rows: Sequence[Sequence[str]], right_aligned_columns: Collection[int] = ()) -> str:
    """Format rows as a table: columns as wide as their widest cell, two spaces between them.

    Trailing blanks of a line are removed; no rows give an empty text.

    Args:
        rows: cells of every row, all of the same number; a heading is simply the first row.
        right_aligned_columns: indices of the columns that are aligned at the right; others are at
            the left.

    Raises:
        ValueError: if rows differ in their number of cells.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right_aligned_columns else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def format_score_table(rows: Mapping[str, Mapping[str, float | str]], corner: str) -> str:
    """Format a table with a row per name and a column per score.

    Numbers have four decimals, texts stay as they are; a missing cell is a dash.

    Args:
        rows: cells by name of the row, then of the column.
        corner: heading of the column of row names.
    """
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    cells = [[corner, *columns]]
    for name, row in rows.items():
        values = (row.get(column, "-") for column in columns)
        cells.append([name, *(v if isinstance(v, str) else f"{v:.4f}" for v in values)])
    return format_table(cells, right_aligned_columns=range(1, len(cells[0])))


def format_matrix(
    matrix: Mapping[str, Mapping[str, float]], corner: str = "expert \\ text", digits: int = 2
) -> str:
    """Format a table of numbers; of several rows a star marks the smallest of each column.

    Args:
        matrix: numbers by row, then column; cells may be missing.
        corner: heading of the column of row names.
        digits: decimals; cells that round to the smallest are marked too.
    """
    columns = list(dict.fromkeys(name for row in matrix.values() for name in row))
    shown = {name: {c: f"{x:.{digits}f}" for c, x in row.items()} for name, row in matrix.items()}
    best = {c: min((row[c] for row in shown.values() if c in row), key=float) for c in columns}
    table = [[corner, *columns]]
    for name, row in shown.items():
        marks = ("*" if row.get(c) == best[c] and len(matrix) > 1 else " " for c in columns)
        cells = (f"{row.get(c, '-')}{mark}" for c, mark in zip(columns, marks, strict=True))
        table.append([name, *cells])
    return format_table(table, right_aligned_columns=range(1, len(table[0])))
