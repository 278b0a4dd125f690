"""FlexAttention in place of `slot_attention`: the same attention as a mask, or as small batches."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


def block_diagonal(instances: int, length: int, heads: int, device: str) -> Callable[..., Tensor]:
    """One sequence of L * N tokens, each position's N instances seeing one another.

    q, k, v [B, N, L, D] -> [B, N, L, D]. The mask is made here, once.
    Source: Dong et al. 2024 (Flex Attention), document masking.
    """

    def same_position(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query // instances == key // instances

    size = instances * length
    mask = create_block_mask(same_position, None, None, size, size, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (_by_position(x).flatten(1, 2) for x in (q, k, v))  # [B, L * N, D]
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        mixed = flex_attention(q, k, v, block_mask=mask).transpose(1, 2).flatten(2)
        return mixed.unflatten(1, (length, instances)).transpose(1, 2)

    return attend


def small_batches(heads: int) -> Callable[..., Tensor]:
    """B * L sequences of N tokens each. q, k, v [B, N, L, D] -> [B, N, L, D]."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups, length = q.shape[0], q.shape[2]
        q, k, v = (
            _by_position(x).flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2)
            for x in (q, k, v)
        )  # [B * L, heads, N, K]
        mixed = flex_attention(q, k, v).transpose(1, 2).flatten(2)
        return mixed.unflatten(0, (groups, length)).transpose(1, 2)

    return attend


def _by_position(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def peers(instances: int, length: int, heads: int, device: str) -> dict[str, Callable[..., Tensor]]:
    """FlexAttention peers, compiled; empty without a GPU, where they have no backward pass."""
    if torch.device(device).type != "cuda":
        return {}
    return {
        "flex mask": block_diagonal(instances, length, heads, device),
        "flex batches": small_batches(heads),
    }
