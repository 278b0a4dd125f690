"""Division of a global batch over ranks and micro-batches, for every kind of data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from megamod.errors import UserError


@dataclass(frozen=True)
class BatchDivision:
    """Division of a global batch over ranks and their micro-batches, as seen from one rank.

    Each rank takes a consecutive part of the global batch, so the samples of a step are the same
    on any number of ranks.

    Attributes:
        micro_batch: samples of a micro-batch.
        global_batch: samples of an optimizer step over all `ranks`.
        rank: index of this rank among the ranks that share the global batch, from 0.
        ranks: number of the ranks that share it.

    Raises:
        UserError: if `global_batch` is not a positive multiple of `ranks * micro_batch`.
    """

    micro_batch: int
    global_batch: int
    rank: int
    ranks: int

    def __post_init__(self):
        """Check that the batch can be divided; raise UserError if it cannot, see the class."""
        parts = {"ranks": self.ranks, "samples of a micro-batch": self.micro_batch}
        check_global_batch_size(self.global_batch, parts)

    @property
    def first_sample(self) -> int:
        """Index of this rank's first sample within the global batch, from 0."""
        return self.rank * (self.global_batch // self.ranks)

    @property
    def micro_steps(self) -> int:
        """Number of micro-batches of a rank in a step."""
        return self.global_batch // (self.ranks * self.micro_batch)

    def get_sample_indices(self, micro_batch_index: int) -> np.ndarray:
        """Return the sample indices of one of this rank's micro-batches: [micro_batch] int64.

        Args:
            micro_batch_index: number of the micro-batch on this rank, counted from the first step
                on. Sample indices count the samples of all ranks and steps.
        """
        step, index_in_step = divmod(micro_batch_index, self.micro_steps)
        start = step * self.global_batch + self.first_sample + index_in_step * self.micro_batch
        return np.arange(start, start + self.micro_batch)


class StepBatches(Dataset):
    """Micro-batches of one rank as an endless dataset: item k is its k-th, from step 0 on.

    An item is a pure function of k and the arguments of the constructor, so it does not depend on
    the number of loader workers or on the items read before. Subclasses define `__getitem__`.
    """

    def __init__(self, division: BatchDivision):
        """Store the division of the global batch over ranks and micro-batches."""
        self.division = division

    @property
    def micro_steps(self) -> int:
        """Number of micro-batches of this rank in a step."""
        return self.division.micro_steps


def check_global_batch_size(global_batch: int, factors_by_name: Mapping[str, int]) -> None:
    """Refuse a global batch that is not a positive multiple of the product of all factors.

    Args:
        global_batch: samples of a step over all ranks.
        factors_by_name: each factor by the name that the message gives it, such as "ranks".
    Raises:
        UserError: with the factors and the nearest allowed values.
    """
    product = math.prod(factors_by_name.values())
    if global_batch < 1 or global_batch % product:
        below = global_batch // product * product
        nearest = f"{below} or {below + product}" if below > 0 else str(product)
        factors = " x ".join(f"{count} {name}" for name, count in factors_by_name.items())
        raise UserError(
            f"--global_batch_size {global_batch}: must be a multiple of {product} = {factors}; "
            f"the nearest is {nearest}"
        )


def check_fills_instance_groups(flag: str, rows: int, instances: int) -> None:
    """Refuse a batch of `rows` that does not fill whole groups of `instances`.

    Args:
        flag: flag that sets `rows`, for the message.
        rows: rows of a micro-batch on one device.
        instances: N, rows that share a forward pass.
    Raises:
        UserError: with the flag and the nearest allowed values.
    """
    if rows % instances:
        below = rows // instances * instances
        nearest = f"{below} or {below + instances}" if below else str(instances)
        raise UserError(
            f"{flag} {rows}: not a multiple of the {instances} instances that share a forward "
            f"pass; the nearest is {nearest}"
        )
