"""Mixtures of a forest's experts, estimated and scored on held-out text.

The protocol of DEMix and Branch-Train-Merge: estimate a prior on the validation split of a domain,
then score its test split with that prior. Experts that the prior leaves out are not run.
Source: Gururangan et al. 2022 (DEMix), section 5; Li et al. 2022 (Branch-Train-Merge), section 2.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megamod.evaluation.expert_scores import Experts, Source, Text
from megamod.evaluation.perplexity import Score
from megamod.mixture.ensemble import MODES, Mixed, Mixture, Rule, Tally, estimate_prior
from megamod.mixture.prior import Prior, top_k

Line = dict[str, object]
"""A record as the DEMix release writes them: ppl of all tokens so far, posterior of the batch by
expert, and the moving average of the posteriors."""


@dataclass(frozen=True)
class Protocol:
    """How to estimate and to mix.

    Attributes:
        mode: the mode whose records and posterior are kept, one of `MODES`.
        rule: how the posterior follows a text.
        topk: keep so many experts of the prior; None: all.
        prior_split, prior_sequences: text to estimate the prior on.
        split: text to score, whole.
        batch: sequences whose posterior the moving average takes in at once.
        removal_test: score without each of the experts as well.
    """

    mode: str = "cached_prior"
    rule: Rule = field(default_factory=Rule)
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
        estimate: the prior as estimated; None where it was given or no mode needed one.
        prior: in use, after top-k.
        single: of each expert that was run, alone.
        modes: of the mixtures, by mode.
        without: of the chosen mode without an expert, by its domain.
        lines: records of the estimate and of the chosen mode.
        posterior: weights [T] of the chosen mode along the first sequence, by expert.
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
        """The expert that does best alone."""
        return min(self.single, key=lambda domain: self.single[domain].perplexity)


def estimate_priors(
    experts: Experts, source: Source, domains: Sequence[str], protocol: Protocol
) -> dict[str, DomainResult]:
    """The prior on each domain's text, with the records of its estimate; before top-k.

    Raises:
        UserError: if there is no text.
    """
    texts = [_estimate_text(domain, protocol) for domain in domains]
    for text in texts:
        experts.masks(text)  # a missing file shows before any score
    source.score({text: experts.domains for text in texts})
    results = {}
    for text in texts:
        result = DomainResult(text.domain)

        def watch(mixture: Mixture, mixed: Mixed, result=result) -> None:
            result.lines.append(
                _line(result.domain, protocol.prior_split, mixture, mixed, experts.domains, experts)
            )

        scored = source.batches(text, experts.domains, protocol.batch)
        prior = estimate_prior(experts.domains, scored, protocol.rule, watch)
        told = {
            "data_digest": experts.data[experts.forest.experts[0].path].digest,
            "domain": text.domain,
            "split": text.split,
            "sequences": len(experts.masks(text)),
        }
        result.estimate = result.prior = replace(prior, text=told)
        results[text.domain] = result
    return results


def evaluate(
    experts: Experts,
    source: Source,
    domains: Sequence[str],
    protocol: Protocol,
    priors: Mapping[str, Prior] | None = None,
) -> dict[str, DomainResult]:
    """Scores of all mixtures on each domain's text.

    Args:
        priors: by domain, from files; None: estimated, where the mode or top-k needs them.
    Raises:
        UserError: if top-k is more than there are experts.
    """
    test = {domain: Text(domain, protocol.split) for domain in domains}
    for text in test.values():
        experts.masks(text)  # a missing file shows before any score
    estimate = priors is None and (protocol.mode == "cached_prior" or protocol.topk is not None)
    if priors is not None:
        results = {domain: DomainResult(domain, prior=priors[domain]) for domain in domains}
    elif estimate:
        if protocol.topk is None:
            # Each expert is loaded once for both texts.
            wanted = [_estimate_text(domain, protocol) for domain in domains] + list(test.values())
            source.score({text: experts.domains for text in wanted})
        results = estimate_priors(experts, source, domains, protocol)
    else:
        results = {domain: DomainResult(domain) for domain in domains}
    kept = {}
    for domain, result in results.items():
        if result.prior is not None and protocol.topk is not None:
            result.prior = top_k(result.prior, protocol.topk)
        everyone = result.prior is None or protocol.rule.first_over_all
        kept[domain] = experts.domains if everyone else result.prior.kept
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
    """Fill in the result: one pass over the text for all mixtures and experts."""
    prior = None
    if result.prior is not None:
        by_domain = dict(zip(result.prior.domains, result.prior.weights, strict=True))
        prior = torch.tensor([by_domain[name] for name in names], dtype=torch.float64)
    modes = [mode for mode in MODES if mode != "cached_prior" or prior is not None]
    mixtures = {mode: Mixture(mode, len(names), protocol.rule, prior) for mode in modes}
    # A prior that follows the text starts alike, as in the estimate, whatever was estimated.
    mixtures["updating_prior"] = Mixture("updating_prior", len(names), protocol.rule)
    alone = {name: Tally() for name in names}
    fewer = _leave_out(names, prior, protocol) if protocol.removal_test else {}
    for log_probs, mask in source.batches(text, names, protocol.batch):
        for mode, mixture in mixtures.items():
            mixed = mixture.add(log_probs, mask)
            if mode != protocol.mode:
                continue
            if not result.posterior:
                result.posterior = _along(mixed.log_weights[:, 0], mask[0], names)
            line = _line(text.domain, text.split, mixture, mixed, names, experts)
            result.lines.append(line)
        for place, tally in enumerate(alone.values()):
            tally.add(log_probs[place], mask)
        for rest, mixture in fewer.values():
            mixture.add(log_probs[rest], mask)
    size = experts.bytes_of(text)
    result.single = {name: _score(tally, size) for name, tally in alone.items()}
    result.modes = {mode: _score(mixture.tally, size) for mode, mixture in mixtures.items()}
    result.without = {name: _score(mixture.tally, size) for name, (_, mixture) in fewer.items()}


def _leave_out(
    names: Sequence[str], prior: Tensor | None, protocol: Protocol
) -> dict[str, tuple[list[int], Mixture]]:
    """For each expert the places of the others and their mixture, if any of them counts.

    The others share the prior of the one left out in proportion to their own.
    """
    fewer = {}
    for left_out, name in enumerate(names):
        rest = [place for place in range(len(names)) if place != left_out]
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
    mixed: Mixed,
    names: Sequence[str],
    experts: Experts,
) -> Line:
    """A record; experts that were not run have posterior 0."""

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


def _score(tally: Tally, size: int) -> Score:
    return Score(tally.nll, tally.tokens, size)
