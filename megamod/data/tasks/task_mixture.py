"""Rows of several tasks as training batches: which task comes when, and rows of many in one batch.

Which rows a step has is a pure function of seed and step, whatever the order, so a run resumes and
changes its number of ranks as one on a single task does.

Source: Pilault et al. 2021 (CA-MTL), section 2.6 and appendix, for the orders that are compared.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch

from megamod.data.batches import StepBatches, StepShape
from megamod.data.lm.batches import Batch
from megamod.data.lm.blocks import IGNORE
from megamod.data.lm.order import Balanced, KeyedPermutation, key_of, make_sampler
from megamod.data.tasks.classification import Encoded

SAMPLINGS = ("proportional", "temperature", "uniform", "sequential", "uncertainty")
TURNS = 1  # tells the keys of the tasks' order from those of their rows


class TaskMixture(StepBatches):
    """Micro-batches of rows of several tasks of one rank, see `StepBatches`.

    Sampling:
        proportional: every row of every task once an epoch, all mixed.
        temperature: a task has a share of size^alpha.
        uniform: each step has one task; all have their turn, in an order drawn anew each round.
        sequential: each step has one task; all rows of the first, then all of the second.
        uncertainty: as many rows of every task as a batch has: candidates, of which
            `megamod.train.selection` takes a batch.

    Args:
        encoded: the train split of each task.
        seed: of the order.
        alpha: of "temperature"; 0 gives all tasks alike, 1 is proportional.
        shape: of a step; a micro-batch has R rows.
    """

    def __init__(
        self,
        encoded: Sequence[Encoded],
        sampling: str,
        shape: StepShape,
        *,
        seed: int,
        alpha: float,
    ):
        super().__init__(shape)
        self.encoded, self.sampling, self.seed = tuple(encoded), sampling, seed
        sizes = [len(one) for one in encoded]
        self.in_turn = Balanced(sizes, seed)
        order = "temperature" if sampling == "temperature" else "unbalanced"
        self.mixed = make_sampler(order, sizes, seed, alpha)
        self.steps = [math.ceil(size / shape.global_batch) for size in sizes]  # of an epoch

    @property
    def digest(self) -> str:
        """SHA-256 of the rows of all tasks."""
        return hashlib.sha256("".join(one.digest for one in self.encoded).encode()).hexdigest()

    def epoch(self, percent: float) -> int:
        """Steps of an epoch.

        Where all tasks have equally many rows it is as long as the largest one takes, times tasks.

        Args:
            percent: share of it, 0 to 1, of "uniform" and "uncertainty".
        """
        if self.sampling == "sequential":
            return sum(self.steps)
        if self.sampling in ("uniform", "uncertainty"):
            return max(1, int(max(self.steps) * len(self.steps) * percent))
        return math.ceil(sum(map(len, self.encoded)) / self.shape.global_batch)

    def places(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """[R] tasks and [R] numbers of rows in them, of micro-batch `number`."""
        samples = self.shape.samples(number)
        if self.sampling == "uncertainty":
            tasks = np.arange(len(self.encoded)).repeat(len(samples))
            return tasks, self.in_turn.at_domain(tasks, np.tile(samples, len(self.encoded)))
        if self.sampling in ("uniform", "sequential"):
            step = number // self.micro_steps
            task, before = self._task_of(step)
            tasks = np.full(len(samples), task)
            ordinals = samples - (step - before) * self.shape.global_batch
            return tasks, self.in_turn.at_domain(tasks, ordinals)
        return self.mixed.at(samples)

    def _task_of(self, step: int) -> tuple[int, int]:
        """Task of a step, and how many steps it had before."""
        if self.sampling == "uniform":
            turn, place = divmod(step, len(self.encoded))
            key = key_of(self.seed, turn, TURNS)
            order = KeyedPermutation(len(self.encoded), key)
            return int(order(np.array(place))), turn
        epoch, place = divmod(step, sum(self.steps))
        ends = np.cumsum(self.steps)
        task = int(np.searchsorted(ends, place, side="right"))
        return task, epoch * self.steps[task] + place - int(ends[task] - self.steps[task])

    def __getitem__(self, number: int) -> Batch:
        """Micro-batch `number` of this rank."""
        return self.gather(*self.places(number))

    def gather(self, tasks: np.ndarray, rows: np.ndarray) -> Batch:
        """A batch of rows of any tasks, in the order that is given.

        Args:
            tasks, rows: [R] int64, as of `places`.
        Returns:
            input_ids, attention_mask, token_type_ids [R, L] int64, padded to the longest row and a
            multiple of 8; task_ids, rows [R] int64; labels [R] float32, classes or values, 0 where
            a task has labels of tokens; token_labels [R, L] int64, -100 where there is none, if
            any task has them; items, T numbers of labels by task.
        """
        parts = [
            (np.flatnonzero(tasks == task), encoded) for task, encoded in enumerate(self.encoded)
        ]
        length = max(one.padded(rows[there]) for there, one in parts if len(there))
        shape = (len(rows), length)
        batch: Batch = {
            name: torch.zeros(shape, dtype=torch.int64)
            for name in ("input_ids", "attention_mask", "token_type_ids")
        }
        labels = torch.zeros(len(rows))
        token_labels = torch.full(shape, IGNORE)
        items = [0.0] * len(parts)
        for task, (there, encoded) in enumerate(parts):
            if not len(there):
                continue
            part = encoded.gather(rows[there], length)
            for name in ("input_ids", "attention_mask", "token_type_ids"):
                batch[name][there] = part[name]
            own = token_labels if encoded.per_token else labels
            own[there] = part["labels"].to(own.dtype)
            items[task] = float(part["items"])
        batch |= {
            "task_ids": torch.from_numpy(tasks.astype(np.int64)),
            "rows": torch.from_numpy(rows.astype(np.int64)),
            "labels": labels,
            "items": items,
        }
        if any(one.per_token for one in self.encoded):
            batch["token_labels"] = token_labels
        return batch
