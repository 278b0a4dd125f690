"""Which sample comes when: pure functions of (seed, epoch, domain, index), no stored shuffle.

A run that resumes at step s, on other ranks or with other workers, asks for the same numbers and
gets the same samples. Every sampler maps global sample numbers 0, 1, 2, ... without end to
(domain, block of that domain).

Source: DEMix (Gururangan et al. 2022), which gives every domain the same number of tokens in each
step, small domains wrapping around; here all ranks of a domain share one permutation.
"""

from collections.abc import Sequence

import numpy as np

ROUNDS = 12
CYCLE = 1 << 16
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
WORD = (1 << 64) - 1


@np.errstate(over="ignore")
def key_of(*parts: int | np.ndarray) -> np.ndarray:
    """uint64 keys from numbers, or from arrays that broadcast; the order of the parts matters."""
    key = np.zeros((), dtype=np.uint64)
    for part in parts:
        word = np.uint64(part & WORD) if isinstance(part, int) else part.astype(np.uint64)
        key = _mix((key ^ word) + GOLDEN)
    return key


class KeyedPermutation:
    """A permutation of range(n) for each key, computed index by index in O(1).

    A Feistel network on the smallest power of two that holds n, walked again while it leaves
    range(n) (cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary finite domains").

    Args:
        n: size, at least 1; an array that broadcasts with the indices chooses one for each.
        key: see `key_of`; likewise.
    """

    def __init__(self, n: int | np.ndarray, key: int | np.ndarray):
        self.n = np.asarray(n, dtype=np.int64)
        self.key = key_of(key) if isinstance(key, int) else key
        if (self.n < 1).any():
            raise ValueError(f"cannot permute {self.n.min()} things")

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """int64 places of int64 indices, any shape, each in range(n).

        Raises:
            ValueError: for an index outside range(n).
        """
        index, n, key = np.broadcast_arrays(np.asarray(index, dtype=np.int64), self.n, self.key)
        if ((index < 0) | (index >= n)).any():
            raise ValueError("an index is outside the permutation")
        shape = index.shape
        place, n, key = index.astype(np.uint64).ravel(), n.ravel().astype(np.uint64), key.ravel()
        bits = np.frexp((n - np.uint64(1)).astype(np.float64))[1].astype(np.uint64)
        place = _feistel(place, bits, key)
        outside = np.flatnonzero(place >= n)
        while len(outside):
            place[outside] = _feistel(place[outside], bits[outside], key[outside])
            outside = outside[place[outside] >= n[outside]]
        return place.astype(np.int64).reshape(shape)


class Sampler:
    """Order of the blocks of domains.

    Args:
        lengths: blocks of each of the E domains.
        seed: of the run.
    """

    def __init__(self, lengths: Sequence[int], seed: int):
        self.lengths = np.array(lengths, dtype=np.int64)
        self.seed = seed
        if len(self.lengths) == 0 or self.lengths.min() < 1:
            raise ValueError(f"every domain needs a block, there are {list(lengths)}")

    def at(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 domains and blocks of int64 global sample numbers, same shape."""
        raise NotImplementedError

    def _block(self, domains: np.ndarray, ordinals: np.ndarray) -> np.ndarray:
        """Block of the `ordinal`-th sample of a domain, a new permutation every epoch."""
        lengths = self.lengths[domains]
        epochs, index = np.divmod(ordinals, lengths)
        return KeyedPermutation(lengths, key_of(self.seed, epochs, domains))(index)


class Balanced(Sampler):
    """Domains take turns: sample j is the (j // E)-th of domain j % E. One domain: all its blocks.

    Args:
        lengths: blocks of each of the E domains.
        seed: of the run.
    """

    def at(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 domains and blocks of int64 global sample numbers, same shape."""
        ordinals, domains = np.divmod(numbers, len(self.lengths))
        return domains, self._block(domains, ordinals)

    def at_domain(self, domains: np.ndarray, ordinals: np.ndarray) -> np.ndarray:
        """int64 blocks of the `ordinals`-th samples of domains; the two broadcast."""
        return self._block(*np.broadcast_arrays(domains, ordinals))


class Unbalanced(Sampler):
    """One permutation over all domains laid end to end: a domain's share is its size."""

    def at(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 domains and blocks of int64 global sample numbers, same shape."""
        ends = np.cumsum(self.lengths)
        epochs, index = np.divmod(numbers, ends[-1])
        place = KeyedPermutation(ends[-1], key_of(self.seed, epochs))(index)
        domains = np.searchsorted(ends, place, side="right")
        return domains, place - (ends - self.lengths)[domains]


class Temperature(Sampler):
    """Domain d has a share of length_d^alpha / sum: 0 is balanced, 1 by size.

    In every `CYCLE` samples each domain has a fixed number of places, at least one, in a random
    order that all cycles share. Inside a domain all blocks come once an epoch, as elsewhere.

    Args:
        lengths: blocks of each domain.
        seed: of the run.
        alpha: exponent.
    """

    def __init__(self, lengths: Sequence[int], seed: int, alpha: float):
        super().__init__(lengths, seed)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha {alpha} is not between 0 and 1")
        weights = self.lengths.astype(np.float64) ** alpha
        self.quotas = _quotas(weights / weights.sum(), CYCLE)
        place = KeyedPermutation(CYCLE, key_of(self.seed))(np.arange(CYCLE))
        ends = np.cumsum(self.quotas)
        self._domains = np.searchsorted(ends, place, side="right")
        # Grouped by domain in order of time, the places number each domain's samples of a cycle.
        by_domain = np.argsort(self._domains, kind="stable")
        self._ordinals = np.empty(CYCLE, dtype=np.int64)
        self._ordinals[by_domain] = np.arange(CYCLE) - np.repeat(ends - self.quotas, self.quotas)

    def at(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 domains and blocks of int64 global sample numbers, same shape."""
        cycles, place = np.divmod(numbers, CYCLE)
        domains = self._domains[place]
        return domains, self._block(domains, cycles * self.quotas[domains] + self._ordinals[place])


def make_sampler(name: str, lengths: Sequence[int], seed: int, alpha: float) -> Sampler:
    """Sampler by its name: "balanced", "unbalanced", or "temperature", which takes `alpha`."""
    if name == "temperature":
        return Temperature(lengths, seed, alpha)
    return {"balanced": Balanced, "unbalanced": Unbalanced}[name](lengths, seed)


def _quotas(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers >= 1 near total * shares that sum to `total` (largest remainders)."""
    if len(shares) > total:
        raise ValueError(f"{len(shares)} domains are more than {total}")
    exact = 1 + shares * (total - len(shares))
    quotas = np.floor(exact).astype(np.int64)
    order = np.argsort(quotas - exact, kind="stable")
    quotas[order[: total - quotas.sum()]] += 1
    return quotas


@np.errstate(over="ignore")
def _feistel(place: np.ndarray, bits: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Permute range(2**bits); all arguments uint64 [m]."""
    shift = bits >> np.uint64(1)
    masks = (np.uint64(1) << (bits - shift)) - np.uint64(1), (np.uint64(1) << shift) - np.uint64(1)
    halves = [place >> shift, place & masks[1]]
    for number in range(ROUNDS):
        here = number % 2
        # The round function is output `half * ROUNDS + number` of splitmix64 started at the key.
        word = (halves[1 - here] * np.uint64(ROUNDS) + np.uint64(number + 1)) * GOLDEN + key
        halves[here] ^= _mix(word) & masks[here]
    return (halves[0] << shift) | halves[1]


def _mix(word: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014)."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))
