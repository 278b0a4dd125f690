"""Sparsification of task vectors, by magnitude or at random, piece by piece.

A task vector is the difference of a model from the base. No whole one is held in memory. Ranks of
magnitudes come from counting the bits of floating-point numbers, 16 at a time: the bit patterns of
magnitudes are in the order of the magnitudes.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megamod.errors import UserError
from megamod.merging.tensors import MergeTensor, ModelTensor

_DIGIT = 16  # bits
_TINY = 1e-7  # smaller L1 norms are taken as zero, and nothing is divided by them
Drop = Callable[[Tensor], None]
"""Sparsifies the next piece of a task vector (1-D) in place: dropped entries become 0, and some
sparsifiers rescale those that are kept. Must be called with the pieces in order, each once."""


@dataclass(frozen=True)
class TaskVector:
    """Difference of a model from the base, read in pieces.

    Attributes:
        target: tensor of the result, whose base counts; `model`: one of its models.
    """

    target: MergeTensor
    model: ModelTensor

    def iterate_pieces(self, spans: Iterable[tuple[int, int]] | None = None) -> Iterator[Tensor]:
        """Yield the differences in order, 1-D; each piece is valid until the next one is requested.

        Args:
            spans: first element, and that after the last, of each; None: those of `target`.
        """
        spans = list(self.target.iterate_pieces() if spans is None else spans)
        longest = max((stop - start for start, stop in spans), default=0)
        differences, base_values = self.target.allocate_buffers(2, longest)
        for start, stop in spans:
            piece, base = differences[: stop - start], base_values[: stop - start]
            self.model.read_into(start, piece)
            self.target.base.read_into(start, base)
            yield piece.sub_(base)


def keep_all(_: Tensor) -> None:
    """Drop nothing: the `Drop` of whole task vectors, and of sparsifiers at density 1."""


def drop_all(piece: Tensor) -> None:
    """Set every entry of a piece to zero in place: the `Drop` of sparsifiers at density 0.

    NaN stays NaN, so that it is reported.
    """
    piece.mul_(0)


def keep_largest(target: MergeTensor, model: ModelTensor) -> Callable[[], Drop]:
    """Prepare to keep the fraction `density` of largest magnitude, at least one entry.

    Of entries of equal magnitude the first are kept. A density of 0 drops all. The task vector is
    read several times here, to find the smallest magnitude that is kept.

    Args:
        target, model: the tensor to merge, and one of its models, whose `values` has the settings.
    Returns:
        a function that starts a pass over the pieces, see `Drop`; so do the other sparsifiers.
    Source: Yadav et al. 2023 (TIES-Merging), section 4.2, step 1.
    """
    count, density = target.numel, model.values["density"]
    if density >= 1 or count == 0:
        return lambda: keep_all
    if density <= 0:
        return lambda: drop_all
    keep = max(1, int(density * count))
    return _keep_ranks(TaskVector(target, model), count - keep, count)


def drop_outliers(target: MergeTensor, model: ModelTensor) -> Callable[[], Drop]:
    """Prepare to drop the largest fraction `gamma`, and keep the next largest fraction `density`.

    Both are fractions of all entries. If `density` is above 1 - `gamma`, fewer of the largest are
    dropped.

    Args:
        target, model: the tensor to merge, and one of its models, whose `values` has the settings.
    Source: Davari and Belilovsky 2023 (Model Breadcrumbs), section 3.
    """
    count, density = target.numel, model.values["density"]
    if density >= 1:
        return lambda: keep_all
    keep = int(density * count)
    if keep <= 0:
        return lambda: drop_all
    low = max(0, count - keep - int(model.values["gamma"] * count))
    return _keep_ranks(TaskVector(target, model), low, low + keep)


def drop_at_random(target: MergeTensor, model: ModelTensor) -> Callable[[], Drop]:
    """Prepare to keep each entry independently with probability `density`.

    With `rescale_by_density` the kept entries are divided by it. Every pass over the same pieces
    drops the same entries.

    Args:
        target, model: the tensor to merge, and one of its models, whose `values` has the settings.
    Source: Yu et al. 2023 (DARE: Language Models are Super Mario), section 3.
    """
    density = model.values["density"]
    if density >= 1:
        return lambda: keep_all
    if density <= 0:
        return lambda: drop_all
    chances = round(density * 2**_DIGIT)  # of as many random numbers, those that keep an entry
    factor = 2**_DIGIT / chances if target.values["rescale_by_density"] and chances else 1.0

    def start_pass() -> Drop:
        """Start a pass over the pieces of the tensor, see `Drop`."""
        draw = _make_integer_source(target, model)

        def drop_entries(piece: Tensor) -> None:
            """Drop entries of the next piece at random."""
            piece.mul_(draw(len(piece)) < chances - 2 ** (_DIGIT - 1))
            if factor != 1:
                piece.mul_(factor)

        return drop_entries

    return start_pass


def drop_by_rank(target: MergeTensor, model: ModelTensor) -> Callable[[], Drop]:
    """Prepare to keep entries at random, with a probability that rises with their magnitude.

    It rises with the rank of the magnitude in its row (along the last axis), linearly from
    `density` - `epsilon` to `density` + `epsilon`. With `rescale_by_density` each kept entry is
    divided by its probability. Pieces must be whole rows (`iterate_row_pieces`).

    Args:
        target, model: the tensor to merge, and one of its models, whose `values` has the settings.
    Raises:
        UserError: if these limits are not probabilities.
    Source: Deep et al. 2024 (DELLA-Merging), section 3.1.
    """
    density, epsilon = model.values["density"], model.values["epsilon"]
    if density >= 1:
        return lambda: keep_all
    if density <= 0:
        return lambda: drop_all
    if density + epsilon >= 1 or density - epsilon <= 0:
        raise UserError(
            f"{target.name}: density {density:g} with epsilon {epsilon:g}: sum and difference "
            "must lie between 0 and 1"
        )
    width = max(1, target.shape[-1] if target.shape else 1)

    def start_pass() -> Drop:
        """Start a pass over the pieces of the tensor, see `Drop`."""
        draw = _make_integer_source(target, model)

        def drop_entries(piece: Tensor) -> None:
            """Drop entries of the next piece, whole rows, at random by rank."""
            rows = piece.view(-1, width)
            order = rows.abs().argsort(dim=1, stable=True)
            steps = torch.linspace(-epsilon, epsilon, width) if width > 1 else torch.zeros(1)
            chances = torch.empty(rows.shape)
            chances.scatter_(1, order, (density + steps).expand(rows.shape))
            drawn = draw(len(piece)).view(rows.shape)
            rows.mul_(drawn < chances * 2**_DIGIT - 2 ** (_DIGIT - 1))
            if target.values["rescale_by_density"]:
                rows.div_(chances)

        return drop_entries

    return start_pass


def compute_norm_scale(
    target: MergeTensor,
    model: ModelTensor,
    start: Callable[[], Drop],
    spans: Iterable[tuple[int, int]] | None = None,
) -> float:
    """Compute the factor that restores the L1 norm of the task vector after sparsification.

    It is 1 if nothing is dropped, or one of the norms is next to zero.

    Args:
        target, model: the tensor to merge, and one of its models, whose `values` has the settings.
        start: starts a pass of the sparsifier; one whole pass over the task vector is made here.
        spans: see `TaskVector.iterate_pieces`.
    """
    drop, before, after = start(), 0.0, 0.0
    if drop is keep_all:
        return 1.0
    for piece in TaskVector(target, model).iterate_pieces(spans):
        before += float(piece.abs().sum())
        drop(piece)
        after += float(piece.abs_().sum())
    return before / after if before >= _TINY and after >= _TINY else 1.0


def find_magnitude_of_rank(
    pieces: Callable[[], Iterable[Tensor]], rank: int
) -> tuple[float, int, int]:
    """Find the magnitude of a given rank among the entries of a tensor.

    Args:
        pieces: called once per 16 bits of a number; yields all elements, of one floating-point
            dtype of 32 or 64 bits, in memory that is overwritten here.
        rank: 0 for the smallest magnitude.
    Returns:
        the magnitude, the number of entries below it, and of those equal to it.
    """
    prefix, shift, below, equal, kind = 0, None, 0, 0, torch.float32
    while shift is None or shift > 0:
        counts = torch.zeros(2**_DIGIT, dtype=torch.int64)
        following = None
        for piece in pieces():
            kind = piece.dtype
            bits = piece.view(torch.int32 if kind.itemsize == 4 else torch.int64)
            bits.bitwise_and_(torch.iinfo(bits.dtype).max)  # without the sign
            if shift is None:
                following = 8 * kind.itemsize - _DIGIT
            else:
                following = shift - _DIGIT
                bits = bits[bits >> shift == prefix]
            digits = bits.bitwise_right_shift_(following).bitwise_and_(2**_DIGIT - 1)
            counts += torch.bincount(digits, minlength=2**_DIGIT)
        upto = counts.cumsum(0)
        digit = int(torch.searchsorted(upto, rank - below, right=True))
        equal = int(counts[digit])
        below += int(upto[digit]) - equal
        prefix, shift = (prefix << _DIGIT) | digit, following
    number = torch.tensor(prefix, dtype=torch.int32 if kind.itemsize == 4 else torch.int64)
    return float(number.view(kind)), below, equal


def _keep_ranks(vector: TaskVector, low: int, high: int) -> Callable[[], Drop]:
    """Prepare to keep the entries whose rank by magnitude lies in [low, high), 0 the smallest.

    Of equal magnitudes the first has the highest rank. The vector is read here, several times for
    each limit that is neither 0 nor the number of entries.

    Args:
        vector: task vector of one model.
        low, high: first rank to keep, and the rank after the last.
    Returns:
        a function that starts a pass over the pieces, see `Drop`.
    """
    count = vector.target.numel
    least, below, equal = (
        find_magnitude_of_rank(vector.iterate_pieces, low) if low > 0 else (0.0, 0, 0)
    )
    numbers = {least: (below + equal - high, below + equal - low)}
    most = None
    if high < count:
        most, below, equal = find_magnitude_of_rank(vector.iterate_pieces, high - 1)
        numbers[most] = (below + equal - high, below + equal - low)
    # Of the entries equal to a limit, number first to last - 1 are kept.
    split = {value: span for value, span in numbers.items() if low > 0 or value == most}

    def start_pass() -> Drop:
        """Start a pass over the pieces of the tensor, see `Drop`."""
        seen = dict.fromkeys(split, 0)

        def drop_entries(piece: Tensor) -> None:
            """Drop entries of the next piece whose ranks are outside of the limits."""
            sizes = piece.abs()
            stay = sizes >= least
            if most is not None:
                stay &= sizes <= most
            for value, (first, last) in split.items():
                equal_ones = (sizes == value).nonzero().view(-1)
                number = torch.arange(seen[value], seen[value] + len(equal_ones))
                stay[equal_ones[(number < first) | (number >= last)]] = False
                seen[value] += len(equal_ones)
            piece.mul_(stay)

        return drop_entries

    return start_pass


def _make_integer_source(target: MergeTensor, model: ModelTensor) -> Callable[[int], Tensor]:
    """Make a function from a number n to the next n uniform signed 16-bit integers.

    Every source of the same tensor `target` and model gives the same sequence. Numbers are drawn
    four at a time, so two passes agree only if their pieces have the same sizes.
    """
    generator = target.make_generator(model)

    def draw_integers(count: int) -> Tensor:
        """Draw the next `count` numbers of the sequence, [count] int16."""
        raw = torch.empty(-(-count // 4), dtype=torch.int64)
        raw.random_(-(2**63), None, generator=generator)  # None: up to the largest int64
        return raw.view(torch.int16)[:count]

    return draw_integers
