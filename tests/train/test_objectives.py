import pytest
import torch
from train.tiny_runs import DOMAINS, make_batch, tiny_config

from megamod.models.lm.demix import DemixForCausalLM, initialise_lm_weights
from megamod.train.objectives import CausalLMObjective


def model_of(untie: str) -> DemixForCausalLM:
    """A model whose experts differ."""
    model = DemixForCausalLM(tiny_config(untie))
    initialise_lm_weights(model, seed=5)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def naive(model: DemixForCausalLM, batch: dict[str, object], domain: str | None) -> list[float]:
    """Summed nll of each row, token by token from the logits."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], domain=domain).logits
    rows = []
    for row, labels in zip(logits.detach().double(), batch["labels"], strict=True):
        scores = [
            -float(torch.log_softmax(at, 0)[label])
            for at, label in zip(row, labels.tolist(), strict=True)
            if label != -100
        ]
        rows.append(sum(scores))
    return rows


@pytest.mark.parametrize("untie", ["none", "feedforward"])
def test_score_is_the_sum_over_tokens(untie):
    model, batch = model_of(untie), make_batch("code", 3, 0)
    objective = CausalLMObjective(DOMAINS, torch.device("cpu"), selects_expert=untie != "none")
    scored = objective.compute_loss(model, batch, item_totals=(7.0,))
    rows = naive(model, batch, "code" if untie != "none" else None)
    assert scored.loss.item() == pytest.approx(sum(rows) / 7.0, rel=1e-5)
    assert scored.total.tolist() == pytest.approx([0, 0, sum(rows), 0], rel=1e-5)
    assert scored.items.tolist() == [0, 0, *objective.count_items(batch), 0]
    assert objective.count_items(batch) == (int((batch["labels"] != -100).sum()),)


def test_the_domain_of_the_batch_chooses_the_expert():
    model, batch = model_of("feedforward"), make_batch("code", 3, 0)
    objective = CausalLMObjective(DOMAINS, torch.device("cpu"), selects_expert=True)
    other = {**batch, "domain": DOMAINS.index("law")}
    losses = [objective.compute_loss(model, entry, (1.0,)).loss.item() for entry in (batch, other)]
    expected = [sum(naive(model, batch, domain)) for domain in ("code", "law")]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert abs(expected[0] - expected[1]) > 1e-2


def test_rows_of_several_domains_are_told_apart():
    model, batch = model_of("none"), make_batch("law", 1, 1)
    batch |= {"domain": None, "domains": torch.tensor([3, 1])}
    scored = CausalLMObjective(DOMAINS, torch.device("cpu"), selects_expert=False).compute_loss(
        model, batch, (1.0,)
    )
    first, second = naive(model, batch, None)
    assert scored.total.tolist() == pytest.approx([0, second, 0, first], rel=1e-5)
    lengths = (batch["labels"] != -100).sum(1).tolist()
    assert scored.items.tolist() == [0, lengths[1], 0, lengths[0]]


def test_full_batches_need_no_mask():
    """Without a mask the tokens that look like padding are tokens."""
    model, batch = model_of("none"), make_batch("law", 1, 1, ragged=False)
    assert "attention_mask" not in batch
    batch["input_ids"][0, 3] = 1
    objective = CausalLMObjective(DOMAINS, torch.device("cpu"), selects_expert=False)
    scored = objective.compute_loss(model, batch, (1.0,))
    masked = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    expected = objective.compute_loss(model, masked, (1.0,))
    assert scored.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
