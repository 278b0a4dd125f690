"""The linear layer with oneDNN against products in float64, and its fallback to torch."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from megamod.nn import linear
from megamod.nn.linear import Linear


def make_layer(inputs: int, outputs: int, bias: bool = True) -> Linear:
    torch.manual_seed(1)
    return Linear(inputs, outputs, bias=bias)


@pytest.fixture
def calls(monkeypatch):
    """Count the calls of the layer of torch."""
    counted = []
    original = F.linear

    def counting(*args):
        counted.append(args)
        return original(*args)

    monkeypatch.setattr(linear.F, "linear", counting)
    return counted


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(200, 256), (2, 90, 256)])
def test_large_products_in_inference_are_those_in_float64(shape, bias, calls):
    layer, x = make_layer(256, 128, bias), torch.randn(*shape)
    with torch.no_grad():
        ours = layer(x)
    assert bool(calls) != linear.USES_ONEDNN
    exact = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    torch.testing.assert_close(ours.double(), exact.detach(), atol=1e-5, rtol=0)


def test_inputs_that_are_not_contiguous():
    """The last block of an encoder computes the first position of each row only."""
    layer, x = make_layer(512, 512), torch.randn(20, 3, 512)
    with torch.no_grad():
        torch.testing.assert_close(layer(x[:, :1]), layer(x)[:, :1], atol=1e-5, rtol=0)


def test_otherwise_it_is_the_layer_of_torch(calls):
    layer, x = make_layer(256, 128), torch.randn(200, 256)
    output = layer(x)
    output.sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(128, -1), atol=1e-3, rtol=0)
    with torch.no_grad():
        layer(x[:10])  # small
        assert layer.double()(x.double()).dtype == torch.double
        layer.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    assert len(calls) == 4
    assert isinstance(layer, nn.Linear) and [*layer.state_dict()] == ["weight", "bias"]
