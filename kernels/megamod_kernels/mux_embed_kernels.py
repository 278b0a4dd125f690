"""Triton kernels of `mux_embed`, whose docstring describes the arguments.

A row is one token of one instance, r = (group * N + instance) * T + t; a mixed row is m = group * T
+ t. Rows are held as tuples of tiles of WIDTH columns, so widths need not be powers of two.
"""

# ruff: noqa: RUF005, B007 (Triton knows neither starred tuples nor a loop variable `_`)

import triton
import triton.language as tl

from megamod_kernels.rows import dropout_factor, moments_of_tiles, valid_mask


@triton.jit
def _looked_up(source, position, token_type, source_row, position_row, type_row, column, D, inside):
    """Sum of source, position and segment rows: one tile in float32."""
    loaded = tl.load(source + source_row[:, None] * D + column[None, :], mask=inside, other=0.0)
    added = tl.load(position + position_row[:, None] * D + column[None, :], mask=inside, other=0.0)
    segment = tl.load(token_type + type_row[:, None] * D + column[None, :], mask=inside, other=0.0)
    return loaded.to(tl.float32) + added.to(tl.float32) + segment.to(tl.float32)


@triton.jit
def _rows_of(ids, group, t, length, start, stride, inside, GIVEN: tl.constexpr):
    """Indices into a table: loaded if GIVEN, else consecutive from `start`."""
    if GIVEN:
        return tl.load(ids + group * stride + t, mask=inside, other=0).to(tl.int64)
    else:
        return (start + t * stride).to(tl.int64)


@triton.jit
def embed_rows(
    m, real, ids, word, position, token_type, weight, bias, key, types, firsts, seconds, seed,
    output, mixed, length, D, N, start, first_stride, second_stride, eps, p,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, TYPES: tl.constexpr,
    FIRSTS: tl.constexpr, SECONDS: tl.constexpr, DROPOUT: tl.constexpr, WHOLE: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK mixed rows m of the encoder's input from ids; m is int32 for fast division."""
    group, t = (m // length).to(tl.int64), m % length
    m = m.to(tl.int64)
    total = ()
    for tile in tl.static_range(TILES):
        total = total + (tl.zeros([BLOCK, WIDTH], tl.float32),)
    for instance in range(N):
        row = group * N + instance
        word_row = tl.load(ids + row * length + t, mask=real, other=0)
        position_row = _rows_of(firsts, row, t, length, start, first_stride, real, FIRSTS)
        type_row = _rows_of(types, row, t, length, 0, length * TYPES, real, TYPES)
        x = ()
        for tile in tl.static_range(TILES):
            column = tile * WIDTH + tl.arange(0, WIDTH)
            mask = valid_mask(real, column, D, WHOLE)
            x = x + (
                _looked_up(word, position, token_type, word_row, position_row, type_row, column,
                           D, mask),
            )  # fmt: skip
        mean, rstd = moments_of_tiles(x, D, eps, TILES, WIDTH, WHOLE)
        more = ()
        for tile in tl.static_range(TILES):
            column = tile * WIDTH + tl.arange(0, WIDTH)
            gain = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
            shift = tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)
            mark = tl.load(key + instance * D + column, mask=column < D, other=0.0).to(tl.float32)
            normed = (x[tile] - mean[:, None]) * rstd[:, None] * gain[None, :] + shift[None, :]
            normed *= dropout_factor(seed, 0, row * length + t, tile * WIDTH, p, DROPOUT, WIDTH)
            more = more + (total[tile] + normed * mark[None, :],)
        total = more
    position_row = _rows_of(seconds, group, t, length, start, second_stride, real, SECONDS)
    z = ()
    for tile in tl.static_range(TILES):
        column = tile * WIDTH + tl.arange(0, WIDTH)
        mask = valid_mask(real, column, D, WHOLE)
        mean_of_instances = total[tile] * (1.0 / N)
        if KEEP:
            tl.store(mixed + m[:, None] * D + column[None, :],
                     mean_of_instances.to(mixed.dtype.element_ty), mask=mask)  # fmt: skip
        added = tl.load(position + position_row[:, None] * D + column[None, :], mask=mask,
                        other=0.0)  # fmt: skip
        segment = tl.load(token_type + column, mask=column < D, other=0.0).to(tl.float32)
        z = z + (mean_of_instances + added.to(tl.float32) + segment[None, :],)
    mean, rstd = moments_of_tiles(z, D, eps, TILES, WIDTH, WHOLE)
    for tile in tl.static_range(TILES):
        column = tile * WIDTH + tl.arange(0, WIDTH)
        mask = valid_mask(real, column, D, WHOLE)
        gain = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
        shift = tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)
        normed = (z[tile] - mean[:, None]) * rstd[:, None] * gain[None, :] + shift[None, :]
        normed *= dropout_factor(seed, 1, m, tile * WIDTH, p, DROPOUT, WIDTH)
        tl.store(output + m[:, None] * D + column[None, :], normed.to(output.dtype.element_ty),
                 mask=mask)  # fmt: skip


@triton.jit
def mux_embed_fwd_kernel(
    ids, word, position, token_type, weight, bias, key, types, firsts, seconds, seed,
    output, mixed, rows, length, D, N, start, first_stride, second_stride, eps, p,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, TYPES: tl.constexpr,
    FIRSTS: tl.constexpr, SECONDS: tl.constexpr, DROPOUT: tl.constexpr, WHOLE: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """`embed_rows` for all rows, BLOCK per program."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    embed_rows(
        m, m < rows, ids, word, position, token_type, weight, bias, key, types, firsts, seconds,
        seed, output, mixed, length, D, N, start, first_stride, second_stride, eps, p,
        BLOCK, WIDTH, TILES, TYPES, FIRSTS, SECONDS, DROPOUT, WHOLE, KEEP,
    )  # fmt: skip


@triton.jit
def mux_embed_bwd_kernel(
    upstream, ids, word, position, token_type, weight, key, types, firsts, seconds, seed, mixed,
    grad_mixed, stats, second_stats, rows, length, D, N, start, first_stride, second_stride, eps,
    p, BLOCK: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, TYPES: tl.constexpr,
    FIRSTS: tl.constexpr, SECONDS: tl.constexpr, DROPOUT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK mixed rows, and the row statistics that the other kernels need.

    stats [4, R * T] of the first norm: mean, reciprocal standard deviation, and the means of the
    gradient and of its product with the normed row. second_stats [2, B * T]: the first two of the
    second norm.
    """
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = m < rows
    group, t = (m // length).to(tl.int64), m % length
    m = m.to(tl.int64)
    position_row = _rows_of(seconds, group, t, length, start, second_stride, real, SECONDS)
    z = ()
    for tile in tl.static_range(TILES):
        column = tile * WIDTH + tl.arange(0, WIDTH)
        mask = valid_mask(real, column, D, WHOLE)
        z = z + (
            _looked_up(mixed, position, token_type, m, position_row, tl.zeros_like(m), column, D,
                       mask),
        )  # fmt: skip
    mean, rstd = moments_of_tiles(z, D, eps, TILES, WIDTH, WHOLE)
    tl.store(second_stats + m, mean, mask=real)
    tl.store(second_stats + rows + m, rstd, mask=real)
    scaled = ()
    level = tl.zeros([BLOCK, WIDTH], tl.float32)
    along = tl.zeros([BLOCK, WIDTH], tl.float32)
    for tile in tl.static_range(TILES):
        column = tile * WIDTH + tl.arange(0, WIDTH)
        mask = valid_mask(real, column, D, WHOLE)
        above = tl.load(upstream + m[:, None] * D + column[None, :], mask=mask, other=0.0)
        gain = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
        grad = above.to(tl.float32) * gain[None, :]
        grad *= dropout_factor(seed, 1, m, tile * WIDTH, p, DROPOUT, WIDTH)
        level += grad
        along += grad * (z[tile] - mean[:, None])
        scaled = scaled + (grad,)
    first, second = tl.sum(level, 1) / D, tl.sum(along, 1) * rstd / D
    shared = ()
    for tile in tl.static_range(TILES):
        column = tile * WIDTH + tl.arange(0, WIDTH)
        mask = valid_mask(real, column, D, WHOLE)
        normed = (z[tile] - mean[:, None]) * rstd[:, None]
        grad = (scaled[tile] - first[:, None] - normed * second[:, None]) * rstd[:, None]
        tl.store(grad_mixed + m[:, None] * D + column[None, :],
                 grad.to(grad_mixed.dtype.element_ty), mask=mask)  # fmt: skip
        gain = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
        shared = shared + (grad * gain[None, :] * (1.0 / N),)
    for instance in range(N):
        row = group * N + instance
        token = row * length + t
        word_row = tl.load(ids + token, mask=real, other=0)
        position_row = _rows_of(firsts, row, t, length, start, first_stride, real, FIRSTS)
        type_row = _rows_of(types, row, t, length, 0, length * TYPES, real, TYPES)
        x = ()
        for tile in tl.static_range(TILES):
            column = tile * WIDTH + tl.arange(0, WIDTH)
            mask = valid_mask(real, column, D, WHOLE)
            x = x + (
                _looked_up(word, position, token_type, word_row, position_row, type_row, column,
                           D, mask),
            )  # fmt: skip
        mean, rstd = moments_of_tiles(x, D, eps, TILES, WIDTH, WHOLE)
        level = tl.zeros([BLOCK, WIDTH], tl.float32)
        along = tl.zeros([BLOCK, WIDTH], tl.float32)
        for tile in tl.static_range(TILES):
            column = tile * WIDTH + tl.arange(0, WIDTH)
            mark = tl.load(key + instance * D + column, mask=column < D, other=0.0).to(tl.float32)
            grad = shared[tile] * mark[None, :]
            grad *= dropout_factor(seed, 0, token, tile * WIDTH, p, DROPOUT, WIDTH)
            level += grad
            along += grad * (x[tile] - mean[:, None])
        every = rows * N
        tl.store(stats + token, mean, mask=real)
        tl.store(stats + every + token, rstd, mask=real)
        tl.store(stats + every * 2 + token, tl.sum(level, 1) / D, mask=real)
        tl.store(stats + every * 3 + token, tl.sum(along, 1) * rstd / D, mask=real)


@triton.jit
def mux_embed_columns_kernel(
    upstream, ids, source, position, token_type, types, positions, seed, stats, partial, rows,
    length, D, N, blocks, start, position_stride, every, p, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr, TYPES: tl.constexpr, POSITIONS: tl.constexpr, DROPOUT: tl.constexpr,
    SECOND: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Column sums of v and of v * normed row, for one instance: partial [programs, N, 2, D].

    v is the gradient of the norm's output before multiplication by the key. All gradients of norm
    and keys follow from these sums. SECOND: the source is the mixed rows, with one instance.
    """
    instance = tl.program_id(2)
    first_column = tl.program_id(1) * WIDTH
    column = first_column + tl.arange(0, WIDTH)
    plain = tl.zeros([BLOCK, WIDTH], tl.float32)
    product = tl.zeros([BLOCK, WIDTH], tl.float32)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        m = block * BLOCK + tl.arange(0, BLOCK)  # int32 for fast division
        real = m < rows
        mask = valid_mask(real, column, D, WHOLE)
        t = m % length
        row = (m // length).to(tl.int64) * N + instance
        token = row * length + t
        m = m.to(tl.int64)
        source_row = m
        if not SECOND:
            source_row = tl.load(ids + token, mask=real, other=0)
        position_row = _rows_of(positions, row, t, length, start, position_stride, real, POSITIONS)
        type_row = _rows_of(types, row, t, length, 0, length * TYPES, real, TYPES)
        x = _looked_up(source, position, token_type, source_row, position_row, type_row, column, D,
                       mask)  # fmt: skip
        mean = tl.load(stats + token, mask=real, other=0.0)
        rstd = tl.load(stats + every + token, mask=real, other=0.0)
        v = tl.load(upstream + m[:, None] * D + column[None, :], mask=mask, other=0.0)
        v = v.to(tl.float32) * (1.0 / N)
        v *= dropout_factor(seed, 1 if SECOND else 0, token, first_column, p, DROPOUT, WIDTH)
        plain += v
        product += v * (x - mean[:, None]) * rstd[:, None]
    token = (tl.program_id(0).to(tl.int64) * N + instance) * 2 * D
    tl.store(partial + token + column, tl.sum(plain, 0), mask=column < D)
    tl.store(partial + token + D + column, tl.sum(product, 0), mask=column < D)


@triton.jit
def mux_embed_table_kernel(
    grad_mixed, ids, word, position, token_type, weight, key, types, firsts, seed, stats, order,
    owner, grad, head, tail, count, length, D, N, start, first_stride, p, padding,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr, TYPES: tl.constexpr, FIRSTS: tl.constexpr,
    DROPOUT: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of CHUNK rows by the table row that owns them.

    `order` sorts the rows by `owner`, which is sorted. A sum whose rows are all in the chunk is
    written to the table; of a sum that starts in an earlier chunk, this part is written to `head`;
    of one that continues in the next chunk, to `tail`. MIXED: rows are mixed rows, whose gradient
    is already computed.
    """
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    column_mask = (column < D)[None, :]
    begin = chunk * CHUNK
    gain = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    before = tl.load(owner + begin - 1, mask=begin > 0, other=-1)
    began_before = before == tl.load(owner + begin)
    total = tl.zeros([1, WIDTH], tl.float32)
    for step in range(CHUNK):
        at = begin + step
        real = at < count
        mine = tl.load(owner + at, mask=real, other=-1)
        following = tl.load(owner + at + 1, mask=at + 1 < count, other=-1)
        counts = real & (mine != padding)
        token = tl.load(order + at + tl.arange(0, 1), mask=counts, other=0)
        inside = counts & column_mask
        if MIXED:
            loaded = tl.load(grad_mixed + token[:, None] * D + column[None, :], mask=inside,
                            other=0.0)  # fmt: skip
            total += loaded.to(tl.float32)
        else:
            narrow = token.to(tl.int32)
            row, t = narrow // length, narrow % length
            m = (row // N).to(tl.int64) * length + t
            word_row = tl.load(ids + token, mask=counts, other=0)
            position_row = _rows_of(firsts, row, t, length, start, first_stride, counts, FIRSTS)
            type_row = _rows_of(types, row, t, length, 0, length * TYPES, counts, TYPES)
            x = _looked_up(word, position, token_type, word_row, position_row, type_row, column, D,
                           inside)  # fmt: skip
            every = count
            mean = tl.load(stats + token)
            rstd = tl.load(stats + every + token)
            first = tl.load(stats + every * 2 + token)
            second = tl.load(stats + every * 3 + token)
            v = tl.load(grad_mixed + m[:, None] * D + column[None, :], mask=inside, other=0.0)
            mark = tl.load(key + (row % N)[:, None] * D + column[None, :], mask=inside, other=0.0)
            v = v.to(tl.float32) * mark.to(tl.float32) * gain[None, :] * (1.0 / N)
            v *= dropout_factor(seed, 0, token, tl.program_id(1) * WIDTH, p, DROPOUT, WIDTH)
            normed = (x - mean[:, None]) * rstd[:, None]
            loaded = (v - first[:, None] - normed * second[:, None]) * rstd[:, None]
            total += tl.where(inside, loaded, 0.0)
        ends = counts & (mine != following)
        row_of_grad = tl.where(counts, mine, 0).to(tl.int64) * D
        tl.store(grad + row_of_grad + column[None, :], total.to(grad.dtype.element_ty),
                 mask=column_mask & ends & (began_before == 0))  # fmt: skip
        tl.store(head + chunk * D + column[None, :], total, mask=column_mask & ends & began_before)
        total = tl.where(ends, 0.0, total)
        began_before = began_before & (mine == following)
    tl.store(head + chunk * D + column[None, :], total, mask=column_mask & began_before)
    tl.store(tail + chunk * D + column[None, :], total, mask=column_mask & (began_before == 0))


@triton.jit
def mux_embed_join_kernel(
    owner, grad, head, tail, count, D, padding, CHUNK: tl.constexpr, WIDTH: tl.constexpr
):
    """Complete the sums over several chunks; the program of the first chunk adds the parts."""
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    begin, end = chunk * CHUNK, (chunk + 1) * CHUNK
    mine = tl.load(owner + end - 1, mask=end < count, other=-1)
    before = tl.load(owner + begin - 1, mask=begin > 0, other=-1)
    following = tl.load(owner + end, mask=end < count, other=-2)
    if (mine == following) & (mine != before) & (mine != padding):
        parts = chunk * 0
        while following == mine:  # count first: Triton cannot lay out a tile that a `while` carries
            parts += 1
            following = tl.load(owner + end + parts * CHUNK, mask=end + parts * CHUNK < count,
                                other=-2)  # fmt: skip
        total = tl.load(tail + chunk * D + column, mask=column < D, other=0.0)
        for part in range(parts):
            total += tl.load(head + (chunk + 1 + part) * D + column, mask=column < D, other=0.0)
        tl.store(
            grad + mine.to(tl.int64) * D + column, total.to(grad.dtype.element_ty), mask=column < D
        )


@triton.jit
def mux_embed_finish_kernel(
    sums, second_sums, key, weight, bias, grad_weight, grad_bias, grad_key, D, N,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of norm and keys from the sums of the columns kernel."""
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    known = column < D
    gain = tl.load(weight + column, mask=known, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=known, other=0.0).to(tl.float32)
    of_shift = tl.load(second_sums + column, mask=known, other=0.0)
    of_gain = tl.load(second_sums + D + column, mask=known, other=0.0)
    for instance in range(N):
        mark = tl.load(key + instance * D + column, mask=known, other=0.0).to(tl.float32)
        plain = tl.load(sums + 2 * instance * D + column, mask=known, other=0.0)
        product = tl.load(sums + (2 * instance + 1) * D + column, mask=known, other=0.0)
        of_shift += mark * plain
        of_gain += mark * product
        grad = gain * product + shift * plain
        tl.store(grad_key + instance * D + column, grad.to(grad_key.dtype.element_ty), mask=known)
    tl.store(grad_weight + column, of_gain.to(grad_weight.dtype.element_ty), mask=known)
    tl.store(grad_bias + column, of_shift.to(grad_bias.dtype.element_ty), mask=known)
