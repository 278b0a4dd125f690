"""Which entries of a task vector stay: by magnitude, or drawn at random; by pieces in both cases.

A task vector is what a model has learned since the base: the difference of the two. Nothing here
holds a whole one. Magnitudes are ranked by counting the bits of floating-point numbers, which are
in the order of the numbers, 16 bits at a time.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megamod.errors import UserError
from megamod.merging.tensors import Blend, Operand

_DIGIT = 16  # bits
_TINY = 1e-7
Thin = Callable[[Tensor], None]
"""Sets entries that go to zero, in place. To be called with the pieces in order, each once."""


@dataclass(frozen=True)
class TaskVector:
    """A model less the base, in pieces."""

    blend: Blend
    operand: Operand

    def pieces(self, spans: Iterable[tuple[int, int]] | None = None) -> Iterator[Tensor]:
        """Its elements; each piece is valid until the next one is asked for.

        Args:
            spans: first element, and that after the last, of each; None: as `Blend.pieces`.
        """
        spans = list(self.blend.pieces() if spans is None else spans)
        longest = max((stop - start for start, stop in spans), default=0)
        tau, anchor = self.blend.buffers(2, longest)
        for start, stop in spans:
            piece, base = tau[: stop - start], anchor[: stop - start]
            self.operand.read_into(start, piece)
            self.blend.base.read_into(start, base)
            yield piece.sub_(base)


def keep_all(_: Tensor) -> None:
    """Nothing goes."""


def keep_none(piece: Tensor) -> None:
    """Everything goes."""
    piece.mul_(0)  # which leaves a NaN to be found


def trimmed(blend: Blend, operand: Operand) -> Callable[[], Thin]:
    """Only the `density` of the largest magnitude stays, at least one entry.

    Among equals the first stay.

    Source: Yadav et al. 2023 (TIES-Merging), section 4.2, step 1.
    """
    count, density = blend.numel, operand.values["density"]
    if density >= 1 or count == 0:
        return lambda: keep_all
    if density <= 0:
        return lambda: keep_none
    keep = max(1, int(density * count))
    return _band(TaskVector(blend, operand), count - keep, count)


def without_outliers(blend: Blend, operand: Operand) -> Callable[[], Thin]:
    """The `density` stays that is left of the largest when their first `gamma` is taken away.

    With more than 1 - `gamma` of density fewer of the largest go.

    Source: Davari and Belilovsky 2023 (Model Breadcrumbs), section 3.
    """
    count, density = blend.numel, operand.values["density"]
    if density >= 1:
        return lambda: keep_all
    keep = int(density * count)
    if keep <= 0:
        return lambda: keep_none
    low = max(0, count - keep - int(operand.values["gamma"] * count))
    return _band(TaskVector(blend, operand), low, low + keep)


def dropped(blend: Blend, operand: Operand) -> Callable[[], Thin]:
    """Each entry stays with a chance of `density`, drawn for itself.

    With `rescale_by_density` those that stay are divided by it.

    Source: Yu et al. 2023 (DARE: Language Models are Super Mario), section 3.
    """
    density = operand.values["density"]
    if density >= 1:
        return lambda: keep_all
    if density <= 0:
        return lambda: keep_none
    chances = round(density * 2**_DIGIT)
    factor = 2**_DIGIT / chances if blend.values["rescale_by_density"] and chances else 1.0

    def start() -> Thin:
        draw = _draws(blend, operand)

        def thin(piece: Tensor) -> None:
            piece.mul_(draw(len(piece)) < chances - 2 ** (_DIGIT - 1))
            if factor != 1:
                piece.mul_(factor)

        return thin

    return start


def dropped_by_rank(blend: Blend, operand: Operand) -> Callable[[], Thin]:
    """As `dropped`, but the larger an entry among those of its row, the likelier it stays.

    The chance grows with its rank from `density` - `epsilon` to `density` + `epsilon`. To be called
    with whole rows, as `Blend.row_pieces` has them.

    Raises:
        UserError: if these are not chances.
    Source: Deep et al. 2024 (DELLA-Merging), section 3.1.
    """
    density, epsilon = operand.values["density"], operand.values["epsilon"]
    if density >= 1:
        return lambda: keep_all
    if density <= 0:
        return lambda: keep_none
    if density + epsilon >= 1 or density - epsilon <= 0:
        raise UserError(
            f"{blend.name}: density {density:g} with epsilon {epsilon:g}: their sum and difference "
            "must lie between 0 and 1"
        )
    width = max(1, blend.shape[-1] if blend.shape else 1)

    def start() -> Thin:
        draw = _draws(blend, operand)

        def thin(piece: Tensor) -> None:
            rows = piece.view(-1, width)
            order = rows.abs().argsort(dim=1, stable=True)
            steps = torch.linspace(-epsilon, epsilon, width) if width > 1 else torch.zeros(1)
            chances = torch.empty(rows.shape)
            chances.scatter_(1, order, (density + steps).expand(rows.shape))
            drawn = draw(len(piece)).view(rows.shape)
            rows.mul_(drawn < chances * 2**_DIGIT - 2 ** (_DIGIT - 1))
            if blend.values["rescale_by_density"]:
                rows.div_(chances)

        return thin

    return start


def scale_of_norm(
    blend: Blend,
    operand: Operand,
    start: Callable[[], Thin],
    spans: Iterable[tuple[int, int]] | None = None,
) -> float:
    """The factor that gives what stays the sum of magnitudes that the whole task vector has."""
    thin, before, after = start(), 0.0, 0.0
    if thin is keep_all:
        return 1.0
    for piece in TaskVector(blend, operand).pieces(spans):
        before += float(piece.abs().sum())
        thin(piece)
        after += float(piece.abs_().sum())
    return before / after if before >= _TINY and after >= _TINY else 1.0


def ranked(pieces: Callable[[], Iterable[Tensor]], rank: int) -> tuple[float, int, int]:
    """The magnitude of a given rank, how many are smaller, and how many are equal to it.

    Args:
        pieces: called once for each 16 bits of a number; gives its elements, all of one dtype of
            32 or 64 bits, in memory that may be written over.
        rank: 0 for the smallest magnitude.
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


def _band(vector: TaskVector, low: int, high: int) -> Callable[[], Thin]:
    """Keeps entries whose rank by magnitude is from `low` to before `high`, and no other.

    Among equals the first has the highest rank.
    """
    count = vector.blend.numel
    least, below, equal = ranked(vector.pieces, low) if low > 0 else (0.0, 0, 0)
    places = {least: (below + equal - high, below + equal - low)}
    most = None
    if high < count:
        most, below, equal = ranked(vector.pieces, high - 1)
        places[most] = (below + equal - high, below + equal - low)
    # Of equals at a limit, those stay that come as number [first, last) of them.
    split = {value: place for value, place in places.items() if low > 0 or value == most}

    def start() -> Thin:
        seen = dict.fromkeys(split, 0)

        def thin(piece: Tensor) -> None:
            sizes = piece.abs()
            stay = sizes >= least
            if most is not None:
                stay &= sizes <= most
            for value, (first, last) in split.items():
                found = (sizes == value).nonzero().view(-1)
                number = torch.arange(seen[value], seen[value] + len(found))
                stay[found[(number < first) | (number >= last)]] = False
                seen[value] += len(found)
            piece.mul_(stay)

        return thin

    return start


def _draws(blend: Blend, operand: Operand) -> Callable[[int], Tensor]:
    """Gives so many equally likely 16-bit integers, the same ones after each new start.

    Only of multiples of four the last ones are used up, so pieces are to be the same each time.
    """
    generator = blend.generator(operand)

    def draw(count: int) -> Tensor:
        raw = torch.empty(-(-count // 4), dtype=torch.int64)
        raw.random_(-(2**63), None, generator=generator)
        return raw.view(torch.int16)[:count]

    return draw
