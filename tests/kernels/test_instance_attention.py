import math

import pytest
import torch
from megamod_kernels.instance_attention import (
    instance_attention,
    instance_attention_packed,
    instance_attention_reference,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig

from megamod.nn.encoder import EncoderLayer
from megamod.nn.multiplexer import multiplex_contextual

SHAPES = {
    "B2-N5-L3-D48": ((2, 5, 3, 48), 2),  # heads of 24 columns, positions across groups in a tile
    "B1-N1-L3-D20": ((1, 1, 3, 20), 2),
    "B2-N2-L9-D80": ((2, 2, 9, 80), 1),
    "B1-N12-L6-D16": ((1, 12, 6, 16), 1),  # the large tile of half precision
    "B1-N16-L2-D200": ((1, 16, 2, 200), 2),
    "B1-N33-L1-D16": ((1, 33, 1, 16), 1),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = [
    pytest.param(*inputs, dtype, masked, id=f"{shape}-{name}" + "-masked" * masked)
    for shape, inputs in SHAPES.items()
    for name, dtype in DTYPES.items()
    for masked in (False, True)
]


def case(shape, dtype=torch.float32):
    """q, k, v and an upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(4)]


def some_seen(shape, anywhere=False):
    """At least one position at which no instance is seen, unless one is to be seen anywhere.

    In float32 a shift of all scores by -10000 costs plain torch three of its digits.
    """
    mask = torch.rand(shape[:3], generator=torch.Generator().manual_seed(1)) < 0.6
    mask[0, :, 0] = False
    mask[:, -1] |= anywhere
    return mask


def loops(q, k, v, heads, mask=None, kept=None):
    """Position by position and head by head, in the dtype given.

    Args:
        kept: [B, heads, L, N, N], what dropout multiplies probabilities by.
    """
    groups, instances, length, size = q.shape
    width, out = size // heads, []
    for group in range(groups):
        for token in range(length):
            for head in range(heads):
                part = slice(head * width, (head + 1) * width)
                ours = [x[group, :, token, part] for x in (q, k, v)]
                scores = ours[0] @ ours[1].T / math.sqrt(width)
                if mask is not None:
                    scores = scores + torch.where(mask[group, :, token], 0.0, -10000.0)
                weights = torch.softmax(scores, 1)
                if kept is not None:
                    weights = weights * kept[group, head, token]
                out.append(weights @ ours[2])
    out = torch.stack(out).view(groups, length, heads, instances, width)
    return out.permute(0, 3, 1, 2, 4).reshape(groups, instances, length, size)


def results(function, inputs, dtype):
    """Value and gradients."""
    *leaves, upstream = (x.detach().to(dtype) for x in inputs)
    leaves = [x.requires_grad_() for x in leaves]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


def row_error(result, exact, of_scores=False):
    """Largest error of a row over its norm, or over the mean norm where that is larger.

    The latter is for what comes of the gradients of scores: differences, which may be as near to 0
    as one likes while what they are differences of is rounded.
    """
    rows = exact.norm(dim=-1)
    if of_scores:
        rows = rows.clamp_min(rows.mean())
    off = (result.double() - exact).norm(dim=-1)
    return float(torch.where(off == 0, 0.0, off / rows).max())


@pytest.mark.parametrize(("shape", "heads", "dtype", "masked"), CASES)
def test_value_and_gradients_against_loops(shape, heads, dtype, masked, poisoned, rounding):
    inputs = case(shape, dtype)
    mask = some_seen(shape) if masked else None
    exact = results(lambda q, k, v: loops(q, k, v, heads, mask), inputs, torch.float64)
    eager = results(
        lambda q, k, v: instance_attention_reference(q, k, v, heads, mask), inputs, dtype
    )
    result = results(
        lambda q, k, v: instance_attention(q, k, v, heads, mask, 0.0, "triton"), inputs, dtype
    )
    for name, ours, plain, expected in zip(
        ("out", "q", "k", "v"), result, eager, exact, strict=True
    ):
        assert ours.dtype == dtype and ours.shape == expected.shape
        if shape[1] == 1 and name in ("q", "k"):  # nothing to choose from
            assert ours.abs().max() < 1e-6 and expected.abs().max() < 1e-12
        elif dtype == torch.float32:
            assert row_error(ours, expected, name in ("q", "k")) <= 2e-6, name
        else:
            off = (ours.double() - expected).norm()
            assert off <= 1.1 * (plain.double() - expected).norm(), name


@pytest.mark.parametrize("heads", [1, 3])
def test_the_reference_against_loops(heads):
    inputs = case((2, 4, 3, 12))
    mask = some_seen((2, 4, 3))
    for seen in (None, mask):
        exact = results(lambda q, k, v, m=seen: loops(q, k, v, heads, m), inputs, torch.float64)
        for implementation in ("auto", "reference"):
            result = results(
                lambda q, k, v, m=seen, i=implementation: instance_attention(
                    q, k, v, heads, m, 0.0, i
                ),
                inputs,
                torch.float64,
            )
            torch.testing.assert_close(result, exact)


def test_dropout_is_replayed_in_backward():
    """Unit values read out the probabilities, and so what was dropped."""
    groups, instances, length, heads, dropout = 1, 4, 24, 2, 0.3
    q, k, _, upstream = case((groups, instances, length, heads * instances))
    units = torch.eye(instances).repeat(1, heads)[None, :, None].expand_as(q)

    def dropped(values):
        torch.manual_seed(3)
        return lambda q, k, v: instance_attention(q, k, v, heads, None, dropout, "triton")

    probabilities = results(dropped(units), (q, k, units, upstream), torch.float32)[0]
    plain = instance_attention(q, k, units, heads, implementation="triton")
    kept = probabilities / plain
    scaled = torch.tensor(1 / (1 - dropout))
    assert torch.isclose(kept, scaled).logical_or(kept == 0).all()
    assert abs(float((kept == 0).float().mean()) - dropout) < 4 * math.sqrt(0.21 / kept.numel())
    kept = kept.unflatten(-1, (heads, instances)).permute(0, 3, 2, 1, 4)  # [B, heads, L, N, N]
    assert not torch.equal(kept[:, 0], kept[:, 1])
    assert not torch.equal(kept[..., :12, :, :], kept[..., 12:, :, :])

    inputs = case(q.shape)
    exact = results(lambda q, k, v: loops(q, k, v, heads, None, kept), inputs, torch.float64)
    result = results(dropped(inputs[2]), inputs, torch.float32)
    for name, ours, expected in zip(("out", "q", "k", "v"), result, exact, strict=True):
        assert row_error(ours, expected, name in ("q", "k")) <= 2e-6
    other = instance_attention(*inputs[:3], heads, None, dropout, "triton")
    assert not torch.equal(other, result[0])  # the generator has moved on


def test_side_by_side_and_other_strides():
    """One projection's columns, positions first, columns that are not adjacent."""
    shape, heads = (2, 3, 4, 16), 2
    *inputs, upstream = case(shape)
    mask = some_seen(shape, anywhere=True)
    straight = results(
        lambda q, k, v: instance_attention(q, k, v, heads, mask, 0.0, "triton"),
        (*inputs, upstream),
        torch.float32,
    )
    qkv = torch.cat(inputs, -1).requires_grad_()
    for implementation in ("triton", "auto"):
        packed = instance_attention_packed(qkv, heads, mask, 0.0, implementation)
        grad = torch.autograd.grad(packed, qkv, upstream)[0]
        result = (packed.detach(), *grad.chunk(3, -1))
        torch.testing.assert_close(result, straight, atol=1e-6, rtol=1e-5)
    turned = [
        inputs[0].transpose(1, 2).contiguous().transpose(1, 2),
        inputs[1].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        torch.cat([inputs[2], inputs[0]], -1)[..., :16],
    ]
    assert not any(x.is_contiguous() for x in turned)
    leaves = [x.detach().requires_grad_() for x in turned]
    by_token = mask.transpose(1, 2).contiguous().transpose(1, 2)
    out = instance_attention(*leaves, heads, by_token, 0.0, "triton")
    grads = torch.autograd.grad(out, leaves, upstream.transpose(1, 2).contiguous().transpose(1, 2))
    assert all(torch.equal(a, b) for a, b in zip((out, *grads), straight, strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 4, 8), (2, 3, 0, 8)])
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_nothing_to_attend_to(shape, implementation):
    mask = torch.ones(shape[:3], dtype=torch.bool)
    result = results(
        lambda q, k, v: instance_attention(q, k, v, 2, mask, 0.0, implementation),
        case(shape),
        torch.float32,
    )
    assert [x.shape for x in result] == [torch.Size(shape)] * 4


def test_gradcheck_of_the_reference():
    q, k, v, _ = (x.double().requires_grad_() for x in case((1, 3, 2, 4)))
    mask = some_seen((1, 3, 2))
    assert torch.autograd.gradcheck(
        lambda *inputs: instance_attention_reference(*inputs, 2, mask), (q, k, v)
    )


def test_the_operation_is_known_to_torch():
    shape, heads = (1, 3, 2, 8), 2
    q, k, v, upstream = case(shape)
    mask, seed = some_seen(shape, anywhere=True), torch.tensor([5])
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.megamod.instance_attention, (leaves, heads, mask, 0.0, None))
    inputs = [torch.cat([q, k, v], -1).detach()]
    torch.library.opcheck(
        torch.ops.megamod.instance_attention_backward,
        (upstream, inputs, heads, None, 0.5, seed),
        test_utils=("test_schema", "test_faketensor"),
    )

    def twice(*inputs):
        return instance_attention(*inputs, heads, mask, 0.0, "triton") * 2

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    for function in (compiled, twice):
        torch.testing.assert_close(
            results(function, (q, k, v, upstream), torch.float32),
            results(lambda *x: loops(*x, heads, mask) * 2, (q, k, v, upstream), torch.float32),
        )
    meta = [x.detach().to("meta").requires_grad_() for x in (q, k, v)]
    out = instance_attention(*meta, heads, mask.to("meta"), 0.1, "triton")
    out.sum().backward()
    assert out.shape == meta[0].grad.shape == shape and out.is_meta


def test_flops_and_what_is_saved():
    groups, instances, length, size = 2, 3, 4, 16
    qkv = torch.randn(groups, instances, length, 3 * size, requires_grad=True)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with FlopCounterMode(display=False) as counter, hooks:
        instance_attention_packed(qkv, 2, None, 0.0, "triton").sum().backward()
    # Two products forward and five backward, each of 2 N^2 D per position.
    assert counter.get_total_flops() == 7 * 2 * instances**2 * size * groups * length
    assert sum(t.numel() for t in saved) == qkv.numel()


def test_what_does_not_fit_is_refused():
    q, k, v, _ = case((2, 3, 4, 8))
    mask = torch.ones(2, 3, 4)
    for message, call in (
        ("do not fit: expected", lambda: instance_attention(q, k[:1], v, 2)),
        ("3 heads do not divide 8", lambda: instance_attention(q, k, v, 3)),
        (
            "of torch.float32 does not fit: expected bool",
            lambda: instance_attention(q, k, v, 2, mask),
        ),
        ("dropout 1.0 is not in", lambda: instance_attention(q, k, v, 2, None, 1.0)),
        (r"expected \[B, N, L, 3", lambda: instance_attention_packed(q, 2)),
        ("implementation 'best'", lambda: instance_attention(q, k, v, 2, implementation="best")),
        (
            "kernels support N <= 64",
            lambda: instance_attention(*[q.double()] * 3, 2, implementation="triton"),
        ),
        (
            "N is 65",
            lambda: instance_attention(*[torch.zeros(1, 65, 1, 4)] * 3, 2, implementation="triton"),
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("masked", [False, True])
def test_the_contextual_multiplexer_of_kernels_is_that_of_plain_torch(masked):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    blocks = [EncoderLayer(config) for _ in range(2)]
    x, key = torch.randn(2, 3, 5, 16), torch.randn(3, 16)
    mask = some_seen((2, 3, 5), anywhere=True).flatten(0, 1).long() if masked else None
    leaves = [x.requires_grad_(), key.requires_grad_(), *blocks[0].parameters()]
    leaves += blocks[1].parameters()
    result = []
    for implementation in ("triton", "reference"):
        mixed = multiplex_contextual(x, key, *blocks, mask, True, implementation)
        grads = torch.autograd.grad(mixed.square().sum(), leaves)
        result.append((mixed.detach(), *grads))
    torch.testing.assert_close(*result, atol=1e-4, rtol=1e-4)  # of gradients in the hundreds
    assert result[1][0].shape == (2, 5, 16)
