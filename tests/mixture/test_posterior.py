"""Posterior against Bayes' rule written out token by token."""

import math

import pytest
import torch

from megamod.mixture.posterior import average_final_posterior, compute_token_weights, mix_log_probs

PRIOR = [0.5, 0.2, 0.25, 0.05]
SETTINGS = [
    {"rule": "last_token"},
    {"rule": "history"},
    {"rule": "history", "temperature": 2.5},
    {"rule": "history", "forgetting": 0.6},
    {"rule": "history", "forgetting": 0.0, "temperature": 0.5},
]


def random_scores(experts: int = 4, batch: int = 3, length: int = 9, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return -6 * torch.rand(experts, batch, length, generator=generator)


def by_hand(column, prior, rule, temperature=1.0, forgetting=1.0) -> list[float]:
    """Weights [E] after the tokens of `column` ([E] lists of log-probabilities)."""
    experts, length = len(column), len(column[0])
    if rule == "last_token" and length == 0:
        alive = [1.0 if share > 0 else 0.0 for share in prior]
        return [share / sum(alive) for share in alive]
    shares = []
    for expert in range(experts):
        if rule == "last_token":
            likelihood = math.exp(column[expert][-1])
        else:
            evidence = 0.0
            for log_prob in column[expert]:
                evidence = forgetting * evidence + log_prob
            likelihood = math.exp(evidence / temperature)
        shares.append(prior[expert] * likelihood)
    return [share / sum(shares) for share in shares]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("prior", [PRIOR, [0.25] * 4, [0.7, 0.0, 0.3, 0.0]])
def test_weights_are_bayes_rule_token_by_token(setting, prior):
    scores = random_scores()
    weights = compute_token_weights(scores, torch.tensor(prior), **setting)
    assert weights.dtype == torch.float32
    mixed = mix_log_probs(weights, scores)
    for row in range(3):
        for at in range(9):
            column = [scores[expert, row, :at].tolist() for expert in range(4)]
            hand = by_hand(column, prior, **setting)
            assert weights[:, row, at].exp().tolist() == pytest.approx(hand, abs=1e-6)
            total = sum(w * math.exp(s) for w, s in zip(hand, scores[:, row, at], strict=True))
            assert float(mixed[row, at]) == pytest.approx(math.log(total), abs=2e-6)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_long_text_stays_exact(setting):
    scores = random_scores(length=700, batch=1, seed=3)
    scores[1] = scores[0] + 1e-3 * torch.randn(1, 700, generator=torch.Generator().manual_seed(1))
    weights = compute_token_weights(scores, torch.tensor(PRIOR), **setting).exp()
    torch.testing.assert_close(weights.sum(0), torch.ones(1, 700))
    evidence = torch.zeros(4, dtype=torch.float64)
    for log_probs in scores[:, 0, :-1].double().T:
        if setting["rule"] == "last_token":
            evidence = log_probs
        else:
            evidence = setting.get("forgetting", 1.0) * evidence + log_probs
    hand = (torch.tensor(PRIOR).log() + evidence / setting.get("temperature", 1.0)).softmax(0)
    torch.testing.assert_close(weights[:, 0, -1], hand.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("setting", SETTINGS)
def test_masked_tokens_are_skipped(setting):
    scores, prior = random_scores(batch=1, length=6), torch.tensor(PRIOR)
    short = compute_token_weights(scores, prior, **setting)
    for places in ([3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5], [0, 2, 3, 5, 6, 8]):
        padded, mask = torch.full((4, 1, 9), -1.0), torch.zeros(1, 9, dtype=torch.bool)
        padded[:, :, places], mask[:, places] = scores, True
        padded[0, 0, ~mask[0]] = -9.0
        weights = compute_token_weights(padded, prior, mask=mask, **setting)
        torch.testing.assert_close(weights[:, :, places], short)
        torch.testing.assert_close(
            average_final_posterior(weights, mask),
            average_final_posterior(short, torch.ones(1, 6).bool()),
        )


@pytest.mark.parametrize("setting", SETTINGS)
def test_properties_of_a_mixture(setting):
    scores, prior = random_scores(seed=5), torch.tensor(PRIOR)
    weights = compute_token_weights(scores, prior, **setting)
    order = torch.tensor([2, 0, 3, 1])
    permuted = compute_token_weights(scores[order], prior[order], **setting)
    torch.testing.assert_close(permuted, weights[order])
    alike = scores[:1].expand(4, -1, -1)
    torch.testing.assert_close(
        mix_log_probs(compute_token_weights(alike, prior, **setting), alike), scores[0]
    )
    only = torch.tensor([0.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(
        mix_log_probs(compute_token_weights(scores, only, **setting), scores), scores[1]
    )
    single = compute_token_weights(scores[:1], torch.ones(1), **setting)
    assert torch.equal(mix_log_probs(single, scores[:1]), scores[0])
    # What comes later cannot change a weight.
    later = scores.clone()
    later[:, :, 5:] = random_scores(seed=6)[:, :, 5:]
    assert torch.equal(compute_token_weights(later, prior, **setting)[..., :6], weights[..., :6])


@pytest.mark.parametrize("setting", SETTINGS)
def test_impossible_tokens_give_no_nan(setting):
    scores, prior = random_scores(batch=1), torch.tensor([0.5, 0.5, 0.0, 0.0])
    scores[0, 0, 2] = -torch.inf  # to one expert
    scores[:, 0, 5] = -torch.inf  # to all of them
    weights = compute_token_weights(scores, prior, **setting)
    assert not weights.isnan().any() and weights[2:].exp().max() == 0
    torch.testing.assert_close(weights.exp().sum(0), torch.ones(1, 9))
    assert weights[0, 0, 3].exp() == 0
    mixed = mix_log_probs(weights, scores)
    assert mixed[0, 5] == -torch.inf and mixed[0, :5].isfinite().all()
    if setting["rule"] == "last_token":
        torch.testing.assert_close(weights[:2, 0, 6].exp(), torch.tensor([0.5, 0.5]))


def test_experts_without_prior_count_at_the_first_token_on_request():
    scores, prior = random_scores(), torch.tensor([0.5, 0.5, 0.0, 0.0])
    kept = compute_token_weights(scores, prior).exp()
    every = compute_token_weights(scores, prior, first_over_all=True).exp()
    assert kept[:, 0, 0].tolist() == pytest.approx([0.5, 0.5, 0, 0])
    assert every[:, 0, 0].tolist() == pytest.approx([0.25] * 4)
    assert torch.equal(kept[:, :, 1:], every[:, :, 1:])


def test_an_unknown_rule_is_named():
    with pytest.raises(ValueError, match="rule 'bayes' is unknown; choose one of last_token, hist"):
        compute_token_weights(random_scores(), torch.tensor(PRIOR), rule="bayes")
