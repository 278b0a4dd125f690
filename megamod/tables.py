"""Text tables."""

from collections.abc import Collection, Sequence


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
