import pytest
import torch
from megamod_kernels import keyed_linear as module
from megamod_kernels.keyed_linear import keyed_linear, keyed_linear_reference
from torch.utils.flop_counter import FlopCounterMode

SHAPES = {
    "B2-N3-L7-D48-E20": (2, 3, 7, 48, 20),  # a block of rows lies in several instances
    "B1-N2-L64-D80-E33": (1, 2, 64, 80, 33),  # in one
    "B1-N1-L3-D200-E70": (1, 1, 3, 200, 70),
    "B1-N17-L1-D16-E8": (1, 17, 1, 16, 8),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = [
    pytest.param(sizes, dtype, id=f"{shape}-{name}")
    for shape, sizes in SHAPES.items()
    for name, dtype in DTYPES.items()
]
NAMES = ("out", "x", "key", "weight", "bias")


def case(sizes, dtype=torch.float32):
    """x, key, weight, bias and an upstream gradient."""
    groups, instances, length, size, outputs = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = (groups, instances, length, size), (instances, size), (outputs, size), (outputs,)
    shapes += ((groups, instances, length, outputs),)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def loops(x, key, weight, bias):
    """Instance by instance."""
    return torch.stack([(x[:, i] * key[i]) @ weight.T + bias for i in range(len(key))], 1)


def kernels(*inputs):
    return keyed_linear(*inputs, implementation="triton")


def results(function, inputs, dtype):
    """Value and gradients."""
    *leaves, upstream = (t.detach().to(dtype) for t in inputs)
    leaves = [t.requires_grad_() for t in leaves]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


def row_error(result, exact):
    """Largest error of a row over its norm."""
    return float(((result.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max())


@pytest.mark.parametrize(("sizes", "dtype"), CASES)
def test_value_and_gradients_against_loops(sizes, dtype, poisoned, rounding):
    inputs = case(sizes, dtype)
    exact = results(loops, inputs, torch.float64)
    eager = results(keyed_linear_reference, inputs, dtype)
    result = results(kernels, inputs, dtype)
    for name, ours, plain, expected in zip(NAMES, result, eager, exact, strict=True):
        assert ours.dtype == dtype and ours.shape == expected.shape
        if dtype == torch.float32:
            assert row_error(ours, expected) <= 2e-6, name
        else:
            off = (ours.double() - expected).norm()
            assert off <= 1.1 * (plain.double() - expected).norm(), name


def test_parts_of_the_positions(monkeypatch):
    monkeypatch.setattr(module, "SPLIT_ROWS", 8)
    inputs = case((2, 3, 19, 24, 40))
    result = results(kernels, inputs, torch.float32)
    exact = results(loops, inputs, torch.float64)
    assert all(row_error(*pair) <= 2e-6 for pair in zip(result, exact, strict=True))
    again = results(kernels, inputs, torch.float32)
    assert all(torch.equal(*pair) for pair in zip(result, again, strict=True))


def test_tensors_that_are_not_contiguous_and_wider_keys():
    x, key, weight, bias, upstream = case((2, 3, 5, 24, 10))
    exact = results(loops, (x, key, weight, bias, upstream), torch.float64)
    inputs = (
        x.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([key.double(), key.double()], -1)[..., 0],
        weight.T.contiguous().T,
        torch.stack([bias, bias], -1)[..., 0],
    )
    assert not any(t.is_contiguous() for t in inputs)
    leaves = [t.requires_grad_() for t in inputs]
    out = kernels(*leaves)
    upstream = upstream.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    result = out, *torch.autograd.grad(out, leaves, upstream)
    assert [t.dtype for t in result] == [torch.float32] * 2 + [torch.float64] + [torch.float32] * 2
    assert all(row_error(*pair) <= 2e-6 for pair in zip(result, exact, strict=True))


@pytest.mark.parametrize("sizes", [(0, 2, 3, 8, 4), (2, 2, 0, 8, 4)])
def test_no_rows(sizes):
    result = results(kernels, case(sizes), torch.float32)
    expected = results(keyed_linear_reference, case(sizes), torch.float32)
    assert all(torch.equal(*pair) for pair in zip(result, expected, strict=True))


@pytest.mark.parametrize("trained", ["x", "key", "weight", "bias"])
def test_only_the_asked_for_gradients_are_made(trained):
    inputs = case((1, 2, 3, 16, 8))
    exact = dict(zip(NAMES, results(loops, inputs, torch.float64), strict=True))
    leaves = dict(zip(NAMES[1:], inputs, strict=False))
    leaves[trained].requires_grad_()
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks:
        out = kernels(*leaves.values())
    out.backward(inputs[-1])
    assert row_error(leaves[trained].grad, exact[trained]) <= 2e-6
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [trained]
    kept_x = any(t.shape == leaves["x"].shape for t in saved)
    assert kept_x == (trained in ("key", "weight"))
    assert sum(t.numel() for t in saved) <= sum(t.numel() for t in inputs[:3])


def test_gradcheck_of_the_reference():
    *inputs, _ = (t.double().requires_grad_() for t in case((1, 2, 2, 3, 4)))
    assert torch.autograd.gradcheck(keyed_linear_reference, inputs)


def test_the_operation_is_known_to_torch():
    sizes = (1, 2, 3, 16, 8)
    inputs = case(sizes)
    leaves = [t.detach().requires_grad_() for t in inputs[:-1]]
    torch.library.opcheck(torch.ops.megamod.keyed_linear, leaves)
    x, key, weight, _, upstream = inputs
    for name, arguments in (
        ("input", (upstream, key, weight)),
        ("weight", (upstream, x, key, weight)),
    ):
        for more in ((),) if name == "input" else ((True,), (False,)):
            torch.library.opcheck(
                getattr(torch.ops.megamod, f"keyed_linear_grad_{name}"),
                (*arguments, *more),
                test_utils=("test_schema", "test_faketensor"),
            )
    compiled = torch.compile(lambda *t: kernels(*t) * 2, fullgraph=True, backend="aot_eager")
    expected = results(lambda *t: loops(*t) * 2, inputs, torch.float32)
    torch.testing.assert_close(results(compiled, inputs, torch.float32), expected)
    meta = [t.to("meta") for t in inputs[:-1]]
    assert kernels(*meta).shape == (1, 2, 3, 8)
    with FlopCounterMode(display=False) as counter:
        results(kernels, inputs, torch.float32)
    assert counter.get_total_flops() == 3 * 2 * 6 * 16 * 8  # three products, as of any layer


def test_what_does_not_fit_is_refused():
    x, key, weight, bias, _ = case((1, 2, 3, 8, 4))
    for inputs in (
        (x[0], key, weight, bias),
        (x, key[:1], weight, bias),
        (x, key, weight[:, 1:], bias),
        (x, key, weight, bias[1:]),
    ):
        with pytest.raises(ValueError, match="do not fit: expected"):
            keyed_linear(*inputs)
    with pytest.raises(ValueError, match="bias none do not fit"):
        keyed_linear(x, key[:1], weight)
    for inputs in ((x.half(), key, weight), (x.double(), key, weight.double())):
        with pytest.raises(ValueError, match="kernels take one of float32"):
            kernels(*inputs)
