"""Division of an optimizer step into micro-batches, for every kind of data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from megamod.errors import UserError


@dataclass(frozen=True)
class StepShape:
    """Division of the samples of an optimizer step over ranks and micro-batches.

    Each rank takes a consecutive part of the step, so the samples of a step are the same on any
    number of ranks.

    Attributes:
        micro_batch: samples of a micro-batch.
        global_batch: samples of a step over all `ranks`.
        rank, ranks: this rank among those that share the samples.

    Raises:
        UserError: if the step is not a whole number of micro-batches on every rank.
    """

    micro_batch: int
    global_batch: int
    rank: int
    ranks: int

    def __post_init__(self):
        parts = {"ranks": self.ranks, "samples of a micro-batch": self.micro_batch}
        check_global_batch_size(self.global_batch, parts)

    @property
    def first_sample(self) -> int:
        """Number of this rank's first sample within a step."""
        return self.rank * (self.global_batch // self.ranks)

    @property
    def micro_steps(self) -> int:
        """Micro-batches of a rank in a step."""
        return self.global_batch // (self.ranks * self.micro_batch)

    def get_sample_indices(self, micro_batch_index: int) -> np.ndarray:
        """Return the global sample indices of this rank's micro-batch: [micro_batch] int64."""
        step, index_in_step = divmod(micro_batch_index, self.micro_steps)
        start = step * self.global_batch + self.first_sample + index_in_step * self.micro_batch
        return np.arange(start, start + self.micro_batch)


class StepBatches(Dataset):
    """Micro-batches of one rank: item k is its k-th since step 0, without end.

    An item is a pure function of k and the arguments, for any number of ranks and workers.
    """

    def __init__(self, shape: StepShape):
        self.shape = shape

    @property
    def micro_steps(self) -> int:
        """Micro-batches of this rank in a step."""
        return self.shape.micro_steps


def check_global_batch_size(global_batch: int, factors_by_name: Mapping[str, int]) -> None:
    """Check that the samples of a step are a multiple of the product of `factors_by_name`.

    Args:
        factors_by_name: counts by their names, for the message.
    Raises:
        UserError: naming the factors and the nearest allowed values.
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
    """Check that a batch of `rows` fills whole groups of `instances`.

    Raises:
        UserError: naming the flag and the nearest allowed values.
    """
    if rows % instances:
        below = rows // instances * instances
        nearest = f"{below} or {below + instances}" if below else str(instances)
        raise UserError(
            f"{flag} {rows}: not a multiple of the {instances} instances that share a forward "
            f"pass; the nearest is {nearest}"
        )
