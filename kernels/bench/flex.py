"""FlexAttention in place of `instance_attention`, with a mask or as many short sequences."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


def make_block_diagonal_attention(
    instances: int, length: int, heads: int, device: str
) -> Callable[..., Tensor]:
    """Make attention over one sequence of L * N tokens, within the N tokens of each position.

    Args:
        instances, length, heads: N, L and the number of heads.
        device: of the mask, which is made here, once.
    Returns:
        a function of q, k, v [B, N, L, D] that returns [B, N, L, D].
    Source: Dong et al. 2024 (Flex Attention), document masking.
    """

    def have_same_position(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Return True where a query and a key have one position, by their indices in the sequence.

        FlexAttention calls it; `batch` and `head` have no effect.
        """
        return query // instances == key // instances

    size = instances * length
    mask = create_block_mask(have_same_position, None, None, size, size, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend among all tokens of a group with the mask; q, k, v and result [B, N, L, D]."""
        q, k, v = (_transpose_positions_first(x).flatten(1, 2) for x in (q, k, v))  # [B, L * N, D]
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        mixed = flex_attention(q, k, v, block_mask=mask).transpose(1, 2).flatten(2)
        return mixed.unflatten(1, (length, instances)).transpose(1, 2)

    return attend


def make_per_position_attention(heads: int) -> Callable[..., Tensor]:
    """Make attention over B * L sequences, one per position, of N tokens, with `heads` heads.

    Returns:
        a function of q, k, v [B, N, L, D] that returns [B, N, L, D].
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend among the instances of each position; q, k, v and result [B, N, L, D]."""
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
    """Make the FlexAttention variants by name; none for a CPU, where they have no backward pass.

    Args:
        instances, length, heads: N, L and the number of heads.
        device: "cuda" or "cpu".
    """
    if torch.device(device).type != "cuda":
        return {}
    return {
        "flex mask": make_block_diagonal_attention(instances, length, heads, device),
        "flex positions": make_per_position_attention(heads),
    }
