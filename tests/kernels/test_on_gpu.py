"""Every operation on a GPU: values and all gradients against float64, at the sizes models have.

    pytest -m gpu tests/kernels

Without a GPU the same checks are rehearsed at small sizes, so that they are known to run.

The rules are those of the tests that run in Triton's interpreter: float32 within 2e-6 of float64
(or as near as plain torch), bf16 and fp16 with at most 1.1 times the error of plain torch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import test_demux
import test_instance_attention
import test_keyed_linear
import test_mux
import test_norm_linear
import torch
from megamod_kernels.demux import rsa_demux, rsa_demux_reference
from megamod_kernels.dispatch import INTERPRETED
from megamod_kernels.instance_attention import (
    instance_attention,
    instance_attention_packed,
    instance_attention_reference,
)
from megamod_kernels.keyed_linear import keyed_linear, keyed_linear_reference
from megamod_kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from megamod_kernels.mux import multiplex, multiplex_reference
from megamod_kernels.mux_attention import mux_attention, mux_attention_reference
from megamod_kernels.mux_embed import Tables, mux_embed, mux_embed_reference
from megamod_kernels.norm_linear import Norm, norm_linear, norm_linear_reference
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
WHY = "needs a CUDA device"
if torch.cuda.is_available():
    WHY = "Triton's interpreter is on in this process: run `pytest -m gpu tests/kernels`"


def on_gpu(test):
    """Marks a test of a GPU."""
    return pytest.mark.gpu(pytest.mark.skipif(DEVICE == "cpu", reason=WHY)(test))


Sizes = tuple[int, ...]
WORDS = 1000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = {  # B, N, L, D
    "base-n5": (4, 5, 128, 768),
    "base-n10": (2, 10, 128, 768),
    "large-n2": (3, 2, 96, 1024),
    "xl-n5": (2, 5, 64, 2048),
    "odd": (3, 7, 37, 200),
    "one-row": (1, 3, 1, 72),
}
ODD = SHAPES["odd"]
# Compiling takes most of the time, so every dtype runs at two shapes only.
EVERYWHERE = ("base-n5", "odd")
CASES = [
    pytest.param(shape, dtype, id=f"{where}-{name}")
    for where, shape in SHAPES.items()
    for name, dtype in DTYPES.items()
    if where in EVERYWHERE or name == "bf16"
]


@dataclass(frozen=True)
class Op:
    """An operation as a function of tensors: those that have gradients, then others.

    Attributes:
        leaves: from B, N, L, D to those with gradients, any float dtype, on the CPU.
        ours, plain: what is compared; with `drops` ours takes `dropout`.
        others: from the same to tensors of integers and booleans.
        slack: how many times the error of plain torch is allowed in half precision.
    """

    leaves: Callable[[Sizes], list[Tensor]]
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    others: Callable[[Sizes], list[Tensor]] = lambda shape: []
    drops: bool = False
    slack: float = 1.1


def drawn(*sizes: Sizes, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*size, generator=generator) for size in sizes]


def below(*tops: int, size: Sizes) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(top, size, generator=generator) for top in tops]


def heads_of(size: int) -> int:
    """Heads of 64 columns, or two."""
    return size // 64 if size % 64 == 0 else 2


def demux_by(function: Callable[..., Tensor], pairs: bool) -> Callable[..., Tensor]:
    """`rsa_demux` or its definition, of all positions or of pairs, which are the last arguments."""

    def call(hidden: Tensor, key: Tensor, *weights: Tensor, **more: float) -> Tensor:
        chosen = test_demux.Pairs(*weights[-3:]) if pairs else None
        chain = test_demux.chain_of(weights[:-3] if pairs else weights)
        return function(hidden, key, chain, chosen, **more)

    return call


def fused_demux(*inputs: object, **more: float) -> Tensor:
    """With products that make the states they read, which "auto" does not choose."""
    implementation = "triton" if DEVICE == "cuda" else "auto"
    return rsa_demux(*inputs, **more, implementation=implementation)


def demux_leaves(shape: Sizes) -> list[Tensor]:
    return test_demux.case((*shape, 3), False)[0]


def pairs_of(shape: Sizes) -> list[Tensor]:
    """More pairs than positions, so that some share one."""
    B, N, L, _ = shape
    return below(B, N, L, size=(2 * B * L + 1,))


def embed_leaves(shape: Sizes) -> list[Tensor]:
    _, N, L, D = shape
    return drawn((WORDS, D), (max(L, 8), D), (2, D), (D,), (D,), (N, D))


def embed_by(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*inputs: Tensor, **more: float) -> Tensor:
        *tables, key, ids, types = inputs
        return function(ids, key, Tables(*tables, eps=1e-5, word_padding=0), types, **more)

    return call


def ids_and_types(shape: Sizes) -> list[Tensor]:
    B, N, L, _ = shape
    return below(WORDS, 2, size=(B * N, L))


def by_heads(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **more: float) -> Tensor:
        return function(q, k, v, heads_of(q.shape[-1]), mask, **more)

    return call


def seen(shape: Sizes) -> list[Tensor]:
    """Somebody is seen at every position, so that no shift spoils plain torch's float32."""
    mask = test_instance_attention.some_seen(shape, anywhere=True)
    mask[:, 0] = True
    return [mask]


def packed(qkv: Tensor, **more: float) -> Tensor:
    return instance_attention_packed(qkv, heads_of(qkv.shape[-1] // 3), **more)


def plain_packed(qkv: Tensor) -> Tensor:
    return instance_attention_reference(*qkv.chunk(3, -1), heads_of(qkv.shape[-1] // 3))


def keyed_leaves(shape: Sizes) -> list[Tensor]:
    x, key, weight, bias, _ = test_keyed_linear.case((*shape, 3 * shape[-1]))
    return [x, key, weight * shape[-1] ** -0.5, bias]


def keyed(*inputs: Tensor) -> Tensor:
    """By kernels in float32 too, which "auto" leaves to plain torch."""
    return keyed_linear(*inputs, implementation="triton" if DEVICE == "cuda" else "auto")


def norm_leaves(shape: Sizes) -> list[Tensor]:
    B, N, L, D = shape
    return test_norm_linear.case((B * N, L), D, 2 * D)


def behind_norm(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return function(x, Norm(gain, shift, 1e-5), weight, bias)

    return call


def normed(x: Tensor, norm: Norm, weight: Tensor, bias: Tensor) -> Tensor:
    """By kernels in float32 too, which "auto" leaves to plain torch."""
    implementation = "triton" if DEVICE == "cuda" else "auto"
    return norm_linear(x, norm, weight, bias, implementation)


def first_block_leaves(shape: Sizes) -> list[Tensor]:
    """Tables and keys, then matrices of queries, keys and values, and two biases."""
    D = shape[-1]
    layers = drawn(*[(D, D)] * 3, *[(D,)] * 2, seed=5)
    return embed_leaves(shape) + [layer * D**-0.5 for layer in layers]


def first_block_by(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """The heads' result and the residual, side by side."""

    def call(*inputs: Tensor, **more: float) -> Tensor:
        *tables, key = inputs[:6]
        matrices, (bias, of_values), (ids, types) = inputs[6:9], inputs[9:11], inputs[11:]
        known = (ids, key, Tables(*tables, eps=1e-5, word_padding=0))
        # Softmax does not see the bias of keys alone, whose gradient would be 0.
        projections = list(zip(matrices, (bias, bias, of_values), strict=True))
        return torch.cat(function(*known, projections, heads_of(key.shape[1]), types, **more), -1)

    return call


def fused(*inputs: object, **more: float) -> tuple[Tensor, Tensor]:
    """In one kernel, which "auto" does not choose."""
    implementation = "triton" if DEVICE == "cuda" else "auto"
    return mux_attention(*inputs, **more, implementation=implementation)


def entropy_leaves(shape: Sizes) -> list[Tensor]:
    B, N, L, D = shape
    return [D**-0.5 * leaf for leaf in drawn((B * N * L, D), (WORDS, D))]


def labels_of(shape: Sizes) -> list[Tensor]:
    B, N, L, _ = shape
    (labels,) = below(WORDS, size=(B * N * L,))
    labels[::5] = -100
    return [labels]


def entropy(*inputs: Tensor) -> Tensor:
    return linear_cross_entropy(*inputs)[0]


def plain_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    if hidden.dtype != torch.float64:
        return linear_cross_entropy_reference(hidden, weight, labels)
    # The reference computes in float32.
    return torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")


OPS = {
    "multiplex": Op(lambda shape: list(test_mux.case(shape)[:2]), multiplex, multiplex_reference),
    "mux_embed": Op(
        embed_leaves, embed_by(mux_embed), embed_by(mux_embed_reference), ids_and_types, drops=True
    ),
    "rsa_demux": Op(
        demux_leaves, demux_by(rsa_demux, False), demux_by(rsa_demux_reference, False), drops=True
    ),
    "rsa_demux fused": Op(
        demux_leaves, demux_by(fused_demux, False), demux_by(rsa_demux_reference, False), drops=True
    ),
    "rsa_demux of pairs": Op(
        demux_leaves,
        demux_by(rsa_demux, True),
        demux_by(rsa_demux_reference, True),
        pairs_of,
        drops=True,
    ),
    "instance_attention": Op(
        lambda shape: test_instance_attention.case(shape)[:3],
        by_heads(instance_attention),
        by_heads(instance_attention_reference),
        seen,
        drops=True,
    ),
    "instance_attention_packed": Op(
        lambda shape: [torch.cat(test_instance_attention.case(shape)[:3], -1)],
        packed,
        plain_packed,
        drops=True,
    ),
    "keyed_linear": Op(keyed_leaves, keyed, keyed_linear_reference),
    "norm_linear": Op(norm_leaves, behind_norm(normed), behind_norm(norm_linear_reference)),
    # Gradients of queries and keys go through torch's softmax, which is noise on both sides.
    "mux_attention": Op(
        first_block_leaves,
        first_block_by(fused),
        first_block_by(mux_attention_reference),
        ids_and_types,
        drops=True,
        slack=1.5,
    ),
    # Gradients are rounded before they are multiplied by the loss's own, and again then.
    "linear_cross_entropy": Op(entropy_leaves, entropy, plain_entropy, labels_of, slack=2.5),
}
DROPPING = [name for name, op in OPS.items() if op.drops]


def on_device(op: Op, shape: Sizes, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves in float64, with values that a tensor of that dtype can hold; and the others."""
    leaves = [leaf.to(DEVICE).to(dtype).double() for leaf in op.leaves(shape)]
    return leaves, [other.to(DEVICE) for other in op.others(shape)]


def results(function, leaves, others, dtype) -> list[Tensor]:
    """The value and all gradients."""
    inputs = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    value = function(*inputs, *others)
    generator = torch.Generator(DEVICE).manual_seed(1)
    upstream = torch.randn(value.shape, generator=generator, device=DEVICE).to(dtype)
    return [value.detach(), *torch.autograd.grad(value, inputs, upstream.to(value.dtype))]


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm().clamp_min(1e-300))


@on_gpu
@pytest.mark.parametrize(("shape", "dtype"), CASES)
@pytest.mark.parametrize("name", OPS)
def test_value_and_gradients_on_a_gpu(name, shape, dtype):
    op = OPS[name]
    inputs = on_device(op, shape, dtype)
    exact = results(op.plain, *inputs, torch.float64)
    plain = results(op.plain, *inputs, dtype)
    ours = results(op.ours, *inputs, dtype)
    again = results(op.ours, *inputs, dtype)
    for number, (result, other, eager, expected) in enumerate(
        zip(ours, again, plain, exact, strict=True)
    ):
        assert result.shape == expected.shape and result.isfinite().all(), number
        assert torch.equal(result, other), f"{number}: other bits the second time"
        # The error of a few numbers is itself uncertain by about one over the root of how many.
        if expected.norm() < 1e-9:  # what softmax over one position does not see
            continue
        allowed = op.slack * (1 + 4 / expected.numel() ** 0.5) * error(eager, expected)
        if result.dtype == torch.float32:
            allowed = max(2e-6, allowed)
        assert error(result, expected) <= allowed, number


@on_gpu
@pytest.mark.parametrize("name", OPS)
def test_tensors_that_are_not_contiguous_on_a_gpu(name):
    op = OPS[name]
    leaves, others = on_device(op, ODD, torch.float32)
    turned = [leaf.float().mT.contiguous().mT if leaf.dim() > 1 else leaf for leaf in leaves]
    assert any(not leaf.is_contiguous() for leaf in turned)
    exact = results(op.plain, leaves, others, torch.float64)
    ours = results(op.ours, turned, others, torch.float32)
    for number, (result, expected) in enumerate(zip(ours, exact, strict=True)):
        assert error(result, expected) <= 5e-6, number


@on_gpu
@pytest.mark.parametrize("name", DROPPING)
def test_dropout_is_replayed_on_a_gpu(name):
    """The slope along the gradient, by differences with the same masks."""
    op = OPS[name]
    leaves, others = on_device(op, (1, 3, 8, 64), torch.float32)

    def dropped(*inputs: Tensor) -> Tensor:
        torch.manual_seed(3)
        return op.ours(*inputs, *others, dropout=0.3)

    inputs = [leaf.float().requires_grad_() for leaf in leaves]
    value = dropped(*inputs)
    assert torch.equal(value, dropped(*inputs))
    assert not torch.equal(value, op.ours(*inputs, *others, dropout=0.3))
    upstream = torch.randn_like(value)
    grads = torch.autograd.grad(value, inputs, upstream)
    norm = sum(grad.double().square().sum() for grad in grads).sqrt()
    step = 2e-3 / norm
    sums = []
    for sign in (1, -1):
        moved = [(t + sign * step * g).float() for t, g in zip(inputs, grads, strict=True)]
        with torch.no_grad():
            sums.append((dropped(*moved).double() * upstream.double()).sum())
    assert float((sums[0] - sums[1]) / (2 * step) / norm**2) == pytest.approx(1.0, rel=2e-2)


@on_gpu
@pytest.mark.parametrize("name", [name for name in OPS if name != "linear_cross_entropy"])
def test_compiled_whole_on_a_gpu(name, backend="inductor", dtype=torch.bfloat16):
    op = OPS[name]
    torch.compiler.reset()
    inputs = on_device(op, ODD, dtype)

    def twice(*tensors: Tensor) -> Tensor:
        return op.ours(*tensors) * 2

    compiled = torch.compile(twice, fullgraph=True, dynamic=False, backend=backend)
    expected = results(twice, *inputs, dtype)
    for result, plain in zip(results(compiled, *inputs, dtype), expected, strict=True):
        assert error(result, plain.double()) <= 1e-2


@on_gpu
def test_kernels_replay_from_a_graph():
    """A forward and backward pass that was captured once gives the same bits again."""
    op = OPS["rsa_demux"]
    leaves, _ = on_device(op, ODD, torch.float32)
    inputs = [leaf.float().requires_grad_() for leaf in leaves]

    def step() -> list[Tensor]:
        value = op.ours(*inputs)
        return [value.detach(), *torch.autograd.grad(value, inputs, torch.ones_like(value))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for pair in zip(result, expected, strict=True))


@pytest.mark.skipif(DEVICE == "cuda", reason="the real tests run")
@pytest.mark.parametrize("name", OPS)
def test_rehearsal_without_a_gpu(name, monkeypatch):
    monkeypatch.setitem(globals(), "ODD", (2, 3, 5, 24))
    for dtype in (torch.float32, torch.bfloat16):
        test_value_and_gradients_on_a_gpu(name, (2, 3, 4, 64), dtype)
    test_tensors_that_are_not_contiguous_on_a_gpu(name)
    if name in DROPPING:
        test_dropout_is_replayed_on_a_gpu(name)
    if name != "linear_cross_entropy":
        for dtype in (torch.float32, torch.bfloat16):
            test_compiled_whole_on_a_gpu(name, "aot_eager", dtype)
