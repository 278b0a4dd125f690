"""Modes of mixing, against plain arithmetic and against numbers of the original program."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megamod.errors import UserError
from megamod.mixture.ensemble import Mixture, PerplexityCounter, PosteriorRule, estimate_prior
from megamod.mixture.prior import Prior, restrict_to_top_k

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared/golden/demix_btm/ensemble"
MODES = ("cached_prior", "updating_prior", "uniform_prior", "simple_average")


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    if not GOLDEN.exists():
        pytest.skip(f"no recorded numbers at {GOLDEN}")
    return load_file(GOLDEN / "io.safetensors")


def real(scores: torch.Tensor) -> torch.Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool)


def test_the_prior_is_estimated_as_recorded(golden):
    mixture = Mixture("updating_prior", 4, PosteriorRule())
    for batch in range(6):
        scores = golden["target_logprobs"][batch]
        mixed = mixture.mix_batch(scores, real(scores))
        close(mixed.posterior, golden["estimate.posterior_per_batch"][batch])
        close(mixed.average, golden["estimate.ema_prior_after_batch"][batch])
        assert mixture.counter.perplexity == pytest.approx(
            float(golden["estimate.ppl"][batch]), rel=1e-5
        )
    batches = [(scores, real(scores)) for scores in golden["target_logprobs"][:6]]
    prior = estimate_prior("abcd", batches, PosteriorRule())
    close(torch.tensor(prior.weights), golden["cached.prior"])


@pytest.mark.parametrize(
    ("name", "mode", "rule"),
    [
        ("cached", "cached_prior", PosteriorRule()),
        ("uniform", "simple_average", PosteriorRule()),
        ("top2", "cached_prior", PosteriorRule(first_over_all=True)),
    ],
)
def test_mixtures_are_as_recorded(golden, name, mode, rule):
    prior = golden.get(f"{name}.prior", golden["cached.prior"])
    mixture = Mixture(mode, 4, rule, prior)
    for batch in range(6):
        scores = golden["target_logprobs"][6 + batch]
        mixed = mixture.mix_batch(scores, real(scores))
        close(mixed.log_probs, golden[f"{name}.mixture_logprobs"][batch])
        if name == "cached":
            close(mixed.posterior, golden["cached.posterior_per_batch"][batch])
            at_end = mixed.log_weights[:, :, -1].exp()
            close(at_end, golden["cached.final_posterior"][batch])
        if f"{name}.ppl" in golden:
            expected = float(golden[f"{name}.ppl"][batch])
            assert mixture.counter.perplexity == pytest.approx(expected, rel=1e-5)


def test_without_a_prior_all_experts_count_equally(golden):
    mixture = Mixture("uniform_prior", 4, PosteriorRule())
    mixed = []
    for scores in golden["target_logprobs"][6:]:
        mixed.append(mixture.mix_batch(scores, real(scores)).log_probs)
    close(torch.stack(mixed), golden["noprior.mixture_logprobs"])


def test_top_two_are_as_recorded(golden):
    names = ("a", "b", "c", "d")
    cached = Prior(names, tuple(golden["cached.prior"].tolist()))
    close(torch.tensor(restrict_to_top_k(cached, 2).weights), golden["top2.prior"])


def random_batches(count: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        mask = torch.arange(6) < torch.tensor([[6], [4]])
        batches.append((-4 * torch.rand(3, 2, 6, generator=generator), mask))
    return batches


def test_the_average_follows_the_last_real_tokens():
    average, prior = None, [1 / 3] * 3
    mixture = Mixture("updating_prior", 3, PosteriorRule("history"))
    for scores, mask in random_batches():
        posterior = [0.0] * 3
        for row, length in enumerate((6, 4)):
            shares = [
                prior[e] * math.exp(float(scores[e, row, : length - 1].sum())) for e in range(3)
            ]
            for expert in range(3):
                posterior[expert] += shares[expert] / sum(shares) / 2
        mixed = mixture.mix_batch(scores, mask)
        assert mixed.posterior.tolist() == pytest.approx(posterior, abs=1e-6)
        average = (
            posterior
            if average is None
            else [0.7 * old + 0.3 * new for old, new in zip(average, posterior, strict=True)]
        )
        prior = average
        assert mixed.average.tolist() == pytest.approx(average, abs=1e-6)
    prior = estimate_prior("abc", random_batches(), PosteriorRule("history"))
    assert prior.weights == pytest.approx(average, abs=1e-6) and prior.rule == "history"


@pytest.mark.parametrize("mode", MODES)
def test_order_of_experts_and_twins_do_not_matter(mode):
    prior, order = torch.tensor([0.6, 0.3, 0.1]), [2, 0, 1]
    for rule in (PosteriorRule(), PosteriorRule("history", 1.5, 0.9)):
        plain, turned = Mixture(mode, 3, rule, prior), Mixture(mode, 3, rule, prior[order])
        twins = Mixture(mode, 3, rule, prior)
        single = PerplexityCounter()
        for scores, mask in random_batches():
            plain_batch = plain.mix_batch(scores, mask)
            other = turned.mix_batch(scores[order], mask)
            close(plain_batch.log_probs, other.log_probs)
            close(plain_batch.posterior[order], other.posterior)
            twins.mix_batch(scores[:1].expand(3, -1, -1), mask)
            single.add_tokens(scores[0], mask)
        assert twins.counter.nll == pytest.approx(single.nll, rel=1e-6)
        assert plain.counter.tokens == 5 * 10


def test_a_fixed_prior_stays():
    first = random_batches()[0]
    for mode in ("cached_prior", "uniform_prior"):
        mixture = Mixture(mode, 3, PosteriorRule(), torch.tensor([0.6, 0.3, 0.1]))
        before = mixture.mix_batch(*first).log_probs
        assert torch.equal(mixture.mix_batch(*first).log_probs, before)
    alike = Mixture("cached_prior", 3, PosteriorRule(), torch.tensor([1 / 3] * 3)).mix_batch(*first)
    assert torch.equal(before, alike.log_probs)


def test_no_expert_is_lost_for_good():
    certain = torch.tensor([-1.0, -9.0]).reshape(2, 1, 1).expand(2, 1, 50)
    mask = torch.ones(1, 50, dtype=torch.bool)
    prior = estimate_prior("ab", [(certain, mask)] * 3, PosteriorRule("history"))
    assert prior.weights == pytest.approx((1 - 1e-4, 1e-4), rel=1e-3)
    mixture = Mixture("updating_prior", 2, PosteriorRule("history"))
    mixture.mix_batch(certain, mask)
    turned = mixture.mix_batch(certain.flip(0), mask)
    assert float(turned.posterior[1]) == pytest.approx(1)
    # An expert that was left out on purpose stays out.
    mixture = Mixture("updating_prior", 2, PosteriorRule("history"), torch.tensor([0.0, 1.0]))
    mixture.mix_batch(certain, mask)
    assert mixture.prior.tolist() == [0, 1]


def test_infinite_tokens_count_in_neither_sum_nor_number():
    counter = PerplexityCounter()
    counter.add_tokens(
        torch.tensor([[-1.0, -torch.inf, -3.0, -5.0]]), torch.tensor([[1, 1, 1, 0]]).bool()
    )
    assert (counter.nll, counter.tokens) == (4.0, 2) and counter.perplexity == pytest.approx(
        math.exp(2)
    )


def test_a_prior_needs_text():
    with pytest.raises(UserError, match="on no text"):
        estimate_prior("ab", [], PosteriorRule())
    with pytest.raises(ValueError, match="lacks a prior"):
        Mixture("cached_prior", 2, PosteriorRule())


def close(ours: torch.Tensor, recorded: torch.Tensor) -> None:
    torch.testing.assert_close(ours.double(), recorded.double(), rtol=0, atol=2e-6)
