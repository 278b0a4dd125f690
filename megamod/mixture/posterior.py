"""Posterior over experts along a text, and the mixture with it.

    log p(x_t) = log sum_j w_j(t) p_j(x_t)

Two rules compute the weights w_j(t) from a prior pi:

    history     w_j(t) ∝ pi_j exp(l_j(t) / temperature),
                l_j(t) = forgetting l_j(t-1) + log p_j(x_{t-1}),  l_j(0) = 0
    last_token  w_j(t) ∝ pi_j p_j(x_{t-1});  at the first token all experts with
                prior above 0 count equally, or with `first_over_all` all experts

With temperature and forgetting 1, `history` is Bayes' rule; `last_token` is the rule of the DEMix
release. Evidence is accumulated in float64; weights are float32 logarithms.
Source: Gururangan et al. 2022 (DEMix), section 5; Li et al. 2022 (Branch-Train-Merge), section 2.

Shapes: E experts, B sequences, T positions.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

RULES = ("last_token", "history")

# Largest cost of a token in nats. An expert for which a token is impossible is nearly excluded; if
# it is impossible for all experts, none is excluded.
IMPOSSIBLE = 1e4


def compute_token_weights(
    log_probs: Tensor,
    prior: Tensor,
    *,
    rule: str = "last_token",
    temperature: float = 1.0,
    forgetting: float = 1.0,
    mask: Tensor | None = None,
    first_over_all: bool = False,
) -> Tensor:
    """Compute the logarithms of the experts' weights for predicting each token.

    Weights at position t depend only on positions before t. At each position they sum to 1.

    Args:
        log_probs: [E, B, T] log-probability of each token by each expert; -inf is allowed.
        prior: [E] not negative; an expert with 0 keeps weight 0.
        rule: one of `RULES`.
        temperature: positive ("history" only).
        forgetting: from 0 to 1 ("history" only).
        mask: [B, T] True where a token is real; other tokens are skipped. None: all are real.
        first_over_all: at the first token count experts with prior 0 too, as the DEMix release
            does ("last_token" only).
    Returns:
        [E, B, T] float32.
    Raises:
        ValueError: for an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is unknown; choose one of {', '.join(RULES)}")
    if mask is None:
        mask = torch.ones(log_probs.shape[1:], dtype=torch.bool, device=log_probs.device)
    evidence = _compute_evidence(log_probs, prior, mask)
    has_history = _shift_right(mask.cumsum(-1)) > 0
    if rule == "history":
        summed = _sum_with_decay(evidence, 1 + mask.double() * (forgetting - 1))
        return _compute_log_weights(_shift_right(summed), prior, temperature)
    positions = torch.arange(mask.shape[-1], device=mask.device).where(mask, 0)
    latest = positions.cummax(-1).values.expand_as(evidence)
    evidence = _shift_right(evidence.gather(-1, latest))
    return _compute_log_weights(evidence, prior, 1.0, has_history, first_over_all)


def mix_log_probs(log_weights: Tensor, log_probs: Tensor) -> Tensor:
    """Compute the log-probabilities of the mixture, [B, T] float32.

    Args:
        log_weights, log_probs: [E, B, T] of the experts.
    """
    return torch.logsumexp(log_weights.float() + log_probs.float(), dim=0)


def average_final_posterior(log_weights: Tensor, mask: Tensor) -> Tensor:
    """Average the weights at the last real token of each sequence over the sequences: [E].

    Sequences without a real token are skipped; if all are, the result is NaN.

    Args:
        log_weights: [E, B, T].
        mask: [B, T] True where a token is real.
    """
    positions = torch.arange(mask.shape[-1], device=mask.device)
    last = positions.where(mask, -1).amax(-1)
    rows = (last >= 0).nonzero()[:, 0]
    return log_weights[:, rows, last[rows]].exp().mean(-1)


def _compute_evidence(log_probs: Tensor, prior: Tensor, mask: Tensor) -> Tensor:
    """Subtract from log-probabilities the best of the experts with a prior above 0, per token.

    Only differences matter, and this keeps sums over long texts small and exact.

    Args:
        log_probs: [E, B, T]; below -`IMPOSSIBLE` they count as that.
        prior: [E].
        mask: [B, T]; the result is 0 where it is False.
    Returns:
        [E, B, T] float64.
    """
    bounded = log_probs.double().clamp(min=-IMPOSSIBLE)
    has_weight = (prior > 0).reshape(-1, *[1] * mask.ndim)
    best_log_probs = bounded.masked_fill(~has_weight, -torch.inf).amax(0)
    return (bounded - best_log_probs).where(mask, 0.0)


def _sum_with_decay(values: Tensor, decay: Tensor) -> Tensor:
    """Compute s_t = decay_t s_{t-1} + values_t along the last dimension, in log2(T) passes.

    Args:
        values, decay: [..., T], the shape of the result; not changed.
    """
    step = 1
    while step < values.shape[-1]:
        values = values + decay * pad(values[..., :-step], (step, 0))
        decay = decay * pad(decay[..., :-step], (step, 0))
        step *= 2
    return values


def _shift_right(values: Tensor) -> Tensor:
    """Shift values [..., T] by one position to the right; the first becomes 0."""
    return pad(values[..., :-1], (1, 0))


def _compute_log_weights(
    evidence: Tensor,
    prior: Tensor,
    temperature: float,
    has_history: Tensor | None = None,
    first_over_all: bool = False,
) -> Tensor:
    """Compute log-weights [E, B, T] float32 from evidence and prior, normalised over the experts.

    Args:
        evidence: [E, B, T] float64, see `_compute_evidence`, of the tokens before each position.
        prior: [E].
        temperature: divides the evidence.
        has_history: [B, T], False where no real token precedes: weights are equal there over all
            experts with prior above 0, or with `first_over_all` over all. None: nowhere.
    """
    shape = (-1, *[1] * (evidence.ndim - 1))
    scores = prior.double().log().reshape(shape) + evidence / temperature
    if has_history is not None:
        counted = torch.ones_like(prior) if first_over_all else (prior > 0)
        scores = scores.where(has_history, counted.double().log().reshape(shape))
    return scores.log_softmax(0).float()
