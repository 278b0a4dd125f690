"""Perplexity of language models by domain, under each domain's own expert or every expert."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from megamod.data.lm.blocks import IGNORE
from megamod.mixture.ensemble import compute_perplexity
from megamod.progress import show_progress

Batch = dict[str, object]
ScoreMatrix = dict[str, dict[str, "Score"]]
"""Scores by expert (row) and domain (column)."""

DENSE = "dense"  # row of a model without experts


@dataclass(frozen=True)
class Score:
    """Summed negative log-likelihood in nats, with the numbers of tokens and of bytes of text."""

    nll: float
    tokens: int
    bytes: int = 0

    @property
    def perplexity(self) -> float:
        """exp(nll / tokens), where tokens include the `</s>` of each item; inf on overflow."""
        return compute_perplexity(self.nll, self.tokens)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte, which is comparable between tokenizers; None if the bytes are unknown."""
        return self.nll / math.log(2) / self.bytes if self.bytes else None


@dataclass
class DomainEvaluation:
    """Scoring of every expert of a run on held-out text; a collective call of all ranks.

    Attributes:
        model: the module to score.
        experts: names of all rows; (`DENSE`,) for a dense model.
        scorable: rows that this rank can score, such as `DENSE` or an independent model's own
            domain.
        takes_domain: True if the model takes the name of the expert to use.
        domains: names of all columns.
        batches: function from a domain to its batches, in a fixed order.
        count_bytes: function from a domain to the UTF-8 bytes of all its batches; 0 if unknown.
        part, parts: index and number of the ranks with the same rows, which share the batches.
        device: device of the model.
        reduce: sums a tensor over all ranks, in place.
    """

    model: nn.Module
    experts: Sequence[str]
    scorable: Sequence[str]
    takes_domain: bool
    domains: Sequence[str]
    batches: Callable[[str], Iterable[Batch]]
    count_bytes: Callable[[str], int]
    part: int
    parts: int
    device: torch.device
    reduce: Callable[[torch.Tensor], None]

    def __call__(self, own_only: bool = False) -> ScoreMatrix:
        """Run the model on all batches of its share and sum the scores over the ranks; collective.

        Args:
            own_only: score each expert on its own domain only; a dense model on all domains.
        Returns:
            a row per expert, empty if nothing was scored; cells without a scored token are missing.
        Source: Gururangan et al. 2022 (DEMix), table 3, without mixing.
        """
        sums = torch.zeros(
            len(self.experts), len(self.domains), 2, dtype=torch.float64, device=self.device
        )
        for row, expert in enumerate(self.experts):
            if expert not in self.scorable:
                continue
            for column, domain in enumerate(self.domains):
                if own_only and expert not in (domain, DENSE):
                    continue
                own_batches = select_rank_share(self.batches(domain), self.part, self.parts)
                domain_argument = expert if self.takes_domain else None
                sums[row, column] = sum_batch_nll(
                    self.model,
                    show_progress(own_batches, f"{expert} on {domain}"),
                    domain_argument,
                    self.device,
                )
        self.reduce(sums)
        return {
            expert: {
                domain: Score(float(nll), int(tokens), self.count_bytes(domain))
                for domain, (nll, tokens) in zip(self.domains, sums[row].tolist(), strict=True)
                if tokens
            }
            for row, expert in enumerate(self.experts)
        }


@torch.no_grad()
def sum_batch_nll(
    model: nn.Module, batches: Iterable[Batch], domain: str | None, device: torch.device
) -> torch.Tensor:
    """Sum the negative log-likelihoods of targets (nats), and count the targets: [2] float64.

    Tokens whose log-probability is not finite are excluded from both, as in the DEMix release.
    Batches of weight 0 run the model, which keeps the ranks in step, and do not count. The model
    runs in evaluation mode; its mode is restored.

    Args:
        model: language model on `device`; its output has `token_log_probs` [B, T].
        batches: see `iterate_eval_batches`; a batch's "weight" (1 if missing) multiplies its sums.
        domain: expert to use, for a model that takes one; else None.
        device: device of the model and of the result.
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


def prepend_context(
    batches: Iterable[Batch], window: int, pad_id: int, leading_columns: int = 0
) -> Iterator[Batch]:
    """Yield the batches with up to `window` tokens of the preceding text before each sequence.

    Context tokens have no label, so they are not scored again.

    Source: fairseq's `LMContextWindowDataset`, as used to evaluate DEMix.

    Args:
        batches: consecutive sequences of a text, in order, padded on the right only.
        window: tokens of context; 0 yields the batches unchanged.
        pad_id: id of padding for sequences with less context than others.
        leading_columns: leading columns that are not text, such as a domain token; they stay first.
    """
    preceding = torch.empty(0, dtype=torch.int64)
    for batch in batches:
        if window == 0:
            yield batch
            continue
        inputs, labels = [], []
        for ids, targets in zip(batch["input_ids"], batch["labels"], strict=True):
            text = ids[leading_columns : leading_columns + int((targets != IGNORE).sum())]
            context = torch.cat([ids[:leading_columns], preceding])
            inputs.append(torch.cat([context, text]))
            scored = targets[leading_columns : leading_columns + len(text)]
            labels.append(torch.cat([torch.full_like(context, IGNORE), scored]))
            preceding = torch.cat([preceding, text])[-window:]
        lengths = torch.tensor([len(row) for row in inputs])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        yield {
            **batch,
            "input_ids": pad_sequence(inputs, batch_first=True, padding_value=pad_id),
            "attention_mask": None if bool(mask.all()) else mask,
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
        }


def select_rank_share(batches: Iterable[Batch], part: int, parts: int) -> Iterator[Batch]:
    """Yield the batches of one rank's share: every `parts`-th, starting with number `part`.

    All shares have the same length. A share that would be shorter ends with the first batch of its
    round, with weight 0, because ranks that shard one model (ZeRO 3) must run it equally often.

    Args:
        batches: the same batches in the same order on every rank.
        part: number of this rank's share, from 0.
        parts: number of shares.
    """
    batches = iter(batches)
    while group := list(islice(batches, parts)):
        yield group[part] if part < len(group) else {**group[0], "weight": 0.0}


def compute_perplexities(matrix: ScoreMatrix) -> dict[str, dict[str, float]]:
    """Compute the perplexities exp(nll / tokens) of a matrix of scores, by expert and domain."""
    return {e: {d: s.perplexity for d, s in row.items()} for e, row in matrix.items()}


def select_own_scores(matrix: ScoreMatrix) -> dict[str, Score]:
    """Select each domain's score under the expert of the same name, else under the dense model.

    Domains with neither are missing in the result.

    Args:
        matrix: scores by expert, or by `DENSE`, then by domain of the text.
    """
    return {
        domain: matrix[row][domain]
        for domain in _list_columns(matrix)
        if domain in matrix.get(row := domain if domain in matrix else DENSE, {})
    }


def _list_columns(matrix: Mapping[str, Mapping[str, object]]) -> list[str]:
    """List the distinct column names (domains) of all rows, in order of appearance."""
    return list({domain: None for row in matrix.values() for domain in row})
