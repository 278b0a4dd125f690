"""Token ids of N instances to the input of a multiplexed encoder, in one kernel.

B, N, T, D: groups, instances of a group, tokens of a sequence, hidden size. Word, position and
segment embeddings are added and normed, N instances are multiplexed, and the result is embedded
again by the same tables and norm. The embeddings of all instances, [B, N, T, D], are never stored:
forward and backward recompute them from the ids.
"""

import torch
from torch import Tensor

from megamod_kernels.dispatch import uses_triton
from megamod_kernels.mux_embed_torch import Tables, check_shapes, mux_embed_reference

__all__ = ["Tables", "check_shapes", "mux_embed", "mux_embed_reference"]

WIDTH = 256  # columns of a tile
CHUNK = 16  # sorted rows summed by one program
PARTIALS = 128  # rows of the buffers of partial sums of norm and key gradients


def _ceil_divide(count: int, size: int) -> int:
    """Return count / size, rounded up."""
    return -(-count // size)


def count_rows_per_program(size: int) -> int:
    """Return the number of mixed rows per program: as many as fit in registers."""
    return 2 if size <= 1024 else 1


def make_width_arguments(size: int) -> dict[str, int | bool]:
    """Return the tiling of rows of `size` columns: WIDTH, TILES, and WHOLE: no partial tile."""
    return {"WIDTH": WIDTH, "TILES": _ceil_divide(size, WIDTH), "WHOLE": size % WIDTH == 0}


def count_warps(size: int) -> int:
    """Return the number of warps per program for rows of `size` columns.

    At the tuned widths, up to 2,048, a thread then holds at most 8 columns of a row.
    """
    return 4 if size <= 1024 else 8


def _make_optional_argument(tensor: Tensor | None, instead: Tensor) -> tuple[Tensor, int, bool]:
    """Return a contiguous tensor of rows, its row stride (0 for one row of all), and True.

    If `tensor` is None, return the placeholder `instead`, which kernels do not read, the stride 1,
    by which they count positions then, and False.
    """
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
    """Compute the encoder's input [B, T, D], and the mixed rows before the second embedding.

    The mixed rows [B, T, D], which backward needs, are empty unless `keep`. Other arguments as in
    `make_embedding_arguments`; the two paddings are read by backward alone, -1: none.
    """
    from megamod_kernels import mux_embed_kernels as kernels

    (rows, length), (instances, size) = ids.shape, key.shape
    output = word.new_empty(rows // instances, length, size)
    mixed = torch.empty_like(output) if keep else word.new_empty(0)
    if output.numel():
        arguments, flags = make_embedding_arguments(
            ids, word, position, token_type, weight, bias, key, types, firsts, seconds, seed,
            output, mixed, eps, start, dropout, keep,
        )  # fmt: skip
        kernels.mux_embed_fwd_kernel[
            (_ceil_divide(len(output) * length, count_rows_per_program(size)),)
        ](*arguments, **flags, ROWS=count_rows_per_program(size), num_warps=count_warps(size))
    return output, mixed


def make_embedding_arguments(
    ids: Tensor, word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor,
    key: Tensor, types: Tensor | None, firsts: Tensor | None, seconds: Tensor | None,
    seed: Tensor | None, output: Tensor, mixed: Tensor, eps: float, start: int, dropout: float,
    keep: bool,
) -> tuple[tuple[object, ...], dict[str, object]]:  # fmt: skip
    """Return the positional and keyword arguments of a launch for `embed_rows`.

    Args:
        ids: [B * N, T]; word, position, token_type, weight, bias: fields of `Tables`.
        key: [N, D].
        types, firsts, seconds: token types and positions of the first and second embedding, as in
            `mux_embed`, or None.
        seed: [1] int64; None without dropout.
        output, mixed: [B, T, D], which the kernel fills; `mixed` only with `keep`.
        eps, start: `eps` and `first_position` of `Tables`.
        dropout: probability.
    """
    types, _, has_types = _make_optional_argument(types, ids)
    firsts, first_stride, has_firsts = _make_optional_argument(firsts, ids)
    seconds, second_stride, has_seconds = _make_optional_argument(seconds, ids)
    groups, length, size = output.shape
    arguments = (
        ids.contiguous(), word.contiguous(), position.contiguous(), token_type.contiguous(),
        weight.contiguous(), bias.contiguous(), key.contiguous(), types, firsts, seconds,
        ids if seed is None else seed, output, mixed, groups * length, length, size, len(key),
        start, first_stride, second_stride, eps, dropout,
    )  # fmt: skip
    flags = {**make_width_arguments(size), "TYPES": int(has_types)}
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
    """Return empty results of `_mux_embed`, for tracing by torch.compile."""
    shape = (ids.shape[0] // key.shape[0], ids.shape[1], key.shape[1])
    return word.new_empty(shape), word.new_empty(shape if keep else 0)


@torch.library.custom_op("megamod::mux_embed_backward", mutates_args=())
def mux_embed_backward(
    upstream: Tensor, mixed: Tensor, ids: Tensor, word: Tensor, position: Tensor,
    token_type: Tensor, weight: Tensor, bias: Tensor, key: Tensor, types: Tensor | None,
    firsts: Tensor | None, seconds: Tensor | None, seed: Tensor | None, eps: float, start: int,
    dropout: float, word_padding: int, position_padding: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of word, position, token_type, weight, bias and key, of their shapes.

    `upstream` [B, T, D] is the gradient of the output; `mixed` [B, T, D] are the mixed rows of the
    forward pass; the two paddings are rows without gradient, -1: none; other arguments as in
    `make_embedding_arguments`. Gradients of tables are sums over tokens, sorted by the row of the
    table, so that every run adds in the same order.
    """
    from megamod_kernels import mux_embed_kernels as kernels

    (rows, length), (instances, size) = ids.shape, key.shape
    groups = rows // instances
    parameters = (word, position, token_type, weight, bias, key)
    if not upstream.numel():
        return tuple(torch.zeros_like(parameter) for parameter in parameters)
    upstream, ids = upstream.contiguous(), ids.contiguous()
    passed_types, passed_firsts, passed_seconds = types, firsts, seconds
    word, position, token_type, weight, bias, key = (t.contiguous() for t in parameters)
    types, _, has_types = _make_optional_argument(types, ids)
    firsts, first_stride, has_firsts = _make_optional_argument(firsts, ids)
    seconds, second_stride, has_seconds = _make_optional_argument(seconds, ids)
    has_dropout, seed_or_placeholder = seed is not None, ids if seed is None else seed
    token_count, mixed_count, column_tiles = (
        rows * length,
        groups * length,
        _ceil_divide(size, WIDTH),
    )
    wide = {"dtype": torch.float32, "device": word.device}

    grad_mixed = torch.empty_like(mixed)
    stats, second_stats = torch.empty(4, token_count, **wide), torch.empty(2, mixed_count, **wide)
    kernels.mux_embed_bwd_kernel[(_ceil_divide(mixed_count, count_rows_per_program(size)),)](
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
        seed_or_placeholder,
        mixed,
        grad_mixed,
        stats,
        second_stats,
        mixed_count,
        length,
        size,
        instances,
        start,
        first_stride,
        second_stride,
        eps,
        dropout,
        ROWS=count_rows_per_program(size),
        **make_width_arguments(size),
        TYPES=int(has_types),
        FIRSTS=has_firsts,
        SECONDS=has_seconds,
        DROPOUT=has_dropout,
        num_warps=count_warps(size),
    )

    def sum_columns(second: bool) -> Tensor:
        """Sum the result of `mux_embed_columns_kernel` over programs: [N, 2, D] float32.

        With `second` for the second embedding, and N is 1.
        """
        blocks, count = _ceil_divide(mixed_count, 4), 1 if second else instances
        programs = min(blocks, PARTIALS)
        partial = torch.empty(programs, count, 2, size, **wide)
        kernels.mux_embed_columns_kernel[(programs, column_tiles, count)](
            upstream if second else grad_mixed, ids, mixed if second else word, position,
            token_type, types, seconds if second else firsts, seed_or_placeholder,
            second_stats if second else stats, partial, mixed_count, length, size, count, blocks,
            start, second_stride if second else first_stride, mixed_count if second else
            token_count, dropout, ROWS=4, WIDTH=WIDTH, TYPES=0 if second else int(has_types),
            POSITIONS=has_seconds if second else has_firsts, DROPOUT=has_dropout, SECOND=second,
            WHOLE=size % WIDTH == 0, num_warps=4,
        )  # fmt: skip
        return partial.sum(0)

    def add_to_table(
        owner: Tensor, order: Tensor, grad: Tensor, padding: int, of_mixed: bool
    ) -> Tensor:
        """Add gradients of tokens to the rows of the table that embedded them; return `grad`.

        Args:
            owner, order: result of `_sort_by_owner`.
            grad: [rows of the table, D] zeros, changed in place.
            padding: row of `grad` that stays zero; -1: none.
            of_mixed: tokens are those of the second embedding.
        """
        count = len(order)
        grid = (_ceil_divide(count, CHUNK), column_tiles)
        head, tail = (torch.empty(grid[0], size, **wide) for _ in range(2))
        kernels.mux_embed_table_kernel[grid](
            grad_mixed, ids, word, position, token_type, weight, key, types, firsts,
            seed_or_placeholder, stats, order, owner, grad, head, tail, count, length, size,
            instances, start, first_stride, dropout, padding, CHUNK=CHUNK, WIDTH=WIDTH,
            TYPES=int(has_types), FIRSTS=has_firsts, DROPOUT=has_dropout, MIXED=of_mixed,
            num_warps=1,
        )  # fmt: skip
        kernels.mux_embed_join_kernel[grid](
            owner, grad, head, tail, count, size, padding, CHUNK=CHUNK, WIDTH=WIDTH, num_warps=1
        )
        return grad

    grad_word = add_to_table(*_sort_by_owner(ids), torch.zeros_like(word), word_padding, False)

    # Sum the rows of each (position, segment) first; the gradients of both tables follow from it.
    position_count, segment_count = len(position), len(token_type) if has_types else 1
    if has_firsts or has_types:
        first = _find_position_rows(passed_firsts, rows, length, start, ids)
        pair_order = _sort_by_owner(first + passed_types * position_count if has_types else first)
    else:
        pair_order = _order_by_column(rows, length, start, ids)
    pair_grads = torch.zeros(segment_count * position_count, size, **wide)
    pair_grads = add_to_table(*pair_order, pair_grads, -1, False).view(
        segment_count, position_count, size
    )
    second_position_grad = torch.zeros(position_count, size, **wide)
    if has_seconds:
        second = _find_position_rows(passed_seconds, groups, length, start, ids)
        second_position_grad = add_to_table(*_sort_by_owner(second), second_position_grad, -1, True)
    else:
        second_position_grad[start : start + length] = grad_mixed.sum(0, dtype=torch.float32)

    grad_type = torch.zeros(token_type.shape, **wide)
    grad_type[:segment_count] = pair_grads.sum(1)
    grad_type[0] += second_position_grad.sum(0)
    first_position_grad = pair_grads.sum(0)
    if position_padding >= 0:
        for table_grad, by_row in (
            (first_position_grad, has_firsts),
            (second_position_grad, has_seconds),
        ):
            table_grad[position_padding] *= not by_row
    norm_grads = torch.empty_like(weight), torch.empty_like(bias)
    grad_key = torch.empty_like(key)
    kernels.mux_embed_finish_kernel[(column_tiles,)](
        sum_columns(False), sum_columns(True), key, weight, bias, *norm_grads, grad_key, size,
        instances, WIDTH=WIDTH, num_warps=4,
    )  # fmt: skip
    position_grad = (first_position_grad + second_position_grad).to(position.dtype)
    return grad_word, position_grad, grad_type.to(token_type.dtype), *norm_grads, grad_key


@mux_embed_backward.register_fake
def _(
    upstream: Tensor, mixed: Tensor, ids: Tensor, word: Tensor, position: Tensor,
    token_type: Tensor, weight: Tensor, bias: Tensor, key: Tensor, types: Tensor | None,
    firsts: Tensor | None, seconds: Tensor | None, seed: Tensor | None, eps: float, start: int,
    dropout: float, word_padding: int, position_padding: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return empty results of `mux_embed_backward`, for tracing by torch.compile."""
    return tuple(torch.empty_like(t) for t in (word, position, token_type, weight, bias, key))


def _find_position_rows(
    positions: Tensor | None, rows: int, length: int, start: int, like: Tensor
) -> Tensor:
    """Return indices into the position table, [rows, length].

    Args:
        positions: [rows, length] or [1, length]; None: consecutive from `start`.
        like: tensor on the device of the result.
    """
    if positions is None:
        positions = torch.arange(start, start + length, device=like.device)[None]
    return positions.expand(rows, length)


def _sort_by_owner(owner: Tensor) -> tuple[Tensor, Tensor]:
    """Sort tokens by owner, the row of the table that embeds them.

    Args:
        owner: [...] owner of each token.
    Returns:
        sorted owners, int32, which sorts in half the time of int64; and the token at each place of
        that order. Both have one dimension.
    """
    return owner.flatten().to(torch.int32).sort(stable=True)


def _order_by_column(rows: int, length: int, start: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the result of `_sort_by_owner` for consecutive positions, without sorting.

    Args:
        rows, length: shape of the tokens; column t is owned by row start + t of the position table.
        like: tensor on the device of the result.
    """
    numbers = torch.arange(rows * length, device=like.device).view(rows, length)
    owner = torch.arange(start, start + length, dtype=torch.int32, device=like.device)
    return owner.repeat_interleave(rows), numbers.T.flatten()


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]
) -> None:
    """Save in `ctx` what `_backward` reads: the arguments of `_mux_embed` and the mixed rows."""
    *tensors, eps, start, dropout, word_padding, position_padding, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *tensors)
    ctx.numbers = (eps, start, dropout, word_padding, position_padding)


def _backward(
    ctx: torch.autograd.function.FunctionCtx, upstream: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the six parameters that are needed; None for all other arguments.

    `upstream` [B, T, D] is the gradient of the encoder's input; None: the loss does not depend on
    it.
    """
    needed, no_grads = ctx.needs_input_grad[1:7], (None,) * 10
    if upstream is None:
        return (None,) * 17
    grads = mux_embed_backward(upstream, *ctx.saved_tensors, *ctx.numbers)
    return None, *(g if asked else None for g, asked in zip(grads, needed, strict=True)), *no_grads


_mux_embed.register_autograd(_backward, setup_context=_setup_context)


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
    check_shapes(ids, key, tables, token_type_ids, first_positions, second_positions)
    optional = (token_type_ids, first_positions, second_positions)
    if not uses_triton(implementation, ids) or tables.word.dtype == torch.float64:
        return mux_embed_reference(ids, key, tables, *optional, dropout)
    learned = (*tables[:5], key)
    seed, numbers = make_seed_and_scalars(ids, learned, tables, dropout)
    return _mux_embed(ids, *learned, *optional, seed, *numbers)[0]


def make_seed_and_scalars(
    ids: Tensor, learned: tuple[Tensor, ...], tables: Tables, dropout: float
) -> tuple[Tensor | None, tuple[float | int, ...]]:
    """Return the dropout seed [1] int64 or None, and the scalars at the end of `_mux_embed`.

    Args:
        ids: [B * N, T]; the seed is drawn from torch's generator on its device.
        learned: the six parameters, first five fields of `tables` and keys.
        tables: see `mux_embed`.
        dropout: probability; 0: no seed.
    Returns:
        the seed; and eps, first position, dropout, the padding rows of words and positions (-1:
        none), and True if backward will need the mixed rows.
    """
    seed = torch.randint(2**62, (1,), device=ids.device) if dropout else None
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in learned)
    padding = [-1 if row is None else row for row in (tables.word_padding, tables.position_padding)]
    return seed, (tables.eps, tables.first_position, float(dropout), *padding, keep)
