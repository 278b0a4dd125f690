"""Batches with masked tokens for the pretraining of encoders.

The selection of masked tokens is a pure function of the seed and the number of the sample, so a
step is the same on any number of ranks, and every epoch masks different tokens.

Source: Devlin et al. 2019 (BERT), section 3.1; Clark et al. 2020 (ELECTRA), section 3; Murahari et
al. 2023 (MUX-PLM), section 3, and its release for grouping and padding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megamod.data.batches import BatchDivision, StepBatches, check_fills_instance_groups
from megamod.data.corpus.indexed import IndexedDataset
from megamod.data.lm.batches import Batch
from megamod.data.lm.blocks import IGNORE
from megamod.data.lm.order import Sampler, make_random_key


@dataclass(frozen=True)
class Masking:
    """Settings of masking.

    Attributes:
        mask_id, pad_id: ids of the tokenizer.
        special_ids: ids that are never masked.
        vocab_size: vocabulary size of the tokenizer.
        probability: share of the other tokens that are selected for prediction.
        masked: share of the selected tokens that become [MASK].
        random: share of the selected tokens that become a random id; the rest are unchanged.
        max_pad_tokens: the last p tokens of a row become padding, p uniform from 0 to this.
    """

    mask_id: int
    pad_id: int
    special_ids: tuple[int, ...]
    vocab_size: int
    probability: float = 0.15
    masked: float = 0.8
    random: float = 0.1
    max_pad_tokens: int = 0

    def mask_tokens(
        self, tokens: np.ndarray, random_key: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mask a sequence as in the attributes.

        Args:
            tokens: [T] ids; not changed.
            random_key: seed of all random draws.
        Returns:
            [T] int64 each: ids with masked, replaced and padded positions; labels, the original ids
            where one is predicted and -100 elsewhere; and ids drawn uniformly from the vocabulary.
        """
        draw = np.random.Generator(np.random.Philox(key=int(random_key)))
        tokens = tokens.astype(np.int64)
        padded = int(draw.integers(self.max_pad_tokens + 1))
        if padded:
            tokens[-padded:] = self.pad_id
        chance, kind = draw.random((2, len(tokens)))
        random_ids = draw.integers(self.vocab_size, size=len(tokens))
        selected = (chance < self.probability) & ~np.isin(tokens, self.special_ids)
        labels = np.where(selected, tokens, IGNORE)
        masked = selected & (kind < self.masked)
        replaced = selected & ~masked & (kind < self.masked + self.random)
        tokens = np.where(masked, self.mask_id, np.where(replaced, random_ids, tokens))
        return tokens, labels, random_ids


class MaskedBatches(StepBatches):
    """Micro-batches of masked sequences for one rank, see `StepBatches`.

    N consecutive rows are the instances of one multiplexed group, the same for any number of ranks.
    An item is a dict of
        input_ids, labels:   [R, T] int64; labels are -100 where nothing is predicted.
        random_ids:          [R, T] int64, uniform over the vocabulary (replaced-token detection).
        retrieved_instances: [R / N, T] int64, instance to retrieve at each position.
        domains:             [R] int64, domain of each row.
        masked, positions:   ints, number of labels and of positions to retrieve at.
        tokens, mask_id:     ints, number of tokens for replaced-token detection, and id of [MASK].
        readable:            int, positions whose retrieved token is no padding (generators).
        unpadded:            int, tokens that are no padding (distillation).

    Args:
        datasets: tokens of each domain; those after the last full block are not used.
        order: sampler of blocks.
        masking: settings of masking.
        division: division of a step; a micro-batch has R rows.
        block_size: tokens T of a row.
        instances: rows N of a group; R must be a multiple of it.
        seed: seed of masks and of the instances to retrieve.
        prefix: number of last columns that the model replaces by its own prefix; they have no
            labels, and as many first positions are not retrieved.
    Raises:
        UserError: if a micro-batch is not a multiple of `instances`.
    """

    def __init__(
        self,
        datasets: Sequence[IndexedDataset],
        order: Sampler,
        masking: Masking,
        division: BatchDivision,
        *,
        block_size: int,
        instances: int,
        seed: int,
        prefix: int = 0,
    ):
        """Check the micro-batch and store the arguments, see the class."""
        super().__init__(division)
        check_fills_instance_groups(
            "--per_device_train_batch_size", division.micro_batch, instances
        )
        self.datasets, self.order, self.masking = list(datasets), order, masking
        self.block_size, self.instances, self.seed = block_size, instances, seed
        self.prefix = prefix

    def __getitem__(self, micro_batch_index: int) -> Batch:
        """Return a micro-batch of this rank, as in the docstring of the class.

        Args:
            micro_batch_index: number of the micro-batch on this rank, from 0 for the first of step
                0.
        Raises:
            UserError: for an id outside the vocabulary.
        """
        sample_indices = self.division.get_sample_indices(micro_batch_index)
        return self.build_batch(sample_indices, *self.order.select_blocks(sample_indices))

    def build_batch(
        self, sample_indices: np.ndarray, domains: np.ndarray, block_indices: np.ndarray
    ) -> Batch:
        """Build a batch of R rows, as in the docstring of the class.

        Args:
            sample_indices: [R] numbers of the samples, which seed their masks.
            domains: [R] domain of each row.
            block_indices: [R] block of each row within its domain.
        Raises:
            UserError: for an id outside the vocabulary.
        """
        rows = [
            self.masking.mask_tokens(
                _read_block(self.datasets[domain], block, self.block_size),
                make_random_key(self.seed, sample),
            )
            for sample, domain, block in zip(
                sample_indices.tolist(), domains.tolist(), block_indices.tolist(), strict=True
            )
        ]
        inputs, labels, random_ids = (np.stack(column) for column in zip(*rows, strict=True))
        labels[:, self.block_size - self.prefix :] = IGNORE
        groups = sample_indices[:: self.instances] // self.instances
        retrieved_instances = np.stack(
            [self._draw_retrieved_instances(int(group)) for group in groups]
        )
        return {
            "input_ids": torch.from_numpy(inputs),
            "labels": torch.from_numpy(labels),
            "random_ids": torch.from_numpy(random_ids),
            "retrieved_instances": torch.from_numpy(retrieved_instances),
            "domains": torch.from_numpy(domains.astype(np.int64)),
            "masked": int((labels != IGNORE).sum()),
            "positions": len(retrieved_instances) * (self.block_size - self.prefix),
            "tokens": len(inputs) * (self.block_size - self.prefix),
            "readable": self._count_retrievable_positions(inputs, retrieved_instances),
            "unpadded": int((inputs != self.masking.pad_id).sum()),
            "mask_id": self.masking.mask_id,
        }

    def _count_retrievable_positions(
        self, inputs: np.ndarray, retrieved_instances: np.ndarray
    ) -> int:
        """Count the positions whose retrieved token is no padding; a prefix is not counted.

        Args:
            inputs: [R, T] ids after masking.
            retrieved_instances: [R / N, T] instance of each position.
        """
        by_group = inputs.reshape(len(retrieved_instances), self.instances, self.block_size)
        unprefixed = by_group[:, :, : self.block_size - self.prefix]
        retrieved = np.take_along_axis(
            unprefixed, retrieved_instances[:, None, self.prefix :], axis=1
        )[:, 0]
        readable = retrieved != self.masking.pad_id
        if not self.prefix:
            readable[:, 0] = True  # the model replaces the first token by [CLS]
        return int(readable.sum())

    def _draw_retrieved_instances(self, group_index: int) -> np.ndarray:
        """Draw the instance, 0 to N - 1, to retrieve at each position of a group: [T] int64.

        Args:
            group_index: number of the group among all samples; with the seed it decides the draw.
        """
        draw = np.random.Generator(
            np.random.Philox(key=int(make_random_key(self.seed, group_index, 1)))
        )
        return draw.integers(self.instances, size=self.block_size)


def count_full_blocks(dataset: IndexedDataset, block_size: int) -> int:
    """Count the blocks of `block_size` tokens in a split, without a shorter one at the end."""
    return len(dataset.tokens) // block_size


def iterate_masked_eval_batches(
    batches: MaskedBatches, max_batches: int | None = None
) -> Iterator[Batch]:
    """Yield all blocks of a held-out split in file order, with the same masks in every call.

    The batches are as those of `MaskedBatches`, with one more key, "number", which counts them from
    0. Blocks at the end that do not fill a group are skipped.

    Args:
        batches: batches of the held-out split; a batch has as many rows as their micro-batches, the
            last one may have fewer.
        max_batches: largest number of batches; None: all.
    Raises:
        UserError: for an id outside the vocabulary.
    """
    lengths = [count_full_blocks(dataset, batches.block_size) for dataset in batches.datasets]
    domains = np.repeat(np.arange(len(lengths)), lengths)
    block_indices = np.concatenate([np.arange(length) for length in lengths])
    full_group_rows = len(block_indices) // batches.instances * batches.instances
    for number, start in enumerate(range(0, full_group_rows, batches.division.micro_batch)):
        if number == max_batches:
            return
        stop = min(start + batches.division.micro_batch, full_group_rows)
        batch = batches.build_batch(
            np.arange(start, stop), domains[start:stop], block_indices[start:stop]
        )
        yield {**batch, "number": number}


def _read_block(dataset: IndexedDataset, block_index: int, block_size: int) -> np.ndarray:
    """Read the ids [block_size] of a block; raise UserError for one outside the vocabulary."""
    ids = dataset.tokens[block_index * block_size : (block_index + 1) * block_size]
    dataset.check_read_ids(ids, block_index * block_size)
    return ids
