"""RSA demultiplexing: definition, the form that keeps little, and kernels, against float64."""

import pytest
import torch
from megamod_kernels import demux
from megamod_kernels.demux import (
    Chain,
    Pairs,
    _rsa_demux,
    rsa_demux,
    rsa_demux_reference,
    rsa_demux_triton,
    split_projection,
)
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = [
    (2, 5, 7, 48, 3),
    (1, 1, 3, 80, 2),
    (2, 3, 1, 200, 3),
    (1, 20, 2, 16, 2),
    (1, 2, 5, 300, 4),
    (1, 2, 3, 512, 3),
]
CASES = [
    pytest.param(shape, dtype, chosen, id=f"{name}-{kind}-{'pairs' if chosen else 'all'}")
    for shape in SHAPES
    for name in ["B{}-N{}-L{}-D{}-layers{}".format(*shape)]
    for kind, dtype in DTYPES.items()
    for chosen in (False, True)
    if kind != "fp16" or not chosen
]


def case(shape, chosen: bool):
    """float64 leaves: both parts, then weights of the chain; pairs; the number of weights."""
    generator = torch.Generator().manual_seed(0)
    B, N, L, D, layers = shape
    sizes = [(B, L, D), (N, D)]
    sizes += [(D, D), (D,)] * (layers - 1) + [(D,), (D,)]
    leaves = [
        torch.randn(*size, generator=generator, dtype=torch.float64)
        * (D**-0.5 if size == (D, D) else 1.0)
        for size in sizes
    ]
    if not chosen:
        return leaves, None
    rows = 2 * B * L + 1  # more than positions, so that some share one
    pairs = Pairs(*(torch.randint(top, (rows,), generator=generator) for top in (B, N, L)))
    return leaves, pairs


def chain_of(weights) -> Chain:
    *dense, last, norm = list(zip(weights[::2], weights[1::2], strict=True))
    return Chain(dense, last, norm, 1e-12)


def results(function, leaves, pairs, dtype):
    """The result and all gradients."""
    hidden, key, *weights = (leaf.detach().to(dtype).requires_grad_() for leaf in leaves)
    output = function(hidden, key, chain_of(weights), pairs)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return output, *torch.autograd.grad(output, (hidden, key, *weights), upstream.to(dtype))


def kernels(hidden, key, chain, pairs, dropout=0.0):
    return rsa_demux(hidden, key, chain, pairs, dropout, implementation="triton")


def apart(hidden, key, chain, pairs, dropout=0.0):
    """ "auto" on a GPU: states first, then the vendor's matrix products."""
    return rsa_demux_triton(hidden, key, chain, pairs, dropout, own_matmul=False)


def error(result, exact) -> float:
    return float((result.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("shape", "dtype", "chosen"), CASES)
def test_value_and_gradients_against_float64(shape, dtype, chosen, poisoned, rounding):
    leaves, pairs = case(shape, chosen)
    leaves = [leaf.to(dtype).double() for leaf in leaves]
    exact = results(rsa_demux_reference, leaves, pairs, torch.float64)
    eager = results(rsa_demux_reference, leaves, pairs, dtype)
    for form in (kernels, apart):
        ours = results(form, leaves, pairs, dtype)
        for result, plain, expected in zip(ours, eager, exact, strict=True):
            assert result.shape == expected.shape and result.dtype == dtype
            if dtype == torch.float32:
                assert error(result, expected) <= 2e-6
            else:
                assert error(result, expected) <= 1.1 * error(plain, expected)


@pytest.mark.parametrize("chosen", [False, True])
def test_tiles_of_large_products(chosen, monkeypatch, poisoned):
    """Tuned tiles on sizes that no tile divides, which tests are too small to be given."""
    tuned = demux.select_matmul_launch(1 << 20, 40, 2)
    assert tuned != demux.select_matmul_launch(1, 40, 2)
    monkeypatch.setattr(demux, "select_matmul_launch", lambda *_: tuned)
    leaves, pairs = case((1, 3, 23, 40, 3), chosen)
    leaves = [leaf.float().double() for leaf in leaves]
    exact = results(rsa_demux_reference, leaves, pairs, torch.float64)
    ours = results(kernels, leaves, pairs, torch.float32)
    assert all(error(*both) <= 2e-6 for both in zip(ours, exact, strict=True))


@pytest.mark.parametrize("chosen", [False, True])
def test_programs_with_several_blocks(chosen, monkeypatch, poisoned):
    """As where there are more rows than programs at once, which tests are too small for."""
    monkeypatch.setattr(demux, "PROGRAMS", 2)
    leaves, pairs = case((1, 3, 23, 40, 3), chosen)
    leaves = [leaf.float().double() for leaf in leaves]
    exact = results(rsa_demux_reference, leaves, pairs, torch.float64)
    ours = results(apart, leaves, pairs, torch.float32)
    assert all(error(*both) <= 2e-6 for both in zip(ours, exact, strict=True))


def test_gelu_is_exact(rounding):
    """Far into both tails, where what is left of a normal distribution is small."""
    x = torch.linspace(-9, 9, 901).view(1, 1, -1)
    zero, item = torch.zeros_like(x), torch.ones(1, 901)
    chain = chain_of([torch.zeros(901, 901), item[0] * 0, item[0] * 0, item[0] * 0])
    leaf = x.clone().requires_grad_()
    value = kernels(leaf, zero[0], chain, None)
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    wide = x.double().requires_grad_()
    exact = F.gelu(wide)
    (expected,) = torch.autograd.grad(exact.sum(), wide)
    torch.testing.assert_close(value[:, 0].double(), exact.detach(), rtol=3e-7, atol=5e-8)
    torch.testing.assert_close(slope.double(), expected, rtol=3e-7, atol=2e-7)


@pytest.mark.parametrize("chosen", [False, True])
def test_the_form_for_cpus_is_the_definition(chosen):
    leaves, pairs = case((2, 3, 4, 24, 4), chosen)
    exact = results(rsa_demux_reference, leaves, pairs, torch.float64)
    for result, expected in zip(
        results(rsa_demux, leaves, pairs, torch.float64), exact, strict=True
    ):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_definition_is_the_concatenated_form():
    B, N, L, D = 2, 3, 4, 8
    torch.manual_seed(0)
    hidden, keys = torch.randn(B, L, D), torch.randn(N, D)
    first, bias = torch.randn(D, 2 * D), torch.randn(D)
    leaves, _ = case((B, N, L, D, 3), False)
    dense, dense_bias, last, last_bias, norm, norm_bias = (item.float() for item in leaves[2:])
    chain = Chain([(dense, dense_bias)], (last, last_bias), (norm, norm_bias), 1e-12)
    result = rsa_demux_reference(*split_projection(hidden, keys, first, bias), chain)
    for b in range(B):
        for i in range(N):
            for t in range(L):
                x = F.gelu(first @ torch.cat([keys[i], hidden[b, t]]) + bias)
                x = F.gelu(dense @ x + dense_bias) + x
                z = F.layer_norm(F.gelu(last @ x + last_bias), (D,), norm, norm_bias, 1e-12) + x
                torch.testing.assert_close(result[b, i, t], z, rtol=1e-4, atol=1e-5)


def test_definition_passes_gradcheck():
    leaves, pairs = case((1, 2, 2, 4, 3), True)
    inputs = [leaf.requires_grad_() for leaf in leaves]

    def call(hidden, key, *weights):
        return rsa_demux_reference(hidden, key, chain_of(weights), pairs)

    assert torch.autograd.gradcheck(call, inputs)


def test_tensors_that_are_not_contiguous():
    leaves, _ = case((2, 3, 4, 24, 3), False)
    turned = [leaf.float().T.contiguous().T if leaf.dim() == 2 else leaf.float() for leaf in leaves]
    turned[0] = turned[0].permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert not turned[0].is_contiguous() and not turned[2].is_contiguous()
    exact = results(rsa_demux_reference, leaves, None, torch.float64)
    hidden, key, *weights = (item.requires_grad_() for item in turned)
    output = kernels(hidden, key, chain_of(weights), None)
    torch.testing.assert_close(output.double(), exact[0], rtol=1e-4, atol=1e-5)
    result = torch.autograd.grad(output.sum(), (hidden, key, *weights))
    plain = rsa_demux_reference(hidden, key, chain_of(weights))
    expected = torch.autograd.grad(plain.sum(), (hidden, key, *weights))
    for item, other in zip(result, expected, strict=True):
        torch.testing.assert_close(item, other, rtol=1e-4, atol=1e-4)


def test_nothing_to_do():
    leaves, _ = case((2, 3, 4, 24, 3), False)
    nothing = Pairs(*(torch.zeros(0, dtype=torch.long) for _ in range(3)))
    output, *grads = results(kernels, leaves, nothing, torch.float32)
    assert output.shape == (0, 24) and all(not grad.any() for grad in grads)
    empty = [torch.zeros(0, 4, 24), *(leaf.float() for leaf in leaves[1:])]
    assert kernels(empty[0], empty[1], chain_of(empty[2:]), None).shape == (0, 3, 4, 24)


@pytest.mark.parametrize(("form", "chosen"), [(kernels, False), (apart, False), (apart, True)])
def test_dropout_is_the_same_in_backward(form, chosen):
    """With every mask found from the result, the gradient is that of the masked network."""
    leaves, pairs = case((1, 2, 3, 32, 3), chosen)
    hidden, key, *weights = (leaf.float().requires_grad_() for leaf in leaves)
    torch.manual_seed(3)
    item = form(hidden, key, chain_of(weights), pairs, 0.5)
    torch.manual_seed(3)
    again = form(hidden, key, chain_of(weights), pairs, 0.5)
    assert torch.equal(item, again)
    assert not torch.equal(item, form(hidden, key, chain_of(weights), pairs, 0.5))
    upstream = torch.randn_like(item)
    grads = torch.autograd.grad(item, (hidden, key, *weights), upstream)
    # Central differences along the gradient, with the same masks, in float32.
    norm = sum(grad.double().square().sum() for grad in grads).sqrt()
    step = 2e-3 / norm
    values = []
    for sign in (1, -1):
        moved = [
            (t + sign * step * g).float()
            for t, g in zip((hidden, key, *weights), grads, strict=True)
        ]
        torch.manual_seed(3)
        with torch.no_grad():
            output = form(moved[0], moved[1], chain_of(moved[2:]), pairs, 0.5)
        values.append((output.double() * upstream.double()).sum())
    slope = (values[0] - values[1]) / (2 * step)
    assert slope / norm**2 == pytest.approx(1.0, rel=2e-2)
    # Half of what is dropped from is 0: the last residual is a sum of two such terms.
    _, before = _rsa_demux(
        hidden, key, weights, None, None, torch.tensor([7]), 0.5, 1e-12, form is kernels
    )
    x = F.gelu(hidden[:, None] + key[None, :, None]).flatten(0, 2)
    pre = before[0] - weights[1]
    kept = torch.linalg.solve(weights[0].double(), pre.double().T).T / x.double()
    share = ((kept - 2).abs() < 1e-2).double().mean()
    assert ((kept.abs() < 1e-2) | ((kept - 2).abs() < 1e-2)).double().mean() > 0.98
    assert 0.35 < share < 0.65


def test_compiles_whole_and_counts_operations():
    leaves, _ = case((2, 3, 4, 32, 3), False)
    leaves = [leaf.float() for leaf in leaves]

    def call(hidden, key, *weights):
        return kernels(hidden, key, chain_of(weights), None) * 2

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    inputs = [leaf.requires_grad_() for leaf in leaves]
    torch.testing.assert_close(compiled(*inputs), call(*inputs))
    with FlopCounterMode(display=False) as counter:
        call(*inputs).sum().backward()
    rows = 2 * 3 * 4
    assert counter.get_total_flops() == 3 * 2 * rows * 32 * 32 * 2
    meta = [leaf.detach().to("meta") for leaf in leaves]
    assert kernels(meta[0], meta[1], chain_of(meta[2:]), None).shape == (2, 3, 4, 32)


def test_operator_is_well_formed():
    leaves, pairs = case((1, 2, 3, 16, 3), True)
    hidden, key, *weights = (leaf.float().requires_grad_() for leaf in leaves)
    places = (pairs.group * 3 + pairs.position, pairs.instance)
    torch.library.opcheck(
        torch.ops.megamod.rsa_demux, (hidden, key, weights, *places, None, 0.0, 1e-12, True)
    )


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_saved_for_backward(implementation):
    """Bytes kept, parameters apart, against the concatenated form."""
    B, N, L, D = 2, 5, 8, 32
    torch.manual_seed(0)
    leaves, _ = case((B, N, L, D, 3), False)
    weights = [leaf.float().requires_grad_() for leaf in leaves[2:]]
    hidden = torch.randn(B, L, D, requires_grad=True)
    keys = torch.randn(N, D, requires_grad=True)
    first = torch.randn(D, 2 * D, requires_grad=True)
    bias = torch.zeros(D, requires_grad=True)
    parameters = {t.untyped_storage().data_ptr() for t in (*weights, keys, first, bias, hidden)}

    def kept(call) -> int:
        storages = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = call()
        del output
        return sum(storages.values())

    def split():
        parts = split_projection(hidden, keys, first, bias)
        return rsa_demux(*parts, chain_of(weights), implementation=implementation)

    def concatenated():
        repeated = hidden[:, None].expand(-1, N, -1, -1)
        marks = keys[None, :, None].expand(B, -1, L, -1)
        x = F.gelu(F.linear(torch.cat([marks, repeated], -1), first, bias))
        x = F.gelu(F.linear(x, *weights[:2])) + x
        last = F.gelu(F.linear(x, *weights[2:4]))
        return F.layer_norm(last, (D,), *weights[4:], 1e-12) + x

    assert kept(split) <= 0.35 * kept(concatenated)


def test_shapes_that_do_not_fit():
    leaves, _ = case((2, 3, 4, 24, 3), False)
    hidden, key, *weights = leaves
    with pytest.raises(
        ValueError, match=r"hidden_part \(2, 4, 24\) and key_part \(3, 23\) do not fit"
    ):
        rsa_demux(hidden, key[:, 1:], chain_of(weights))
    with pytest.raises(ValueError, match="implementation 'fast' is none of auto"):
        rsa_demux(hidden, key, chain_of(weights), implementation="fast")
