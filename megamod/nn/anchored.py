"""Anchored experts: each is mixed, by a router row of its own, with a frozen module they all share.

For an input x of width D, the anchor's row r_0 and domain d's row r_d

    (a_0, a_d) = softmax(r_0 x, r_d x);    y = a_0 anchor(x) + a_d expert_d(x)

No expert sees another one, so experts that were trained apart are experts of one mixture.
Source: Shi et al. 2025 (FlexOlmo), section 3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from megamod.nn.demix import DomainExperts


class AnchoredExperts(DomainExperts):
    """Domain experts beside an anchor, which is frozen and has the frozen row `anchor_row` [D].

    An expert's own row is its parameter `row` [D]. Rows are zero until they are set.

    Args:
        anchor: feed-forward that maps [..., D] to [..., D].
        experts: a module of the same kind for each domain.
        domains: domains of the experts, in their order.
        width: features D.
    """

    def __init__(
        self, anchor: nn.Module, experts: Sequence[nn.Module], domains: Sequence[str], width: int
    ):
        super().__init__(iter(experts).__next__, domains)
        self.anchor = anchor.requires_grad_(False)
        self.anchor_row = nn.Parameter(torch.zeros(width), requires_grad=False)
        for expert in self.experts.values():
            expert.row = nn.Parameter(torch.zeros(width))

    def apply_expert(self, expert: nn.Module, x: Tensor) -> Tensor:
        """Mix the outputs of the anchor and of an expert for x [..., D]."""
        rows = torch.stack([self.anchor_row, expert.row])
        shares = functional.linear(x, rows).float().softmax(-1)
        # Divided once more, as the classes of transformers divide the weights they select.
        shares = (shares / shares.sum(-1, keepdim=True)).to(x.dtype)
        return shares[..., :1] * self.anchor(x) + shares[..., 1:] * expert(x)
