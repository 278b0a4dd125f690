"""Means over seeds, and comparisons of runs that share a seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its 95 % interval by Student's t.

    Attributes:
        low, high: limits of the interval; None with fewer than two seeds.
        count: number of seeds.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    def format(self, digits: int, signed: bool = False) -> str:
        """Format the estimate as `1.23 [1.20, 1.26]`, or as `1.23` without an interval.

        Args:
            digits: decimals.
            signed: write `+` before numbers that are not negative.
        """
        sign = "+" if signed else ""
        shown = f"{self.mean:{sign}.{digits}f}"
        if self.low is None:
            return shown
        return f"{shown} [{self.low:{sign}.{digits}f}, {self.high:{sign}.{digits}f}]"


def estimate_mean(values: Sequence[float]) -> Estimate:
    """Estimate the mean of n independent values.

    The interval is mean ± t(0.975, n - 1) s / sqrt(n), s being the sample standard deviation.

    Args:
        values: at least one; of one value there is no interval.
    """
    from scipy import stats

    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Estimate(mean, None, None, count)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (count - 1))
    half = float(stats.t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count)


def compute_mean_and_deviation(
    rows: Sequence[Mapping[str, float]],
) -> tuple[dict[str, float], dict[str, float]]:
    """Compute means and sample standard deviations (0 for one row) of the columns of some rows.

    Args:
        rows: at least one, such as scores by name for each seed. Columns that a row lacks are
            skipped.
    Returns:
        means by name, deviations by name.
    """
    names = [name for name in rows[0] if all(name in row for row in rows)]
    columns = {name: np.array([row[name] for row in rows]) for name in names}
    return (
        {name: float(column.mean()) for name, column in columns.items()},
        {name: float(column.std(ddof=min(1, len(rows) - 1))) for name, column in columns.items()},
    )


def compare_to_baseline(
    values: dict[int, float], baseline: dict[int, float], ratio: bool
) -> tuple[Estimate, int] | None:
    """Estimate the ratio or difference to the baseline of the same seed.

    Args:
        values, baseline: by seed; a seed that only one of them has is skipped.
        ratio: value / baseline; False: value - baseline.
    Returns:
        the estimate, and the number of seeds whose value is below the baseline's; None if no seed
        has both.
    """
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        return None
    pairs = [(values[seed], baseline[seed]) for seed in seeds]
    compared = [value / base if ratio else value - base for value, base in pairs]
    return estimate_mean(compared), sum(value < base for value, base in pairs)
