"""How strongly each feature of one model goes with each feature of another, in one pass over data.

Of the joint covariance only the means, the diagonal and the block between the models are held.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SMALLEST = 1e-7  # of the product of two standard deviations, as in the release


@dataclass(frozen=True)
class Moments:
    """Population moments of two models' features, float64.

    Attributes:
        first, second: variances [C] of the features of each.
        cross: covariances [C, C], rows being the first model's features.
    """

    first: Tensor
    second: Tensor
    cross: Tensor

    def correlation(self) -> Tensor:
        """Correlations [C, C]; 0 where a feature is constant. `cross` is overwritten."""
        first, second = self.first.clamp(min=0).sqrt(), self.second.clamp(min=0).sqrt()
        scale = torch.outer(first, second).nan_to_num_(0.0).clamp_(min=_SMALLEST)
        return self.cross.div_(scale)


class CrossCovariance:
    """Sums over batches of two models' features, in float64; products of a batch are in float32.

    What is summed are differences to the means of the first batch, so that features far from zero
    lose no digits.

    Args:
        size: C, number of features.
        stacked: take the product of both models' features with themselves, and no differences: to
            the last digit what the original program has, which is off by 1e-5 where features are
            far from zero, and four times the work.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu", stacked: bool = False):
        self.count = 0
        self._stacked = stacked
        self._shifts: tuple[Tensor, Tensor] | None = None
        self._sums, self._squares, self._product = (
            torch.zeros(rows, size, dtype=torch.float64, device=device) for rows in (2, 2, size)
        )

    def add(self, first: Tensor, second: Tensor) -> None:
        """Add a batch: features [n, C] of each model; what is not finite counts as 0."""
        pair = tuple(_finite(x) for x in (first, second))
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
        size = len(self._product)
        product = both @ both.T
        self._product += product[:size, size:]
        self._squares += product.diagonal().view(2, size)
        self._sums += both.sum(1).view(2, size)

    def moments(self, count: int | None = None) -> Moments:
        """What the sums come to; they are used up.

        Args:
            count: what to divide by in place of the number of rows that were added. The release
                does so for features that exist once per sequence, which makes their means wrong.
        """
        sums, squares, product, n = self._sums, self._squares, self._product, self.count
        if count is not None and count != n and self._shifts is None:
            n = count
        elif count is not None and count != n:
            shifts = torch.stack(self._shifts).double()
            squares = squares + 2 * shifts * sums + n * shifts**2
            product += torch.outer(shifts[0], sums[1]) + torch.outer(sums[0], shifts[1])
            product += n * torch.outer(*shifts)
            sums, n = sums + n * shifts, count
        mean = sums / n
        variance = squares / n - mean**2
        product.div_(n).sub_(torch.outer(*mean))
        return Moments(variance[0], variance[1], product)


def averaged(moments: Sequence[Moments]) -> Moments:
    """The mean of covariances that were measured at several places."""
    first, second, cross = (
        torch.stack([getattr(one, name) for one in moments]).mean(0)
        for name in ("first", "second", "cross")
    )
    return Moments(first, second, cross)


def _finite(x: Tensor) -> Tensor:
    x = x.float()
    # One sum is much faster than a look at each element, and finite only if all of them are.
    return x if torch.isfinite(x.sum()) else x.nan_to_num(0.0, 0.0, 0.0)
