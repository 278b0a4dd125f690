"""Progress bars: on the first rank, and only if stderr is a terminal."""

import os
from collections.abc import Iterable

from tqdm import tqdm


def progress(
    items: Iterable | None = None,
    title: str | None = None,
    *,
    total: int | None = None,
    unit: str = "batch",
) -> tqdm:
    """Return the items as an iterator with a bar that vanishes at the end.

    Args:
        items: None: the caller calls `update`.
        total: number of units; None: that of the items if they have a length, else unknown.
        unit: "B" counts in kB, MB, ...
    """
    hidden = True if os.environ.get("RANK", "0") != "0" else None
    scaled = unit == "B"
    return tqdm(items, title, total, unit=unit, unit_scale=scaled, leave=False, disable=hidden)
