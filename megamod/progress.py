"""Progress bars: on the first rank, and only if stderr is a terminal."""

import os
from collections.abc import Iterable

from tqdm import tqdm


def show_progress(
    items: Iterable | None = None,
    title: str | None = None,
    *,
    total: int | None = None,
    unit: str = "batch",
) -> tqdm:
    """Return a progress bar on standard error, which is also an iterator over `items`.

    The bar vanishes at the end. Ranks above 0 have none, nor has standard error that is no
    terminal; the iterator is the same.

    Args:
        items: items to iterate over; None: the caller counts by calling `update`.
        title: text before the bar.
        total: number of units; None: that of the items if they have a length, else unknown.
        unit: name of a unit; "B" is shown in kB, MB, ...
    """
    hidden = True if os.environ.get("RANK", "0") != "0" else None
    scaled = unit == "B"
    return tqdm(items, title, total, unit=unit, unit_scale=scaled, leave=False, disable=hidden)
