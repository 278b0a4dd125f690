"""Routers of a mixture: recorded outputs, load-balance loss, freezing."""

import pytest
import torch
from tiny_hosts import VOCAB, tiny_stock

from megamod.errors import UserError
from megamod.models.lm.moe_families import MOE_FAMILIES
from megamod.models.lm.routing import (
    Routing,
    check_router_training,
    compute_balance_losses,
    find_routers,
    freeze_all_but_routers,
    record_routing,
)


def tiny_mixture(kind: str, experts_per_token: int = 2):
    family = MOE_FAMILIES[kind]
    fields = {
        family.count: 4,
        family.experts_per_token: experts_per_token,
        family.width: 24,
        **family.constants,
    }
    fields |= {"head_dim": 8} if kind in ("qwen3_moe", "ernie4_5_moe", "cohere2_moe") else {}
    model = tiny_stock(kind, **fields)
    for name, parameter in model.named_parameters():
        if name.endswith("e_score_correction_bias"):
            parameter.data.zero_()  # as in a mixture made from dense models
    return model


def random_routing(
    tokens: int, experts: int = 4, experts_per_token: int = 2, seed: int = 0
) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    weights, selected = logits.softmax(-1).topk(experts_per_token)
    return Routing(logits, weights / weights.sum(-1, keepdim=True), selected)


def test_loss_against_a_direct_sum():
    layers = [random_routing(7, seed=0), random_routing(7, seed=1)]
    mask = torch.tensor([1, 1, 0, 1, 1, 0, 1], dtype=torch.bool)
    for layer, loss in zip(layers, compute_balance_losses(layers, mask), strict=True):
        expected = 0.0
        for expert in range(4):
            kept = [token for token in range(7) if mask[token]]
            assigned = sum(expert in layer.experts[token].tolist() for token in kept)
            probability = sum(float(layer.logits[token].softmax(-1)[expert]) for token in kept)
            expected += 4 * assigned / len(kept) * probability / len(kept)
        assert float(loss) == pytest.approx(expected, abs=1e-6)


def test_uniform_routing_gives_k_and_one_expert_gives_e():
    uniform = Routing(
        torch.zeros(4, 4), torch.full((4, 2), 0.5), torch.tensor([[0, 1], [2, 3]] * 2)
    )
    sure = Routing(torch.tensor([[50.0, 0, 0, 0]] * 3), torch.ones(3, 1), torch.zeros(3, 1).long())
    assert compute_balance_losses([uniform]).item() == pytest.approx(2.0)
    assert compute_balance_losses([sure]).item() == pytest.approx(4.0)


def test_gradient_against_finite_differences():
    layer = random_routing(5)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        # In float64 only where the function does not cast: its softmax is in float32.
        probabilities = logits.softmax(-1)
        load = torch.bincount(layer.experts.flatten(), minlength=4) / 5
        return 4 * (load * probabilities.mean(0)).sum()

    logits = layer.logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, logits)
    compute_balance_losses([Routing(logits, layer.weights, layer.experts)]).sum().backward()
    (expected,) = torch.autograd.grad(loss(logits), logits)
    assert torch.allclose(logits.grad, expected, atol=1e-6)


@pytest.mark.parametrize("kind", MOE_FAMILIES)
def test_recorded_routing_is_that_of_the_class(kind):
    model = tiny_mixture(kind)
    ids = torch.randint(3, VOCAB, (2, 8), generator=torch.Generator().manual_seed(0))
    with record_routing(model) as layers:
        model(ids)
    assert len(layers) == model.config.num_hidden_layers
    for routing in layers:
        assert routing.logits.shape == (16, 4) and routing.experts.shape == (16, 2)
        assert torch.equal(
            routing.logits.topk(2).indices.sort().values, routing.experts.sort().values
        )
        assert torch.allclose(routing.shares.sum(1), torch.ones(16), atol=1e-6)
    with torch.no_grad():
        model(ids)
    assert len(layers) == model.config.num_hidden_layers  # nothing after the block


def test_checkpointed_layers_give_the_same_gradient():
    """Routers run again in the backward pass, and add nothing to what was recorded."""
    gradients = []
    for checkpointing in (False, True):
        model = tiny_mixture("mixtral").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids = torch.randint(3, VOCAB, (2, 8), generator=torch.Generator().manual_seed(0))
        with record_routing(model) as layers:
            model(ids)
        compute_balance_losses(layers).sum().backward()
        assert len(layers) == 2
        gradients.append([router.weight.grad for router in find_routers(model)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("kind", ["mixtral", "granitemoe"])
def test_router_alone_is_trained(kind):
    model = tiny_mixture(kind)
    freeze_all_but_routers(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    path = f"{MOE_FAMILIES[kind].module}.{MOE_FAMILIES[kind].router}.weight"
    assert trained == [f"model.layers.{n}.{path}" for n in range(2)]
    check_router_training("--train router", model.config)
    with pytest.raises(UserError, match="is 1, so the weight of the only expert is 1"):
        check_router_training("--train router", tiny_mixture(kind, experts_per_token=1).config)
