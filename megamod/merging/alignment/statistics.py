"""Correlations between the features of two models, in one pass over data.

Of the joint covariance only the means, the diagonal and the cross block are accumulated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SMALLEST = (
    1e-7  # lower bound of the product of two standard deviations, as in the original program
)


@dataclass(frozen=True)
class Moments:
    """Population moments of two models' features, float64.

    Attributes:
        first, second: variances [C] of the features of each.
        cross: covariances [C, C]; rows are features of the first model. They are correlations after
            `overwrite_cross_by_correlation`.
    """

    first: Tensor
    second: Tensor
    cross: Tensor

    def overwrite_cross_by_correlation(self) -> Tensor:
        """Divide `cross` in place by the standard deviations, and return it: correlations [C, C].

        They are 0 where a feature is constant. The covariances are lost, which saves the memory of
        a second tensor, so it can be called once.
        """
        first, second = self.first.clamp(min=0).sqrt(), self.second.clamp(min=0).sqrt()
        scale = torch.outer(first, second).nan_to_num_(0.0).clamp_(min=_SMALLEST)
        return self.cross.div_(scale)


class CrossCovariance:
    """Sums over batches of the features of two models, in float64; batch products in float32.

    The means of the first batch are subtracted first, so that features far from zero lose no
    digits.

    Args:
        size: C, number of features.
        device: device of the sums and of the batches.
        stacked: multiply the stacked features of both models without subtracting means: bit for bit
            the arithmetic of the original program, whose error is 1e-5 where features are far from
            zero, at four times the cost.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu", stacked: bool = False):
        self.count = 0
        self._stacked = stacked
        self._shifts: tuple[Tensor, Tensor] | None = None
        self._sums, self._squares, self._product = (
            torch.zeros(rows, size, dtype=torch.float64, device=device) for rows in (2, 2, size)
        )

    def add_batch(self, first: Tensor, second: Tensor) -> None:
        """Add n rows of features, `first` and `second` [n, C], of the two models.

        Values that are not finite count as 0.
        """
        pair = tuple(_replace_non_finite(x) for x in (first, second))
        self.count += len(first)
        if self._stacked:
            self._add_stacked(torch.cat([x.T for x in pair]))
            return
        if self._shifts is None:
            self._shifts = tuple(x.mean(0) for x in pair)
        pair = tuple(x - shift for x, shift in zip(pair, self._shifts, strict=True))
        self._product += pair[0].T @ pair[1]
        for row, x in enumerate(pair):
            self._sums[row] += x.sum(0)
            self._squares[row] += torch.linalg.vecdot(x, x, dim=0)

    def _add_stacked(self, both: Tensor) -> None:
        """Add n rows as the original program does: from one product of all features of both models.

        Args:
            both: [2 C, n], features of the first model, then of the second.
        """
        size = len(self._product)
        product = both @ both.T
        self._product += product[:size, size:]
        self._squares += product.diagonal().view(2, size)
        self._sums += both.sum(1).view(2, size)

    def finalise_moments(self, count: int | None = None) -> Moments:
        """Turn the sums into moments, in place; this ends the accumulation.

        Args:
            count: divisor instead of the number of added rows; None: that number. The original
                program does this for features that exist once per sequence, which makes their means
                wrong.
        """
        sums, squares, product, n = self._sums, self._squares, self._product, self.count
        if count is not None and count != n:
            sums, squares, product = self._compute_raw_sums()
            n = count
        mean = sums / n
        variance = squares / n - mean**2
        product.div_(n).sub_(torch.outer(*mean))
        return Moments(variance[0], variance[1], product)

    def finalise_products(self) -> Moments:
        """Return sums of squares and of products, means not subtracted, on the CPU.

        They are sums and not averages, in the fields of `Moments`. They are made in place, so this
        ends the accumulation.
        """
        _, squares, product = self._compute_raw_sums()
        return Moments(squares[0].cpu(), squares[1].cpu(), product.cpu())

    def _compute_raw_sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return sums [2, C], sums of squares [2, C] and of products [C, C] of the features as they
        were added; the products are overwritten.
        """
        sums, squares, product, n = self._sums, self._squares, self._product, self.count
        if self._shifts is None:
            return sums, squares, product
        shifts = torch.stack(self._shifts).double()
        squares = squares + 2 * shifts * sums + n * shifts**2
        product += torch.outer(shifts[0], sums[1]) + torch.outer(sums[0], shifts[1])
        product += n * torch.outer(*shifts)
        return sums + n * shifts, squares, product


def average_moments(moments: Sequence[Moments]) -> Moments:
    """Average the moments of groups of equal size that get one permutation, each weighing alike."""
    first, second, cross = (
        torch.stack([getattr(entry, name) for entry in moments]).mean(0)
        for name in ("first", "second", "cross")
    )
    return Moments(first, second, cross)


def _replace_non_finite(x: Tensor) -> Tensor:
    """Return x as float32 with 0 for NaN and infinities, as one would spoil all sums."""
    x = x.float()
    # One sum is much faster than a test of each element, and finite only if all are.
    return x if torch.isfinite(x.sum()) else x.nan_to_num(0.0, 0.0, 0.0)
