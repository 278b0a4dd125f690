import numpy as np
import pytest
import torch

from megamod.data.batches import BatchDivision
from megamod.data.lm.blocks import IGNORE
from megamod.data.lm.masking import (
    MaskedBatches,
    Masking,
    count_full_blocks,
    iterate_masked_eval_batches,
)
from megamod.data.lm.order import BalancedSampler
from megamod.errors import UserError

MASKING = Masking(mask_id=4, pad_id=0, special_ids=(0, 1, 2, 4), vocab_size=50)


class Tokens:
    """Stands for a split's tokens."""

    def __init__(self, count: int, first: int):
        self.tokens = (first + np.arange(count) % 20).astype(np.uint16)
        self.tokens[::7] = 1

    def check_read_ids(self, ids: np.ndarray, start: int) -> None:
        assert np.array_equal(ids, self.tokens[start : start + len(ids)])


def batches_of(
    rank: int = 0, ranks: int = 1, micro: int = 12, seed: int = 3, prefix: int = 0, **changes
):
    datasets = [Tokens(403, 10), Tokens(165, 30)]
    masking = Masking(**{**vars(MASKING), **changes})
    order = BalancedSampler([count_full_blocks(item, 8) for item in datasets], seed)
    return MaskedBatches(
        datasets,
        order,
        masking,
        BatchDivision(micro, 24, rank, ranks),
        block_size=8,
        instances=3,
        seed=seed,
        prefix=prefix,
    )


def test_shares_of_bert():
    tokens = np.full(200_000, 9)
    masked, labels, anything = MASKING.mask_tokens(tokens, 5)
    chosen = labels != IGNORE
    assert np.array_equal(labels[chosen], tokens[chosen])
    assert np.array_equal(masked[~chosen], tokens[~chosen])
    assert chosen.mean() == pytest.approx(0.15, abs=0.005)
    assert (masked[chosen] == 4).mean() == pytest.approx(0.8 + 0.1 / 50, abs=0.01)
    assert (masked[chosen] == 9).mean() == pytest.approx(0.1 + 0.1 / 50, abs=0.01)
    assert set(anything) == set(range(50))


def test_special_tokens_are_never_masked():
    tokens = np.tile([1, 9, 2, 0, 4], 4000)
    masked, labels, _ = MASKING.mask_tokens(tokens, 5)
    assert (labels[tokens != 9] == IGNORE).all()
    assert np.array_equal(masked[tokens != 9], tokens[tokens != 9])


def test_padding_at_the_end_is_uniform_and_not_predicted():
    masking = Masking(**{**vars(MASKING), "max_pad_tokens": 3, "random": 0.0})
    lengths = []
    for key in range(4000):
        masked, labels, _ = masking.mask_tokens(np.full(8, 9), key)
        padded = int((masked == 0).sum())
        assert (masked[8 - padded :] == 0).all() and (labels[8 - padded :] == IGNORE).all()
        lengths.append(padded)
    assert np.bincount(lengths) / 4000 == pytest.approx([0.25] * 4, abs=0.03)


def test_electra_masks_or_keeps():
    masking = Masking(**{**vars(MASKING), "masked": 0.85, "random": 0.0})
    masked, labels, _ = masking.mask_tokens(np.full(100_000, 9), 5)
    chosen = labels != IGNORE
    assert set(masked[chosen]) == {4, 9}
    assert (masked[chosen] == 4).mean() == pytest.approx(0.85, abs=0.01)


def test_a_step_is_the_same_on_any_number_of_ranks():
    whole, halves = batches_of(micro=24), [batches_of(rank, 2, micro=6) for rank in (0, 1)]
    assert (whole.micro_steps, halves[0].micro_steps) == (1, 2)
    for step in (0, 3):
        parts = [half[2 * step + turn] for half in halves for turn in (0, 1)]
        for name in ("input_ids", "labels", "random_ids", "retrieved_instances", "domains"):
            assert torch.equal(whole[step][name], torch.cat([part[name] for part in parts])), name
        assert whole[step]["masked"] == sum(part["masked"] for part in parts)
        assert whole[step]["positions"] == 8 * 8


def test_rows_are_blocks_of_their_domain():
    batches = batches_of(probability=0.0)
    batch = batches[0]
    domains, blocks = batches.order.select_blocks(np.arange(12))
    for row, domain, block in zip(batch["input_ids"], domains, blocks, strict=True):
        tokens = batches.datasets[domain].tokens[block * 8 : block * 8 + 8]
        assert row.tolist() == tokens.tolist()
    assert batch["domains"].tolist() == domains.tolist() == [0, 1] * 6
    assert batch["masked"] == 0


def test_epochs_mask_other_tokens():
    batches, samples = batches_of(), np.arange(2000)
    domains, blocks = batches.order.select_blocks(samples)
    again = samples[(domains == domains[0]) & (blocks == blocks[0])][:6]
    built = batches.build_batch(again, domains[again], blocks[again])
    assert len(again) == 6 and len({tuple(row.tolist()) for row in built["labels"]}) > 1


def test_slots_are_uniform():
    slots = torch.cat(
        [batches_of()[number]["retrieved_instances"] for number in range(200)]
    ).flatten()
    assert slots.bincount().div(len(slots)).tolist() == pytest.approx([1 / 3] * 3, abs=0.02)


def test_held_out_text_is_read_once_and_always_the_same():
    batches = batches_of(probability=0.0)
    rows = torch.cat(
        [batch["input_ids"] for batch in iterate_masked_eval_batches(batches)]
    ).tolist()
    assert len(rows) == (50 + 20) // 3 * 3
    assert rows[:50] == batches.datasets[0].tokens[:400].reshape(50, 8).tolist()
    first, second = (list(iterate_masked_eval_batches(batches_of(), 2)) for _ in range(2))
    assert len(first) == 2
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(first, second, strict=True))


def test_a_prefix_replaces_the_last_tokens():
    plain, batch = batches_of()[5], batches_of(prefix=4)[5]
    assert torch.equal(batch["input_ids"], plain["input_ids"])
    assert torch.equal(batch["labels"][:, :4], plain["labels"][:, :4])
    assert (batch["labels"][:, 4:] == IGNORE).all()
    assert batch["masked"] == int((batch["labels"] != IGNORE).sum())
    assert batch["positions"] == 4 * 4


@pytest.mark.parametrize(
    ("micro", "ranks", "message"), [(8, 1, "3 instances"), (9, 1, "--global_batch_size 24")]
)
def test_indivisible_batches_are_refused(micro, ranks, message):
    with pytest.raises(UserError, match=message):
        batches_of(micro=micro, ranks=ranks)
