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
from torch.utils.data import Dataset

from megamod.data.lm.batches import Batch
from megamod.data.lm.blocks import IGNORE
from megamod.data.lm.order import Balanced, KeyedPermutation, Temperature, Unbalanced, key_of
from megamod.data.tasks.classification import Encoded, check_micro_steps

SAMPLINGS = ("proportional", "temperature", "uniform", "sequential", "uncertainty")
TURNS = 1  # tells the keys of the tasks' order from those of their rows


class TaskMixture(Dataset):
    """Micro-batches of one rank: item k is its k-th since step 0, without end.

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
        micro_batch: rows of a micro-batch.
        global_batch: rows of a step over all ranks.
        rank, ranks: this rank's place.
    Raises:
        UserError: if the rows cannot be divided so.
    """

    def __init__(
        self,
        encoded: Sequence[Encoded],
        sampling: str,
        *,
        seed: int,
        alpha: float,
        micro_batch: int,
        global_batch: int,
        rank: int,
        ranks: int,
    ):
        check_micro_steps(global_batch, ranks, micro_batch)
        self.encoded, self.sampling, self.seed = tuple(encoded), sampling, seed
        sizes = [len(one) for one in encoded]
        self.in_turn = Balanced(sizes, seed)
        if sampling == "temperature":
            self.mixed = Temperature(sizes, seed, alpha)
        else:
            self.mixed = Unbalanced(sizes, seed)
        self.steps = [math.ceil(size / global_batch) for size in sizes]  # of an epoch, by task
        self.micro_batch, self.global_batch = micro_batch, global_batch
        self.first = rank * (global_batch // ranks)
        self.micro_steps = global_batch // (ranks * micro_batch)

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
        return math.ceil(sum(map(len, self.encoded)) / self.global_batch)

    def places(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """[R] tasks and [R] numbers of rows in them, of micro-batch `number`."""
        step, turn = divmod(number, self.micro_steps)
        first = self.first + turn * self.micro_batch
        if self.sampling == "uncertainty":
            tasks = np.arange(len(self.encoded)).repeat(self.micro_batch)
            ordinals = step * self.global_batch + first + np.arange(self.micro_batch)
            return tasks, self.in_turn.at_domain(tasks, np.tile(ordinals, len(self.encoded)))
        if self.sampling in ("uniform", "sequential"):
            task, before = self._task_of(step)
            start = before * self.global_batch + first
            rows = self.in_turn.draw_domain(task, start, self.micro_batch)
            return np.full(self.micro_batch, task), rows
        return self.mixed.draw(step * self.global_batch + first, self.micro_batch)

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
