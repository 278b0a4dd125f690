"""A sparse feed-forward: a router selects a few experts for each token.

For an input x of width D and a router with a row per expert, W [E, D],

    p = softmax(W x);    w_e = p_e / sum of p over the k largest;    y = sum of w_e expert_e(x)

over the k experts with the largest p. These are the operations of the mixture-of-experts classes
of transformers whose weights sum to one. Source: Jiang et al. 2024 (Mixtral), section 2.1.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class Router(nn.Module):
    """Selects `experts_per_token` of `experts` for each token, by rows `weight` [E, D].

    Args:
        hidden_size: features D.
    """

    def __init__(self, hidden_size: int, experts: int, experts_per_token: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(experts, hidden_size))
        self.experts_per_token = experts_per_token

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Select the experts of tokens, from their states `hidden` [N, D].

        Returns:
            logits [N, E], weights [N, K] float32 that sum to one, and numbers of experts [N, K].
        """
        logits = functional.linear(hidden, self.weight)
        weights, experts = logits.float().softmax(-1).topk(self.experts_per_token)
        return logits, weights / weights.sum(-1, keepdim=True), experts


class SparseFeedForward(nn.Module):
    """Experts with the interface of a feed-forward, and the router `gate` that selects among them.

    Args:
        build: called once per expert for its module from [N, D] to [N, D].
        hidden_size, experts, experts_per_token: see `Router`.
    """

    def __init__(
        self, build: Callable[[], nn.Module], hidden_size: int, experts: int, experts_per_token: int
    ):
        super().__init__()
        self.experts = nn.ModuleList(build() for _ in range(experts))
        self.gate = Router(hidden_size, experts, experts_per_token)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the selected experts to states x [..., D]; returns [..., D].

        An expert without tokens runs on none of them, so that its gradients are zero, not absent: a
        ZeRO engine reduces the gradients that its hooks receive.
        """
        states = x.reshape(-1, x.shape[-1])
        _, weights, experts = self.gate(states)
        output = torch.zeros_like(states)
        for number, expert in enumerate(self.experts):
            tokens, position = torch.where(experts == number)
            shares = weights[tokens, position, None].to(x.dtype)
            output.index_add_(0, tokens, shares * expert(states[tokens]))
        return output.reshape(x.shape)
