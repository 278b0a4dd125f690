"""The reference of GPU training: a GPT and its loop, written by hand and compiled.

The shape is that of our decoder: pre-norm blocks, learned positions, exact GELU, tied output. What
makes it fast is what such programs do: one projection for queries, keys and values, weights in
float32 with autocast to bf16, compiled blocks and loss, fused AdamW.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm, on a residual stream [B, L, D]."""

    def __init__(self, size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feed_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.up, self.down = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> the same."""
        qkv = self.qkv(self.attention_norm(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.feed_norm(x))))


class Gpt(nn.Module):
    """A decoder-only language model."""

    def __init__(self, vocabulary: int, size: int, layers: int, heads: int, length: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, size), nn.Embedding(length, size)
        self.blocks = nn.ModuleList(Block(size, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(size)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, L] -> states [B, L, D]."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def entropy(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Mean over [B, L] labels of the cross entropy of all logits at once."""
    return F.cross_entropy(F.linear(states, weight).flatten(0, 1).float(), labels.flatten())


def stepping(
    model: Gpt, batches: Sequence[tuple[Tensor, Tensor]], clip: float, compiled: bool
) -> Callable[[], None]:
    """A function that makes one optimizer step over these micro-batches of ids and labels."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    loss_of = entropy
    if compiled:
        for block in model.blocks:
            block.compile(dynamic=False)
        loss_of = torch.compile(entropy, dynamic=False)
    device = model.norm.weight.device.type

    def step() -> None:
        for ids, labels in batches:
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(model(ids), model.tokens.weight, labels)
            (loss / len(batches)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()

    return step
