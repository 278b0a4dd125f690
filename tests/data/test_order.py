"""The order of samples: permutations, shares, epochs; all by counting."""

import itertools
import time
from collections import Counter

import numpy as np
import pytest

from megamod.data.lm.order import (
    CYCLE,
    BalancedSampler,
    KeyedPermutation,
    TemperatureSampler,
    UnbalancedSampler,
    make_sampler,
)
from megamod.data.lm.order import make_random_key as make_key

SAMPLERS = ("balanced", "unbalanced", "temperature")
LENGTHS = [50, 7, 1, 20]


def draw(sampler, first: int, count: int):
    """Domains and blocks of consecutive samples."""
    return sampler.select_blocks(np.arange(first, first + count))


@pytest.mark.parametrize("key", [0, 1, (1 << 64) - 1])
def test_every_size_is_permuted(key):
    for n in [*range(1, 260), 511, 512, 513, 1000, 4097]:
        places = KeyedPermutation(n, key)(np.arange(n))
        assert (np.sort(places) == np.arange(n)).all(), n


def test_arrays_choose_size_and_key():
    """Many permutations at once are those asked for one by one."""
    sizes, keys = np.array([[3], [64], [1000]]), make_key(5, np.array([[0], [1], [2]]))
    index = np.array([[0, 1, 2]])
    together = KeyedPermutation(sizes, keys)(index)
    for row in range(3):
        item = KeyedPermutation(int(sizes[row, 0]), keys[row])(index[0])
        assert together[row].tolist() == item.tolist()


def test_all_permutations_are_about_equally_likely():
    for n, count in ((3, 6), (4, 24), (5, 120)):
        keys = make_key(np.arange(count * 200))[:, None]
        rows = KeyedPermutation(n, keys)(np.arange(n)[None])
        seen = Counter(map(tuple, rows.tolist()))
        assert set(seen) == set(itertools.permutations(range(n)))
        assert max(abs(times - 200) for times in seen.values()) < 100  # 7 standard deviations


@pytest.mark.parametrize("n", [1000, 1024, 100_003])
def test_looks_random(n):
    """Neither places, nor neighbours, nor two keys are correlated; places fill the range evenly."""
    first, second = (KeyedPermutation(n, key)(np.arange(n)).astype(float) for key in (1, 2))
    limit = 4.5 / np.sqrt(n)
    assert abs(np.corrcoef(first, np.arange(n))[0, 1]) < limit
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < limit
    assert abs(np.corrcoef(first, second)[0, 1]) < limit
    assert (first == second).sum() < 10 and (first == np.arange(n)).sum() < 10
    pairs = np.histogram2d(np.arange(n), first, bins=8)[0]  # Poisson counts around n / 64
    assert ((pairs - n / 64) ** 2 / (n / 64)).sum() < 64 + 6 * np.sqrt(2 * 64)


def test_keys_depend_on_every_part():
    keys = {int(make_key(*parts)) for parts in itertools.product(range(6), repeat=3)}
    keys |= {int(make_key(*parts)) for parts in itertools.product(range(6), repeat=2)}
    assert len(keys) == 6**3 + 6**2
    assert int(make_key(-1)) != int(make_key(1))


def test_bad_arguments():
    with pytest.raises(ValueError, match="size 0: at least 1 is needed"):
        KeyedPermutation(0, 1)
    for index in (-1, 5):
        with pytest.raises(ValueError, match="outside"):
            KeyedPermutation(5, 1)(np.array([index]))
    with pytest.raises(ValueError, match="every domain needs a block"):
        BalancedSampler([5, 0], 1)
    with pytest.raises(ValueError, match="alpha 2"):
        TemperatureSampler([5, 6], 1, 2)


def make(name, seed=3):
    return make_sampler(name, LENGTHS, seed, 0.5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_draws_are_pure(name):
    """Any stretch is the same however it is asked for; another seed gives another order."""
    domains, blocks = draw(make(name), 0, 300)
    for first, count in ((0, 1), (299, 1), (17, 100)):
        d, b = draw(make(name), first, count)
        assert d.tolist() == domains[first : first + count].tolist()
        assert b.tolist() == blocks[first : first + count].tolist()
    assert blocks.tolist() != draw(make(name, seed=4), 0, 300)[1].tolist()
    assert (blocks < np.array(LENGTHS)[domains]).all() and blocks.min() >= 0


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_epoch_of_a_domain_has_every_block_once(name):
    domains, blocks = draw(make(name), 0, 1000)
    orders = []
    for domain, length in enumerate(LENGTHS):
        drawn = blocks[domains == domain]
        for epoch in range(len(drawn) // length):
            part = drawn[epoch * length : (epoch + 1) * length]
            assert sorted(part) == list(range(length)), (domain, epoch)
            if length == 20:
                orders.append(tuple(part))
    assert len(set(orders)) == len(orders) > 5  # shuffled anew each time


def test_balanced_alternates_and_repeats():
    sampler = BalancedSampler(LENGTHS, 3)
    domains, blocks = draw(sampler, 40, 400)
    assert domains.tolist() == [0, 1, 2, 3] * 100
    for domain in range(4):
        assert (
            sampler.select_domain_blocks(np.array(domain), np.arange(10, 110)).tolist()
            == blocks[domain::4].tolist()
        )


def test_unbalanced_is_by_size():
    domains, _ = draw(UnbalancedSampler(LENGTHS, 3), 5 * sum(LENGTHS), sum(LENGTHS))
    assert np.bincount(domains).tolist() == LENGTHS


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_temperature_shares(alpha):
    lengths = [900, 100, 1]
    sampler = TemperatureSampler(lengths, 3, alpha)
    shares = np.array(lengths) ** alpha / (np.array(lengths) ** alpha).sum()
    domains, _ = draw(sampler, 2 * CYCLE, CYCLE)
    counts = np.bincount(domains)
    assert counts.sum() == CYCLE and counts.tolist() == sampler.quotas.tolist()
    assert abs(counts / CYCLE - shares).max() < 3 / CYCLE + 1e-9
    early = np.bincount(domains[:4096], minlength=3) / 4096
    assert abs(early - shares).max() < 4.5 * 0.5 / np.sqrt(4096)  # no long stretch of one domain


def test_the_smallest_domain_has_a_sample_in_every_cycle():
    assert TemperatureSampler([10**9, 1], 0, 1.0).quotas.tolist() == [CYCLE - 1, 1]


@pytest.mark.parametrize("name", SAMPLERS)
def test_late_samples_cost_the_same(name):
    sampler = make(name)
    draw(sampler, 0, 8)
    start = time.perf_counter()
    draw(sampler, 10**12, 8)
    assert time.perf_counter() - start < 0.1
