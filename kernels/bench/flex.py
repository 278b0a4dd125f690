"""FlexAttention in place of `slot_attention`: the same attention as a mask, or as small batches."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


def make_block_diagonal_attention(
    instances: int, length: int, heads: int, device: str
) -> Callable[..., Tensor]:
    """Make attention over one sequence of L * N tokens, in which a token attends to the N tokens of
    its own position only.

    q, k, v [B, N, L, D] -> [B, N, L, D]. The mask is made here, once.
    Source: Dong et al. 2024 (Flex Attention), document masking.
    """

    def have_same_position(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Return True where two tokens of the sequence have one position."""
        return query // instances == key // instances

    size = instances * length
    mask = create_block_mask(have_same_position, None, None, size, size, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (_transpose_positions_first(x).flatten(1, 2) for x in (q, k, v))  # [B, L * N, D]
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        mixed = flex_attention(q, k, v, block_mask=mask).transpose(1, 2).flatten(2)
        return mixed.unflatten(1, (length, instances)).transpose(1, 2)

    return attend


def make_small_batch_attention(heads: int) -> Callable[..., Tensor]:
    """Make attention over B * L sequences of N tokens: q, k, v [B, N, L, D] -> [B, N, L, D]."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups, length = q.shape[0], q.shape[2]
        q, k, v = (
            _transpose_positions_first(x).flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2)
            for x in (q, k, v)
        )  # [B * L, heads, N, K]
        mixed = flex_attention(q, k, v).transpose(1, 2).flatten(2)
        return mixed.unflatten(0, (groups, length)).transpose(1, 2)

    return attend


def _transpose_positions_first(x: Tensor) -> Tensor:
    """Return x [B, N, L, D] as [B, L, N, D]."""
    return x.transpose(1, 2)


def make_flex_variants(
    instances: int, length: int, heads: int, device: str
) -> dict[str, Callable[..., Tensor]]:
    """Make the FlexAttention variants by name; none for a CPU, where they have no backward pass."""
    if torch.device(device).type != "cuda":
        return {}
    return {
        "flex mask": make_block_diagonal_attention(instances, length, heads, device),
        "flex batches": make_small_batch_attention(heads),
    }
