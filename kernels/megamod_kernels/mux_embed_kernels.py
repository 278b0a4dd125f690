"""Triton kernels of `mux_embed`.

A row is one token of one instance, r = (group * N + instance) * T + t; a mixed row, the mean over
instances, is m = group * T + t. Rows are held as tuples of tiles of WIDTH columns, so widths need
not be powers of two. Arguments of all kernels, contiguous: ids [B * N, T]; tables word, position,
token_type [rows, D]; norm weight and bias [D]; key [N, D]; types, firsts, seconds: token types and
positions of both embeddings, read with TYPES, FIRSTS, SECONDS; `length` is T, `start` the first row
of the position table.
"""

# ruff: noqa: RUF005, B007 (Triton knows neither starred tuples nor a loop variable `_`)

import triton
import triton.language as tl

from megamod_kernels.rows import compute_tile_moments, draw_dropout_factors, make_valid_mask


@triton.jit
def _load_embedding_sum(
    source, position, token_type, source_row, position_row, type_row, column, D, inside
):
    """Return a tile [ROWS, WIDTH] of source + position + segment rows, in float32.

    Args:
        source, position, token_type: tables with D columns.
        source_row, position_row, type_row: [ROWS] indices of their rows.
        column: [WIDTH] indices of columns.
        inside: [ROWS, WIDTH] mask.
    """
    loaded = tl.load(source + source_row[:, None] * D + column[None, :], mask=inside, other=0.0)
    added = tl.load(position + position_row[:, None] * D + column[None, :], mask=inside, other=0.0)
    segment = tl.load(token_type + type_row[:, None] * D + column[None, :], mask=inside, other=0.0)
    return loaded.to(tl.float32) + added.to(tl.float32) + segment.to(tl.float32)


@triton.jit
def _find_table_rows(ids, group, t, length, start, stride, inside, PASSED: tl.constexpr):
    """Return an index into a table for each row [ROWS], int64.

    If PASSED it is loaded from `ids` at row `group` and column t, with a row stride of `stride`;
    else it is start + t * stride. `inside` [ROWS] masks rows that do not exist.
    """
    if PASSED:
        return tl.load(ids + group * stride + t, mask=inside, other=0).to(tl.int64)
    else:
        return (start + t * stride).to(tl.int64)


@triton.jit
def embed_rows(
    mixed_row, valid, ids, word, position, token_type, weight, bias, key, types, firsts, seconds,
    seed, output, mixed, length, D, N, start, first_stride, second_stride, eps, dropout,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, TYPES: tl.constexpr,
    FIRSTS: tl.constexpr, SECONDS: tl.constexpr, DROPOUT: tl.constexpr, WHOLE: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Compute ROWS rows of the encoder's input from ids and write them to `output` [B * T, D].

    KEEP: also write the mean over instances to `mixed` [B * T, D]. `mixed_row` [ROWS] is int32 for
    fast division; `valid` [ROWS] is False for rows that do not exist. Other arguments: see the top
    of the file.
    """
    group, t = (mixed_row // length).to(tl.int64), mixed_row % length
    mixed_row = mixed_row.to(tl.int64)
    total = ()
    for tile in tl.static_range(TILES):
        total = total + (tl.zeros([ROWS, WIDTH], tl.float32),)
    for instance in range(N):
        row = group * N + instance
        word_row = tl.load(ids + row * length + t, mask=valid, other=0)
        position_row = _find_table_rows(firsts, row, t, length, start, first_stride, valid, FIRSTS)
        type_row = _find_table_rows(types, row, t, length, 0, length * TYPES, valid, TYPES)
        x = ()
        for tile in tl.static_range(TILES):
            column = tile * WIDTH + tl.arange(0, WIDTH)
            mask = make_valid_mask(valid, column, D, WHOLE)
            embedded = _load_embedding_sum(
                word, position, token_type, word_row, position_row, type_row, column, D, mask
            )
            x = x + (embedded,)
        mean, rstd = compute_tile_moments(x, D, eps, TILES, WIDTH, WHOLE)
        new_total = ()
        for tile in tl.static_range(TILES):
            column = tile * WIDTH + tl.arange(0, WIDTH)
            gain = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
            shift = tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)
            key_row = tl.load(key + instance * D + column, mask=column < D, other=0.0).to(
                tl.float32
            )
            normed = (x[tile] - mean[:, None]) * rstd[:, None] * gain[None, :] + shift[None, :]
            normed *= draw_dropout_factors(
                seed, 0, row * length + t, tile * WIDTH, dropout, DROPOUT, WIDTH
            )
            new_total = new_total + (total[tile] + normed * key_row[None, :],)
        total = new_total
    position_row = _find_table_rows(seconds, group, t, length, start, second_stride, valid, SECONDS)
    second_sum = ()
    for tile in tl.static_range(TILES):
        column = tile * WIDTH + tl.arange(0, WIDTH)
        mask = make_valid_mask(valid, column, D, WHOLE)
        mean_of_instances = total[tile] * (1.0 / N)
        if KEEP:
            tl.store(mixed + mixed_row[:, None] * D + column[None, :],
                     mean_of_instances.to(mixed.dtype.element_ty), mask=mask)  # fmt: skip
        added = tl.load(position + position_row[:, None] * D + column[None, :], mask=mask,
                        other=0.0)  # fmt: skip
        segment = tl.load(token_type + column, mask=column < D, other=0.0).to(tl.float32)
        second_sum = second_sum + (mean_of_instances + added.to(tl.float32) + segment[None, :],)
    mean, rstd = compute_tile_moments(second_sum, D, eps, TILES, WIDTH, WHOLE)
    for tile in tl.static_range(TILES):
        column = tile * WIDTH + tl.arange(0, WIDTH)
        mask = make_valid_mask(valid, column, D, WHOLE)
        gain = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
        shift = tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)
        normed = (second_sum[tile] - mean[:, None]) * rstd[:, None] * gain[None, :] + shift[None, :]
        normed *= draw_dropout_factors(seed, 1, mixed_row, tile * WIDTH, dropout, DROPOUT, WIDTH)
        tl.store(output + mixed_row[:, None] * D + column[None, :],
                 normed.to(output.dtype.element_ty), mask=mask)  # fmt: skip


@triton.jit
def mux_embed_fwd_kernel(
    ids, word, position, token_type, weight, bias, key, types, firsts, seconds, seed,
    output, mixed, rows, length, D, N, start, first_stride, second_stride, eps, dropout,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, TYPES: tl.constexpr,
    FIRSTS: tl.constexpr, SECONDS: tl.constexpr, DROPOUT: tl.constexpr, WHOLE: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Run `embed_rows` for all `rows` = B * T rows of the output, ROWS per program."""
    mixed_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    embed_rows(
        mixed_row, mixed_row < rows, ids, word, position, token_type, weight, bias, key, types,
        firsts, seconds, seed, output, mixed, length, D, N, start, first_stride, second_stride,
        eps, dropout, ROWS, WIDTH, TILES, TYPES, FIRSTS, SECONDS, DROPOUT, WHOLE, KEEP,
    )  # fmt: skip


@triton.jit
def mux_embed_bwd_kernel(
    upstream, ids, word, position, token_type, weight, key, types, firsts, seconds, seed, mixed,
    grad_mixed, stats, second_stats, rows, length, D, N, start, first_stride, second_stride, eps,
    dropout, ROWS: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, TYPES: tl.constexpr,
    FIRSTS: tl.constexpr, SECONDS: tl.constexpr, DROPOUT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of ROWS mixed rows, and row statistics for the other kernels.

    `upstream` [B * T, D] is the gradient of the output; that of the mixed rows `mixed` is written
    to grad_mixed [B * T, D]. stats [4, B * N * T] of the first norm: mean, reciprocal standard
    deviation, and the means of the gradient and of its product with the normed row. second_stats
    [2, B * T]: the first two of the second norm. Other arguments: see the top of the file.
    """
    mixed_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = mixed_row < rows
    group, t = (mixed_row // length).to(tl.int64), mixed_row % length
    mixed_row = mixed_row.to(tl.int64)
    position_row = _find_table_rows(seconds, group, t, length, start, second_stride, valid, SECONDS)
    second_sum = ()
    for tile in tl.static_range(TILES):
        column = tile * WIDTH + tl.arange(0, WIDTH)
        mask = make_valid_mask(valid, column, D, WHOLE)
        embedded = _load_embedding_sum(
            mixed, position, token_type, mixed_row, position_row, tl.zeros_like(mixed_row), column,
            D, mask,
        )  # fmt: skip
        second_sum = second_sum + (embedded,)
    mean, rstd = compute_tile_moments(second_sum, D, eps, TILES, WIDTH, WHOLE)
    tl.store(second_stats + mixed_row, mean, mask=valid)
    tl.store(second_stats + rows + mixed_row, rstd, mask=valid)
    scaled = ()
    grad_sum = tl.zeros([ROWS, WIDTH], tl.float32)
    product_sum = tl.zeros([ROWS, WIDTH], tl.float32)
    for tile in tl.static_range(TILES):
        column = tile * WIDTH + tl.arange(0, WIDTH)
        mask = make_valid_mask(valid, column, D, WHOLE)
        upstream_tile = tl.load(
            upstream + mixed_row[:, None] * D + column[None, :], mask=mask, other=0.0
        )
        gain = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
        grad = upstream_tile.to(tl.float32) * gain[None, :]
        grad *= draw_dropout_factors(seed, 1, mixed_row, tile * WIDTH, dropout, DROPOUT, WIDTH)
        grad_sum += grad
        product_sum += grad * (second_sum[tile] - mean[:, None])
        scaled = scaled + (grad,)
    grad_mean, product_mean = tl.sum(grad_sum, 1) / D, tl.sum(product_sum, 1) * rstd / D
    shared = ()
    for tile in tl.static_range(TILES):
        column = tile * WIDTH + tl.arange(0, WIDTH)
        mask = make_valid_mask(valid, column, D, WHOLE)
        normed = (second_sum[tile] - mean[:, None]) * rstd[:, None]
        grad = (scaled[tile] - grad_mean[:, None] - normed * product_mean[:, None]) * rstd[:, None]
        tl.store(grad_mixed + mixed_row[:, None] * D + column[None, :],
                 grad.to(grad_mixed.dtype.element_ty), mask=mask)  # fmt: skip
        gain = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
        shared = shared + (grad * gain[None, :] * (1.0 / N),)
    for instance in range(N):
        row = group * N + instance
        token = row * length + t
        word_row = tl.load(ids + token, mask=valid, other=0)
        position_row = _find_table_rows(firsts, row, t, length, start, first_stride, valid, FIRSTS)
        type_row = _find_table_rows(types, row, t, length, 0, length * TYPES, valid, TYPES)
        x = ()
        for tile in tl.static_range(TILES):
            column = tile * WIDTH + tl.arange(0, WIDTH)
            mask = make_valid_mask(valid, column, D, WHOLE)
            embedded = _load_embedding_sum(
                word, position, token_type, word_row, position_row, type_row, column, D, mask
            )
            x = x + (embedded,)
        mean, rstd = compute_tile_moments(x, D, eps, TILES, WIDTH, WHOLE)
        grad_sum = tl.zeros([ROWS, WIDTH], tl.float32)
        product_sum = tl.zeros([ROWS, WIDTH], tl.float32)
        for tile in tl.static_range(TILES):
            column = tile * WIDTH + tl.arange(0, WIDTH)
            key_row = tl.load(key + instance * D + column, mask=column < D, other=0.0).to(
                tl.float32
            )
            grad = shared[tile] * key_row[None, :]
            grad *= draw_dropout_factors(seed, 0, token, tile * WIDTH, dropout, DROPOUT, WIDTH)
            grad_sum += grad
            product_sum += grad * (x[tile] - mean[:, None])
        token_count = rows * N
        tl.store(stats + token, mean, mask=valid)
        tl.store(stats + token_count + token, rstd, mask=valid)
        tl.store(stats + token_count * 2 + token, tl.sum(grad_sum, 1) / D, mask=valid)
        tl.store(stats + token_count * 3 + token, tl.sum(product_sum, 1) * rstd / D, mask=valid)


@triton.jit
def mux_embed_columns_kernel(
    upstream, ids, source, position, token_type, types, positions, seed, stats, partial, rows,
    length, D, N, blocks, start, position_stride, token_count, dropout, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, TYPES: tl.constexpr, POSITIONS: tl.constexpr, DROPOUT: tl.constexpr,
    SECOND: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Sum columns of v and of v * normed row, for one instance: partial [programs, N, 2, D].

    v (`grad`) is the gradient of the norm's output before multiplication by the key. All gradients
    of norm and keys follow from these sums. `upstream` [B * T, D] is the gradient of the mixed
    rows, `source` the word table, `stats` those of `mux_embed_bwd_kernel`. SECOND: all are those of
    the second embedding, `source` is the mixed rows, and there is one instance. Other arguments:
    see the top of the file.
    """
    instance = tl.program_id(2)
    first_column = tl.program_id(1) * WIDTH
    column = first_column + tl.arange(0, WIDTH)
    grad_sum = tl.zeros([ROWS, WIDTH], tl.float32)
    product_sum = tl.zeros([ROWS, WIDTH], tl.float32)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        mixed_row = block * ROWS + tl.arange(0, ROWS)  # int32 for fast division
        valid = mixed_row < rows
        mask = make_valid_mask(valid, column, D, WHOLE)
        t = mixed_row % length
        row = (mixed_row // length).to(tl.int64) * N + instance
        token = row * length + t
        mixed_row = mixed_row.to(tl.int64)
        source_row = mixed_row
        if not SECOND:
            source_row = tl.load(ids + token, mask=valid, other=0)
        position_row = _find_table_rows(
            positions, row, t, length, start, position_stride, valid, POSITIONS
        )
        type_row = _find_table_rows(types, row, t, length, 0, length * TYPES, valid, TYPES)
        x = _load_embedding_sum(
            source, position, token_type, source_row, position_row, type_row, column, D, mask
        )
        mean = tl.load(stats + token, mask=valid, other=0.0)
        rstd = tl.load(stats + token_count + token, mask=valid, other=0.0)
        grad = tl.load(upstream + mixed_row[:, None] * D + column[None, :], mask=mask, other=0.0)
        grad = grad.to(tl.float32) * (1.0 / N)
        grad *= draw_dropout_factors(
            seed, 1 if SECOND else 0, token, first_column, dropout, DROPOUT, WIDTH
        )
        grad_sum += grad
        product_sum += grad * (x - mean[:, None]) * rstd[:, None]
    token = (tl.program_id(0).to(tl.int64) * N + instance) * 2 * D
    tl.store(partial + token + column, tl.sum(grad_sum, 0), mask=column < D)
    tl.store(partial + token + D + column, tl.sum(product_sum, 0), mask=column < D)


@triton.jit
def mux_embed_table_kernel(
    grad_mixed, ids, word, position, token_type, weight, key, types, firsts, seed, stats, order,
    owner, grad, head, tail, count, length, D, N, start, first_stride, dropout, padding,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr, TYPES: tl.constexpr, FIRSTS: tl.constexpr,
    DROPOUT: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of CHUNK tokens by the table row that owns (embeds) them.

    `order` [count] are tokens sorted by `owner` [count], their rows of the table, which is sorted
    too. A sum whose tokens are all in the chunk is written to `grad`, the gradient of the table; of
    a sum that starts in an earlier chunk, this part is written to `head`; of one that continues in
    the next chunk, to `tail`; both [chunks, D] float32. `padding` is the row without gradient, -1:
    none. MIXED: tokens are mixed rows, whose gradient grad_mixed is already computed. Other
    arguments: see the top of the file.
    """
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    column_mask = (column < D)[None, :]
    begin = chunk * CHUNK
    gain = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    previous_owner = tl.load(owner + begin - 1, mask=begin > 0, other=-1)
    starts_earlier = previous_owner == tl.load(owner + begin)
    total = tl.zeros([1, WIDTH], tl.float32)
    for step in range(CHUNK):
        index = begin + step
        valid = index < count
        owner_row = tl.load(owner + index, mask=valid, other=-1)
        next_owner = tl.load(owner + index + 1, mask=index + 1 < count, other=-1)
        has_grad = valid & (owner_row != padding)
        token = tl.load(order + index + tl.arange(0, 1), mask=has_grad, other=0)
        mask = has_grad & column_mask
        if MIXED:
            loaded = tl.load(
                grad_mixed + token[:, None] * D + column[None, :], mask=mask, other=0.0
            )
            total += loaded.to(tl.float32)
        else:
            narrow = token.to(tl.int32)
            row, t = narrow // length, narrow % length
            mixed_row = (row // N).to(tl.int64) * length + t
            word_row = tl.load(ids + token, mask=has_grad, other=0)
            position_row = _find_table_rows(
                firsts, row, t, length, start, first_stride, has_grad, FIRSTS
            )
            type_row = _find_table_rows(types, row, t, length, 0, length * TYPES, has_grad, TYPES)
            x = _load_embedding_sum(
                word, position, token_type, word_row, position_row, type_row, column, D, mask
            )
            token_count = count
            mean = tl.load(stats + token)
            rstd = tl.load(stats + token_count + token)
            grad_mean = tl.load(stats + token_count * 2 + token)
            product_mean = tl.load(stats + token_count * 3 + token)
            output_grad = tl.load(
                grad_mixed + mixed_row[:, None] * D + column[None, :], mask=mask, other=0.0
            )
            key_row = tl.load(key + (row % N)[:, None] * D + column[None, :], mask=mask, other=0.0)
            output_grad = (
                output_grad.to(tl.float32) * key_row.to(tl.float32) * gain[None, :] * (1.0 / N)
            )
            output_grad *= draw_dropout_factors(
                seed, 0, token, tl.program_id(1) * WIDTH, dropout, DROPOUT, WIDTH
            )
            normed = (x - mean[:, None]) * rstd[:, None]
            centred = output_grad - grad_mean[:, None] - normed * product_mean[:, None]
            total += tl.where(mask, centred * rstd[:, None], 0.0)
        is_last = has_grad & (owner_row != next_owner)
        row_of_grad = tl.where(has_grad, owner_row, 0).to(tl.int64) * D
        tl.store(grad + row_of_grad + column[None, :], total.to(grad.dtype.element_ty),
                 mask=column_mask & is_last & (starts_earlier == 0))  # fmt: skip
        tl.store(
            head + chunk * D + column[None, :], total, mask=column_mask & is_last & starts_earlier
        )
        total = tl.where(is_last, 0.0, total)
        starts_earlier = starts_earlier & (owner_row == next_owner)
    tl.store(head + chunk * D + column[None, :], total, mask=column_mask & starts_earlier)
    tl.store(tail + chunk * D + column[None, :], total, mask=column_mask & (starts_earlier == 0))


@triton.jit
def mux_embed_join_kernel(
    owner, grad, head, tail, count, D, padding, CHUNK: tl.constexpr, WIDTH: tl.constexpr
):
    """Complete the table rows whose gradients were summed in several chunks.

    `head` and `tail` hold their parts; arguments as of `mux_embed_table_kernel`. The program of the
    first chunk of a sum adds the others, so each row is written once.
    """
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    begin, end = chunk * CHUNK, (chunk + 1) * CHUNK
    owner_row = tl.load(owner + end - 1, mask=end < count, other=-1)
    previous_owner = tl.load(owner + begin - 1, mask=begin > 0, other=-1)
    next_owner = tl.load(owner + end, mask=end < count, other=-2)
    if (owner_row == next_owner) & (owner_row != previous_owner) & (owner_row != padding):
        parts = chunk * 0
        # Count the parts first, because Triton cannot lay out a tile that a `while` carries.
        while next_owner == owner_row:
            parts += 1
            next_chunk = end + parts * CHUNK
            next_owner = tl.load(owner + next_chunk, mask=next_chunk < count, other=-2)
        total = tl.load(tail + chunk * D + column, mask=column < D, other=0.0)
        for part in range(parts):
            total += tl.load(head + (chunk + 1 + part) * D + column, mask=column < D, other=0.0)
        tl.store(
            grad + owner_row.to(tl.int64) * D + column,
            total.to(grad.dtype.element_ty),
            mask=column < D,
        )


@triton.jit
def mux_embed_finish_kernel(
    sums, second_sums, key, weight, bias, grad_weight, grad_bias, grad_key, D, N,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of norm weight and bias [D] and of the keys [N, D].

    `sums` [N, 2, D] and `second_sums` [1, 2, D] are those of `mux_embed_columns_kernel` for the
    first and the second embedding. Other arguments: see the top of the file.
    """
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    valid = column < D
    gain = tl.load(weight + column, mask=valid, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=valid, other=0.0).to(tl.float32)
    shift_grad = tl.load(second_sums + column, mask=valid, other=0.0)
    gain_grad = tl.load(second_sums + D + column, mask=valid, other=0.0)
    for instance in range(N):
        key_row = tl.load(key + instance * D + column, mask=valid, other=0.0).to(tl.float32)
        grad_sum = tl.load(sums + 2 * instance * D + column, mask=valid, other=0.0)
        product_sum = tl.load(sums + (2 * instance + 1) * D + column, mask=valid, other=0.0)
        shift_grad += key_row * grad_sum
        gain_grad += key_row * product_sum
        grad = gain * product_sum + shift * grad_sum
        tl.store(grad_key + instance * D + column, grad.to(grad_key.dtype.element_ty), mask=valid)
    tl.store(grad_weight + column, gain_grad.to(grad_weight.dtype.element_ty), mask=valid)
    tl.store(grad_bias + column, shift_grad.to(grad_bias.dtype.element_ty), mask=valid)
