import math

import torch
from torch import nn

from megamod.nn.attention import SelfAttention
from megamod.nn.transformer import (
    DecoderBlock,
    Embeddings,
    FeedForward,
    compute_positions,
    make_causal_mask,
)


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def test_feed_forward_is_the_exact_gelu_between_two_products():
    module, x = FeedForward(4, 6).double(), torch.randn(3, 2, 4, dtype=torch.double)
    expected = gelu(x @ module.fc1.weight.T + module.fc1.bias) @ module.fc2.weight.T
    torch.testing.assert_close(module(x), expected + module.fc2.bias)


def test_block_is_pre_norm_with_two_residuals():
    attention, feed_forward = SelfAttention(4, 2, 0, 0.0, "sdpa"), FeedForward(4, 6)
    block = DecoderBlock(attention, feed_forward, 4, 1e-5, 0.0).double()
    for norm in (block.attention_norm, block.feed_forward_norm):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(2, 3, 4, dtype=torch.double)

    def normed(x: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + (
            norm.bias
        )

    middle = x + attention(normed(x, block.attention_norm), None)
    expected = middle + feed_forward(normed(middle, block.feed_forward_norm))
    torch.testing.assert_close(block(x, None), expected)


def test_dropout_of_the_block_acts_in_training_only():
    block = DecoderBlock(SelfAttention(4, 2, 0, 0.0, "sdpa"), FeedForward(4, 6), 4, 1e-5, 1.0)
    x = torch.randn(2, 3, 4)
    assert torch.equal(block.train()(x, None), x)  # all of both branches is dropped
    assert not torch.equal(block.eval()(x, None), x)


def test_embeddings_scale_tokens_and_shift_positions_by_two():
    module = Embeddings(7, 9, 5, pad_id=1)
    ids, positions = torch.tensor([[3, 4, 1]]), torch.tensor([[0, 1, -1]])
    rows = [
        3 * module.tokens.weight[3] + module.positions.weight[2],
        3 * module.tokens.weight[4] + module.positions.weight[3],
        3 * module.tokens.weight[1] + module.positions.weight[1],
    ]
    torch.testing.assert_close(module(ids, positions)[0], torch.stack(rows))
    assert module.positions.weight.shape == (7, 9)
    module(ids, positions).sum().backward()
    assert not module.tokens.weight.grad[1].any() and not module.positions.weight.grad[1].any()


def test_positions_count_real_tokens():
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]])
    expected = [[0, 1, 2, -1], [-1, -1, 0, 1], [0, -1, 1, -1], [-1, -1, -1, -1]]
    assert compute_positions(mask).tolist() == expected


def test_causal_mask_against_loops():
    torch.manual_seed(0)
    real = torch.rand(6, 7) < 0.6
    real[0], real[1] = True, False
    for queries in (1, 3, 7):
        mask = make_causal_mask(real.int(), queries)
        assert mask.shape == (6, 1, queries, 7)
        for b in range(6):
            for row in range(queries):
                position = 7 - queries + row
                seen = [bool(real[b, key]) and key <= position for key in range(7)]
                if not any(seen):
                    seen[position] = True
                assert mask[b, 0, row].tolist() == seen
