import pytest
import torch
from torch import nn

from megamod.dist.scope import parse_expert_domain
from megamod.nn.demix import DomainExperts, iterate_domain_experts

DOMAINS = ["law", "med", "code"]


def test_the_chosen_expert_is_applied():
    experts, x = DomainExperts(lambda: nn.Linear(3, 2), DOMAINS), torch.randn(4, 3)
    for domain in DOMAINS:
        experts.domain = domain
        assert torch.equal(experts(x), experts.experts[domain](x))


def test_several_experts_need_a_choice_and_one_does_not():
    with pytest.raises(ValueError, match=r"choose one of the domains law, med, code: .*set_domain"):
        DomainExperts(lambda: nn.Linear(3, 2), DOMAINS)(torch.zeros(1, 3))
    alone = DomainExperts(lambda: nn.Linear(3, 2), ["law"])
    assert alone.domain == "law" and alone(torch.zeros(1, 3)).shape == (1, 2)


def test_parameter_names_carry_the_domain():
    experts = DomainExperts(lambda: nn.Linear(3, 2), DOMAINS)
    names = [name for name, _ in experts.named_parameters()]
    assert names == [f"experts.{d}.{p}" for d in DOMAINS for p in ("weight", "bias")]
    assert [parse_expert_domain(name) for name in names] == [d for d in DOMAINS for _ in range(2)]


def test_idle_experts_get_zero_gradients():
    torch.manual_seed(0)
    experts, x = DomainExperts(lambda: nn.Linear(3, 2), DOMAINS), torch.randn(4, 3)
    x.requires_grad_()
    experts.domain = "med"
    experts(x).square().sum().backward()
    gradients, of_input = {name: p.grad for name, p in experts.named_parameters()}, x.grad
    alone = nn.Linear(3, 2)
    alone.load_state_dict(experts.experts["med"].state_dict())
    x.grad = None
    alone(x).square().sum().backward()
    torch.testing.assert_close(gradients["experts.med.weight"], alone.weight.grad)
    torch.testing.assert_close(of_input, x.grad)
    for domain in ("law", "code"):
        for part in ("weight", "bias"):
            gradient = gradients[f"experts.{domain}.{part}"]
            assert gradient is not None and not gradient.any()


def test_zero_gradients_leave_accumulated_ones_unchanged():
    experts, x = DomainExperts(lambda: nn.Linear(3, 2), DOMAINS), torch.randn(4, 3)
    seen = {}
    for domain in DOMAINS:
        experts.domain = domain
        experts(x).sum().backward()
        seen[domain] = experts.experts[domain].weight.grad.clone()
    for domain in DOMAINS:
        assert torch.equal(experts.experts[domain].weight.grad, seen[domain])
        assert experts.experts[domain].weight.grad.any()


def test_outputs_in_tuples_pass_through():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x * self.weight, x.detach() + 1

    experts = DomainExperts(Two, DOMAINS)
    experts.domain = "code"
    first, second = experts(torch.ones(2))
    first.sum().backward()
    assert second.tolist() == [2, 2] and not second.requires_grad
    assert [e.weight.grad.item() for e in experts.experts.values()] == [0, 0, 2]


def test_frozen_idle_experts_take_no_part_and_without_gradients_nothing_is_added():
    experts = DomainExperts(lambda: nn.Linear(3, 2), DOMAINS)
    experts.experts["law"].requires_grad_(False)
    experts.domain = "med"
    experts(torch.randn(4, 3)).sum().backward()
    assert experts.experts["law"].weight.grad is None
    assert experts.experts["code"].weight.grad is not None
    with torch.no_grad():
        assert experts(torch.randn(4, 3)).grad_fn is None


def test_every_group_inside_a_module_is_found():
    first, second = (DomainExperts(lambda: nn.Linear(1, 1), DOMAINS) for _ in range(2))
    assert list(iterate_domain_experts(nn.Sequential(first, nn.Sequential(second)))) == [
        first,
        second,
    ]
