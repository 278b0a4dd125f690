"""Multi-head self-attention with separate query, key, value and output projections."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache


class SelfAttention(nn.Module):
    """softmax(q k^T / sqrt(K) + mask) v, all projections with bias.

    Args:
        hidden_size, num_heads: D and H; a head has K = D / H features.
        layer: index of its keys and values in a cache.
        dropout: dropout rate of the attention weights, in training.
        implementation: "sdpa" (torch's fused kernel) or "eager" (plain torch).
    Raises:
        ValueError: if the heads do not divide the hidden size.
    Source: Vaswani et al. 2017, section 3.2.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, layer: int, dropout: float, implementation: str
    ):
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(
                f"hidden_size {hidden_size} is not divisible by num_attention_heads {num_heads}"
            )
        self.num_heads = num_heads
        self.layer = layer
        self.dropout = dropout
        self.attend = {"sdpa": _attend_sdpa, "eager": _attend_eager}[implementation]
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None, cache: Cache | None = None) -> Tensor:
        """Attend from every position of x.

        Args:
            x: [B, L, D].
            mask: bool [B, 1, L, S], S = cached + L, True where a query sees a key; None: causal,
                for calls without earlier positions.
            cache: keys and values of earlier positions, extended in place.
        Returns:
            [B, L, D].
        """
        query, key, value = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, L, K]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        dropout = self.dropout if self.training else 0.0
        mixed = self.attend(query, key, value, mask, dropout)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


def _attend_sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
) -> Tensor:
    """Attend with torch's fused kernel; returns [B, H, L, K].

    Args:
        query, key, value: [B, H, L, K], and twice [B, H, S, K].
        mask: bool [B, 1, L, S], True where a query sees a key; None: causal.
        dropout: rate at which attention weights are dropped.
    """
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None
    )


def _attend_eager(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
) -> Tensor:
    """Attend in plain torch; arguments and result as in `_attend_sdpa`.

    `query` [B, H, L, K], `key` and `value` [B, H, S, K], `mask` [B, 1, L, S] or None (causal),
    `dropout` of the weights.
    """
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = mask.tril()
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    weights = scores.float().masked_fill(~mask, -torch.inf).softmax(-1).to(value.dtype)
    return F.dropout(weights, dropout) @ value
