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

DEPTHS = (2, 3)  # layers of the models that are measured
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Build = Callable[[PreTrainedConfig], nn.Module]
"""From a configuration to a module, on torch's default device and in its default dtype."""

Loss = Callable[[nn.Module], Tensor]
"""From a module to a scalar, whose backward pass is measured."""


@dataclass(frozen=True)
class PassCost:
    """One micro-batch, forward and backward.

    Attributes:
        peak: peak bytes, without weights and finished gradients.
        flops: FLOPs of matrix products and attention.
    """

    peak: int
    flops: int


def measure_pass(
    config: PreTrainedConfig,
    build: Build,
    loss: Loss,
    *,
    precision: str,
    checkpointing: bool,
    mask_density: float = 1.0,
) -> PassCost:
    """Measure one forward and backward pass of a model, without weights in memory.

    Passes of two and three layers are run on fake tensors and extrapolated to the depth of
    `config`.

    Args:
        config: configuration of the model; not changed.
        build: builds the module from a configuration, called under a default dtype.
        loss: computes a scalar from the module; called on fake tensors.
        precision: "fp32", "bf16" or "fp16".
        checkpointing: recompute blocks in the backward pass.
        mask_density: assumed fraction of True elements of a boolean mask, where a shape depends on
            it.
    """
    passes = []
    for depth in DEPTHS:
        # With dropout, attention on CPUs stores its scores, which it does not on GPUs.
        changed = {"num_hidden_layers": depth, "attention_probs_dropout_prob": 0.0}
        shallow = type(config).from_dict(config.to_dict() | changed)
        passes.append(
            _measure_shallow_pass(
                shallow, build, loss, DTYPES[precision], checkpointing, mask_density
            )
        )
    (low, high), more_layers = passes, config.num_hidden_layers - DEPTHS[0]
    return PassCost(
        low.peak + more_layers * (high.peak - low.peak),
        low.flops + more_layers * (high.flops - low.flops),
    )


def _measure_shallow_pass(
    config: PreTrainedConfig,
    build: Build,
    loss: Loss,
    dtype: torch.dtype,
    checkpointing: bool,
    mask_density: float,
) -> PassCost:
    """Measure one pass of a model of few layers, all of whose operations run on fake tensors.

    The module is in training mode, and each gradient is dropped once it is finished. torch's
    default dtype is restored.

    Args:
        config: configuration of the shallow model.
        build, loss, checkpointing, mask_density: as in `measure_pass`.
        dtype: torch's default dtype while it is built.
    """
    default_dtype = torch.get_default_dtype()
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(dtype)
        try:
            module = build(config)
        finally:
            torch.set_default_dtype(default_dtype)
        module.train()
        if checkpointing:
            module.gradient_checkpointing_enable()
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_free_gradient)
        live = _LiveMemoryCounter(module, mask_density)
        with live:
            loss(module).backward()
    return PassCost(live.peak, live.flops)


def _free_gradient(parameter: nn.Parameter) -> None:
    """Drop a finished gradient: `planning/memory.py` counts the bytes of gradients."""
    parameter.grad = None


class _LiveMemoryCounter(TorchDispatchMode):
    """Counter of the bytes of live storages, except those of a module's weights, and of FLOPs.

    While it is active (`with`), it sees every operation of torch.

    Args:
        module: its parameters and buffers are not counted.
        mask_density: see `measure_pass`.
    Attributes:
        live_bytes, peak: bytes that are live now, and the most so far.
        flops: FLOPs so far, see `_count_flops`.
    """

    def __init__(self, module: nn.Module, mask_density: float):
        super().__init__()
        self.mask_density = mask_density
        self.live_bytes = self.peak = self.flops = 0
        weights = [*module.parameters(), *module.buffers()]
        self.weight_storages = [tensor.untyped_storage() for tensor in weights]
        self.seen = {id(storage) for storage in self.weight_storages}
        self.tracked: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        """Run an operation of torch, or make its result where fake tensors lack it; count both.

        Its storages are added to the live bytes, and its FLOPs to `flops`.
        """
        result = self._make_masked_selection(operation, args)
        if result is None:
            result = _make_grouped_product(operation, args)
        if result is None:
            result = operation(*args, **(kwargs or {}))
        self.flops += _count_flops(operation, args, kwargs or {}, result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._track_storage(tensor.untyped_storage())
        return result

    def _track_storage(self, storage: torch.UntypedStorage) -> None:
        """Count the bytes of a storage that is seen for the first time, until it is freed.

        `live_bytes` and `peak` rise at once; a storage that is tracked, or of a weight, is skipped.
        """
        key, size = id(storage), storage.nbytes()
        if key in self.seen:
            return

        def release_storage(_: weakref.ref) -> None:
            """Subtract the bytes of a storage from the live ones when torch frees it."""
            self.live_bytes -= size
            self.seen.discard(key)
            del self.tracked[key]

        self.seen.add(key)
        self.tracked[key] = weakref.ref(storage, release_storage)
        self.live_bytes += size
        self.peak = max(self.peak, self.live_bytes)

    def _make_masked_selection(self, operation: object, args: tuple) -> Tensor | None:
        """Make the result of a selection by a boolean mask, whose size fake tensors do not know.

        `mask_density` gives the size. `args` are those of the operation. None for any other
        operation, which must be run.
        """
        aten = torch.ops.aten
        if operation is aten.nonzero.default:
            mask = args[0]
            return mask.new_empty((self._count_selected(mask), mask.dim()), dtype=torch.int64)
        if operation is aten.index.Tensor and len(args[1]) == 1:
            source, mask = args[0], args[1][0]
            if mask is not None and mask.dtype == torch.bool:
                return source.new_empty((self._count_selected(mask), *source.shape[mask.dim() :]))
        return None

    def _count_selected(self, mask: Tensor) -> int:
        """Return the assumed number of True elements of a mask, by `mask_density`; at least 1."""
        return max(1, round(mask.numel() * self.mask_density))


def _make_grouped_product(operation: object, args: tuple) -> Tensor | None:
    """Make the result of a grouped product, whose fake form torch has for bfloat16 alone.

    With a group per expert, of E: [S, K] by [E, K, N] is [S, N], and, for the gradients of weights,
    [K, S] by [S, N] is [E, K, N]. `args` are those of the operation. None for any other operation,
    which must be run.
    """
    if operation is not torch.ops.aten._grouped_mm.default:
        return None
    left, right, *offsets = args
    groups = offsets[0].shape if left.dim() == right.dim() == 2 else ()
    return left.new_empty((*groups, left.shape[-2], right.shape[-1]))


def _count_flops(operation: object, args: tuple, kwargs: dict, result: object) -> int:
    """Count the FLOPs of one call of an operation: matrix products and attention, 0 for others.

    Attention counts as if nothing were masked, as in the usual formula.

    Args:
        operation: operation of torch, as `__torch_dispatch__` gets it.
        args, kwargs: its arguments.
        result: its result, whose shape may count.
    """
    packet = getattr(operation, "overloadpacket", None)
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    if packet is forward:
        return _count_attention_flops(args[0], args[1], products=2)
    if packet is backward:
        return _count_attention_flops(args[1], args[2], products=4)
    in_place = {torch.ops.aten.addmm_: torch.ops.aten.addmm}
    count = flop_registry.get(in_place.get(packet, packet))
    return count(*args, **kwargs, out_val=result) if count else 0


def _count_attention_flops(query: Tensor, key: Tensor, products: int) -> int:
    """Count the FLOPs of attention with `products` products of the size of queries times keys.

    Args:
        query, key: [..., length, width].
        products: 2 in a forward pass, scores and weighted values.
    """
    return 2 * products * query.numel() * key.shape[-2]
