"""A linear layer that uses oneDNN where that is faster, and a check for replaced layers."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAST_PRODUCTS = 1 << 21  # below, the dozen microseconds that a call of oneDNN costs are felt
USES_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


class Linear(nn.Linear):
    """`nn.Linear`; in inference on a processor with AVX-512, large float32 products are oneDNN's.

    There `F.linear` calls MKL, which on processors other than Intel's leaves half of their vector
    units idle. Results differ by rounding alone. With gradients, under autocast, on other devices
    and while a graph is traced it is the layer of torch.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if (
            not USES_ONEDNN
            or torch.is_grad_enabled()
            or input.device.type != "cpu"
            or not input.dtype == self.weight.dtype == torch.float32
            or input.numel() * self.out_features < LEAST_PRODUCTS
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
        ):
            return F.linear(input, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")


def is_plain(*modules: nn.Module) -> bool:
    """True if each module's result follows from its `weight` and `bias` as torch defines it.

    An adapter (LoRA) or a quantised layer in the place of a layer of ours has a `weight` too, which
    is not the whole truth. Code that reads weights directly must call such modules instead.
    """
    return all(type(m) in (nn.Linear, Linear, nn.LayerNorm, nn.Embedding) for m in modules)
