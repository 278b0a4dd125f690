import pytest
import torch
from transformers.cache_utils import DynamicCache

from megamod.nn.attention import SelfAttention
from megamod.nn.transformer import make_causal_mask


def naive(module: SelfAttention, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Attention by loops over sequences, heads and positions; seen [B, L, L]."""
    heads, size = module.num_heads, x.shape[-1] // module.num_heads
    output = torch.zeros_like(x)
    for b in range(len(x)):
        query, key, value = (p(x[b]) for p in (module.q_proj, module.k_proj, module.v_proj))
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            for i in range(x.shape[1]):
                places = [j for j in range(x.shape[1]) if seen[b, i, j]]
                scores = torch.stack([query[i, part] @ key[j, part] for j in places]) / size**0.5
                weights = scores.exp() / scores.exp().sum()
                output[b, i, part] = sum(
                    w * value[j, part] for w, j in zip(weights, places, strict=True)
                )
    return module.out_proj(output)


def make(implementation: str, dropout: float = 0.0) -> SelfAttention:
    torch.manual_seed(0)
    return SelfAttention(12, 3, 0, dropout, implementation).double()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_loops_over_heads(implementation, padded):
    module, x = make(implementation), torch.randn(2, 5, 12, dtype=torch.double)
    real = torch.ones(2, 5, dtype=torch.bool)
    if padded:
        real[0, 3:] = False  # on the right
        real[1, :2] = False  # on the left
    seen = torch.ones(5, 5).tril().bool()[None] & real[:, None, :]
    for position in range(2 if padded else 0):
        seen[1, position, position] = True
    output = module(x, make_causal_mask(real, 5) if padded else None)
    close_to = 1e-12 if implementation == "sdpa" else 1e-6  # its softmax is taken in float32
    torch.testing.assert_close(output, naive(module, x, seen), rtol=0, atol=close_to)


def test_both_implementations_have_equal_gradients():
    x, gradients = torch.randn(2, 6, 12, dtype=torch.double), {}
    for implementation in ("sdpa", "eager"):
        module = make(implementation)
        module(x, None).square().sum().backward()
        gradients[implementation] = {name: p.grad for name, p in module.named_parameters()}
    for name, gradient in gradients["sdpa"].items():
        torch.testing.assert_close(gradients["eager"][name], gradient, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_token_by_token_with_a_cache_equals_one_pass(implementation):
    module, x = make(implementation), torch.randn(2, 4, 12, dtype=torch.double)
    cache = DynamicCache()
    steps = [
        module(x[:, i : i + 1], make_causal_mask(torch.ones(2, i + 1), 1), cache) for i in range(4)
    ]
    torch.testing.assert_close(torch.cat(steps, 1), module(x, None))
    assert cache.get_seq_length() == 4


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_dropout_acts_in_training_only(implementation):
    module, x = make(implementation, dropout=0.5), torch.randn(1, 6, 12, dtype=torch.double)
    plain = make(implementation)(x, None)
    assert torch.equal(module.eval()(x, None), plain)
    assert not torch.equal(module.train()(x, None), plain)


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(
        ValueError, match="hidden_size 10 is not divisible by num_attention_heads 3"
    ):
        SelfAttention(10, 3, 0, 0.0, "sdpa")
