import importlib

import pytest
import torch
from megamod_kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from torch.utils._python_dispatch import TorchDispatchMode

MODULE = importlib.import_module("megamod_kernels.linear_cross_entropy")
ROWS, WIDTH, VOCAB = 100, 8, 37


def case(dtype: torch.dtype = torch.float32, rows: int = ROWS):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (rows,), generator=generator)
    labels[::7] = -100
    return hidden, weight, labels


def loops(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """Log-probability of every label in float64, row by row."""
    hidden, weight, actual = hidden.detach().double(), weight.detach().double(), []
    for row, label in zip(hidden, labels.tolist(), strict=True):
        scores = [float(row @ column) for column in weight]
        total = torch.tensor(scores).double().exp().sum().log()
        actual.append(0.0 if label == -100 else scores[label] - float(total))
    return actual


@pytest.fixture(params=[1, 16 * 4 * VOCAB, 2**26], ids=["least chunks", "16 rows", "one chunk"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(MODULE, "LOGITS_BYTES", request.param)


def test_value_against_loops(chunks):
    hidden, weight, labels = case()
    total, log_probs = linear_cross_entropy(hidden, weight, labels)
    expected = torch.tensor(loops(hidden, weight, labels))
    torch.testing.assert_close(log_probs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, -expected.sum(), rtol=1e-6, atol=0)
    assert not log_probs[::7].any() and not log_probs.requires_grad
    assert log_probs.dtype == total.dtype == torch.float32


@pytest.mark.parametrize("scale", [1.0, 0.125])
def test_gradients_against_autograd_of_the_definition(chunks, scale):
    hidden, weight, labels = case()
    (linear_cross_entropy(hidden, weight, labels)[0] * scale).backward()
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    (torch.nn.functional.cross_entropy(h @ w.T, labels, reduction="sum") * scale).backward()
    torch.testing.assert_close(hidden.grad.double(), h.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weight.grad.double(), w.grad, rtol=1e-5, atol=1e-6)
    assert not hidden.grad[::7].any()


@pytest.mark.parametrize(("scale", "softcap"), [(0.125, None), (1.0, 2.0), (3.0, 2.0)])
def test_bias_scale_and_softcap_against_autograd_of_the_definition(chunks, scale, softcap):
    hidden, weight, labels = case()
    bias = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)).requires_grad_()
    total, log_probs = linear_cross_entropy(hidden, weight, labels, bias, scale, softcap)
    total.backward()
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    logits = scale * (exact[0] @ exact[1].T + exact[2])
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    loss.backward()
    torch.testing.assert_close(total.double(), loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(-log_probs.sum().double(), loss, rtol=1e-6, atol=0)
    for ours, theirs in zip((hidden, weight, bias), exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6)
    definition = linear_cross_entropy_reference(hidden, weight, labels, bias, scale, softcap)
    torch.testing.assert_close(definition, total, rtol=1e-6, atol=0)


def test_half_precision_is_as_near_to_float64_as_the_plain_operations(chunks):
    hidden, weight, labels = case(torch.bfloat16)
    exact_hidden = hidden.detach().double().requires_grad_()
    exact_weight = weight.detach().double().requires_grad_()
    logits = exact_hidden @ exact_weight.T
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    errors = {}
    for name, loss in (
        ("plain", linear_cross_entropy_reference),
        ("ours", lambda *inputs: linear_cross_entropy(*inputs)[0]),
    ):
        hidden.grad = weight.grad = None
        loss(hidden, weight, labels).backward()
        assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
        errors[name] = (
            (hidden.grad.double() - exact_hidden.grad).norm(),
            (weight.grad.double() - exact_weight.grad).norm(),
        )
    assert errors["ours"][0] <= 1.1 * errors["plain"][0]
    assert errors["ours"][1] <= 1.25 * errors["plain"][1]  # each chunk's product is rounded once


def test_gradcheck_of_the_reference():
    hidden, weight, labels = (t[:9].detach() for t in case())
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    labels = labels % 9
    labels[0] = -100

    def definition(h, w):  # the reference in float64: its `.float()` would spoil the differences
        return torch.nn.functional.cross_entropy(h @ w.T, labels, reduction="sum")

    assert torch.autograd.gradcheck(definition, (hidden, weight))
    torch.testing.assert_close(
        linear_cross_entropy_reference(hidden, weight, labels).double(),
        definition(hidden, weight),
        rtol=1e-6,
        atol=0,
    )


def test_shapes_beyond_rows_and_empty_ones():
    hidden, weight, labels = case(rows=12)
    total, log_probs = linear_cross_entropy(hidden.view(3, 4, WIDTH), weight, labels.view(3, 4))
    flat_total, flat = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(total, flat_total) and torch.equal(log_probs.flatten(), flat)
    turned = hidden.detach().view(3, 4, WIDTH).transpose(0, 1)  # not contiguous
    assert torch.allclose(
        linear_cross_entropy(turned, weight, labels.view(3, 4).T)[0], total, rtol=1e-6
    )
    nothing, none = linear_cross_entropy(hidden[:0], weight, labels[:0])
    assert nothing == 0 and none.shape == (0,)
    (linear_cross_entropy(hidden, weight, torch.full((12,), -100))[0]).backward()
    assert not hidden.grad.any() and not weight.grad.any()


def test_only_the_asked_for_gradients_are_made():
    hidden, weight, labels = case()
    linear_cross_entropy(hidden.detach(), weight, labels)[0].backward()
    assert hidden.grad is None and weight.grad is not None
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, labels)[0].grad_fn is None


def test_shapes_that_do_not_fit_are_refused():
    hidden, weight, labels = case()
    for inputs in ((hidden, weight, labels[1:]), (hidden[:, 1:], weight, labels)):
        with pytest.raises(ValueError, match="do not fit: expected"):
            linear_cross_entropy(*inputs)


class Sizes(TorchDispatchMode):
    """Records the number of elements of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function, kinds, arguments=(), more=None):
        result = function(*arguments, **(more or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.shapes.add(tuple(value.shape))
        return result


def test_logits_of_all_rows_are_never_held(monkeypatch):
    monkeypatch.setattr(MODULE, "LOGITS_BYTES", 4 * VOCAB * 16)
    hidden, weight, labels = case()
    saved = []
    with (
        Sizes() as sizes,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t),
    ):
        linear_cross_entropy(hidden, weight, labels)[0].backward()
    wide = {shape[0] for shape in sizes.shapes if shape[1:] == (VOCAB,)}
    assert wide - {WIDTH} == {16, ROWS % 16}  # [WIDTH, VOCAB] is the weight, turned
    assert set(map(tuple, saved)) == {(ROWS, WIDTH), (VOCAB, WIDTH)}  # the two gradients
