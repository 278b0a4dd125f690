"""RSA demultiplexing: from a mixed sequence back to its N instances, by a key for each.

B, N, L, D: groups, instances of a group, tokens of a sequence, hidden size; R: rows of the output,
R = B * N * L unless pairs are selected. The first layer sees [key ; hidden]. Its matrix is split, W
= [W_key | W_hidden], so that the hidden part is computed once per mixed position and the key part
once per instance: 2 N times fewer FLOPs than with the concatenation, which is never built.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from megamod_kernels.demux_torch import (
    Chain,
    Pairs,
    RsaDemuxFunction,
    add_pairs,
    pair_weights_with_biases,
    rsa_demux_reference,
    split_projection,
)
from megamod_kernels.dispatch import uses_triton

__all__ = ["Chain", "Pairs", "add_pairs", "rsa_demux", "rsa_demux_reference"]
__all__ += ["split_projection"]

WIDTH = 256  # columns of a tile; the tuned widths are multiples of it
PROGRAMS = 264  # two per multiprocessor of an H100; rows of the buffer of partial gradient sums


def select_whole_row_launch(size: int, itemsize: int) -> dict[str, int | bool]:
    """Return the launch settings of kernels that hold whole rows [ROWS, size] in registers.

    Backward holds six such tensors, so the number of rows is limited by elements per thread.

    Args:
        size: hidden size D.
        itemsize: bytes of an element.
    """
    warps = 4 if size <= 2048 else 8
    share = size / (32 * warps)  # columns of a row per thread
    # Number of rows, and their largest number of elements per thread: more would spill.
    limits = ((4, 24), (2, 16)) if itemsize == 2 else ((4, 12), (2, 12))
    rows = next((rows for rows, columns in limits if rows * share <= columns), 1)
    return {
        "ROWS": rows,
        "TILES": -(-size // WIDTH),
        **make_width_arguments(size),
        "num_warps": warps,
    }


def make_width_arguments(size: int) -> dict[str, int | bool]:
    """Return WIDTH, the columns of a tile, and WHOLE: it divides `size`, so no column is masked."""
    return {"WIDTH": WIDTH, "WHOLE": size % WIDTH == 0}


def select_column_tile_launch(size: int, itemsize: int) -> dict[str, int | bool]:
    """Return the launch settings of kernels whose programs compute one tile of WIDTH columns.

    `size` is the hidden size D, `itemsize` the bytes of an element.
    """
    return {"ROWS": 32 // itemsize, **make_width_arguments(size), "num_warps": 4}


def select_matmul_launch(rows: int, size: int, itemsize: int) -> dict[str, int | bool]:
    """Return the launch settings of `rsa_demux_matmul_kernel`, which computes the states it reads.

    Each column tile recomputes the states of its rows, so tiles are wide from 4,096 rows on. The
    product is [rows, size]; `itemsize` is the bytes of an element.
    """
    names = ("ROWS", "COLUMNS", "INNER", "num_warps", "num_stages")
    chosen = (32, 64, 32, 8, 2)
    if itemsize == 2:
        chosen = (64, 256, 32, 8, 3) if rows >= 4096 else (64, 64, 32, 4, 3)
    return dict(zip(names, chosen, strict=True)) | {"WHOLE": size % 32 == 0}


@torch.library.custom_op("megamod::rsa_demux", mutates_args=())
def _rsa_demux(
    hidden_part: Tensor,
    key_part: Tensor,
    weights: Sequence[Tensor],
    pair_position: Tensor | None,
    pair_instance: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    eps: float,
    own_matmul: bool,
) -> tuple[Tensor, Tensor]:
    """Return the output [R, D], and the input of every GELU but the first, [layers, R, D].

    Args:
        hidden_part, key_part: [B, L, D] and [N, D].
        weights: as `_flatten_chain` lists them.
        pair_position, pair_instance: [R] int64 indices into [B * L] and [N]; None for all.
        seed: [1] int64; None without dropout.
        dropout, eps: dropout probability, epsilon of the norm.
        own_matmul: see `rsa_demux_triton`.
    """
    from megamod_kernels import demux_kernels as kernels

    hidden_part, key_part = hidden_part.contiguous(), key_part.contiguous()
    output, pre_gelu = _allocate_outputs(hidden_part, key_part, weights, pair_position)
    rows, size = output.shape
    if not output.numel():
        return output, pre_gelu
    *layers, norm = pair_weights_with_biases([weight.contiguous() for weight in weights])
    launch = select_whole_row_launch(size, hidden_part.element_size())
    grid = (-(-rows // launch["ROWS"]),)
    flags = {"PAIRS": pair_position is not None, "DROPOUT": seed is not None}
    indices = [
        hidden_part if tensor is None else tensor.contiguous()
        for tensor in (pair_position, pair_instance, seed)
    ]
    counts = (rows, hidden_part.shape[1], size, len(key_part), dropout)
    tile = select_matmul_launch(rows, size, hidden_part.element_size())
    tiles = (-(-rows // tile["ROWS"]) * -(-size // tile["COLUMNS"]),)
    # In both forms the last state is written to the output buffer.
    for layer, (weight, bias) in enumerate(layers):
        if own_matmul:
            kernels.rsa_demux_matmul_kernel[tiles](
                hidden_part, key_part, pre_gelu, output, weight, bias, pre_gelu[layer], *indices,
                *counts, LAYERS=layer, LAST=layer == len(layers) - 1, **flags, **tile,
            )  # fmt: skip
            continue
        kernels.rsa_demux_state_kernel[grid](
            hidden_part, key_part, pre_gelu, output, *indices, *counts, LAYERS=layer, **flags,
            **launch,
        )  # fmt: skip
        torch.addmm(bias, output, weight.T, out=pre_gelu[layer])
    kernels.rsa_demux_finish_kernel[grid](pre_gelu[-1], *norm, output, rows, size, eps, **launch)
    return output, pre_gelu


@_rsa_demux.register_fake
def _(
    hidden_part: Tensor,
    key_part: Tensor,
    weights: Sequence[Tensor],
    pair_position: Tensor | None,
    pair_instance: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    eps: float,
    own_matmul: bool,
) -> tuple[Tensor, Tensor]:
    """Return empty results of `_rsa_demux`, for tracing by torch.compile."""
    return _allocate_outputs(hidden_part, key_part, weights, pair_position)


def _allocate_outputs(
    hidden_part: Tensor, key_part: Tensor, weights: Sequence[Tensor], pair_position: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Allocate the output [R, D] and the GELU inputs [layers, R, D] of `_rsa_demux`.

    Arguments as there.
    """
    groups, length, size = hidden_part.shape
    rows = groups * len(key_part) * length if pair_position is None else pair_position.shape[0]
    return hidden_part.new_empty(rows, size), hidden_part.new_empty(
        len(weights) // 2 - 1, rows, size
    )


@torch.library.custom_op("megamod::rsa_demux_backward", mutates_args=())
def _rsa_demux_backward(
    upstream: Tensor,
    hidden_part: Tensor,
    key_part: Tensor,
    weights: Sequence[Tensor],
    pre_gelu: Tensor,
    pair_position: Tensor | None,
    pair_instance: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    eps: float,
) -> list[Tensor]:
    """Return the gradients of hidden_part, key_part and all weights, in their shapes.

    `upstream` [R, D] is the gradient of the output, `pre_gelu` the second result of `_rsa_demux`;
    other arguments as there. Weight gradients are the vendor's products; sums over rows are
    accumulated in float32.
    """
    from megamod_kernels import demux_kernels as kernels

    if not upstream.numel():
        return [torch.zeros_like(tensor) for tensor in (hidden_part, key_part, *weights)]
    hidden_part, key_part, upstream = (
        hidden_part.contiguous(),
        key_part.contiguous(),
        upstream.contiguous(),
    )
    *layers, norm = pair_weights_with_biases([weight.contiguous() for weight in weights])
    rows, size = upstream.shape
    N, length = len(key_part), hidden_part.shape[1]
    dropout_flag, itemsize = {"DROPOUT": seed is not None}, hidden_part.element_size()
    launch, tile = (
        select_whole_row_launch(size, itemsize) | dropout_flag,
        select_column_tile_launch(size, itemsize) | dropout_flag,
    )
    column_tiles = -(-size // WIDTH)
    pairs = {"PAIRS": pair_position is not None}
    indices = [
        hidden_part if tensor is None else tensor.contiguous()
        for tensor in (pair_position, pair_instance, seed)
    ]
    blocks = -(-rows // launch["ROWS"])
    programs = min(blocks, PROGRAMS)
    grad, state = torch.empty_like(upstream), torch.empty_like(upstream)
    grads: list[Tensor] = []
    for layer in reversed(range(len(layers))):
        last = layer == len(layers) - 1
        partial = hidden_part.new_empty((programs, 3 if last else 1, size), dtype=torch.float32)
        kernels.rsa_demux_layer_bwd_kernel[(programs,)](
            hidden_part, key_part, pre_gelu, upstream, norm[0], grad, state, partial, *indices,
            rows, length, size, N, dropout, eps, blocks, LAYER=layer, NORM=last, **pairs, **launch,
        )  # fmt: skip
        sums = (part.to(key_part.dtype, copy=True) for part in partial.sum(0))
        grads[:0] = [grad.T @ state, *sums]
        upstream = torch.addmm(upstream, grad, layers[layer][0])
    if pair_position is not None:
        # In float32, because gradients of pairs that share a position are summed.
        grad = torch.empty_like(upstream, dtype=torch.float32)
        kernels.rsa_demux_first_bwd_kernel[(-(-rows // tile["ROWS"]), column_tiles)](
            hidden_part, key_part, upstream, grad, *indices, rows, size, dropout, **tile
        )
        # Both sums run in a fixed order, unlike index_add_ on a GPU.
        grad_hidden = torch.zeros_like(hidden_part, dtype=torch.float32).flatten(0, 1)
        grad_hidden = grad_hidden.index_put_((pair_position,), grad, accumulate=True)
        grad_key = F.one_hot(pair_instance, N).to(grad.dtype).T @ grad
        return [
            grad_hidden.view_as(hidden_part).to(hidden_part.dtype),
            grad_key.to(key_part.dtype),
            *grads,
        ]
    positions = hidden_part.shape[0] * length
    programs = -(-positions // tile["ROWS"])
    grad_hidden = torch.empty_like(hidden_part)
    partial = hidden_part.new_empty((programs, N, size), dtype=torch.float32)
    kernels.rsa_demux_sums_bwd_kernel[(programs, column_tiles)](
        hidden_part, key_part, upstream, grad_hidden, partial, indices[2], positions, length, size,
        N, dropout, **tile,
    )  # fmt: skip
    return [grad_hidden, partial.sum(0).to(key_part.dtype), *grads]


@_rsa_demux_backward.register_fake
def _(
    upstream: Tensor,
    hidden_part: Tensor,
    key_part: Tensor,
    weights: Sequence[Tensor],
    pre_gelu: Tensor,
    pair_position: Tensor | None,
    pair_instance: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    eps: float,
) -> list[Tensor]:
    """Return empty results of `_rsa_demux_backward`, for tracing by torch.compile."""
    return [torch.empty_like(tensor) for tensor in (hidden_part, key_part, *weights)]


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[object, ...],
    output: tuple[Tensor, Tensor],
) -> None:
    """Save in `ctx` what `_backward` reads: the arguments of `_rsa_demux` and the GELU inputs."""
    hidden_part, key_part, weights, pair_position, pair_instance, seed, ctx.dropout, ctx.eps, _ = (
        inputs
    )
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(
        hidden_part, key_part, output[1], pair_position, pair_instance, seed, *weights
    )


def _backward(
    ctx: torch.autograd.function.FunctionCtx, upstream: Tensor, _: Tensor
) -> tuple[object, ...]:
    """Return the gradients of the arguments of `_rsa_demux`; None for indices, seed and numbers.

    `upstream` [R, D] is the gradient of the output.
    """
    hidden_part, key_part, pre_gelu, pair_position, pair_instance, seed, *weights = (
        ctx.saved_tensors
    )
    arguments = (
        hidden_part,
        key_part,
        weights,
        pre_gelu,
        pair_position,
        pair_instance,
        seed,
        ctx.dropout,
        ctx.eps,
    )
    grad_hidden, grad_key, *grads = _rsa_demux_backward(upstream, *arguments)
    return grad_hidden, grad_key, grads, None, None, None, None, None, None


_rsa_demux.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.megamod.rsa_demux)
def _count_flops(
    hidden_part: Sequence[int],
    key_part: Sequence[int],
    weights: Sequence[Sequence[int]],
    pair_position: Sequence[int] | None,
    *args: object,
    **kwargs: object,
) -> int:
    """Count the FLOPs of the D x D products of all layers after the first, for all output rows.

    The arguments are the shapes of those of `_rsa_demux`.
    """
    rows = (
        hidden_part[0] * key_part[0] * hidden_part[1] if pair_position is None else pair_position[0]
    )
    return 2 * rows * hidden_part[2] ** 2 * (len(weights) // 2 - 1)


@register_flop_formula(torch.ops.megamod.rsa_demux_backward)
def _count_backward_flops(
    upstream: Sequence[int],
    hidden_part: Sequence[int],
    key_part: Sequence[int],
    weights: Sequence[Sequence[int]],
    *args: object,
    **kwargs: object,
) -> int:
    """Count the FLOPs of two products per layer, for the gradients of its input and its weight.

    The arguments are the shapes of those of `_rsa_demux_backward`.
    """
    return 4 * upstream[0] * hidden_part[2] ** 2 * (len(weights) // 2 - 1)


def rsa_demux(
    hidden_part: Tensor,
    key_part: Tensor,
    chain: Chain,
    pairs: Pairs | None = None,
    dropout: float = 0.0,
    implementation: str = "auto",
) -> Tensor:
    """Apply all layers of the demultiplexer after the split first one.

        x = gelu(hidden_part + key_part);  x = gelu(dense x) + x for each;  LN(gelu(last x)) + x

    Args:
        hidden_part, key_part: [B, L, D] and [N, D], from `split_projection`.
        pairs: positions and instances to demultiplex; None for all.
        dropout: probability after the first GELU and after that of each residual layer.
        implementation: "reference"; "auto": on a GPU one kernel per layer computes the state and
            the vendor's product follows; "triton": fused products that compute the states they
            read (docs/kernels.md has the cost). float64 and autocast always use plain torch.
    Returns:
        [R, D] for pairs, else [B, N, L, D], in hidden_part's dtype. Differentiable once in all
        tensors.
        Backward saves 1 + len(chain.dense) tensors of that size, and the two parts.
    Raises:
        ValueError: if the shapes of the two parts do not fit, or the implementation cannot run.
    Source: Murahari et al. 2023 (MUX-PLM), section 3.1; layers in the order of its release.
    """
    if hidden_part.dim() != 3 or key_part.dim() != 2 or hidden_part.shape[-1] != key_part.shape[-1]:
        raise ValueError(
            f"hidden_part {tuple(hidden_part.shape)} and key_part {tuple(key_part.shape)} do not "
            "fit: expected [B, L, D] and [N, D]"
        )
    if not hidden_part.is_meta and torch.is_autocast_enabled(hidden_part.device.type):
        # A custom backward pass would not run under autocast.
        return rsa_demux_reference(hidden_part, key_part, chain, pairs, dropout)
    if uses_triton(implementation, hidden_part) and hidden_part.dtype != torch.float64:
        return rsa_demux_triton(
            hidden_part, key_part, chain, pairs, dropout, own_matmul=implementation == "triton"
        )
    return RsaDemuxFunction.apply(
        hidden_part, key_part, pairs, dropout, chain.eps, *_flatten_chain(chain)
    )


def rsa_demux_triton(
    hidden_part: Tensor,
    key_part: Tensor,
    chain: Chain,
    pairs: Pairs | None,
    dropout: float,
    own_matmul: bool,
) -> Tensor:
    """Run `rsa_demux` with Triton kernels.

    Args:
        hidden_part, key_part, chain, pairs, dropout: as in `rsa_demux`.
        own_matmul: multiply by the fused products, not by the vendor's.
    Returns:
        [R, D] for pairs, else [B, N, L, D].
    """
    indices = (None, None)
    if pairs is not None:
        indices = (pairs.group * hidden_part.shape[1] + pairs.position, pairs.instance)
    seed = torch.randint(2**31, (1,), device=hidden_part.device) if dropout else None
    arguments = (
        hidden_part,
        key_part,
        _flatten_chain(chain),
        *indices,
        seed,
        dropout,
        chain.eps,
        own_matmul,
    )
    output, _ = _rsa_demux(*arguments)
    if pairs is not None:
        return output
    return output.view(len(hidden_part), len(key_part), *hidden_part.shape[1:])


def _flatten_chain(chain: Chain) -> list[Tensor]:
    """List the weights of a chain in the order of its layers, each followed by its bias, norm last.

    Custom operations take flat lists of tensors only.
    """
    return [tensor for pair in (*chain.dense, chain.last, chain.norm) for tensor in pair]
