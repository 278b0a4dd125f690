"""RSA demultiplexing: from a mixed sequence back to its N instances, by a key for each.

The first layer sees [key ; hidden]. Its matrix is split, W = [W_key | W_hidden], so that the hidden
part is computed once per mixed position and the key part once per instance: 2 N times fewer
operations than concatenating, and the concatenation is never built.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from megamod_kernels.demux_torch import (
    Chain,
    Pairs,
    RsaDemuxFunction,
    add_pairs,
    by_two,
    rsa_demux_reference,
    split_projection,
)
from megamod_kernels.dispatch import uses_triton

if TYPE_CHECKING:
    from megamod_kernels.compile_ahead import Build

__all__ = ["Chain", "Pairs", "add_pairs", "builds", "rsa_demux", "rsa_demux_reference"]
__all__ += ["split_projection"]

WIDTH = 256  # columns of a tile; the tuned widths are multiples of it
PROGRAMS = 264  # two per multiprocessor: rows of the buffer from which gradients are summed


def _held(size: int, itemsize: int) -> dict[str, int | bool]:
    """How rows are held, whole: by how many threads each, for backward holds 6 tensors of a row."""
    warps = 4 if size <= 2048 else 8
    share = size / (32 * warps)  # of a thread, in columns; more are spilled
    most = ((4, 24), (2, 16)) if itemsize == 2 else ((4, 12), (2, 12))
    rows = next((rows for rows, columns in most if rows * share <= columns), 1)
    return {"ROWS": rows, "TILES": -(-size // WIDTH), **_tile(size), "num_warps": warps}


def _tile(size: int) -> dict[str, int | bool]:
    return {"WIDTH": WIDTH, "WHOLE": size % WIDTH == 0}


def _block(size: int, itemsize: int) -> dict[str, int | bool]:
    """A tile of rows that are not held."""
    return {"ROWS": 32 // itemsize, **_tile(size), "num_warps": 4}


def _product(rows: int, size: int, itemsize: int) -> dict[str, int | bool]:
    """Tile of a product that makes the states it reads.

    Every tile across makes the states of its rows again, so tiles are wider than they are tall.
    """
    names = ("ROWS", "COLUMNS", "INNER", "num_warps", "num_stages")
    chosen = (32, 64, 32, 8, 2)
    if itemsize == 2:
        chosen = (64, 256, 32, 8, 3) if rows >= 4096 else (64, 64, 32, 4, 3)
    return dict(zip(names, chosen, strict=True)) | {"WHOLE": size % 32 == 0}


@torch.library.custom_op("megamod::rsa_demux", mutates_args=())
def _rsa_demux(
    hidden: Tensor,
    key: Tensor,
    weights: Sequence[Tensor],
    of_hidden: Tensor | None,
    of_key: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    eps: float,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    """The result, flat [R, D], and what each GELU behind the first was given [layers, R, D]."""
    from megamod_kernels import demux_kernels as kernels

    hidden, key = hidden.contiguous(), key.contiguous()
    output, before = _shapes(hidden, key, weights, of_hidden)
    rows, size = output.shape
    if not output.numel():
        return output, before
    *layers, norm = by_two([weight.contiguous() for weight in weights])
    held = _held(size, hidden.element_size())
    grid = (-(-rows // held["ROWS"]),)
    flags = {"PAIRS": of_hidden is not None, "DROPS": seed is not None}
    places = [hidden if one is None else one.contiguous() for one in (of_hidden, of_key, seed)]
    counts = (rows, size, len(key), hidden.shape[1], dropout)
    tile = _product(rows, size, hidden.element_size())
    tiles = (-(-rows // tile["ROWS"]) * -(-size // tile["COLUMNS"]),)
    # In either form the last state lies where the result will be.
    for layer, (weight, bias) in enumerate(layers):
        if fused:
            kernels.rsa_demux_matmul_kernel[tiles](
                hidden, key, before, output, weight, bias, before[layer], *places, *counts,
                LAYERS=layer, LAST=layer == len(layers) - 1, **flags, **tile,
            )  # fmt: skip
            continue
        kernels.rsa_demux_state_kernel[grid](
            hidden, key, before, output, *places, *counts, LAYERS=layer, **flags, **held
        )
        torch.addmm(bias, output, weight.T, out=before[layer])
    kernels.rsa_demux_finish_kernel[grid](before[-1], *norm, output, rows, size, eps, **held)
    return output, before


@_rsa_demux.register_fake
def _(
    hidden: Tensor,
    key: Tensor,
    weights: Sequence[Tensor],
    of_hidden: Tensor | None,
    of_key: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    eps: float,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    return _shapes(hidden, key, weights, of_hidden)


def _shapes(
    hidden: Tensor, key: Tensor, weights: Sequence[Tensor], of_hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    groups, length, size = hidden.shape
    rows = groups * len(key) * length if of_hidden is None else of_hidden.shape[0]
    return hidden.new_empty(rows, size), hidden.new_empty(len(weights) // 2 - 1, rows, size)


@torch.library.custom_op("megamod::rsa_demux_backward", mutates_args=())
def _rsa_demux_backward(
    upstream: Tensor,
    hidden: Tensor,
    key: Tensor,
    weights: Sequence[Tensor],
    before: Tensor,
    of_hidden: Tensor | None,
    of_key: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    eps: float,
) -> list[Tensor]:
    """Gradients of hidden, key and all weights."""
    from megamod_kernels import demux_kernels as kernels

    if not upstream.numel():
        return [torch.zeros_like(tensor) for tensor in (hidden, key, *weights)]
    hidden, key, upstream = hidden.contiguous(), key.contiguous(), upstream.contiguous()
    *layers, norm = by_two([weight.contiguous() for weight in weights])
    rows, size = upstream.shape
    N, L = len(key), hidden.shape[1]
    drops, itemsize = {"DROPS": seed is not None}, hidden.element_size()
    held, block = _held(size, itemsize) | drops, _block(size, itemsize) | drops
    across = -(-size // WIDTH)
    pairs = {"PAIRS": of_hidden is not None}
    places = [hidden if one is None else one.contiguous() for one in (of_hidden, of_key, seed)]
    blocks = -(-rows // held["ROWS"])
    programs = min(blocks, PROGRAMS)
    grad, state = torch.empty_like(upstream), torch.empty_like(upstream)
    grads: list[Tensor] = []
    for layer in reversed(range(len(layers))):
        last = layer == len(layers) - 1
        partial = hidden.new_empty((programs, 3 if last else 1, size), dtype=torch.float32)
        kernels.rsa_demux_layer_bwd_kernel[(programs,)](
            hidden, key, before, upstream, norm[0], grad, state, partial, *places, rows, size, N, L,
            dropout, eps, blocks, LAYER=layer, NORM=last, **pairs, **held,
        )  # fmt: skip
        sums = (part.to(key.dtype, copy=True) for part in partial.sum(0))
        grads[:0] = [grad.T @ state, *sums]
        upstream = torch.addmm(upstream, grad, layers[layer][0])
    if of_hidden is not None:
        # In float32, because several pairs may share a position.
        grad = torch.empty_like(upstream, dtype=torch.float32)
        kernels.rsa_demux_first_bwd_kernel[(-(-rows // block["ROWS"]), across)](
            hidden, key, upstream, grad, *places, rows, size, dropout, **block
        )  # fmt: skip
        # Both sums are made in a fixed order, unlike those of index_add_ on a GPU.
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32).flatten(0, 1)
        grad_hidden = grad_hidden.index_put_((of_hidden,), grad, accumulate=True)
        grad_key = F.one_hot(of_key, N).to(grad.dtype).T @ grad
        return [grad_hidden.view_as(hidden).to(hidden.dtype), grad_key.to(key.dtype), *grads]
    positions = hidden.shape[0] * L
    programs = -(-positions // block["ROWS"])
    grad_hidden = torch.empty_like(hidden)
    partial = hidden.new_empty((programs, N, size), dtype=torch.float32)
    kernels.rsa_demux_sums_bwd_kernel[(programs, across)](
        hidden, key, upstream, grad_hidden, partial, places[2], positions, size, N, L, dropout,
        **block,
    )  # fmt: skip
    return [grad_hidden, partial.sum(0).to(key.dtype), *grads]


@_rsa_demux_backward.register_fake
def _(
    upstream: Tensor,
    hidden: Tensor,
    key: Tensor,
    weights: Sequence[Tensor],
    before: Tensor,
    of_hidden: Tensor | None,
    of_key: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    eps: float,
) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in (hidden, key, *weights)]


def _keep(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[object, ...],
    output: tuple[Tensor, Tensor],
) -> None:
    hidden, key, weights, of_hidden, of_key, seed, ctx.dropout, ctx.eps, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(hidden, key, output[1], of_hidden, of_key, seed, *weights)


def _differentiate(
    ctx: torch.autograd.function.FunctionCtx, upstream: Tensor, _: Tensor
) -> tuple[object, ...]:
    hidden, key, before, of_hidden, of_key, seed, *weights = ctx.saved_tensors
    given = (hidden, key, weights, before, of_hidden, of_key, seed, ctx.dropout, ctx.eps)
    grad_hidden, grad_key, *grads = _rsa_demux_backward(upstream, *given)
    return grad_hidden, grad_key, grads, None, None, None, None, None, None


_rsa_demux.register_autograd(_differentiate, setup_context=_keep)


@register_flop_formula(torch.ops.megamod.rsa_demux)
def _flops(
    hidden: Sequence[int],
    key: Sequence[int],
    weights: Sequence[Sequence[int]],
    of_hidden: Sequence[int] | None,
    *args: object,
    **kwargs: object,
) -> int:
    rows = hidden[0] * key[0] * hidden[1] if of_hidden is None else of_hidden[0]
    return 2 * rows * hidden[2] ** 2 * (len(weights) // 2 - 1)


@register_flop_formula(torch.ops.megamod.rsa_demux_backward)
def _flops_backward(
    upstream: Sequence[int],
    hidden: Sequence[int],
    key: Sequence[int],
    weights: Sequence[Sequence[int]],
    *args: object,
    **kwargs: object,
) -> int:
    return 4 * upstream[0] * hidden[2] ** 2 * (len(weights) // 2 - 1)


def rsa_demux(
    hidden: Tensor,
    key: Tensor,
    chain: Chain,
    pairs: Pairs | None = None,
    dropout: float = 0.0,
    implementation: str = "auto",
) -> Tensor:
    """The whole demultiplexer behind the split first layer.

        x = gelu(hidden + key);  x = gelu(dense x) + x for each;  LN(gelu(last x)) + x

    Args:
        hidden, key: parts of the first layer, [B, L, D] and [N, D], from `split_projection`.
        pairs: which positions of which instances; None for all.
        dropout: probability, behind the first GELU and that of each residual layer.
        implementation: "reference"; "auto": on a GPU one kernel per layer makes its state, and the
            vendor's product follows; "triton": products of our own that make the states they read
            (docs/kernels.md says what that costs). float64 and autocast are always computed by
            plain torch.
    Returns:
        [R, D] for pairs, else [B, N, L, D], in hidden's dtype. Differentiable once in all tensors.
        A backward pass keeps 1 + len(chain.dense) tensors of that size, and the two parts.
    Raises:
        ValueError: if the shapes do not fit, or the implementation cannot run.
    Source: Murahari et al. 2023 (MUX-PLM), section 3.1; layers in the order of its release.
    """
    if hidden.dim() != 3 or key.dim() != 2 or hidden.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and key {tuple(key.shape)} do not fit: expected "
            "[B, L, D] and [N, D]"
        )
    if not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type):
        # A backward pass of our own would not see it.
        return rsa_demux_reference(hidden, key, chain, pairs, dropout)
    if uses_triton(implementation, hidden) and hidden.dtype != torch.float64:
        return by_kernels(hidden, key, chain, pairs, dropout, fused=implementation == "triton")
    return RsaDemuxFunction.apply(hidden, key, pairs, dropout, chain.eps, *_flat(chain))


def by_kernels(
    hidden: Tensor, key: Tensor, chain: Chain, pairs: Pairs | None, dropout: float, fused: bool
) -> Tensor:
    """`rsa_demux` by Triton; fused: with products that make the states they read."""
    places = (None, None)
    if pairs is not None:
        places = (pairs.group * hidden.shape[1] + pairs.position, pairs.instance)
    seed = torch.randint(2**31, (1,), device=hidden.device) if dropout else None
    given = (hidden, key, _flat(chain), *places, seed, dropout, chain.eps, fused)
    output, _ = _rsa_demux(*given)
    if pairs is not None:
        return output
    return output.view(len(hidden), len(key), *hidden.shape[1:])


def _flat(chain: Chain) -> list[Tensor]:
    return [tensor for pair in (*chain.dense, chain.last, chain.norm) for tensor in pair]


def builds() -> "Iterator[Build]":
    """The kernels at the tuned widths, for ahead-of-time compilation."""
    from megamod_kernels import demux_kernels as kernels
    from megamod_kernels.compile_ahead import Build

    types = {"of_hidden": "*i64", "of_key": "*i64", "seed": "*i64", "partial": "*fp32"}
    types |= dict.fromkeys(("dropout", "eps"), "fp32")
    types |= dict.fromkeys(("rows", "D", "N", "L", "blocks", "positions"), "i32")
    for size, (dtype, itemsize) in product((768, 1024, 1536, 2048), (("bf16", 2), ("fp32", 4))):
        if size == 1536 and dtype == "fp32":
            continue  # as 2048
        for kernel, layers in (
            (kernels.rsa_demux_state_kernel, {"LAYERS": 0}),
            (kernels.rsa_demux_state_kernel, {"LAYERS": 1}),
            (kernels.rsa_demux_matmul_kernel, {"LAYERS": 0, "LAST": True}),
            (kernels.rsa_demux_matmul_kernel, {"LAYERS": 1, "LAST": True}),
            (kernels.rsa_demux_finish_kernel, {}),
            (kernels.rsa_demux_layer_bwd_kernel, {"LAYER": 0, "NORM": True}),
            (kernels.rsa_demux_layer_bwd_kernel, {"LAYER": 1, "NORM": True}),
            (kernels.rsa_demux_layer_bwd_kernel, {"LAYER": 0, "NORM": False}),
            (kernels.rsa_demux_first_bwd_kernel, {}),
            (kernels.rsa_demux_sums_bwd_kernel, {}),
        ):
            if kernel is kernels.rsa_demux_matmul_kernel:
                flags = _product(size * 8, size, itemsize) | layers
            else:
                flags = (_held if "TILES" in kernel.arg_names else _block)(size, itemsize) | layers
            warps, stages = flags.pop("num_warps"), flags.pop("num_stages", 3)
            flags |= {"PAIRS": size == 1024, "DROPS": size == 768}
            constants = {name: flags[name] for name in kernel.arg_names if name in flags}
            signature = {
                name: types.get(name, f"*{dtype}")
                for name in kernel.arg_names
                if name not in constants
            }
            if kernel is kernels.rsa_demux_first_bwd_kernel:
                signature["grad"] = "*fp32"
            number = "".join(str(int(number)) for number in layers.values())
            yield Build(
                name=f"{kernel.__name__}{number}-D{size}-{dtype}",
                kernel=kernel,
                signature=signature,
                constants=constants,
                num_warps=warps,
                num_stages=stages,
                aligned=(*(n for n, kind in signature.items() if kind[0] == "*"), "D"),
            )
