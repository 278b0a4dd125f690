import pytest
import torch
from megamod_kernels.mux import multiplex, multiplex_reference

SHAPES = [(2, 5, 7, 48), (1, 1, 3, 80), (2, 3, 1, 200), (1, 64, 2, 8), (1, 2, 9, 300)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = [
    pytest.param(shape, dtype, id="B{}-N{}-L{}-D{}-".format(*shape) + name)
    for shape in SHAPES
    for name, dtype in DTYPES.items()
]


def case(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    groups, instances, length, size = shape
    x, key, upstream = (
        torch.randn(*sizes, generator=generator).to(dtype)
        for sizes in (shape, (instances, size), (groups, length, size))
    )
    return x, key, upstream


def results(function, x, key, upstream, dtype):
    x, key = (t.detach().to(dtype).requires_grad_() for t in (x, key))
    mixed = function(x, key)
    return mixed, *torch.autograd.grad(mixed, (x, key), upstream.to(dtype))


def kernels(x, key):
    return multiplex(x, key, "triton")


def row_error(result, exact):
    """Largest error of a row over the norm of that row."""
    off = (result.double() - exact).flatten(0, -2).norm(dim=-1)
    return float((off / exact.flatten(0, -2).norm(dim=-1)).max())


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_value_and_gradients_against_float64(shape, dtype, poisoned, rounding):
    inputs = case(shape, dtype)
    exact = results(multiplex_reference, *inputs, torch.float64)
    eager = results(multiplex_reference, *inputs, dtype)
    for result, plain, expected in zip(results(kernels, *inputs, dtype), eager, exact, strict=True):
        assert result.dtype == dtype and result.shape == expected.shape
        if dtype == torch.float32:
            assert row_error(result, expected) <= 2e-6
        else:
            assert row_error(result, expected) <= 1.1 * row_error(plain, expected)


def test_tensors_that_are_not_contiguous():
    x, key, upstream = case((2, 3, 4, 24))
    turned = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    wide = torch.stack([key, key], -1)[..., 0]
    assert not turned.is_contiguous() and not wide.is_contiguous()
    leaf, marks = turned.detach().requires_grad_(), wide.detach().requires_grad_()
    mixed = kernels(leaf, marks)
    result = torch.autograd.grad(mixed, (leaf, marks), upstream[:1, :, :1].expand(2, 4, 24))
    exact = results(
        multiplex_reference, x, key, upstream[:1, :, :1].expand(2, 4, 24), torch.float64
    )
    for ours, expected in zip((mixed, *result), exact, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)


def test_wider_keys_and_what_is_saved():
    x, key, _ = case((2, 3, 4, 24))
    x = x.bfloat16().requires_grad_()
    for trained, kept in ((False, [(3, 24)]), (True, [(2, 3, 4, 24), (3, 24)])):
        saved, marks = [], key.detach().requires_grad_(trained)
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(tuple(t.shape)) or t, lambda t: t
        )
        with hooks:
            mixed = kernels(x, marks)
        mixed.float().sum().backward()
        assert saved == kept and mixed.dtype == x.grad.dtype == torch.bfloat16
        assert marks.grad is None or marks.grad.dtype == torch.float32
    only = torch.autograd.grad(kernels(x.detach(), marks).float().sum(), marks)[0]
    assert torch.equal(only, marks.grad)


def test_more_rows_than_partial_sums(monkeypatch):
    monkeypatch.setattr("megamod_kernels.mux.PARTIALS", 2)
    x, key, upstream = case((3, 2, 7, 16))
    result = results(kernels, x, key, upstream, torch.float32)
    exact = results(multiplex_reference, x, key, upstream, torch.float64)
    again = results(kernels, x, key, upstream, torch.float32)
    assert row_error(result[2], exact[2]) <= 2e-6
    assert all(torch.equal(item, other) for item, other in zip(result, again, strict=True))


def test_nothing_to_multiplex():
    for shape in ((0, 2, 3, 8), (2, 2, 0, 8)):
        x, key, upstream = case(shape)
        mixed, grad_x, grad_key = results(kernels, x, key, upstream, torch.float32)
        assert mixed.shape == upstream.shape and grad_x.shape == x.shape
        assert grad_key.shape == key.shape and not grad_key.any()


def test_gradcheck_of_the_reference():
    x, key, _ = (tensor.double() for tensor in case((1, 2, 3, 4)))
    inputs = (x.requires_grad_(), key.requires_grad_())
    assert torch.autograd.gradcheck(multiplex_reference, inputs)
    assert torch.autograd.gradcheck(multiplex, inputs)


def test_the_operation_is_known_to_torch():
    x, key, _ = case((1, 2, 3, 8))
    x.requires_grad_(), key.requires_grad_()
    torch.library.opcheck(torch.ops.megamod.multiplex, (x, key))
    assert multiplex(x.to("meta"), key.to("meta"), "triton").shape == (1, 3, 8)
    compiled = torch.compile(lambda a, b: kernels(a, b) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, key), multiplex_reference(x, key) * 2)
    grads = torch.autograd.grad(compiled(x, key).sum(), (x, key))
    expected = torch.autograd.grad(multiplex_reference(x, key).sum() * 2, (x, key))
    torch.testing.assert_close(grads, expected)


def test_what_does_not_fit_is_refused():
    x, key, _ = case((1, 2, 3, 8))
    for a, b in ((x, key[:1]), (x[0], key), (x, key[:, :4]), (x[:, :0], key[:0])):
        with pytest.raises(ValueError, match="do not fit: expected"):
            multiplex(a, b)
    with pytest.raises(ValueError, match="'cuda' is none of auto, triton, reference"):
        multiplex(x, key, "cuda")
