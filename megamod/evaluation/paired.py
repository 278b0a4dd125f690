"""Means over seeds, and comparisons of runs that share a seed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its 95 % interval by Student's t; None with fewer than two seeds."""

    mean: float
    low: float | None
    high: float | None
    count: int

    def format(self, digits: int, signed: bool = False) -> str:
        """Format the estimate as `1.23 [1.20, 1.26]`."""
        sign = "+" if signed else ""
        shown = f"{self.mean:{sign}.{digits}f}"
        if self.low is None:
            return shown
        return f"{shown} [{self.low:{sign}.{digits}f}, {self.high:{sign}.{digits}f}]"


def estimate_mean(values: Sequence[float]) -> Estimate:
    """Estimate the mean of independent values, with interval mean ± t(0.975, n - 1) s / sqrt(n)."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Estimate(mean, None, None, count)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (count - 1))
    half = float(stats.t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count)


def compare_to_baseline(
    values: dict[int, float], baseline: dict[int, float], ratio: bool
) -> tuple[Estimate, int] | None:
    """Estimate the ratio or difference to the baseline of the same seed; None if no seed has both.

    Args:
        values, baseline: by seed.
    Returns:
        the estimate, and the number of seeds whose value is below the baseline's.
    """
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        return None
    pairs = [(values[seed], baseline[seed]) for seed in seeds]
    compared = [value / base if ratio else value - base for value, base in pairs]
    return estimate_mean(compared), sum(value < base for value, base in pairs)
