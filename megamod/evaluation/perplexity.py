"""Perplexity of language models per domain: each under its own expert, or under every expert."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from megamod.data.lm.blocks import IGNORE
from megamod.mixture.ensemble import perplexity

Batch = dict[str, object]
Matrix = dict[str, dict[str, "Score"]]
"""Scores by expert (row) and domain (column)."""

DENSE = "dense"  # the row of a model whose domains share everything


@dataclass(frozen=True)
class Score:
    """Summed negative log-likelihood in nats, over a number of tokens that stand for some bytes."""

    nll: float
    tokens: int
    bytes: int = 0

    @property
    def perplexity(self) -> float:
        """exp of the mean per token, the `</s>` of each item included; inf where it overflows."""
        return perplexity(self.nll, self.tokens)

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers; None if the bytes scored are not known."""
        return self.nll / math.log(2) / self.bytes if self.bytes else None


@dataclass
class DomainEvaluation:
    """Scores every expert of a run on held-out text; to be called on all ranks at once.

    Attributes:
        model: the module to score.
        experts: names of all rows, for a dense model (`DENSE`,).
        held: rows this rank can score; `DENSE` and an independent model's own domain included.
        choose: True if the model must be told which expert to use.
        domains: names of all columns.
        batches: from a domain to its batches, in a fixed order.
        bytes_of: from a domain to the UTF-8 bytes that all its batches stand for; 0 if unknown.
        part, parts: this rank's place among those that hold the same rows; they share the work.
        reduce: sums a tensor over all ranks, in place.
    """

    model: nn.Module
    experts: Sequence[str]
    held: Sequence[str]
    choose: bool
    domains: Sequence[str]
    batches: Callable[[str], Iterable[Batch]]
    bytes_of: Callable[[str], int]
    part: int
    parts: int
    device: torch.device
    reduce: Callable[[torch.Tensor], None]

    def __call__(self, own_only: bool = False) -> Matrix:
        """The matrix of scores; with `own_only` each expert on its own domain and nothing else.

        Source: Gururangan et al. 2022 (DEMix), table 3, without mixing.
        """
        sums = torch.zeros(
            len(self.experts), len(self.domains), 2, dtype=torch.float64, device=self.device
        )
        for row, expert in enumerate(self.experts):
            if expert not in self.held:
                continue
            for column, domain in enumerate(self.domains):
                if own_only and expert not in (domain, DENSE):
                    continue
                mine = share_of(self.batches(domain), self.part, self.parts)
                chosen = expert if self.choose else None
                sums[row, column] = score_batches(self.model, mine, chosen, self.device)
        self.reduce(sums)
        return {
            expert: {
                domain: Score(float(nll), int(tokens), self.bytes_of(domain))
                for domain, (nll, tokens) in zip(self.domains, sums[row].tolist(), strict=True)
                if tokens
            }
            for row, expert in enumerate(self.experts)
        }


@torch.no_grad()
def score_batches(
    model: nn.Module, batches: Iterable[Batch], domain: str | None, device: torch.device
) -> torch.Tensor:
    """[2] float64: summed nll and number of targets; batches of weight 0 only keep ranks in step.

    Tokens whose log-probability is not finite are left out of both, as in the DEMix release.
    """
    training, sums = model.training, torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    for batch in batches:
        labels = batch["labels"].to(device)
        mask = batch.get("attention_mask")
        output = model(
            batch["input_ids"].to(device),
            attention_mask=None if mask is None else mask.to(device),
            shift_labels=labels,
            domain=domain,
        )
        counted = (labels != IGNORE) & output.token_log_probs.isfinite()
        weight = float(batch.get("weight", 1.0))
        sums[0] -= weight * output.token_log_probs[counted].double().sum()
        sums[1] += weight * counted.sum()
    model.train(training)
    return sums


def with_context(
    batches: Iterable[Batch], window: int, pad_id: int, front: int = 0
) -> Iterator[Batch]:
    """Put up to `window` tokens of the text before it in front of each sequence, not scored.

    Source: fairseq's `LMContextWindowDataset`, as used to evaluate DEMix.

    Args:
        batches: consecutive sequences of a text, in order, padded on the right if at all.
        window: tokens of context; 0 leaves the batches as they are.
        pad_id: what sequences with less context than others end in.
        front: columns that are not text and stay in front, such as a domain token.
    """
    before = torch.empty(0, dtype=torch.int64)
    for batch in batches:
        if window == 0:
            yield batch
            continue
        inputs, labels = [], []
        for ids, targets in zip(batch["input_ids"], batch["labels"], strict=True):
            text = ids[front : front + int((targets != IGNORE).sum())]
            context = torch.cat([ids[:front], before])
            inputs.append(torch.cat([context, text]))
            scored = targets[front : front + len(text)]
            labels.append(torch.cat([torch.full_like(context, IGNORE), scored]))
            before = torch.cat([before, text])[-window:]
        lengths = torch.tensor([len(row) for row in inputs])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        yield {
            **batch,
            "input_ids": pad_sequence(inputs, batch_first=True, padding_value=pad_id),
            "attention_mask": None if bool(mask.all()) else mask,
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
        }


def share_of(batches: Iterable[Batch], part: int, parts: int) -> Iterator[Batch]:
    """Every `parts`-th batch from the `part`-th on; all parts equally long.

    A part that would be shorter repeats its round's first batch with weight 0, because ranks that
    hold a model together (ZeRO 3) must run it equally often.
    """
    batches = iter(batches)
    while taken := list(islice(batches, parts)):
        yield taken[part] if part < len(taken) else {**taken[0], "weight": 0.0}


def perplexities(matrix: Matrix) -> dict[str, dict[str, float]]:
    """The matrix in perplexities."""
    return {e: {d: s.perplexity for d, s in row.items()} for e, row in matrix.items()}


def own_scores(matrix: Matrix) -> dict[str, Score]:
    """Each domain under its own expert, or under the dense model; domains without one left out."""
    return {
        domain: matrix[row][domain]
        for domain in columns_of(matrix)
        if domain in matrix.get(row := domain if domain in matrix else DENSE, {})
    }


def columns_of(matrix: Mapping[str, Mapping[str, object]]) -> list[str]:
    """The domains of all rows, each once, in the order in which they appear."""
    return list({domain: None for row in matrix.values() for domain in row})


def format_matrix(
    matrix: Mapping[str, Mapping[str, float]], corner: str = "expert \\ text", digits: int = 2
) -> str:
    """Numbers as aligned text, rows down, columns across; the best of a column starred.

    Args:
        matrix: by row, then column; cells may be missing.
        corner: heading of the column with the names of the rows.
        digits: decimals shown. What looks equal to the best is starred too.
    """
    columns = columns_of(matrix)
    shown = {name: {c: f"{x:.{digits}f}" for c, x in row.items()} for name, row in matrix.items()}
    best = {c: min((row[c] for row in shown.values() if c in row), key=float) for c in columns}
    table = [[corner, *columns]]
    for name, row in shown.items():
        marks = ("*" if row.get(c) == best[c] and len(matrix) > 1 else " " for c in columns)
        cells = (f"{row.get(c, '-')}{mark}" for c, mark in zip(columns, marks, strict=True))
        table.append([name, *cells])
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    )
