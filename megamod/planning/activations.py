"""Activation memory and FLOPs of a forward and backward pass, measured on fake tensors.

The pass runs the training code on tensors without storage, so a model of any size takes a moment.
Two depths are measured; their difference is one block, because all blocks are alike. For the
decoder the result is the count of Korthikanti et al. 2022 (Reducing Activation Recomputation),
section 4.1, without dropout and with attention that stores no scores: 16 D e + 4 H + 16 bytes per
token and block, with e bytes per element.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedConfig

DEPTHS = (2, 3)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Build = Callable[[PreTrainedConfig], nn.Module]
Loss = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Pass:
    """One micro-batch, forward and backward.

    Attributes:
        peak: peak bytes, without weights and finished gradients.
        flops: FLOPs of matrix products and attention.
    """

    peak: int
    flops: int


def measure(
    config: PreTrainedConfig,
    build: Build,
    loss: Loss,
    *,
    precision: str,
    checkpointing: bool,
    chosen: float = 1.0,
) -> Pass:
    """Measure one pass of the model of a configuration.

    Args:
        build: builds the module from a configuration.
        loss: computes a scalar from the module; called on fake tensors.
        precision: "fp32", "bf16" or "fp16".
        checkpointing: recompute blocks in the backward pass.
        chosen: fraction of elements that a boolean mask selects, where a shape depends on it.
    """
    passes = []
    for depth in DEPTHS:
        # With dropout, attention on CPUs stores its scores, which it does not on GPUs.
        changed = {"num_hidden_layers": depth, "attention_probs_dropout_prob": 0.0}
        shallow = type(config).from_dict(config.to_dict() | changed)
        passes.append(_measure(shallow, build, loss, DTYPES[precision], checkpointing, chosen))
    (low, high), further = passes, config.num_hidden_layers - DEPTHS[0]
    return Pass(
        low.peak + further * (high.peak - low.peak), low.flops + further * (high.flops - low.flops)
    )


def _measure(
    config: PreTrainedConfig,
    build: Build,
    loss: Loss,
    dtype: torch.dtype,
    checkpointing: bool,
    chosen: float,
) -> Pass:
    before = torch.get_default_dtype()
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(dtype)
        try:
            module = build(config)
        finally:
            torch.set_default_dtype(before)
        module.train()
        if checkpointing:
            module.gradient_checkpointing_enable()
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop)
        live = _Live(module, chosen)
        with live:
            loss(module).backward()
    return Pass(live.peak, live.flops)


def _drop(parameter: nn.Parameter) -> None:
    parameter.grad = None


class _Live(TorchDispatchMode):
    """Counts the bytes of live storages, except those of a module's weights."""

    def __init__(self, module: nn.Module, chosen: float):
        super().__init__()
        self.chosen = chosen
        self.now = self.peak = self.flops = 0
        known = [*module.parameters(), *module.buffers()]
        self.kept = [tensor.untyped_storage() for tensor in known]
        self.seen = {id(storage) for storage in self.kept}
        self.watched: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = self._masked_selection(operation, args)
        if result is None:
            result = operation(*args, **(kwargs or {}))
        self.flops += _flops(operation, args, kwargs or {}, result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.seen:
            return

        def release(_: weakref.ref) -> None:
            self.now -= size
            self.seen.discard(key)
            del self.watched[key]

        self.seen.add(key)
        self.watched[key] = weakref.ref(storage, release)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _masked_selection(self, operation: object, args: tuple) -> Tensor | None:
        """Result of a mask selection; its size, unknown without data, follows from `chosen`."""
        aten = torch.ops.aten
        if operation is aten.nonzero.default:
            mask = args[0]
            return mask.new_empty((self._number(mask), mask.dim()), dtype=torch.int64)
        if operation is aten.index.Tensor and len(args[1]) == 1:
            source, mask = args[0], args[1][0]
            if mask is not None and mask.dtype == torch.bool:
                return source.new_empty((self._number(mask), *source.shape[mask.dim() :]))
        return None

    def _number(self, mask: Tensor) -> int:
        return max(1, round(mask.numel() * self.chosen))


def _flops(operation: object, args: tuple, kwargs: dict, result: object) -> int:
    """FLOPs of one call; attention without masking, as in the usual formula."""
    packet = getattr(operation, "overloadpacket", None)
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    if packet is forward:
        return _attention(args[0], args[1], products=2)
    if packet is backward:
        return _attention(args[1], args[2], products=4)
    in_place = {torch.ops.aten.addmm_: torch.ops.aten.addmm}
    count = flop_registry.get(in_place.get(packet, packet))
    return count(*args, **kwargs, out_val=result) if count else 0


def _attention(query: Tensor, key: Tensor, products: int) -> int:
    return 2 * products * query.numel() * key.shape[-2]
