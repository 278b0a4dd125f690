import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from saved_models import BYTES, DOMAINS, LENGTH, TOKENS, VOCAB, make_data, make_model, plain_nll
from torch import nn

from megamod.data.lm.pretraining import LmData
from megamod.evaluation.perplexity import (
    DENSE,
    DomainEvaluation,
    Score,
    compute_perplexities,
    select_own_scores,
    select_rank_share,
    sum_batch_nll,
)
from megamod.models.lm.demix import DemixForCausalLM

CPU = torch.device("cpu")


class Fixed(nn.Module):
    """Stands in for a model: every log-probability is given."""

    def __init__(self, value: float = -math.log(VOCAB)):
        super().__init__()
        self.value, self.seen = value, []

    def forward(self, input_ids, attention_mask, shift_labels, domain):
        self.seen.append((domain, self.training, torch.is_grad_enabled()))
        log_probs = torch.full(shift_labels.shape, self.value).masked_fill(
            shift_labels == -100, 0.0
        )
        return SimpleNamespace(token_log_probs=log_probs)


def batch(*labels: list[int]) -> dict[str, object]:
    rows = torch.tensor(labels)
    return {"input_ids": rows.clamp(min=0), "labels": rows}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return make_data(folder / "bin"), make_model(folder / "model", untie="feedforward")


def evaluation(built, part=0, parts=1, batch_size=2) -> DomainEvaluation:
    data = LmData(str(built[0]), domains=None, block_size=LENGTH, domain_token=False)
    return DomainEvaluation(
        model=DemixForCausalLM.from_pretrained(built[1]),
        experts=DOMAINS,
        scorable=DOMAINS,
        takes_domain=True,
        domains=DOMAINS,
        batches=lambda domain: data.iterate_eval_batches(domain, "test", batch_size, 0),
        count_bytes=lambda domain: data.get_text_bytes(domain, "test"),
        part=part,
        parts=parts,
        device=CPU,
        reduce=lambda sums: None,
    )


def test_guessing_costs_the_size_of_the_vocabulary():
    score = Score(nll=10 * math.log(VOCAB), tokens=10, bytes=40)
    assert score.perplexity == pytest.approx(VOCAB)
    assert score.bits_per_byte == pytest.approx(math.log2(VOCAB) / 4)
    assert Score(1.0, 1).bits_per_byte is None
    assert Score(1e6, 1).perplexity == math.inf
    assert Score(0.0, 0).perplexity == math.inf


def test_labels_left_out_do_not_count():
    model = Fixed()
    sums = sum_batch_nll(model, [batch([1, 2, -100], [3, -100, -100])], "law", CPU)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, torch.tensor([3 * math.log(VOCAB), 3.0]).double())
    assert model.seen == [("law", False, False)] and model.training


def test_log_probabilities_that_are_not_finite_are_left_out():
    for value in (-math.inf, math.nan):
        assert sum_batch_nll(Fixed(value), [batch([1, 2])], None, CPU).tolist() == [0.0, 0.0]


def test_a_batch_of_weight_0_is_run_but_not_counted():
    model = Fixed()
    assert sum_batch_nll(model, [{**batch([1, 2]), "weight": 0.0}], None, CPU).tolist() == [0, 0]
    assert len(model.seen) == 1


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 6, 7])
def test_parts_share_the_batches(count, parts):
    batches = [{"number": number} for number in range(count)]
    shares = [list(select_rank_share(iter(batches), part, parts)) for part in range(parts)]
    assert {len(share) for share in shares} == {-(-count // parts)}
    taken = [item["number"] for share in shares for item in share if item.get("weight", 1.0)]
    assert sorted(taken) == list(range(count))


def test_matrix_is_that_of_a_plain_loop(built):
    evaluate = evaluation(built)
    matrix = evaluate()
    for expert in DOMAINS:
        for domain in DOMAINS:
            score = matrix[expert][domain]
            expected = plain_nll(evaluate.model, built[0], domain, expert)
            assert score.nll == pytest.approx(expected, rel=1e-5)
            assert (score.tokens, score.bytes) == (TOKENS[domain], BYTES[domain])
    assert len({round(matrix[expert]["law"].nll, 3) for expert in DOMAINS}) == len(DOMAINS)


@pytest.mark.parametrize("parts", [2, 3])
def test_ranks_together_find_what_one_finds(built, parts):
    whole = evaluation(built)()
    shares = [evaluation(built, part, parts)() for part in range(parts)]
    for expert in DOMAINS:
        for domain in DOMAINS:
            scores = [share[expert][domain] for share in shares if domain in share[expert]]
            assert sum(s.tokens for s in scores) == TOKENS[domain]
            assert sum(s.nll for s in scores) == pytest.approx(whole[expert][domain].nll, rel=1e-9)


def test_batch_size_changes_nothing(built):
    first, seven = evaluation(built, batch_size=1)(), evaluation(built, batch_size=7)()
    for expert in DOMAINS:
        for domain in DOMAINS:
            assert first[expert][domain].nll == pytest.approx(seven[expert][domain].nll, rel=1e-6)


def test_own_only_and_rows_that_are_not_held(built):
    own_values = evaluation(built)(own_only=True)
    assert {expert: list(row) for expert, row in own_values.items()} == {d: [d] for d in DOMAINS}
    whole = evaluation(built)()
    assert (
        select_own_scores(own_values)
        == select_own_scores(whole)
        == {d: whole[d][d] for d in DOMAINS}
    )
    part = replace(evaluation(built), scorable=("code",))()
    assert [expert for expert, row in part.items() if row] == ["code"]


def test_own_scores_of_dense_models_and_of_domains_without_expert():
    score = Score(1.0, 1)
    assert select_own_scores({DENSE: {"law": score, "art": score}}) == {"law": score, "art": score}
    assert select_own_scores({"law": {"law": score, "art": score}}) == {"law": score}


def test_perplexities_of_a_matrix():
    matrix = {"law": {"law": Score(2 * math.log(5), 2)}}
    assert compute_perplexities(matrix)["law"]["law"] == pytest.approx(5)
