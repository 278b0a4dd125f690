"""Predictions of a classifier for a whole split, its batches divided among the ranks."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from megamod.data.tasks.classification import EncodedRows, HeldOutBatch
from megamod.progress import show_progress


class Predictor:
    """Runner of a classifier over held-out rows; with several ranks collective.

    Args:
        module: takes `input_ids`, `attention_mask` and perhaps `token_type_ids`, returns
            `logits`.
        inputs: names of the fields of a batch that the module takes.
        device: device of the module.
        part, parts: rank `part` of `parts` runs every parts-th batch.
        reduce: sums a tensor over the ranks in place.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Sequence[str],
        device: torch.device,
        part: int = 0,
        parts: int = 1,
        reduce: Callable[[Tensor], object] = lambda tensor: None,
    ):
        """Store the arguments, see the class; the module is not moved."""
        self.module, self.inputs, self.device = module, tuple(inputs), device
        self.part, self.parts, self.reduce = part, parts, reduce
        self._passes: list[tuple[int, float]] = []  # rows that were answered, seconds

    @property
    def instances_per_second(self) -> float:
        """Rows per second of this rank's forward passes, of which there must be one.

        The first of several passes is skipped, because it includes warm-up.
        """
        counted = self._passes[1:] or self._passes
        rows, seconds = (sum(column) for column in zip(*counted, strict=True))
        return rows / seconds

    def __call__(self, encoded: EncodedRows, batches: Sequence[HeldOutBatch]) -> np.ndarray:
        """Run the module on this rank's batches and gather the answers for all rows; collective.

        Every row counts once: fillers are dropped, copies of a row averaged. The module runs in
        evaluation mode; its mode is restored.

        Args:
            batches: batches of all rows of `encoded`, at least one.
        Returns:
            logits [n, C] float64 of the rows; with labels of tokens the number of the best label of
            each token, [T] int64.
        """
        training = self.module.training
        self.module.eval()
        answers = None
        try:
            # With parameters divided over the ranks (ZeRO 3) all of them must run equally often.
            padded = -(-len(batches) // self.parts) * self.parts
            for number in show_progress(range(self.part, padded, self.parts), "predicting"):
                batch = batches[min(number, len(batches) - 1)]
                logits = self.compute_logits(batch)
                if answers is None:
                    shape = (
                        (len(encoded.ids),)
                        if encoded.has_token_labels
                        else (len(encoded), logits.shape[-1])
                    )
                    dtype = torch.int64 if encoded.has_token_labels else torch.float64
                    answers = torch.zeros(shape, dtype=dtype)
                if number < len(batches):
                    _store_answers(answers, encoded, batch, logits)
        finally:
            self.module.train(training)
        answers = answers.to(self.device)
        self.reduce(answers)
        return answers.cpu().numpy()

    @torch.no_grad()
    def compute_logits(self, batch: HeldOutBatch) -> Tensor:
        """Compute the logits of a batch's n rows, [n, C] or [n, L, C] of tokens: float32, CPU.

        Copies of a row are averaged. The time of the pass counts in `instances_per_second`. The
        caller puts the module into evaluation mode.
        """
        fields = {name: batch.batch[name].to(self.device) for name in self.inputs}
        self._synchronise()
        started = time.perf_counter()
        logits = self.module(**fields).logits
        self._synchronise()
        self._passes.append((batch.stop - batch.start, time.perf_counter() - started))
        return batch.layout.average_row_logits(logits.float()).cpu()

    def _synchronise(self) -> None:
        """Wait until the device has finished, so that times are right."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def _store_answers(
    stored: Tensor, encoded: EncodedRows, batch: HeldOutBatch, logits: Tensor
) -> None:
    """Store the answers of a batch in `stored`: logits of its rows, or best labels of their tokens.

    Args:
        stored: [n, C] of all rows, or [T] of all tokens; see `Predictor.__call__`.
        encoded: rows of the split, whose offsets give the tokens of a row.
        batch: range of the rows that `logits` are of.
        logits: [rows, C] or [rows, L, C].
    """
    if not encoded.has_token_labels:
        stored[batch.start : batch.stop] = logits.double()
        return
    best_labels = logits.argmax(-1)
    for row, answers in zip(range(batch.start, batch.stop), best_labels, strict=True):
        start, stop = encoded.offsets[row : row + 2].tolist()
        stored[start:stop] = answers[: stop - start]


def select_word_labels(
    encoded: EncodedRows, answers: np.ndarray, labels: Sequence[str]
) -> list[list[str]]:
    """Select the label of each word of each sentence: the one predicted for its first token.

    Words that were cut off get O if that is a label, else the first label.

    Args:
        encoded: sentences with `word_starts`.
        answers: [T] number of the best label of each token, as from `Predictor`.
        labels: names by number.
    """
    missing = "O" if "O" in labels else labels[0]
    return [
        [
            labels[answers[row_start + word_start]] if word_start >= 0 else missing
            for word_start in word_starts.tolist()
        ]
        for row_start, word_starts in zip(
            encoded.offsets[:-1].tolist(), encoded.word_starts, strict=True
        )
    ]
