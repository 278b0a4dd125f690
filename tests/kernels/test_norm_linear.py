"""A linear layer behind a norm that is never held, against float64."""

import pytest
import torch
from megamod_kernels import keyed_linear_kernels
from megamod_kernels.norm_linear import Norm, norm_linear, norm_linear_reference
from torch.utils.flop_counter import FlopCounterMode

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = [((2, 7), 48, 24), ((5,), 300, 70), ((3, 1, 2), 16, 16), ((1,), 520, 40)]


def case(shape, size, outputs, biased=True):
    """float64 leaves: x off the origin, gain, shift, weight, and a bias if there is one."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(*shape, size), (size,), (size,), (outputs, size)] + [(outputs,)] * biased
    leaves = [torch.randn(*each, generator=generator, dtype=torch.float64) for each in sizes]
    leaves[0] = 3 * leaves[0] + 2
    leaves[3] *= size**-0.5
    return leaves


def results(function, leaves, dtype, **more):
    """The value and all gradients."""
    x, gain, shift, *layer = inputs = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    output = function(x, Norm(gain, shift, 1e-5), *layer, **more)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return output, *torch.autograd.grad(output, inputs, upstream.to(dtype))


def kernels(*inputs, **more):
    return norm_linear(*inputs, implementation="triton", **more)


def error(result, exact) -> float:
    return float((result.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("biased", [True, False])
def test_value_and_gradients_against_float64(shape, kind, biased, poisoned, rounding):
    dtype = DTYPES[kind]
    leaves = [leaf.to(dtype).double() for leaf in case(*shape, biased)]
    exact = results(norm_linear_reference, leaves, torch.float64)
    eager = results(norm_linear_reference, leaves, dtype)
    for result, plain, expected in zip(results(kernels, leaves, dtype), eager, exact, strict=True):
        assert result.dtype == dtype and result.shape == expected.shape
        if dtype == torch.float32:
            assert error(result, expected) <= 2e-6
        else:
            assert error(result, expected) <= 1.1 * error(plain, expected)


def test_large_tiles(monkeypatch, poisoned):
    """Tuned tiles on sizes that no tile divides, which tests are too small to be given."""
    tuned = keyed_linear_kernels.select_matmul_tile(2**20, 768, 2)
    assert tuned != keyed_linear_kernels.select_matmul_tile(1, 1, 2)
    monkeypatch.setattr(keyed_linear_kernels, "select_matmul_tile", lambda *_: tuned)
    leaves = [leaf.float().double() for leaf in case((1200,), 40, 130)]
    exact = norm_linear_reference(leaves[0], Norm(*leaves[1:3], 1e-5), *leaves[3:])
    inputs = [leaf.float() for leaf in leaves]
    result = kernels(inputs[0], Norm(*inputs[1:3], 1e-5), *inputs[3:])
    assert error(result, exact) <= 2e-6


def test_tensors_that_are_not_contiguous():
    x, gain, shift, weight, bias = (leaf.float() for leaf in case((4, 6), 48, 24))
    wide = torch.randn(24, 96)
    wide[:, 48:] = weight
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    norm = Norm(gain.repeat_interleave(2)[::2], shift, 1e-5)
    plain = kernels(x, Norm(gain, shift, 1e-5), weight, bias)
    assert torch.equal(kernels(turned, norm, wide[:, 48:], bias), plain)
    torch.testing.assert_close(kernels(x[:, :1], norm, weight, bias), plain[:, :1])


def test_gradcheck_of_the_reference():
    leaves = [leaf.requires_grad_() for leaf in case((2, 3), 5, 4)]

    def definition(x, gain, shift, weight, bias):
        return norm_linear_reference(x, Norm(gain, shift, 1e-5), weight, bias)

    assert torch.autograd.gradcheck(definition, leaves)


def test_nothing_to_do():
    output, *grads = results(kernels, case((0, 3), 8, 4), torch.float32)
    assert output.shape == (0, 3, 4) and not any(grad.any() for grad in grads)


def test_the_operation_is_known_to_torch():
    leaves = [leaf.float() for leaf in case((2, 3), 16, 8)]
    exact = results(norm_linear_reference, leaves, torch.float32)
    compiled = torch.compile(kernels, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, leaves, torch.float32), exact)
    inputs = [leaf.requires_grad_() for leaf in leaves]
    torch.library.opcheck(torch.ops.megamod.norm_linear, (*inputs, 1e-5))
    x, gain, shift, weight, bias = (leaf.to("meta") for leaf in leaves)
    with FlopCounterMode(display=False) as counter:
        assert kernels(x, Norm(gain, shift, 1e-5), weight, bias).shape == (2, 3, 8)
    assert counter.get_total_flops() == 2 * 6 * 16 * 8


def test_only_the_input_is_kept():
    x, gain, shift, weight, bias = [leaf.float().requires_grad_() for leaf in case((4, 6), 48, 24)]
    kept = set()

    def note(tensor):
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kernels(x, Norm(gain, shift, 1e-5), weight, bias)
    assert kept <= {t.untyped_storage().data_ptr() for t in (x, gain, shift, weight, bias)}


def test_what_does_not_fit_is_refused():
    x, gain, shift, weight, bias = case((2, 3), 16, 8)
    with pytest.raises(ValueError, match=r"x \(2, 3, 16\), norm \(16,\) and weight \(8, 15\) do"):
        norm_linear(x, Norm(gain, shift, 1e-5), weight[:, 1:], bias)
    with pytest.raises(ValueError, match=r"x of torch.float32 and weight of torch.float16"):
        kernels(x.float(), Norm(gain, shift, 1e-5), weight.half(), bias)
