"""Pre-norm decoder block, feed-forward network, and the embeddings of the fairseq GPT models."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from megamod.nn.attention import SelfAttention

POSITION_OFFSET = 2  # row 0 of a position table is never used, row 1 belongs to padding


class FeedForward(nn.Module):
    """fc2(gelu(fc1 x)) with the exact (erf) GELU; in DEMix each domain has its own."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the network: [..., D] -> [..., D]."""
        return self.fc2(F.gelu(self.fc1(x)))


class DecoderBlock(nn.Module):
    """x + Attention(LN x), then x + FeedForward(LN x): the pre-norm block of GPT-2 and GPT-3.

    Args:
        attention: module of the attention.
        feed_forward: module from [B, L, D] to [B, L, D], possibly `DomainExperts`.
        hidden_size: features D.
        eps: epsilon of both norms.
        dropout: dropout rate of both updates before they are added, in training.
    """

    def __init__(
        self,
        attention: SelfAttention,
        feed_forward: nn.Module,
        hidden_size: int,
        eps: float,
        dropout: float,
    ):
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.attention = attention
        self.feed_forward_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.feed_forward = feed_forward
        self.dropout = dropout

    def forward(self, x: Tensor, mask: Tensor | None, cache: Cache | None = None) -> Tensor:
        """Apply the block: [B, L, D] -> [B, L, D]; mask and cache as in `SelfAttention.forward`."""
        x = x + self._apply_dropout(self.attention(self.attention_norm(x), mask, cache))
        return x + self._apply_dropout(self.feed_forward(self.feed_forward_norm(x)))

    def _apply_dropout(self, x: Tensor) -> Tensor:
        """Apply dropout in training; return x itself otherwise."""
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


class Embeddings(nn.Module):
    """sqrt(D) * token + learned position, without a norm: fairseq's decoder with `embed_scale`.

    The position table has two more rows than positions; row 1 belongs to padding and stays zero.

    Args:
        vocab_size: number of tokens V.
        hidden_size: features D.
        max_positions: longest sequence.
        pad_id: id of padding, the `padding_idx` of the token table.
    """

    def __init__(self, vocab_size: int, hidden_size: int, max_positions: int, pad_id: int):
        super().__init__()
        self.scale = math.sqrt(hidden_size)
        self.tokens = nn.Embedding(vocab_size, hidden_size, padding_idx=pad_id)
        self.positions = nn.Embedding(
            max_positions + POSITION_OFFSET, hidden_size, padding_idx=POSITION_OFFSET - 1
        )

    def forward(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        """Embed tokens, or rows of the token table in their place.

        Args:
            tokens: ids [B, L], or rows [B, L, D].
            position_ids: [B, L], 0 first, -1 for padding.
        Returns:
            [B, L, D].
        """
        rows = tokens if tokens.is_floating_point() else self.tokens(tokens)
        return self.scale * rows + self.positions(position_ids + POSITION_OFFSET)


def compute_positions(attention_mask: Tensor) -> Tensor:
    """Compute the position of each real token in its row: [B, S] -> [B, S] int64, -1 at padding."""
    mask = attention_mask.long()
    return mask.cumsum(1) * mask - 1


def make_causal_mask(attention_mask: Tensor, query_count: int) -> Tensor:
    """Make a causal attention mask with padding.

    Args:
        attention_mask: [B, S], nonzero at real tokens, earlier (cached) positions first.
        query_count: L, number of trailing positions that attend.
    Returns:
        bool [B, 1, L, S]. A position that would see nothing (padding on the left) sees itself, so
        that no softmax is over an empty set.
    """
    size = attention_mask.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=attention_mask.device).tril()
    visible = causal[None, None] & attention_mask[:, None, None, :].bool()
    identity = torch.eye(size, dtype=torch.bool, device=attention_mask.device)
    return (visible | (identity & ~visible.any(-1, keepdim=True)))[:, :, size - query_count :]
