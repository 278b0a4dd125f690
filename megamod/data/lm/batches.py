"""Micro-batches of language models from the sequences of a data-bin.

`TrainBatches` maps the number of a micro-batch to its sequences; `iterate_train_batches` and
`iterate_eval_batches` iterate.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from megamod.data.batches import BatchDivision, StepBatches, check_global_batch_size
from megamod.data.lm.blocks import IGNORE, TokenBlocks, build_inputs_and_labels
from megamod.data.lm.order import BalancedSampler, Sampler

AHEAD = 4096  # samples whose order is computed at once
ENDLESS = 1 << 62  # more micro-batches than any run has

Batch = dict[str, object]
"""Tensors, numbers and None by name; the function or class that yields it lists them."""


class TrainBatches(StepBatches):
    """Training micro-batches of a language model for one rank, see `StepBatches`.

    `build_shared_stream` and `build_domain_streams` build them.

    An item is a dict of
        input_ids, labels:  [B, T] int64; labels are -100 at padding.
        attention_mask:     [B, T] bool, only if a sequence is padded.
        domain:             number of the domain of all sequences, None if they differ.
        domains:            [B] int64, domain of each sequence.
        tokens:             int, number of targets.
    """

    def __init__(
        self,
        blocks: Sequence[TokenBlocks],
        sampler: Sampler,
        division: BatchDivision,
        streams: Sequence[int] | None,
    ):
        """Set up one stream of samples, or a stream for each of some domains, read in turn.

        Args:
            blocks: sequences of each domain, in the sampler's order.
            sampler: order of the samples over domains and blocks.
            division: division of the samples of a step, those of one stream.
            streams: domains with streams of their own; None: one stream of all domains, in the
                order of the sampler.
        """
        super().__init__(division)
        self.blocks, self.sampler, self.streams = list(blocks), sampler, streams
        self._ahead = -1

    @property
    def micro_steps(self) -> int:
        """Number of micro-batches of this rank in a step, over all streams."""
        return self.division.micro_steps * (1 if self.streams is None else len(self.streams))

    @classmethod
    def build_shared_stream(
        cls,
        blocks: Sequence[TokenBlocks],
        sampler: Sampler,
        division: BatchDivision,
    ) -> "TrainBatches":
        """Build one stream for all ranks (dense training).

        Args:
            blocks: sequences of each domain, in the sampler's order.
            sampler: order of the samples over domains and blocks.
            division: division of a step over all ranks.
        """
        return cls(blocks, sampler, division, None)

    @classmethod
    def build_domain_streams(
        cls,
        blocks: Sequence[TokenBlocks],
        sampler: BalancedSampler,
        division: BatchDivision,
        domains: Sequence[int],
    ) -> "TrainBatches":
        """Build a stream for each domain, shared by the ranks that train it (DEMix, BTM).

        Every domain has the same number of sequences in a step, and these are the sequences of the
        same step of `build_shared_stream` with the same sampler.

        Args:
            blocks: sequences of all E domains, also of other ranks.
            sampler: order of the samples; each domain's share of it is one stream.
            division: division of a step over all domains; its ranks are those with the same
                domains as this one. A micro-batch has sequences of one domain.
            domains: numbers of this rank's domains, read in turn.
        Raises:
            UserError: if the step cannot be divided evenly over the domains.
        """
        parts = {
            "domains": len(blocks),
            "ranks of each": division.ranks,
            "samples of a micro-batch": division.micro_batch,
        }
        check_global_batch_size(division.global_batch, parts)
        per_domain = replace(division, global_batch=division.global_batch // len(blocks))
        return cls(blocks, sampler, per_domain, list(domains))

    def select_blocks(self, micro_batch_index: int) -> tuple[np.ndarray, np.ndarray]:
        """Select the domains [B] and block indices [B] of a micro-batch, both int64.

        Args:
            micro_batch_index: number of the micro-batch on this rank, from 0.
        Raises:
            IndexError: for a negative index.
        """
        row = self._find_prepared_row(micro_batch_index)
        return self._domains[row], self._indices[row]

    def __getitem__(self, micro_batch_index: int) -> Batch:
        """Return a micro-batch of this rank, as in the docstring of the class.

        Args:
            micro_batch_index: number of the micro-batch on this rank, from 0 for the first of step
                0.
        Raises:
            IndexError: for a negative index.
            UserError: for an id outside the vocabulary.
        """
        row = self._find_prepared_row(micro_batch_index)
        domains, indices, any_blocks = self._domains[row], self._indices[row], self.blocks[0]
        domain = int(domains[0]) if self._alike[row] else None
        if domain is not None:
            rows = self.blocks[domain].read_blocks(indices)
            self.blocks[domain].check_row_ids(rows, indices)
        else:
            rows = np.zeros((len(indices), any_blocks.span + 1), dtype=np.int64)
            for target, block_domain, index in zip(
                rows, domains.tolist(), indices.tolist(), strict=True
            ):
                self.blocks[block_domain].read_block_into(target, index)
                self.blocks[block_domain].check_row_ids(target[None], [index])
        domain_tokens = None if self._domain_tokens is None else self._domain_tokens[domains]
        inputs, labels, padded = build_inputs_and_labels(
            rows,
            self._opens[row],
            self._lengths[row],
            any_blocks.eos_id,
            any_blocks.pad_id,
            domain_tokens,
        )
        batch = {"input_ids": inputs, "labels": labels}
        if padded:
            batch["attention_mask"] = labels != IGNORE
        return {
            **batch,
            "domain": domain,
            "domains": torch.from_numpy(domains.copy()),
            "tokens": int(self._lengths[row].sum())
            + (0 if domain_tokens is None else len(domain_tokens)),
        }

    def _find_prepared_row(self, micro_batch_index: int) -> int:
        """Return the row of a micro-batch in the prepared arrays.

        The arrays describe consecutive micro-batches of `AHEAD` samples or a few more; if the
        micro-batch is not among them, those around it are prepared.

        Args:
            micro_batch_index: number of the micro-batch on this rank.
        Raises:
            IndexError: for a negative index.
        """
        if micro_batch_index < 0:
            raise IndexError(f"micro-batch {micro_batch_index} is before the first")
        size = -(-AHEAD // self.division.micro_batch)
        part, row = divmod(micro_batch_index, size)
        if part != self._ahead:
            self._prepare_micro_batches(np.arange(part * size, (part + 1) * size))
            self._ahead = part
        return row

    def _prepare_micro_batches(self, micro_batch_indices: np.ndarray) -> None:
        """Prepare n micro-batches: set their domains, blocks and lengths, [n, micro_batch] each.

        Streams alternate within a step: with streams a and b its micro-batches are a0 b0 a1 b1,
        which are number 0 of both streams, then number 1.

        Args:
            micro_batch_indices: [n] int64 numbers of micro-batches on this rank.
        """
        division = self.division
        steps, index_in_step = np.divmod(micro_batch_indices, self.micro_steps)
        micro_step, stream = np.divmod(index_in_step, self.micro_steps // division.micro_steps)
        first_samples = (
            steps * division.global_batch
            + division.first_sample
            + micro_step * division.micro_batch
        )
        ordinals = first_samples[:, None] + np.arange(division.micro_batch)
        if self.streams is None:
            self._domains, self._indices = self.sampler.select_blocks(ordinals)
        else:
            stream_domains = np.array(self.streams)[stream][:, None]
            self._domains = np.broadcast_to(stream_domains, ordinals.shape)
            self._indices = self.sampler.select_domain_blocks(self._domains, ordinals)
        self._alike = (self._domains == self._domains[:, :1]).all(1)
        self._opens = np.empty(ordinals.shape, dtype=bool)
        self._lengths = np.empty(ordinals.shape, dtype=np.int64)
        tokens = [blocks.domain_token for blocks in self.blocks]
        self._domain_tokens = None if None in tokens else np.array(tokens)
        for domain, blocks in enumerate(self.blocks):
            selected = self._domains == domain
            indices = self._indices[selected]
            self._opens[selected] = blocks.mask_item_starts(indices)
            self._lengths[selected] = blocks.count_targets(indices) - (
                self._domain_tokens is not None
            )


def iterate_train_batches(
    dataset: StepBatches, first_step: int, num_workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """Yield the micro-batches of a rank without end, from the first one of step `first_step` on.

    Args:
        dataset: the micro-batches of this rank.
        first_step: number of the step to start at; above 0 in a resumed run.
        num_workers: processes that read ahead; 0 reads in this process, with the same batches.
        pin_memory: put tensors in page-locked memory, for copies during computation.
    Raises:
        UserError: as the items of `dataset`.
    """
    first = first_step * dataset.micro_steps
    if num_workers == 0:
        batches = map(dataset.__getitem__, itertools.count(first))
        return map(_pin_batch, batches) if pin_memory else batches
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(first, ENDLESS),
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_return_unchanged,
        generator=torch.Generator(),  # else the loader draws from the generator of dropout
    )
    return iter(loader)


def iterate_eval_batches(
    blocks: TokenBlocks, batch_size: int, max_batches: int | None = None
) -> Iterator[Batch]:
    """Yield all blocks of a split in file order.

    A batch has `input_ids`, `labels` and `tokens` as those of `TrainBatches`, and `attention_mask`
    if a sequence is padded. The last batch may have fewer sequences. A domain token is an input,
    but is not scored.

    Args:
        blocks: sequences of the split.
        batch_size: sequences of a batch.
        max_batches: largest number of batches; None: all.
    Raises:
        UserError: for an id outside the vocabulary.
    """
    for number, start in enumerate(range(0, len(blocks), batch_size)):
        if number == max_batches:
            return
        indices = np.arange(start, min(start + batch_size, len(blocks)))
        inputs, labels, padded = blocks.gather_inputs_and_labels(indices)
        batch = {"input_ids": inputs, "labels": labels}
        if padded:
            batch["attention_mask"] = labels != IGNORE
        tokens = int(blocks.count_targets(indices).sum())
        if blocks.domain_token is not None:
            labels[:, 0] = IGNORE
            tokens -= len(indices)
        yield {**batch, "tokens": tokens}


def _return_unchanged(batch: Batch) -> Batch:
    """Return a batch unchanged: the loader's `collate_fn`, which worker processes can import."""
    return batch


def _pin_batch(batch: Batch) -> Batch:
    """Copy the tensors of a batch into page-locked memory."""
    return {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in batch.items()}
