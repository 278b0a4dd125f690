"""Perplexity of language models, per domain, and of every expert on every domain."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

Batch = dict[str, object]


@dataclass(frozen=True)
class Score:
    """Summed negative log-likelihood in nats, over a number of tokens that stand for some bytes."""

    nll: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """exp of the mean per token, `</s>` of each item included; inf where it overflows."""
        mean = self.nll / max(1, self.tokens)
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers; nan if the bytes are not known."""
        return self.nll / math.log(2) / self.bytes if self.bytes else math.nan


@torch.no_grad()
def score_batches(
    model: nn.Module,
    batches: Iterable[Batch],
    domain: str | None,
    device: torch.device,
) -> torch.Tensor:
    """[2] float64: summed nll and number of targets; batches of weight 0 only keep ranks in step.

    Tokens whose log-probability is not finite are left out of both, as in the DEMix release.
    """
    training, model_sums = model.training, torch.zeros(2, dtype=torch.float64, device=device)
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
        counted = (labels != -100) & output.token_log_probs.isfinite()
        weight = float(batch.get("weight", 1.0))
        model_sums[0] -= weight * output.token_log_probs[counted].double().sum()
        model_sums[1] += weight * counted.sum()
    model.train(training)
    return model_sums


def share_of(batches: Sequence[Batch] | Iterable[Batch], part: int, parts: int) -> list[Batch]:
    """Every `parts`-th batch from the `part`-th on; all parts equally long.

    A part that would be shorter repeats a batch with weight 0, because ranks that hold a model
    together (ZeRO 3) must run it equally often.
    """
    batches = list(batches)
    size = math.ceil(len(batches) / parts)
    mine = batches[part::parts]
    return mine + [{**batches[0], "weight": 0.0}] * (size - len(mine))


def domain_matrix(
    experts: Sequence[str],
    domains: Sequence[str],
    score: Callable[[str, str], Score],
) -> dict[str, dict[str, Score]]:
    """Scores of every expert (row) on every domain (column)."""
    return {expert: {domain: score(expert, domain) for domain in domains} for expert in experts}


def format_matrix(matrix: Mapping[str, Mapping[str, float]], title: str) -> str:
    """A matrix of perplexities as aligned text; the best of each column is starred."""
    columns = list(next(iter(matrix.values())))
    best = {c: min(row[c] for row in matrix.values()) for c in columns}
    rows = [[title, *columns]]
    for name, row in matrix.items():
        cells = (f"{row[c]:.2f}" + ("*" if row[c] == best[c] and len(matrix) > 1 else " ")
                 for c in columns)
        rows.append([name, *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        row[0].ljust(widths[0]) + "".join("  " + c.rjust(w) for c, w in zip(row[1:], widths[1:]))
        for row in rows
    )
