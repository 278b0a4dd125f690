"""Mixtures over a whole text, batch by batch: estimate a prior, or score with one.

Inputs are log-probabilities of target tokens, of whichever models.
Source: Gururangan et al. 2022 (DEMix), section 5.

Shapes: E experts, B sequences, T positions.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megamod.errors import UserError
from megamod.mixture.posterior import average_final_posterior, compute_token_weights, mix_log_probs
from megamod.mixture.prior import Prior

MODES = ("cached_prior", "updating_prior", "uniform_prior", "simple_average")
"""Source of the weights. The first three apply the rule to a prior: a fixed one, one updated with
the posterior of each batch, the uniform one. The last weighs all experts equally, without a rule.
"""

NEW_SHARE = 0.3  # of the newest batch in the moving average

# Least weight of an expert in a prior updated with posteriors of whole sequences: these are 0 or 1
# after a hundred tokens, and an expert with prior 0 never returns.
LEAST = 1e-4


@dataclass(frozen=True)
class PosteriorRule:
    """Settings of the posterior along a text: the arguments of `compute_token_weights`.

    `name` is its `rule`, one of `posterior.RULES`.
    """

    name: str = "last_token"
    temperature: float = 1.0
    forgetting: float = 1.0
    first_over_all: bool = False


@dataclass(frozen=True)
class MixedBatch:
    """Results of one batch.

    Attributes:
        log_probs: [B, T] of the mixture, float32, on the device of the batch.
        log_weights: [E, B, T] of the experts for predicting each token, as `log_probs`.
        posterior: [E] of the batch, the mean over its sequences; float64 on the CPU.
        average: [E] moving average of the batches' posteriors so far, as `posterior`.
    """

    log_probs: Tensor
    log_weights: Tensor
    posterior: Tensor
    average: Tensor


def compute_perplexity(nll: float, tokens: int) -> float:
    """Compute exp(nll / tokens), nll in nats; inf if it overflows or no token was counted."""
    mean = nll / tokens if tokens else math.inf
    return math.exp(mean) if mean < 700 else math.inf


class PerplexityCounter:
    """Sum of negative log-likelihoods (nats) and number of tokens.

    Tokens of infinite log-likelihood count in neither, as in the DEMix release.
    """

    def __init__(self) -> None:
        self.nll, self.tokens = 0.0, 0

    def add_tokens(self, log_probs: Tensor, mask: Tensor) -> None:
        """Add the tokens where `mask` is True; log-probabilities and mask are [B, T]."""
        counted = log_probs[mask & log_probs.isfinite()]
        self.nll -= float(counted.double().sum())
        self.tokens += counted.numel()

    @property
    def perplexity(self) -> float:
        """Perplexity of all tokens so far; inf on overflow and before the first token."""
        return compute_perplexity(self.nll, self.tokens)


class Mixture:
    """State of a mixture along a text.

    Attributes:
        prior: [E] float64, that of the next batch.
        counter: scores of the mixture on all batches so far.
        average: [E] moving average of the batches' posteriors; None before the first batch.
    """

    def __init__(
        self, mode: str, expert_count: int, rule: PosteriorRule, prior: Tensor | None = None
    ):
        """Start at the beginning of a text.

        Args:
            mode: see `MODES`.
            expert_count: E.
            rule: rule of the posterior; not used by "simple_average".
            prior: [E], for "cached_prior"; the initial one for "updating_prior" (None: uniform).
        Raises:
            ValueError: for an unknown mode, or "cached_prior" without a prior.
        """
        if mode not in MODES or (mode == "cached_prior" and prior is None):
            raise ValueError(f"mode {mode!r} is not one of {MODES}, or lacks a prior")
        uniform = torch.full((expert_count,), 1 / expert_count, dtype=torch.float64)
        self.mode, self.rule = mode, rule
        self.prior = uniform if prior is None or mode == "uniform_prior" else prior.double()
        self.counter = PerplexityCounter()
        self.average: Tensor | None = None

    def mix_batch(self, log_probs: Tensor, mask: Tensor) -> MixedBatch:
        """Mix the next batch, and advance the state.

        The tokens are added to `counter`, the batch's posterior to `average`, and with
        "updating_prior" the new average becomes the prior of the next batch.

        Args:
            log_probs: [E, B, T] of the target tokens.
            mask: [B, T] True where a token is real.
        Raises:
            ValueError: for an unknown rule.
        """
        prior = self.prior.to(log_probs.device)
        if self.mode == "simple_average":
            weights = log_probs.new_full(log_probs.shape, -math.log(len(prior)))
        else:
            weights = compute_token_weights(
                log_probs,
                prior,
                rule=self.rule.name,
                temperature=self.rule.temperature,
                forgetting=self.rule.forgetting,
                mask=mask,
                first_over_all=self.rule.first_over_all,
            )
        mixed = mix_log_probs(weights, log_probs)
        self.counter.add_tokens(mixed, mask)
        posterior = average_final_posterior(weights, mask).double().cpu()
        if self.average is None:
            self.average = posterior
        else:
            self.average = (1 - NEW_SHARE) * self.average + NEW_SHARE * posterior
        if self.mode == "updating_prior":
            self.prior = self._make_prior_from_average(self.average)
        return MixedBatch(mixed, weights, posterior, self.average)

    def _make_prior_from_average(self, average: Tensor) -> Tensor:
        """Make a prior [E] with sum 1 from average posteriors [E].

        With the rule "history" no expert whose present prior is above 0 falls to 0, see `LEAST`.
        """
        if self.rule.name == "history":
            average = average.clamp(min=LEAST).where(self.prior > 0, 0.0)
        return average / average.sum()


def make_leave_one_out_mixtures(
    names: Sequence[str], mode: str, rule: PosteriorRule, prior: Tensor | None
) -> dict[str, tuple[list[int], Mixture]]:
    """Make, for each expert, a mixture of all others.

    Args:
        names: domains of the experts.
        mode, rule: see `Mixture`.
        prior: [E] float64 weights of these experts; those of the others are rescaled to sum 1.
            None: see `Mixture`.
    Returns:
        by the domain of the omitted expert: indices of the others among `names`, and their mixture.
        No entry for an only expert, and none for one that has all of the prior.
    """
    mixtures = {}
    for left_out, name in enumerate(names):
        others = [index for index in range(len(names)) if index != left_out]
        rescaled = None if prior is None else prior[others] / prior[others].sum()
        if others and (rescaled is None or bool(rescaled.isfinite().all())):
            mixtures[name] = (others, Mixture(mode, len(others), rule, rescaled))
    return mixtures


def estimate_prior(
    domains: Iterable[str],
    batches: Iterable[tuple[Tensor, Tensor]],
    rule: PosteriorRule,
    report_batch: Callable[[Mixture, MixedBatch], None] | None = None,
) -> Prior:
    """Estimate a prior on a text: the moving average of the batches' posteriors.

    It starts uniform, and the average so far is the prior of each next batch.

    Args:
        domains: domains of the E experts.
        batches: log-probabilities [E, B, T] and masks [B, T].
        rule: rule of the posterior.
        report_batch: called after each batch with the mixture and the results of the batch.
    Raises:
        UserError: if there is no batch.
    """
    domains = tuple(domains)
    mixture = Mixture("updating_prior", len(domains), rule)
    for log_probs, mask in batches:
        mixed = mixture.mix_batch(log_probs, mask)
        if report_batch is not None:
            report_batch(mixture, mixed)
    if mixture.average is None:
        raise UserError("a prior cannot be estimated on no text")
    return Prior(domains, tuple(mixture.prior.tolist()), rule.name)
