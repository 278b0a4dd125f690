"""Domain experts: copies of a module, one per domain, selected by the domain of the sequence.

There is no router: the domain of a sequence selects the expert. So in training a rank runs only the
experts whose data it reads, and the forward pass needs no communication.
Source: Gururangan et al. 2022 (DEMix), section 3.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from megamod.errors import UserError


class DomainExperts(nn.Module):
    """One module per domain, with the interface of that module.

    In training a rank holds only the experts of its domains. `megamod.dist.scope` reads a
    parameter's domain from its name, of which the attribute `experts` is a part. A single expert is
    selected from the start; of several none is until `select_domain` is called.

    Args:
        build: called once per domain, in their order, for the module of that domain.
        domains: domains whose experts are held.
    """

    def __init__(self, build: Callable[[], nn.Module], domains: Sequence[str]):
        super().__init__()
        self.experts = nn.ModuleDict({domain: build() for domain in domains})
        self.domain = domains[0] if len(domains) == 1 else None

    def forward(self, *args: object, **kwargs: object) -> Tensor | tuple[Tensor, ...]:
        """Apply the selected domain's expert, with the arguments and result of that module.

        With gradients, the experts that are not selected receive gradients of zero.

        Args:
            args, kwargs: passed to the expert, such as states [B, L, D].
        Raises:
            UserError: if several experts are held and none is selected.
        """
        if self.domain is None:
            raise UserError(
                f"choose one of the domains {', '.join(self.experts)}: domain=NAME at "
                "from_pretrained or in a call, or model.set_domain(NAME)"
            )
        output = self.apply_expert(self.experts[self.domain], *args, **kwargs)
        if not torch.is_grad_enabled() or len(self.experts) == 1:
            return output
        if isinstance(output, tuple):
            return _ZeroGradient.apply(output[0], *self._iterate_idle_parameters()), *output[1:]
        return _ZeroGradient.apply(output, *self._iterate_idle_parameters())

    def apply_expert(
        self, expert: nn.Module, *args: object, **kwargs: object
    ) -> Tensor | tuple[Tensor, ...]:
        """Compute the output of the selected expert; a subclass may add to it."""
        return expert(*args, **kwargs)

    def _iterate_idle_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the trainable parameters of the experts that are not selected."""
        for domain, expert in self.experts.items():
            if domain != self.domain:
                yield from (p for p in expert.parameters() if p.requires_grad)


class _ZeroGradient(torch.autograd.Function):
    """Identity that gives zero gradients to the parameters of idle experts.

    A ZeRO engine reduces the gradients its backward hooks receive. Without this, an expert that is
    idle in the last micro-batch of a step would miss the division by the world size (with
    overlapped communication) or its update (with an offloaded optimizer).
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, *idle: Tensor) -> Tensor:
        """Return x unchanged; `idle` are the parameters of the experts that are not selected."""
        ctx.like = [(p.shape, p.dtype, p.device) for p in idle]
        return x.clone()  # not a view: layers may add to it in place

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, ...]:
        """Return `grad` for x, and zeros in the shape of each idle parameter."""
        zeros = (
            torch.zeros((), dtype=dtype, device=device).expand(shape)
            for shape, dtype, device in ctx.like
        )
        return grad, *zeros


def get_selected_expert(module: nn.Module) -> nn.Module:
    """Return the selected expert of a `DomainExperts`, the first if none is selected.

    Any other module is returned as it is.
    """
    if not isinstance(module, DomainExperts):
        return module
    return module.experts[module.domain or next(iter(module.experts))]


def iterate_domain_experts(module: nn.Module) -> Iterator[DomainExperts]:
    """Yield every group of experts inside a module."""
    return (m for m in module.modules() if isinstance(m, DomainExperts))


def select_domain(module: nn.Module, domain: str) -> None:
    """Select the domain whose expert all `DomainExperts` inside a module use from now on.

    A module without experts is left as it is.

    Raises:
        UserError: if a group does not hold the domain's expert.
    """
    for group in iterate_domain_experts(module):
        if domain not in group.experts:
            raise UserError(
                f"no expert for domain {domain!r}; there are {', '.join(group.experts)}"
            )
        group.domain = domain
