"""Intervals over seeds against SciPy's own, and paired comparisons against lists by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from megamod.evaluation.seeds import (
    compare_to_baseline,
    compute_mean_and_deviation,
    estimate_mean,
)


@pytest.mark.parametrize("count", [2, 3, 5, 17])
def test_interval(count):
    values = np.random.default_rng(count).normal(3.0, 0.5, count)
    result = estimate_mean(list(values))
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert result.mean == pytest.approx(values.mean(), rel=1e-12) and result.count == count


def test_one_value_has_no_interval():
    result = estimate_mean([2.5])
    assert (result.mean, result.low, result.high) == (2.5, None, None)
    assert result.format(1) == "2.5" and result.format(2, signed=True) == "+2.50"


def test_pairs_of_common_seeds():
    values, baseline = {1: 8.0, 2: 9.0, 4: 7.0}, {1: 10.0, 2: 9.0, 3: 1.0, 4: 8.0}
    ratio, below = compare_to_baseline(values, baseline, ratio=True)
    assert ratio.mean == pytest.approx((0.8 + 1.0 + 0.875) / 3) and below == 2
    difference, _ = compare_to_baseline(values, baseline, ratio=False)
    assert difference.mean == pytest.approx(-1.0)
    assert difference.format(2, signed=True).startswith("-1.00 [-3.48, +1.48]")
    assert compare_to_baseline({1: 1.0}, {2: 1.0}, ratio=True) is None


def test_means_and_deviations_of_common_columns():
    means, deviations = compute_mean_and_deviation([{"f1": 0.5, "x": 1.0}, {"f1": 0.7}])
    assert means == {"f1": pytest.approx(0.6)}
    assert deviations == {"f1": pytest.approx(0.2 / math.sqrt(2))}
    assert compute_mean_and_deviation([{"f1": 0.5}])[1] == {"f1": 0.0}
