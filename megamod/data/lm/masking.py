"""Blocks of tokens with some of them masked: what encoders are pretrained on.

Which tokens are masked is a pure function of the seed and the number of the sample, so that a step
is the same on any number of ranks, and every epoch masks other tokens.

Source: Devlin et al. 2019 (BERT), section 3.1; Clark et al. 2020 (ELECTRA), section 3; Murahari et
al. 2023 (MUX-PLM), section 3, and its release for grouping and padding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megamod.data.batches import StepBatches, StepShape, check_instances
from megamod.data.corpus.indexed import IndexedDataset
from megamod.data.lm.batches import Batch
from megamod.data.lm.blocks import IGNORE
from megamod.data.lm.order import Sampler, key_of


@dataclass(frozen=True)
class Masking:
    """How tokens are masked.

    Attributes:
        mask_id, pad_id: of the tokenizer.
        special_ids: ids that are never masked.
        vocab_size: of the tokenizer.
        probability: share of the other tokens that the model must predict.
        masked: share of those that become [MASK].
        random: share of those that become any id of the vocabulary; the rest stay as they are.
        max_pad_tokens: a row's last p tokens become padding, p uniform from 0 to this.
    """

    mask_id: int
    pad_id: int
    special_ids: tuple[int, ...]
    vocab_size: int
    probability: float = 0.15
    masked: float = 0.8
    random: float = 0.1
    max_pad_tokens: int = 0

    def apply(self, tokens: np.ndarray, key: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masked tokens, labels and random ids, all [T] int64; labels are -100 where kept.

        Args:
            tokens: [T] ids.
            key: decides everything drawn.
        """
        draw = np.random.Generator(np.random.Philox(key=int(key)))
        tokens = tokens.astype(np.int64)
        padded = int(draw.integers(self.max_pad_tokens + 1))
        if padded:
            tokens[-padded:] = self.pad_id
        chance, kind = draw.random((2, len(tokens)))
        anything = draw.integers(self.vocab_size, size=len(tokens))
        chosen = (chance < self.probability) & ~np.isin(tokens, self.special_ids)
        labels = np.where(chosen, tokens, IGNORE)
        hidden = chosen & (kind < self.masked)
        replaced = chosen & ~hidden & (kind < self.masked + self.random)
        tokens = np.where(hidden, self.mask_id, np.where(replaced, anything, tokens))
        return tokens, labels, anything


class MaskedBatches(StepBatches):
    """Micro-batches of one rank with masked tokens, see `StepBatches`.

    N consecutive rows are the instances of one multiplexed group, the same rows on any number of
    ranks. An item is a dict of
        input_ids, labels:  [R, T] int64; labels are -100 where nothing is predicted.
        random_ids:         [R, T] int64, uniform over the vocabulary (replaced-token detection).
        slots:              [R / N, T] int64, an instance of each position (retrieval of tokens).
        domains:            [R] int64, domain of each row.
        masked, positions:  ints, labels to predict and positions to retrieve at.
        tokens, mask_id:    ints, tokens to tell replaced ones from, and the id of [MASK].
        readable:           int, positions whose instance has no padding there (generators).

    Args:
        datasets: tokens of each domain; the rest behind its last full block is left out.
        order: which block comes when.
        block_size: T.
        instances: N; every rank's micro-batch must be a multiple of it.
        prefix: columns at the end that the model drops to make room for a prefix of its own; no
            label stands there, and as many positions at the beginning are not retrieved.
        shape: of a step; a micro-batch has R rows.
    Raises:
        UserError: if a micro-batch is not a multiple of `instances`.
    """

    def __init__(
        self,
        datasets: Sequence[IndexedDataset],
        order: Sampler,
        masking: Masking,
        shape: StepShape,
        *,
        block_size: int,
        instances: int,
        seed: int,
        prefix: int = 0,
    ):
        super().__init__(shape)
        check_instances("--per_device_train_batch_size", shape.micro_batch, instances)
        self.datasets, self.order, self.masking = list(datasets), order, masking
        self.block_size, self.instances, self.seed = block_size, instances, seed
        self.prefix = prefix

    def __getitem__(self, number: int) -> Batch:
        """Micro-batch `number` of this rank."""
        samples = self.shape.samples(number)
        return self._make(samples, *self.order.at(samples))

    def _make(self, samples: np.ndarray, domains: np.ndarray, blocks: np.ndarray) -> Batch:
        rows = [
            self.masking.apply(
                _block(self.datasets[domain], block, self.block_size), key_of(self.seed, sample)
            )
            for sample, domain, block in zip(
                samples.tolist(), domains.tolist(), blocks.tolist(), strict=True
            )
        ]
        inputs, labels, anything = (np.stack(column) for column in zip(*rows, strict=True))
        labels[:, self.block_size - self.prefix :] = IGNORE
        groups = samples[:: self.instances] // self.instances
        slots = np.stack([self._slots(int(group)) for group in groups])
        return {
            "input_ids": torch.from_numpy(inputs),
            "labels": torch.from_numpy(labels),
            "random_ids": torch.from_numpy(anything),
            "slots": torch.from_numpy(slots),
            "domains": torch.from_numpy(domains.astype(np.int64)),
            "masked": int((labels != IGNORE).sum()),
            "positions": len(slots) * (self.block_size - self.prefix),
            "tokens": len(inputs) * (self.block_size - self.prefix),
            "readable": self._readable(inputs, slots),
            "mask_id": self.masking.mask_id,
        }

    def _readable(self, inputs: np.ndarray, slots: np.ndarray) -> int:
        by_group = inputs.reshape(len(slots), self.instances, self.block_size)
        kept = by_group[:, :, : self.block_size - self.prefix]
        asked = np.take_along_axis(kept, slots[:, None, self.prefix :], axis=1)[:, 0]
        there = asked != self.masking.pad_id
        if not self.prefix:
            there[:, 0] = True  # the model puts [CLS] there
        return int(there.sum())

    def _slots(self, group: int) -> np.ndarray:
        draw = np.random.Generator(np.random.Philox(key=int(key_of(self.seed, group, 1))))
        return draw.integers(self.instances, size=self.block_size)


def blocks_of(dataset: IndexedDataset, block_size: int) -> int:
    """Full blocks of a split."""
    return len(dataset.tokens) // block_size


def held_out_batches(batches: MaskedBatches, count: int | None = None) -> Iterator[Batch]:
    """Every block once in file order, masked the same at every call; a last part of a batch that
    does not fill its groups is left out. "number" counts the batches.

    Args:
        batches: of the held-out split; its micro-batch is the size of these.
        count: end after so many batches.
    """
    lengths = [blocks_of(dataset, batches.block_size) for dataset in batches.datasets]
    domains = np.repeat(np.arange(len(lengths)), lengths)
    blocks = np.concatenate([np.arange(length) for length in lengths])
    whole = len(blocks) // batches.instances * batches.instances
    for number, start in enumerate(range(0, whole, batches.shape.micro_batch)):
        if number == count:
            return
        stop = min(start + batches.shape.micro_batch, whole)
        made = batches._make(np.arange(start, stop), domains[start:stop], blocks[start:stop])
        yield {**made, "number": number}


def _block(dataset: IndexedDataset, block: int, size: int) -> np.ndarray:
    return dataset.tokens[block * size : (block + 1) * size]
