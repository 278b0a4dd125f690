"""Sample order and samplers: pure functions of (seed, epoch, domain, index), no stored shuffle.

A sampler maps global sample numbers 0, 1, 2, ... without end to (domain, block of that domain). A
run that resumes at some step, with other ranks or workers, requests the same numbers and gets the
same samples.

Source: DEMix (Gururangan et al. 2022), where every domain has the same number of tokens in each
step and small domains repeat. Here all ranks of a domain share one permutation.
"""

from collections.abc import Sequence

import numpy as np

ROUNDS = 12  # of the Feistel network; another number changes the order of every run
CYCLE = 1 << 16  # samples in which every domain has a fixed number (temperature)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # increment of splitmix64
WORD = (1 << 64) - 1  # mask that makes negative integers uint64


@np.errstate(over="ignore")
def make_random_key(*parts: int | np.ndarray) -> np.ndarray:
    """Hash integers, or integer arrays that broadcast, to uint64 keys of their common shape.

    Nothing is drawn: equal parts in the same order give equal keys, in another order others. Keys
    seed permutations and generators. The hash is the mixing function of SplitMix64.
    """
    key = np.zeros((), dtype=np.uint64)
    for part in parts:
        word = np.uint64(part & WORD) if isinstance(part, int) else part.astype(np.uint64)
        key = _mix_bits((key ^ word) + GOLDEN)
    return key


class KeyedPermutation:
    """A permutation of range(n) for each key, computed index by index in O(1).

    A Feistel network permutes the smallest power of two that is at least n, and is applied again
    while the result is outside range(n) (cycle walking: Black and Rogaway 2002, "Ciphers with
    arbitrary finite domains").

    Args:
        n: size, at least 1, or an array of sizes that broadcasts with the indices.
        key: see `make_random_key`; a key, or an array of keys that broadcasts with the indices.
    Raises:
        ValueError: for a size below 1.
    """

    def __init__(self, n: int | np.ndarray, key: int | np.ndarray):
        """Check the sizes and store the arguments, see the class."""
        self.n = np.asarray(n, dtype=np.int64)
        self.key = make_random_key(key) if isinstance(key, int) else key
        if (self.n < 1).any():
            raise ValueError(f"size {self.n.min()}: at least 1 is needed")

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Permute indices of any shape, each in range(n); returns int64 of the common shape.

        Raises:
            ValueError: for an index outside range(n).
        """
        index, n, key = np.broadcast_arrays(np.asarray(index, dtype=np.int64), self.n, self.key)
        if ((index < 0) | (index >= n)).any():
            raise ValueError("an index is outside the permutation")
        shape = index.shape
        value, n, key = index.astype(np.uint64).ravel(), n.ravel().astype(np.uint64), key.ravel()
        bits = np.frexp((n - np.uint64(1)).astype(np.float64))[1].astype(np.uint64)
        value = _permute_by_feistel(value, bits, key)
        outside = np.flatnonzero(value >= n)
        while len(outside):
            value[outside] = _permute_by_feistel(value[outside], bits[outside], key[outside])
            outside = outside[value[outside] >= n[outside]]
        return value.astype(np.int64).reshape(shape)


class Sampler:
    """Order of the samples of a run; subclasses define `select_blocks`.

    Args:
        blocks_per_domain: number of blocks of each of the E domains.
        seed: seed of the run.
    Raises:
        ValueError: if there is no domain, or one without a block.
    """

    def __init__(self, blocks_per_domain: Sequence[int], seed: int):
        """Check the numbers of blocks and store the arguments, see the class."""
        self.lengths = np.array(blocks_per_domain, dtype=np.int64)
        self.seed = seed
        if len(self.lengths) == 0 or self.lengths.min() < 1:
            raise ValueError(f"every domain needs a block, but they have {list(blocks_per_domain)}")

    def select_blocks(self, sample_indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Select the block of each sample; subclasses define it.

        Args:
            sample_indices: int64 of any shape; numbers of the samples of all ranks from step 0 on.
        Returns:
            domains, and indices of blocks within their domain: int64 of the same shape.
        """
        raise NotImplementedError

    def _permute_blocks(self, domains: np.ndarray, ordinals: np.ndarray) -> np.ndarray:
        """Return element-wise the block of the `ordinals`-th sample of a domain: int64.

        Each domain has another permutation of its blocks in every epoch over them.

        Args:
            domains: int64 numbers of domains.
            ordinals: number of the sample within its domain, from 0 without end; of the same shape.
        """
        lengths = self.lengths[domains]
        epochs, index = np.divmod(ordinals, lengths)
        return KeyedPermutation(lengths, make_random_key(self.seed, epochs, domains))(index)


class BalancedSampler(Sampler):
    """Domains alternate: sample j is the (j // E)-th sample of domain j % E.

    Args:
        blocks_per_domain: number of blocks of each of the E domains.
        seed: seed of the run.
    """

    def select_blocks(self, sample_indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Select domains and blocks of samples, see `Sampler.select_blocks`."""
        ordinals, domains = np.divmod(sample_indices, len(self.lengths))
        return domains, self._permute_blocks(domains, ordinals)

    def select_domain_blocks(self, domains: np.ndarray, ordinals: np.ndarray) -> np.ndarray:
        """Select element-wise the block of the `ordinals`-th sample of a domain: int64.

        Args:
            domains: numbers of domains; broadcast with `ordinals`.
            ordinals: number of the sample within its domain, from 0 without end.
        """
        return self._permute_blocks(*np.broadcast_arrays(domains, ordinals))


class UnbalancedSampler(Sampler):
    """Each epoch is one permutation of the blocks of all domains, so shares are sizes."""

    def select_blocks(self, sample_indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Select domains and blocks of samples, see `Sampler.select_blocks`."""
        ends = np.cumsum(self.lengths)
        epochs, index = np.divmod(sample_indices, ends[-1])
        block = KeyedPermutation(ends[-1], make_random_key(self.seed, epochs))(index)
        domains = np.searchsorted(ends, block, side="right")
        return domains, block - (ends - self.lengths)[domains]


class TemperatureSampler(Sampler):
    """Domain d has the share length_d^alpha / sum: equal for alpha 0, by size for alpha 1.

    In every `CYCLE` samples each domain has a fixed number of samples, at least one, in a random
    order that is the same in all cycles. Within a domain every block occurs once per epoch.

    Args:
        blocks_per_domain: number of blocks of each domain.
        seed: seed of the run.
        alpha: exponent from 0 to 1.
    Raises:
        ValueError: for another exponent, or as `Sampler`.
    """

    def __init__(self, blocks_per_domain: Sequence[int], seed: int, alpha: float):
        """Draw the domain of each sample of a cycle; see the class for arguments and errors."""
        super().__init__(blocks_per_domain, seed)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha {alpha} is not between 0 and 1")
        weights = self.lengths.astype(np.float64) ** alpha
        self.quotas = _allocate_quotas(weights / weights.sum(), CYCLE)
        shuffled = KeyedPermutation(CYCLE, make_random_key(self.seed))(np.arange(CYCLE))
        ends = np.cumsum(self.quotas)
        self._domains = np.searchsorted(ends, shuffled, side="right")
        # A stable sort by domain numbers each domain's samples of a cycle in order of time.
        by_domain = np.argsort(self._domains, kind="stable")
        self._ordinals = np.empty(CYCLE, dtype=np.int64)
        self._ordinals[by_domain] = np.arange(CYCLE) - np.repeat(ends - self.quotas, self.quotas)

    def select_blocks(self, sample_indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Select domains and blocks of samples, see `Sampler.select_blocks`."""
        cycles, index = np.divmod(sample_indices, CYCLE)
        domains = self._domains[index]
        return domains, self._permute_blocks(
            domains, cycles * self.quotas[domains] + self._ordinals[index]
        )


def make_sampler(name: str, blocks_per_domain: Sequence[int], seed: int, alpha: float) -> Sampler:
    """Make a sampler by name: "balanced", "unbalanced", or "temperature", which alone has `alpha`.

    Args:
        blocks_per_domain, seed, alpha: as of the class of the sampler.
    Raises:
        ValueError: as the class of the sampler.
        KeyError: for another name.
    """
    if name == "temperature":
        return TemperatureSampler(blocks_per_domain, seed, alpha)
    return {"balanced": BalancedSampler, "unbalanced": UnbalancedSampler}[name](
        blocks_per_domain, seed
    )


def _allocate_quotas(shares: np.ndarray, total: int) -> np.ndarray:
    """Allocate whole numbers near `total * shares`, each at least 1, by largest remainders.

    Args:
        shares: [E] float64, sum 1.
        total: sum of the result.
    Returns:
        [E] int64.
    Raises:
        ValueError: if there are more shares than `total`.
    """
    if len(shares) > total:
        raise ValueError(f"{len(shares)} domains: at most {total} are allowed")
    exact = 1 + shares * (total - len(shares))
    quotas = np.floor(exact).astype(np.int64)
    order = np.argsort(quotas - exact, kind="stable")
    quotas[order[: total - quotas.sum()]] += 1
    return quotas


@np.errstate(over="ignore")
def _permute_by_feistel(value: np.ndarray, bits: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Permute each value within range(2**bits) by a Feistel network of `ROUNDS` rounds.

    Args:
        value: [m] uint64, each below 2**bits.
        bits: [m] uint64 number of bits of each value.
        key: [m] uint64 key of each permutation, see `make_random_key`.
    """
    shift = bits >> np.uint64(1)
    masks = (np.uint64(1) << (bits - shift)) - np.uint64(1), (np.uint64(1) << shift) - np.uint64(1)
    halves = [value >> shift, value & masks[1]]
    for round_index in range(ROUNDS):
        half = round_index % 2
        # The round function is output `half * ROUNDS + number` of splitmix64 started at the key.
        word = (halves[1 - half] * np.uint64(ROUNDS) + np.uint64(round_index + 1)) * GOLDEN + key
        halves[half] ^= _mix_bits(word) & masks[half]
    return (halves[0] << shift) | halves[1]


def _mix_bits(word: np.ndarray) -> np.ndarray:
    """Apply the finalizer of splitmix64 (Steele, Lea and Flood 2014) to uint64 of any shape."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))
