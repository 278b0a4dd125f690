"""Losses of dense models and forests on held-out text, with the experts mixed in several ways."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megamod.evaluation.ensemble import MixingProtocol, estimate_priors
from megamod.evaluation.expert_scores import Experts, SequentialScores, TextSelection
from megamod.evaluation.held_out_data import HeldOut
from megamod.evaluation.model_folders import find_saved_models, score_models
from megamod.evaluation.perplexity import DENSE
from megamod.mixture.ensemble import (
    Mixture,
    PerplexityCounter,
    PosteriorRule,
    make_leave_one_out_mixtures,
)
from megamod.mixture.prior import Prior, restrict_to_top_k
from megamod.states.forest import Forest

CPU = torch.device("cpu")
BATCH = 16  # sequences of a forward pass, and of a batch of the mixtures
RULES = {
    "mixed": ("cached_prior", PosteriorRule()),
    "history": ("cached_prior", PosteriorRule("history")),
    "history_0.9": ("cached_prior", PosteriorRule("history", forgetting=0.9)),
    "uniform_prior": ("uniform_prior", PosteriorRule()),
    "simple_average": ("simple_average", PosteriorRule()),
}
"""Rows of a forest's losses, and the mode and rule that each is mixed by."""
TOP = (1, 2, 4)  # numbers of experts in the mixtures topK

Losses = dict[str, dict[str, float]]
"""Nats per token by row and domain."""


@dataclass(frozen=True)
class ScoredText:
    """Held-out text: a split of some domains of a data-bin."""

    databin: Path
    domains: Sequence[str]
    split: str

    def make_held_out(self) -> HeldOut:
        """Return the text as `HeldOut`, with the settings that all scores of a study share."""
        return HeldOut(
            str(self.databin), self.domains, self.split, None, BATCH, "auto", own_only=False
        )


@dataclass
class ForestLosses:
    """Losses of a forest.

    Attributes:
        rows: losses of the mixtures, and "own": each domain's text under the expert of that name.
        experts: losses of each expert alone, by its name.
        without: losses of the mixture "mixed" without an expert, by the name of that expert.
        priors: estimated weights of the experts, by domain.
    """

    rows: Losses
    experts: Losses
    without: Losses
    priors: dict[str, dict[str, float]]


def score_expert(model: Path, expert: str, text: ScoredText) -> dict[str, float]:
    """Score a dense model (`expert` is `DENSE`), or one expert of a model with experts, on a text.

    Args:
        model: model folder.
        expert: name of the expert, or `DENSE`.
        text: the text to score.
    Returns:
        nats per token by domain.
    """
    held_out = text.make_held_out()
    if expert != DENSE:
        held_out = replace(held_out, experts=(expert,))
    scores = score_models(find_saved_models(model, held_out), held_out, CPU)[expert]
    return {domain: _compute_loss(score.nll, score.tokens) for domain, score in scores.items()}


def score_forest(forest: Forest, text: ScoredText) -> ForestLosses:
    """Score all experts and mixtures of a forest; every expert reads every text once.

    Priors are estimated on the first hundred sequences of the valid split. The mixtures are those
    of `RULES`, and `topK` of the K experts with the largest prior for each K of `TOP` below the
    number of experts. All experts run on the CPU.
    """
    experts = Experts(forest, text.make_held_out(), CPU)
    source, names = SequentialScores(experts), experts.domains
    protocol = MixingProtocol()
    texts = {domain: TextSelection(domain, text.split) for domain in text.domains}
    before = [
        TextSelection(d, protocol.prior_split, protocol.prior_sequences) for d in text.domains
    ]
    source.prepare_scores(dict.fromkeys([*texts.values(), *before], names))
    priors = {
        name: estimate_priors(
            experts, source, text.domains, MixingProtocol(rule=PosteriorRule(name))
        )
        for name in {rule.name for _, rule in RULES.values()}
    }
    losses = ForestLosses({}, {}, {}, {})
    for domain, scored in texts.items():
        prior = priors["last_token"][domain].estimate
        losses.priors[domain] = {
            name: round(weight, 6) for name, weight in zip(names, prior.weights, strict=True)
        }
        mixtures = {
            row: _make_mixture(mode, rule, priors[rule.name][domain].estimate)
            for row, (mode, rule) in RULES.items()
        }
        mixtures |= {
            f"top{count}": _make_mixture(
                "cached_prior", PosteriorRule(), restrict_to_top_k(prior, count)
            )
            for count in TOP
            if count < len(names)
        }
        weights = torch.tensor(prior.weights, dtype=torch.float64)
        fewer = make_leave_one_out_mixtures(prior.domains, "cached_prior", PosteriorRule(), weights)
        alone = {name: PerplexityCounter() for name in names}
        for log_probs, mask in source.iterate_batches(scored, names, BATCH):
            for mixture in mixtures.values():
                mixture.mix_batch(log_probs, mask)
            for places, mixture in fewer.values():
                mixture.mix_batch(log_probs[places], mask)
            for counter, scores in zip(alone.values(), log_probs, strict=True):
                counter.add_tokens(scores, mask)
        _add_losses(
            losses.rows, domain, {row: mixture.counter for row, mixture in mixtures.items()}
        )
        _add_losses(losses.experts, domain, alone)
        _add_losses(
            losses.without, domain, {name: mixture.counter for name, (_, mixture) in fewer.items()}
        )
        if domain in alone:
            _add_losses(losses.rows, domain, {"own": alone[domain]})
    return losses


def _make_mixture(mode: str, rule: PosteriorRule, prior: Prior) -> Mixture:
    """Make a mixture of all experts that starts from the weights of a prior."""
    weights = torch.tensor(prior.weights, dtype=torch.float64)
    return Mixture(mode, len(weights), rule, weights)


def _add_losses(losses: Losses, domain: str, counters: Mapping[str, PerplexityCounter]) -> None:
    """Add the losses of one domain to `losses`, in place.

    Args:
        losses: nats per token by row, then domain.
        counters: counted tokens of the domain's text by row.
    """
    for row, counter in counters.items():
        losses.setdefault(row, {})[domain] = _compute_loss(counter.nll, counter.tokens)


def _compute_loss(nll: float, tokens: int) -> float:
    """Compute nats per token from the sum over `tokens` tokens, rounded to six decimals."""
    return round(nll / tokens, 6)
