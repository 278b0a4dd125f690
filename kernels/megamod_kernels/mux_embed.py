"""Token ids of N instances to the input of a multiplexed encoder, in one kernel.

Word, position and segment embeddings are added and normed, N instances are multiplexed, and the
result is embedded again by the same tables and norm. The embeddings of all instances, [B, N, T, D],
are never stored: forward and backward recompute them from the ids.
"""

import torch
from torch import Tensor

from megamod_kernels.dispatch import uses_triton
from megamod_kernels.mux_embed_torch import Tables, check, mux_embed_reference

__all__ = ["Tables", "check", "mux_embed", "mux_embed_reference"]

WIDTH = 256  # columns of a tile
CHUNK = 16  # sorted rows summed by one program
PARTIALS = 128  # rows of the buffers of partial sums of norm and key gradients


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


def rows_per_program(size: int) -> int:
    """Mixed rows per program: as many as fit in registers."""
    return 2 if size <= 1024 else 1


def tiles(size: int) -> dict[str, int | bool]:
    """Compile-time arguments for rows of `size` columns."""
    return {"WIDTH": WIDTH, "TILES": _blocks(size, WIDTH), "WHOLE": size % WIDTH == 0}


def warps(size: int) -> int:
    """Warps per program for rows of `size` columns."""
    return 4 if size <= 1024 else 8


def _optional(tensor: Tensor | None, instead: Tensor) -> tuple[Tensor, int, bool]:
    """A contiguous tensor of rows or a placeholder, its row stride, and True if it was passed."""
    if tensor is None:
        return instead, 1, False
    return tensor.contiguous(), 0 if len(tensor) == 1 else tensor.shape[1], True


@torch.library.custom_op("megamod::mux_embed", mutates_args=())
def _mux_embed(
    ids: Tensor, word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor,
    key: Tensor, types: Tensor | None, firsts: Tensor | None, seconds: Tensor | None,
    seed: Tensor | None, eps: float, start: int, dropout: float, word_padding: int,
    position_padding: int, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The encoder's input, and with `keep` the mixed rows before the second embedding."""
    from megamod_kernels import mux_embed_kernels as kernels

    (rows, length), (instances, size) = ids.shape, key.shape
    output = word.new_empty(rows // instances, length, size)
    mixed = torch.empty_like(output) if keep else word.new_empty(0)
    if output.numel():
        arguments, flags = embedding_arguments(
            ids, word, position, token_type, weight, bias, key, types, firsts, seconds, seed,
            output, mixed, eps, start, dropout, keep,
        )  # fmt: skip
        kernels.mux_embed_fwd_kernel[(_blocks(len(output) * length, rows_per_program(size)),)](
            *arguments, **flags, BLOCK=rows_per_program(size), num_warps=warps(size)
        )
    return output, mixed


def embedding_arguments(
    ids: Tensor, word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor,
    key: Tensor, types: Tensor | None, firsts: Tensor | None, seconds: Tensor | None,
    seed: Tensor | None, output: Tensor, mixed: Tensor, eps: float, start: int, dropout: float,
    keep: bool,
) -> tuple[tuple[object, ...], dict[str, object]]:  # fmt: skip
    """Positional and keyword arguments of a launch for `embed_rows`."""
    types, _, has_types = _optional(types, ids)
    firsts, first_stride, has_firsts = _optional(firsts, ids)
    seconds, second_stride, has_seconds = _optional(seconds, ids)
    groups, length, size = output.shape
    arguments = (
        ids.contiguous(), word.contiguous(), position.contiguous(), token_type.contiguous(),
        weight.contiguous(), bias.contiguous(), key.contiguous(), types, firsts, seconds,
        ids if seed is None else seed, output, mixed, groups * length, length, size, len(key),
        start, first_stride, second_stride, eps, dropout,
    )  # fmt: skip
    flags = {**tiles(size), "TYPES": int(has_types)}
    flags |= {
        "FIRSTS": has_firsts,
        "SECONDS": has_seconds,
        "DROPOUT": seed is not None,
        "KEEP": keep,
    }
    return arguments, flags


@_mux_embed.register_fake
def _(
    ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    key: Tensor,
    types: Tensor | None,
    firsts: Tensor | None,
    seconds: Tensor | None,
    seed: Tensor | None,
    eps: float,
    start: int,
    dropout: float,
    word_padding: int,
    position_padding: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    shape = (ids.shape[0] // key.shape[0], ids.shape[1], key.shape[1])
    return word.new_empty(shape), word.new_empty(shape if keep else 0)


@torch.library.custom_op("megamod::mux_embed_backward", mutates_args=())
def mux_embed_backward(
    upstream: Tensor, mixed: Tensor, ids: Tensor, word: Tensor, position: Tensor,
    token_type: Tensor, weight: Tensor, bias: Tensor, key: Tensor, types: Tensor | None,
    firsts: Tensor | None, seconds: Tensor | None, seed: Tensor | None, eps: float, start: int,
    dropout: float, word_padding: int, position_padding: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of word, position, token_type, weight, bias and key."""
    from megamod_kernels import mux_embed_kernels as kernels

    (rows, length), (instances, size) = ids.shape, key.shape
    groups = rows // instances
    parameters = (word, position, token_type, weight, bias, key)
    if not upstream.numel():
        return tuple(torch.zeros_like(arguments) for arguments in parameters)
    upstream, ids = upstream.contiguous(), ids.contiguous()
    given_types, given_firsts, given_seconds = types, firsts, seconds
    word, position, token_type, weight, bias, key = (t.contiguous() for t in parameters)
    types, _, has_types = _optional(types, ids)
    firsts, first_stride, has_firsts = _optional(firsts, ids)
    seconds, second_stride, has_seconds = _optional(seconds, ids)
    drop, drawn = seed is not None, ids if seed is None else seed
    every, all_mixed, column_tiles = rows * length, groups * length, _blocks(size, WIDTH)
    wide = {"dtype": torch.float32, "device": word.device}

    grad_mixed = torch.empty_like(mixed)
    stats, second_stats = torch.empty(4, every, **wide), torch.empty(2, all_mixed, **wide)
    kernels.mux_embed_bwd_kernel[(_blocks(all_mixed, rows_per_program(size)),)](
        upstream,
        ids,
        word,
        position,
        token_type,
        weight,
        key,
        types,
        firsts,
        seconds,
        drawn,
        mixed,
        grad_mixed,
        stats,
        second_stats,
        all_mixed,
        length,
        size,
        instances,
        start,
        first_stride,
        second_stride,
        eps,
        dropout,
        BLOCK=rows_per_program(size),
        **tiles(size),
        TYPES=int(has_types),
        FIRSTS=has_firsts,
        SECONDS=has_seconds,
        DROPOUT=drop,
        num_warps=warps(size),
    )

    def columns(second: bool) -> Tensor:
        """Sum over all rows, [instances or 1, 2, D]."""
        blocks, count = _blocks(all_mixed, 4), 1 if second else instances
        programs = min(blocks, PARTIALS)
        partial = torch.empty(programs, count, 2, size, **wide)
        kernels.mux_embed_columns_kernel[(programs, column_tiles, count)](
            upstream if second else grad_mixed, ids, mixed if second else word, position,
            token_type, types, seconds if second else firsts, drawn,
            second_stats if second else stats, partial, all_mixed, length, size, count, blocks,
            start, second_stride if second else first_stride, all_mixed if second else every,
            dropout, BLOCK=4, WIDTH=WIDTH, TYPES=0 if second else int(has_types),
            POSITIONS=has_seconds if second else has_firsts, DROPOUT=drop, SECOND=second,
            WHOLE=size % WIDTH == 0, num_warps=4,
        )  # fmt: skip
        return partial.sum(0)

    def table(owner: Tensor, order: Tensor, grad: Tensor, padding: int, of_mixed: bool) -> Tensor:
        """Add rows to the row of `grad` that owns them; `grad` starts at zero."""
        count = len(order)
        grid = (_blocks(count, CHUNK), column_tiles)
        head, tail = (torch.empty(grid[0], size, **wide) for _ in range(2))
        kernels.mux_embed_table_kernel[grid](
            grad_mixed, ids, word, position, token_type, weight, key, types, firsts, drawn, stats,
            order, owner, grad, head, tail, count, length, size, instances, start, first_stride,
            dropout, padding, CHUNK=CHUNK, WIDTH=WIDTH, TYPES=int(has_types), FIRSTS=has_firsts,
            DROPOUT=drop, MIXED=of_mixed, num_warps=1,
        )  # fmt: skip
        kernels.mux_embed_join_kernel[grid](
            owner, grad, head, tail, count, size, padding, CHUNK=CHUNK, WIDTH=WIDTH, num_warps=1
        )
        return grad

    grad_word = table(*_sorted(ids), torch.zeros_like(word), word_padding, False)

    # Sum the rows of each (position, segment) first; the gradients of both tables follow from it.
    places, segments = len(position), len(token_type) if has_types else 1
    if has_firsts or has_types:
        first = _rows(given_firsts, rows, length, start, ids)
        order_of_slots = _sorted(first + given_types * places if has_types else first)
    else:
        order_of_slots = _by_column(rows, length, start, ids)
    slots = torch.zeros(segments * places, size, **wide)
    slots = table(*order_of_slots, slots, -1, False).view(segments, places, size)
    again = torch.zeros(places, size, **wide)
    if has_seconds:
        second = _rows(given_seconds, groups, length, start, ids)
        again = table(*_sorted(second), again, -1, True)
    else:
        again[start : start + length] = grad_mixed.sum(0, dtype=torch.float32)

    grad_type = torch.zeros(token_type.shape, **wide)
    grad_type[:segments] = slots.sum(1)
    grad_type[0] += again.sum(0)
    of_first = slots.sum(0)
    if position_padding >= 0:
        for table_grad, by_row in ((of_first, has_firsts), (again, has_seconds)):
            table_grad[position_padding] *= not by_row
    of_norm = torch.empty_like(weight), torch.empty_like(bias)
    grad_key = torch.empty_like(key)
    kernels.mux_embed_finish_kernel[(column_tiles,)](
        columns(False), columns(True), key, weight, bias, *of_norm, grad_key, size, instances,
        WIDTH=WIDTH, num_warps=4,
    )  # fmt: skip
    of_position = (of_first + again).to(position.dtype)
    return grad_word, of_position, grad_type.to(token_type.dtype), *of_norm, grad_key


@mux_embed_backward.register_fake
def _(
    upstream: Tensor, mixed: Tensor, ids: Tensor, word: Tensor, position: Tensor,
    token_type: Tensor, weight: Tensor, bias: Tensor, key: Tensor, types: Tensor | None,
    firsts: Tensor | None, seconds: Tensor | None, seed: Tensor | None, eps: float, start: int,
    dropout: float, word_padding: int, position_padding: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return tuple(torch.empty_like(t) for t in (word, position, token_type, weight, bias, key))


def _rows(arguments: Tensor | None, rows: int, length: int, start: int, like: Tensor) -> Tensor:
    """Indices into the position table, [rows, length]."""
    if arguments is None:
        arguments = torch.arange(start, start + length, device=like.device)[None]
    return arguments.expand(rows, length)


def _sorted(owner: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted owners of rows and their row indices; sorting int32 takes half as long as int64."""
    return owner.flatten().to(torch.int32).sort(stable=True)


def _by_column(rows: int, length: int, start: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Result of `_sorted` for rows [rows, length] of consecutive indices."""
    numbers = torch.arange(rows * length, device=like.device).view(rows, length)
    owner = torch.arange(start, start + length, dtype=torch.int32, device=like.device)
    return owner.repeat_interleave(rows), numbers.T.flatten()


def _keep(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]
) -> None:
    *tensors, eps, start, dropout, word_padding, position_padding, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *tensors)
    ctx.numbers = (eps, start, dropout, word_padding, position_padding)


def _differentiate(
    ctx: torch.autograd.function.FunctionCtx, upstream: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    needed, no_grads = ctx.needs_input_grad[1:7], (None,) * 10
    if upstream is None:
        return (None,) * 17
    grads = mux_embed_backward(upstream, *ctx.saved_tensors, *ctx.numbers)
    return None, *(g if asked else None for g, asked in zip(grads, needed, strict=True)), *no_grads


_mux_embed.register_autograd(_differentiate, setup_context=_keep)


def mux_embed(
    ids: Tensor,
    key: Tensor,
    tables: Tables,
    token_type_ids: Tensor | None = None,
    first_positions: Tensor | None = None,
    second_positions: Tensor | None = None,
    dropout: float = 0.0,
    implementation: str = "auto",
) -> Tensor:
    """Embed, multiplex and embed again.

        x_i = dropout(LN(word + position + segment));  M = mean of key_i * x_i
        result = dropout(LN(M + position + segment 0))

    Args:
        ids: [B * N, T] int64, row r is instance r % N of group r // N.
        key: [N, D] one vector per instance.
        tables: parameters of both embeddings; their gradients are summed.
        token_type_ids: [B * N, T]; None: segment 0.
        first_positions: [B * N, T] or [1, T] indices into the position table; None: consecutive.
        second_positions: [B, T] or [1, T], the same for the second embedding.
        dropout: probability; 0 outside training.
        implementation: "triton", "reference", or "auto", which is Triton on a GPU. float64 always
            uses the reference.
    Returns:
        [B, T, D], in the dtype of `tables.word`. Differentiable once in key and all tables.
        Backward saves one tensor of that size.
    Raises:
        ValueError: if shapes do not fit, or the implementation cannot run.
    Source: Murahari et al. 2023 (MUX-PLM), section 3.1; both embeddings as in its release.
    """
    check(ids, key, tables, token_type_ids, first_positions, second_positions)
    optional = (token_type_ids, first_positions, second_positions)
    if not uses_triton(implementation, ids) or tables.word.dtype == torch.float64:
        return mux_embed_reference(ids, key, tables, *optional, dropout)
    learned = (*tables[:5], key)
    seed, numbers = settings(ids, learned, tables, dropout)
    return _mux_embed(ids, *learned, *optional, seed, *numbers)[0]


def settings(
    ids: Tensor, learned: tuple[Tensor, ...], tables: Tables, dropout: float
) -> tuple[Tensor | None, tuple[float | int, ...]]:
    """Dropout seed or None, and the trailing number arguments of the operation."""
    seed = torch.randint(2**62, (1,), device=ids.device) if dropout else None
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in learned)
    padding = [-1 if row is None else row for row in (tables.word_padding, tables.position_padding)]
    return seed, (tables.eps, tables.first_position, float(dropout), *padding, keep)
