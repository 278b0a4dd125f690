"""A linear layer that uses oneDNN where that is faster, and a check for replaced layers."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAST_PRODUCTS = 1 << 21  # below, the overhead of a call of oneDNN (12 us) is more than it saves
USES_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


class Linear(nn.Linear):
    """`nn.Linear`, with oneDNN for large float32 products in inference on AVX-512 processors.

    There `F.linear` calls MKL, which uses half of the vector units of other processors than
    Intel's. Results differ by rounding only. With gradients, under autocast, on other devices and
    while a graph is traced, it is the layer of torch.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to `input` [..., in_features]; returns [..., out_features]."""
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


def are_standard_layers(*modules: nn.Module) -> bool:
    """Return True if `weight` and `bias` of each module define its result as in torch.

    An adapter (LoRA) or a quantised layer that replaced a layer also has a `weight`, but computes
    something else. Code that reads weights must call such modules instead.
    """
    return all(type(m) in (nn.Linear, Linear, nn.LayerNorm, nn.Embedding) for m in modules)
