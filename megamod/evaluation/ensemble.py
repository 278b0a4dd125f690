"""Mixtures of a forest's experts, estimated and scored on held-out text.

The protocol of DEMix and Branch-Train-Merge estimates a prior on the validation split of a domain
and scores its test split with that prior. Experts with prior 0 are not run.
Source: Gururangan et al. 2022 (DEMix), section 5; Li et al. 2022 (Branch-Train-Merge), section 2.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megamod.evaluation.expert_scores import Experts, ScoreSource, TextSelection
from megamod.evaluation.perplexity import Score
from megamod.mixture.ensemble import (
    MODES,
    MixedBatch,
    Mixture,
    PerplexityCounter,
    PosteriorRule,
    estimate_prior,
    make_leave_one_out_mixtures,
)
from megamod.mixture.prior import Prior, restrict_to_top_k
from megamod.progress import show_progress

BatchRecord = dict[str, object]
"""Record of a batch in the format of the DEMix release: ppl of all tokens so far, posterior of the
batch by expert, and moving average of the posteriors."""


@dataclass(frozen=True)
class MixingProtocol:
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
    lines: list[BatchRecord] = field(default_factory=list)
    posterior: dict[str, list[float]] = field(default_factory=dict)

    @property
    def best(self) -> str:
        """Domain of the expert with the lowest perplexity in `single`, which must not be empty."""
        return min(self.single, key=lambda domain: self.single[domain].perplexity)


def estimate_priors(
    experts: Experts, source: ScoreSource, domains: Sequence[str], protocol: MixingProtocol
) -> dict[str, DomainResult]:
    """Estimate the prior on the first sequences of each domain's `prior_split`.

    Args:
        experts: all of them get a weight.
        source: scores of the texts; asked to prepare them first.
        domains: domains of the texts.
        protocol: `prior_split`, `prior_sequences`, `rule` and `batch` count here.
    Returns:
        by domain a result with `estimate`, the equal `prior` (not restricted to the top k), which
        records its text, and the `lines` of the estimate; all else is empty.
    Raises:
        UserError: if a domain has no text or no file, or an expert cannot be loaded or run.
    """
    texts = [_select_estimate_text(domain, protocol) for domain in domains]
    for text in texts:
        experts.load_target_masks(text)  # raises for a missing file before any scoring
    source.prepare_scores({text: experts.domains for text in texts})
    results = {}
    for text in texts:
        result = DomainResult(text.domain)

        def append_record(mixture: Mixture, mixed: MixedBatch, result=result) -> None:
            """Add the record of a mixed batch to the lines of `result`, that of this text."""
            result.lines.append(
                _make_batch_record(
                    result.domain, protocol.prior_split, mixture, mixed, experts.domains, experts
                )
            )

        scored = source.iterate_batches(text, experts.domains, protocol.batch)
        prior = estimate_prior(experts.domains, scored, protocol.rule, append_record)
        source_text = {
            "data_digest": experts.data[experts.forest.experts[0].path].digest,
            "domain": text.domain,
            "split": text.split,
            "sequences": len(experts.load_target_masks(text)),
        }
        result.estimate = result.prior = replace(prior, text=source_text)
        results[text.domain] = result
    return results


def score_mixtures(
    experts: Experts,
    source: ScoreSource,
    domains: Sequence[str],
    protocol: MixingProtocol,
    priors: Mapping[str, Prior] | None = None,
) -> dict[str, DomainResult]:
    """Score all mixtures and single experts on each domain's text.

    Args:
        experts: those to mix; one with prior 0 is not run, unless `rule.first_over_all` is set.
        source: scores of the texts; asked to prepare them first.
        domains: domains of the texts.
        protocol: settings of the estimate and of the mixtures.
        priors: priors from files by domain; None: estimate them if the mode or top-k needs them.
    Returns:
        results by domain; without a prior, none for the mode "cached_prior".
    Raises:
        UserError: if top-k exceeds the number of experts, a domain has no text, or an expert cannot
            be loaded or run.
    """
    test_texts = {domain: TextSelection(domain, protocol.split) for domain in domains}
    for text in test_texts.values():
        experts.load_target_masks(text)  # raises for a missing file before any scoring
    estimate = priors is None and (protocol.mode == "cached_prior" or protocol.topk is not None)
    if priors is not None:
        results = {domain: DomainResult(domain, prior=priors[domain]) for domain in domains}
    elif estimate:
        if protocol.topk is None:
            # Each expert is loaded once for both texts.
            texts = [_select_estimate_text(domain, protocol) for domain in domains] + list(
                test_texts.values()
            )
            source.prepare_scores({text: experts.domains for text in texts})
        results = estimate_priors(experts, source, domains, protocol)
    else:
        results = {domain: DomainResult(domain) for domain in domains}
    experts_to_run = {}
    for domain, result in results.items():
        if result.prior is not None and protocol.topk is not None:
            result.prior = restrict_to_top_k(result.prior, protocol.topk)
        all_run = result.prior is None or protocol.rule.first_over_all
        experts_to_run[domain] = experts.domains if all_run else result.prior.domains_with_weight
    source.prepare_scores({test_texts[domain]: names for domain, names in experts_to_run.items()})
    for domain, result in results.items():
        _score_text(experts, source, test_texts[domain], experts_to_run[domain], protocol, result)
    return results


def _select_estimate_text(domain: str, protocol: MixingProtocol) -> TextSelection:
    """Return the beginning of a domain's text on which its prior is estimated, by `protocol`."""
    return TextSelection(domain, protocol.prior_split, protocol.prior_sequences)


def _score_text(
    experts: Experts,
    source: ScoreSource,
    text: TextSelection,
    names: Sequence[str],
    protocol: MixingProtocol,
    result: DomainResult,
) -> None:
    """Score one text under all mixtures and experts in one pass.

    Args:
        experts: all experts of the forest, with the data.
        source: scores of the text.
        text: the text, whose domain is that of `result`.
        names: domains of the experts to run, a subset of `experts.domains`.
        protocol: settings of the mixtures.
        result: gets `single`, `modes`, `without`, `posterior` and further `lines`; its `prior` is
            read.
    """
    prior = None
    if result.prior is not None:
        by_domain = dict(zip(result.prior.domains, result.prior.weights, strict=True))
        prior = torch.tensor([by_domain[name] for name in names], dtype=torch.float64)
    modes = [mode for mode in MODES if mode != "cached_prior" or prior is not None]
    mixtures = {mode: Mixture(mode, len(names), protocol.rule, prior) for mode in modes}
    # The updating prior starts uniform, as in the estimate, whatever the prior in use is.
    mixtures["updating_prior"] = Mixture("updating_prior", len(names), protocol.rule)
    single_counters = {name: PerplexityCounter() for name in names}
    without_expert: dict[str, tuple[list[int], Mixture]] = {}
    if protocol.removal_test:
        kept_prior = prior if protocol.mode == "cached_prior" else None
        without_expert = make_leave_one_out_mixtures(
            names, protocol.mode, protocol.rule, kept_prior
        )
    batches = source.iterate_batches(text, names, protocol.batch)
    for log_probs, mask in show_progress(batches, f"mixing on {text.domain}"):
        for mode, mixture in mixtures.items():
            mixed = mixture.mix_batch(log_probs, mask)
            if mode != protocol.mode:
                continue
            if not result.posterior:
                result.posterior = _list_weights_by_expert(mixed.log_weights[:, 0], mask[0], names)
            line = _make_batch_record(text.domain, text.split, mixture, mixed, names, experts)
            result.lines.append(line)
        for index, counter in enumerate(single_counters.values()):
            counter.add_tokens(log_probs[index], mask)
        for other_indices, mixture in without_expert.values():
            mixture.mix_batch(log_probs[other_indices], mask)
    text_bytes = experts.get_text_bytes(text)
    result.single = {
        name: _make_score(counter, text_bytes) for name, counter in single_counters.items()
    }
    result.modes = {
        mode: _make_score(mixture.counter, text_bytes) for mode, mixture in mixtures.items()
    }
    result.without = {
        name: _make_score(mixture.counter, text_bytes)
        for name, (_, mixture) in without_expert.items()
    }


def _list_weights_by_expert(
    log_weights: Tensor, mask: Tensor, names: Sequence[str]
) -> dict[str, list[float]]:
    """List the experts' weights along one sequence.

    Args:
        log_weights: [E, T].
        mask: [T] True where a token is real; others are skipped.
        names: domains of the E experts, keys of the result.
    """
    return {name: row.tolist() for name, row in zip(names, log_weights[:, mask].exp(), strict=True)}


def _make_batch_record(
    domain: str,
    split: str,
    mixture: Mixture,
    mixed: MixedBatch,
    names: Sequence[str],
    experts: Experts,
) -> BatchRecord:
    """Make the record of a batch that was just mixed.

    Args:
        domain, split: the text.
        mixture: state after the batch; gives the perplexity so far.
        mixed: results of the batch.
        names: domains of the experts that ran; all others have posterior 0.
        experts: all experts of the forest; the lists of the record have a number for each of them,
            in their order.
    """

    def expand_to_all_experts(weights: Iterable[float]) -> list[float]:
        """Return a weight for every expert of the forest, 0 for experts that did not run."""
        by_domain = dict(zip(names, weights, strict=True))
        return [by_domain.get(name, 0.0) for name in experts.domains]

    return {
        "dataset": domain,
        "split": split,
        "mode": mixture.mode,
        "ppl": mixture.counter.perplexity,
        "posterior": expand_to_all_experts(mixed.posterior.tolist()),
        "exp_avg_posterior": expand_to_all_experts(mixed.average.tolist()),
    }


def _make_score(counter: PerplexityCounter, size: int) -> Score:
    """Make the score of a mixture or an expert on one text.

    Args:
        counter: counted tokens of the text.
        size: bytes of the text; 0: unknown.
    """
    return Score(counter.nll, counter.tokens, size)
