"""Mixtures of a forest's experts, estimated and scored on held-out text.

The protocol of DEMix and Branch-Train-Merge estimates a prior on the validation split of a domain
and scores its test split with that prior. Experts with prior 0 are not run.
Source: Gururangan et al. 2022 (DEMix), section 5; Li et al. 2022 (Branch-Train-Merge), section 2.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megamod.evaluation.expert_scores import Experts, Source, Text
from megamod.evaluation.perplexity import Score
from megamod.mixture.ensemble import (
    MODES,
    MixedBatch,
    Mixture,
    PerplexityCounter,
    PosteriorRule,
    estimate_prior,
)
from megamod.mixture.prior import Prior, restrict_to_top_k

Line = dict[str, object]
"""A record in the format of the DEMix release: ppl of all tokens so far, posterior of the batch by
expert, and moving average of the posteriors."""


@dataclass(frozen=True)
class Protocol:
    """Settings of the estimate and of the mixture.

    Attributes:
        mode: mode whose records and posterior are reported, one of `MODES`.
        rule: update rule of the posterior.
        topk: number of experts of the prior to keep; None: all.
        prior_split, prior_sequences: text that the prior is estimated on.
        split: split to score.
        batch: sequences per update of the moving average of posteriors.
        removal_test: also score the mixture without each expert.
    """

    mode: str = "cached_prior"
    rule: PosteriorRule = field(default_factory=PosteriorRule)
    topk: int | None = None
    prior_split: str = "valid"
    prior_sequences: int = 100
    split: str = "test"
    batch: int = 2
    removal_test: bool = False


@dataclass
class DomainResult:
    """Scores of mixtures on one domain's text.

    Attributes:
        estimate: estimated prior; None if it was read from a file or no mode needs one.
        prior: prior in use, after top-k.
        single: scores of each expert alone, of those that ran.
        modes: scores of the mixtures by mode.
        without: scores of the reported mode without one expert, by its domain.
        lines: records of the estimate and of the reported mode.
        posterior: weights [T] of the reported mode along the first sequence, by expert.
    """

    domain: str
    estimate: Prior | None = None
    prior: Prior | None = None
    single: dict[str, Score] = field(default_factory=dict)
    modes: dict[str, Score] = field(default_factory=dict)
    without: dict[str, Score] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    posterior: dict[str, list[float]] = field(default_factory=dict)

    @property
    def best(self) -> str:
        """Domain of the expert with the lowest perplexity alone."""
        return min(self.single, key=lambda domain: self.single[domain].perplexity)


def estimate_priors(
    experts: Experts, source: Source, domains: Sequence[str], protocol: Protocol
) -> dict[str, DomainResult]:
    """Estimate the prior on each domain's text, before top-k, with the records of the estimate.

    Raises:
        UserError: if a domain has no text.
    """
    texts = [_estimate_text(domain, protocol) for domain in domains]
    for text in texts:
        experts.masks(text)  # raises for a missing file before any scoring
    source.score({text: experts.domains for text in texts})
    results = {}
    for text in texts:
        result = DomainResult(text.domain)

        def watch(mixture: Mixture, mixed: MixedBatch, result=result) -> None:
            result.lines.append(
                _line(result.domain, protocol.prior_split, mixture, mixed, experts.domains, experts)
            )

        scored = source.batches(text, experts.domains, protocol.batch)
        prior = estimate_prior(experts.domains, scored, protocol.rule, watch)
        source_text = {
            "data_digest": experts.data[experts.forest.experts[0].path].digest,
            "domain": text.domain,
            "split": text.split,
            "sequences": len(experts.masks(text)),
        }
        result.estimate = result.prior = replace(prior, text=source_text)
        results[text.domain] = result
    return results


def evaluate(
    experts: Experts,
    source: Source,
    domains: Sequence[str],
    protocol: Protocol,
    priors: Mapping[str, Prior] | None = None,
) -> dict[str, DomainResult]:
    """Score all mixtures on each domain's text.

    Args:
        priors: priors from files by domain; None: estimate them if the mode or top-k needs them.
    Raises:
        UserError: if top-k exceeds the number of experts.
    """
    test = {domain: Text(domain, protocol.split) for domain in domains}
    for text in test.values():
        experts.masks(text)  # raises for a missing file before any scoring
    estimate = priors is None and (protocol.mode == "cached_prior" or protocol.topk is not None)
    if priors is not None:
        results = {domain: DomainResult(domain, prior=priors[domain]) for domain in domains}
    elif estimate:
        if protocol.topk is None:
            # Each expert is loaded once for both texts.
            texts = [_estimate_text(domain, protocol) for domain in domains] + list(test.values())
            source.score({text: experts.domains for text in texts})
        results = estimate_priors(experts, source, domains, protocol)
    else:
        results = {domain: DomainResult(domain) for domain in domains}
    kept = {}
    for domain, result in results.items():
        if result.prior is not None and protocol.topk is not None:
            result.prior = restrict_to_top_k(result.prior, protocol.topk)
        all_run = result.prior is None or protocol.rule.first_over_all
        kept[domain] = experts.domains if all_run else result.prior.domains_with_weight
    source.score({test[domain]: names for domain, names in kept.items()})
    for domain, result in results.items():
        _mix_text(experts, source, test[domain], kept[domain], protocol, result)
    return results


def _estimate_text(domain: str, protocol: Protocol) -> Text:
    return Text(domain, protocol.prior_split, protocol.prior_sequences)


def _mix_text(
    experts: Experts,
    source: Source,
    text: Text,
    names: Sequence[str],
    protocol: Protocol,
    result: DomainResult,
) -> None:
    """Fill in the result in one pass over the text for all mixtures and experts."""
    prior = None
    if result.prior is not None:
        by_domain = dict(zip(result.prior.domains, result.prior.weights, strict=True))
        prior = torch.tensor([by_domain[name] for name in names], dtype=torch.float64)
    modes = [mode for mode in MODES if mode != "cached_prior" or prior is not None]
    mixtures = {mode: Mixture(mode, len(names), protocol.rule, prior) for mode in modes}
    # The updating prior starts uniform, as in the estimate, whatever the prior in use is.
    mixtures["updating_prior"] = Mixture("updating_prior", len(names), protocol.rule)
    alone = {name: PerplexityCounter() for name in names}
    fewer = _leave_out(names, prior, protocol) if protocol.removal_test else {}
    for log_probs, mask in source.batches(text, names, protocol.batch):
        for mode, mixture in mixtures.items():
            mixed = mixture.mix_batch(log_probs, mask)
            if mode != protocol.mode:
                continue
            if not result.posterior:
                result.posterior = _along(mixed.log_weights[:, 0], mask[0], names)
            line = _line(text.domain, text.split, mixture, mixed, names, experts)
            result.lines.append(line)
        for index, tally in enumerate(alone.values()):
            tally.add_item(log_probs[index], mask)
        for rest, mixture in fewer.values():
            mixture.mix_batch(log_probs[rest], mask)
    size = experts.count_text_bytes(text)
    result.single = {name: _score(tally, size) for name, tally in alone.items()}
    result.modes = {mode: _score(mixture.tally, size) for mode, mixture in mixtures.items()}
    result.without = {name: _score(mixture.tally, size) for name, (_, mixture) in fewer.items()}


def _leave_out(
    names: Sequence[str], prior: Tensor | None, protocol: Protocol
) -> dict[str, tuple[list[int], Mixture]]:
    """Indices and mixture of the other experts, by the expert left out.

    The prior of the others is rescaled to sum to 1; an expert with all of the prior has no entry.
    """
    fewer = {}
    for left_out, name in enumerate(names):
        rest = [index for index in range(len(names)) if index != left_out]
        share = None
        if prior is not None and protocol.mode == "cached_prior":
            share = prior[rest] / prior[rest].sum()
        if rest and (share is None or bool(share.isfinite().all())):
            fewer[name] = rest, Mixture(protocol.mode, len(rest), protocol.rule, share)
    return fewer


def _along(log_weights: Tensor, mask: Tensor, names: Sequence[str]) -> dict[str, list[float]]:
    return {name: row.tolist() for name, row in zip(names, log_weights[:, mask].exp(), strict=True)}


def _line(
    domain: str,
    split: str,
    mixture: Mixture,
    mixed: MixedBatch,
    names: Sequence[str],
    experts: Experts,
) -> Line:
    """One record; experts that did not run have posterior 0."""

    def of_all(weights: Iterable[float]) -> list[float]:
        by_domain = dict(zip(names, weights, strict=True))
        return [by_domain.get(name, 0.0) for name in experts.domains]

    return {
        "dataset": domain,
        "split": split,
        "mode": mixture.mode,
        "ppl": mixture.tally.perplexity,
        "posterior": of_all(mixed.posterior.tolist()),
        "exp_avg_posterior": of_all(mixed.average.tolist()),
    }


def _score(tally: PerplexityCounter, size: int) -> Score:
    return Score(tally.nll, tally.tokens, size)
