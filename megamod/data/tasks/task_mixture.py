"""Training batches mixed from the rows of several tasks.

The rows of a step are a pure function of seed and step for every kind of sampling, so that a run
can resume, and change its number of ranks, as with a single task.

Source: Pilault et al. 2021 (CA-MTL), section 2.6 and appendix, for the kinds of sampling.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch

from megamod.data.batches import BatchDivision, StepBatches
from megamod.data.lm.batches import Batch
from megamod.data.lm.blocks import IGNORE
from megamod.data.lm.order import BalancedSampler, KeyedPermutation, make_random_key, make_sampler
from megamod.data.tasks.classification import EncodedRows

SAMPLINGS = ("proportional", "temperature", "uniform", "sequential", "uncertainty")
TASK_ORDER_KEY = 1  # makes keys of the order of tasks differ from keys of the order of rows


class TaskMixture(StepBatches):
    """Micro-batches of rows of several tasks of one rank, see `StepBatches`.

    Sampling:
        proportional: every row of every task once an epoch, all mixed.
        temperature: a task has a share of size^alpha.
        uniform: each step has one task; a round has all of them, in an order drawn for each round.
        sequential: each step has one task; all rows of the first, then all of the second.
        uncertainty: a whole batch of rows of every task; `megamod.train.selection` selects a batch
            of these candidates.

    Args:
        encoded: encoded rows of the train split of each task.
        sampling: one of `SAMPLINGS`, see above.
        seed: seed of the order of rows and tasks.
        alpha: exponent of "temperature"; 0: all tasks have equal shares, 1: proportional.
        division: division of a step; a micro-batch has R rows.
    """

    def __init__(
        self,
        encoded: Sequence[EncodedRows],
        sampling: str,
        division: BatchDivision,
        *,
        seed: int,
        alpha: float,
    ):
        """Make the samplers of the tasks; see the class for the arguments."""
        super().__init__(division)
        self.encoded, self.sampling, self.seed = tuple(encoded), sampling, seed
        sizes = [len(rows) for rows in encoded]
        self.by_task = BalancedSampler(sizes, seed)
        order = "temperature" if sampling == "temperature" else "unbalanced"
        self.mixed = make_sampler(order, sizes, seed, alpha)
        # Steps of an epoch of each task.
        self.steps_by_task = [math.ceil(size / division.global_batch) for size in sizes]

    @property
    def digest(self) -> str:
        """SHA-256 of the rows of all tasks, which a resumed run must have again."""
        return hashlib.sha256("".join(rows.digest for rows in self.encoded).encode()).hexdigest()

    def compute_steps_per_epoch(self, epoch_share: float) -> int:
        """Compute the number of steps of an epoch.

        It is ceil(rows / global batch) for "proportional" and "temperature", and the sum of that of
        each task for "sequential". For "uniform" and "uncertainty" it is `epoch_share` times the
        number of tasks times that of the largest task, and at least 1.

        Args:
            epoch_share: 0 to 1; without effect for the other kinds of sampling.
        """
        if self.sampling == "sequential":
            return sum(self.steps_by_task)
        if self.sampling in ("uniform", "uncertainty"):
            return max(1, int(max(self.steps_by_task) * len(self.steps_by_task) * epoch_share))
        return math.ceil(sum(map(len, self.encoded)) / self.division.global_batch)

    def select_rows(self, micro_batch_index: int) -> tuple[np.ndarray, np.ndarray]:
        """Select tasks and row numbers of a micro-batch of this rank, [R] int64 each.

        For "uncertainty" they are [T R], the candidates of task 0 first, then those of task 1.

        Args:
            micro_batch_index: number of the micro-batch on this rank, from 0.
        """
        sample_indices = self.division.get_sample_indices(micro_batch_index)
        if self.sampling == "uncertainty":
            tasks = np.arange(len(self.encoded)).repeat(len(sample_indices))
            return tasks, self.by_task.select_domain_blocks(
                tasks, np.tile(sample_indices, len(self.encoded))
            )
        if self.sampling in ("uniform", "sequential"):
            step = micro_batch_index // self.micro_steps
            task, earlier_steps = self._select_step_task(step)
            tasks = np.full(len(sample_indices), task)
            ordinals = sample_indices - (step - earlier_steps) * self.division.global_batch
            return tasks, self.by_task.select_domain_blocks(tasks, ordinals)
        return self.mixed.select_blocks(sample_indices)

    def _select_step_task(self, step: int) -> tuple[int, int]:
        """Select the task of a step of "uniform" or "sequential".

        Returns:
            number of the task, and the number of earlier steps of this task.
        """
        if self.sampling == "uniform":
            round_index, index = divmod(step, len(self.encoded))
            key = make_random_key(self.seed, round_index, TASK_ORDER_KEY)
            order = KeyedPermutation(len(self.encoded), key)
            return int(order(np.array(index))), round_index
        epoch, index = divmod(step, sum(self.steps_by_task))
        ends = np.cumsum(self.steps_by_task)
        task = int(np.searchsorted(ends, index, side="right"))
        return task, epoch * self.steps_by_task[task] + index - int(
            ends[task] - self.steps_by_task[task]
        )

    def __getitem__(self, micro_batch_index: int) -> Batch:
        """Return a micro-batch of this rank, see `gather_batch`."""
        return self.gather_batch(*self.select_rows(micro_batch_index))

    def gather_batch(self, task_indices: np.ndarray, row_indices: np.ndarray) -> Batch:
        """Gather a batch of rows of any tasks, in the order of the arguments.

        Args:
            task_indices, row_indices: [R] int64, as `select_rows` returns them.
        Returns:
            input_ids, attention_mask, token_type_ids [R, L] int64, padded to the largest of
            the tasks' `compute_padded_length`; task_ids, rows [R] int64; labels [R] float32,
            classes or values, 0 where a task has labels of tokens; token_labels [R, L] int64, -100
            where there is none, if any task has them; items, T numbers of labels by task.
        """
        parts = [
            (np.flatnonzero(task_indices == task), encoded)
            for task, encoded in enumerate(self.encoded)
        ]
        length = max(
            encoded.compute_padded_length(row_indices[index])
            for index, encoded in parts
            if len(index)
        )
        shape = (len(row_indices), length)
        batch: Batch = {
            name: torch.zeros(shape, dtype=torch.int64)
            for name in ("input_ids", "attention_mask", "token_type_ids")
        }
        labels = torch.zeros(len(row_indices))
        token_labels = torch.full(shape, IGNORE)
        items = [0.0] * len(parts)
        for task, (index, encoded) in enumerate(parts):
            if not len(index):
                continue
            part = encoded.gather_batch(row_indices[index], length)
            for name in ("input_ids", "attention_mask", "token_type_ids"):
                batch[name][index] = part[name]
            target = token_labels if encoded.has_token_labels else labels
            target[index] = part["labels"].to(target.dtype)
            items[task] = float(part["items"])
        batch |= {
            "task_ids": torch.from_numpy(task_indices.astype(np.int64)),
            "rows": torch.from_numpy(row_indices.astype(np.int64)),
            "labels": labels,
            "items": items,
        }
        if any(encoded.has_token_labels for encoded in self.encoded):
            batch["token_labels"] = token_labels
        return batch
