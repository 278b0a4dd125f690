"""Triton kernels of `instance_attention`: one tile holds all instances of several positions.

Row r of a tile is instance r % N of its position r // N, for one head. Leftover rows form a
position of zeros, which is never stored. K is the width of a head, COLUMNS the power of two that it
is padded to.
"""

import triton
import triton.language as tl

from megamod_kernels.dot import dot

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _dot_unrounded(wide, narrow):
    """Multiply a float32 tile [M, K] by a tile [K, N] of any dtype, without rounding the first.

    Rounding the probabilities would cause half of the error. So `wide` is split into a part in the
    dtype of `narrow` and the rounding remainder; the second product costs no time because the
    kernel is limited by memory.
    """
    if narrow.dtype == tl.float32:
        return dot(wide, narrow)
    else:
        high = wide.to(narrow.dtype)
        low = (wide - high.to(tl.float32)).to(narrow.dtype)
        return dot(high, narrow) + dot(low, narrow)


@triton.jit
def _compute_probabilities(q, k, mask, mask_rows, valid, tile_position, scale, SHIFT: tl.constexpr):
    """Compute softmax(q k^T * scale) of a tile's rows among those of one position, [ROWS, ROWS].

    q and k [ROWS, COLUMNS]; `mask_rows` [ROWS] are the offsets of the rows in `mask`, `valid`
    [ROWS] is False for rows that do not exist, and `tile_position` [ROWS] is the position of each
    row within the tile. SHIFT is added to the scores of masked instances; 0 if there is no mask.
    """
    scores = dot(q, tl.trans(k)) * (scale * _LOG2_E)
    same = tile_position[:, None] == tile_position[None, :]
    if SHIFT != 0:
        visible = tl.load(mask + mask_rows, mask=valid, other=0).to(tl.int32)
        # If no instance is visible, all scores would be shifted equally, so none is.
        any_visible = tl.max(tl.where(same, visible[None, :], 0), axis=1)
        invisible = (visible[None, :] == 0) & (any_visible[:, None] != 0)
        scores += tl.where(invisible, SHIFT * _LOG2_E, 0.0)
    scores = tl.where(same, scores, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit
def _draw_dropout_mask(
    seed, position, head, instance, dropout, HEADS: tl.constexpr, N: tl.constexpr
):
    """Draw the mask [ROWS, ROWS] of the probabilities that dropout keeps.

    `seed` points to one int64. The Philox counter numbers (position, head, pair of instances), so
    that backward draws the same mask. `position` and `instance` [ROWS] are those of the rows.
    """
    first = (position.to(tl.int64) * HEADS + head) * (N * N) + instance * N
    uniform = tl.rand(tl.load(seed), first[:, None] + instance[None, :])
    return uniform >= dropout


@triton.jit
def instance_attention_fwd_kernel(
    q,
    k,
    v,
    output,
    mask,
    seed,
    positions,
    length,
    scale,
    dropout,
    q_group_stride,
    q_instance_stride,
    q_token_stride,
    k_group_stride,
    k_instance_stride,
    k_token_stride,
    v_group_stride,
    v_instance_stride,
    v_token_stride,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHIFT: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Compute softmax(scale q k^T) v over the instances of each position, for one head and tile.

    q, k, v: [B, N, L, HEADS * K], addressed by strides, the last axis contiguous; `output`, of
    their shape, and `mask` [B, N, L], read if SHIFT is not 0, are contiguous. `positions` is B * L,
    `length` L. With DROPOUT the probabilities are dropped as `seed` draws them.
    """
    head = tl.program_id(0) % HEADS
    rows = tl.arange(0, ROWS)
    tile_position, instance = rows // N, rows % N
    position = tl.program_id(0) // HEADS * (ROWS // N) + tile_position
    valid = (tile_position < ROWS // N) & (position < positions)
    group = (position // length).to(tl.int64)
    token = (position % length).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = valid[:, None] & (columns < K)[None, :]
    columns += head * K

    q_rows = group * q_group_stride + instance * q_instance_stride + token * q_token_stride
    k_rows = group * k_group_stride + instance * k_instance_stride + token * k_token_stride
    v_rows = group * v_group_stride + instance * v_instance_stride + token * v_token_stride
    output_rows = (group * N + instance) * length + token
    q_tile = tl.load(q + q_rows[:, None] + columns[None, :], mask=inside, other=0.0)
    k_tile = tl.load(k + k_rows[:, None] + columns[None, :], mask=inside, other=0.0)
    v_tile = tl.load(v + v_rows[:, None] + columns[None, :], mask=inside, other=0.0)

    probabilities = _compute_probabilities(
        q_tile, k_tile, mask, output_rows, valid, tile_position, scale, SHIFT
    )
    if DROPOUT:
        dropout_mask = _draw_dropout_mask(seed, position, head, instance, dropout, HEADS, N)
        probabilities = tl.where(dropout_mask, probabilities / (1.0 - dropout), 0.0)
    output_tile = _dot_unrounded(probabilities, v_tile)
    pointers = output + output_rows[:, None] * (HEADS * K) + columns[None, :]
    tl.store(pointers, output_tile.to(output.dtype.element_ty), mask=inside)


@triton.jit
def instance_attention_bwd_kernel(
    upstream,
    q,
    k,
    v,
    grad_q,
    grad_k,
    grad_v,
    mask,
    seed,
    positions,
    length,
    scale,
    dropout,
    upstream_group_stride,
    upstream_instance_stride,
    upstream_token_stride,
    q_group_stride,
    q_instance_stride,
    q_token_stride,
    k_group_stride,
    k_instance_stride,
    k_token_stride,
    v_group_stride,
    v_instance_stride,
    v_token_stride,
    grad_token_stride,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHIFT: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Write the gradients of q, k and v for one head and tile; probabilities are recomputed.

    `upstream` is the gradient of the output. All are [B, N, L, HEADS * K], addressed by strides,
    and the three gradients have one stride between tokens; other arguments as of
    `instance_attention_fwd_kernel`.
    """
    head = tl.program_id(0) % HEADS
    rows = tl.arange(0, ROWS)
    tile_position, instance = rows // N, rows % N
    position = tl.program_id(0) // HEADS * (ROWS // N) + tile_position
    valid = (tile_position < ROWS // N) & (position < positions)
    group = (position // length).to(tl.int64)
    token = (position % length).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = valid[:, None] & (columns < K)[None, :]
    columns += head * K

    q_rows = group * q_group_stride + instance * q_instance_stride + token * q_token_stride
    k_rows = group * k_group_stride + instance * k_instance_stride + token * k_token_stride
    v_rows = group * v_group_stride + instance * v_instance_stride + token * v_token_stride
    upstream_rows = (
        group * upstream_group_stride
        + instance * upstream_instance_stride
        + token * upstream_token_stride
    )
    mask_rows = (group * N + instance) * length + token
    q_tile = tl.load(q + q_rows[:, None] + columns[None, :], mask=inside, other=0.0)
    k_tile = tl.load(k + k_rows[:, None] + columns[None, :], mask=inside, other=0.0)
    v_tile = tl.load(v + v_rows[:, None] + columns[None, :], mask=inside, other=0.0)
    upstream_tile = tl.load(
        upstream + upstream_rows[:, None] + columns[None, :], mask=inside, other=0.0
    )
    grad_offsets = mask_rows[:, None] * grad_token_stride + columns[None, :]

    probabilities = _compute_probabilities(
        q_tile, k_tile, mask, mask_rows, valid, tile_position, scale, SHIFT
    )
    probability_grads = dot(upstream_tile, tl.trans(v_tile))
    if DROPOUT:
        dropout_mask = _draw_dropout_mask(seed, position, head, instance, dropout, HEADS, N)
        probability_grads = tl.where(dropout_mask, probability_grads / (1.0 - dropout), 0.0)
        dropped = tl.where(dropout_mask, probabilities / (1.0 - dropout), 0.0)
        v_grad = _dot_unrounded(tl.trans(dropped), upstream_tile)
    else:
        v_grad = _dot_unrounded(tl.trans(probabilities), upstream_tile)
    tl.store(grad_v + grad_offsets, v_grad.to(grad_v.dtype.element_ty), mask=inside)

    score_grads = (
        probabilities
        * (probability_grads - tl.sum(probabilities * probability_grads, axis=1)[:, None])
        * scale
    )
    tl.store(
        grad_q + grad_offsets,
        _dot_unrounded(score_grads, k_tile).to(grad_q.dtype.element_ty),
        mask=inside,
    )
    tl.store(
        grad_k + grad_offsets,
        _dot_unrounded(tl.trans(score_grads), q_tile).to(grad_k.dtype.element_ty),
        mask=inside,
    )


def select_rows_and_warps(instances: int, head_width: int, element_size: int) -> tuple[int, int]:
    """Return ROWS of a tile, and the number of warps of its program.

    More rows waste more scores between positions, so 64 only if 32 rows leave clearly more rows
    unused, as for N = 12 (24 used). float32 products run without tensor cores, where wasted scores
    cost more than unused rows.

    Args:
        instances, head_width: N and K.
        element_size: bytes of an element.
    """
    if element_size == 4:
        rows = max(16, triton.next_power_of_2(instances))
    else:
        share = {rows: rows // instances * instances / rows for rows in (32, 64)}
        rows = 32 if share[32] + 0.05 >= share[64] else 64
    work = rows * triton.next_power_of_2(head_width) * (1 if element_size == 2 else 3)
    return rows, 4 if work <= 4096 else 8 if work <= 8192 else 16


def make_compile_time_arguments(
    instances: int, heads: int, head_width: int, rows: int, shift: float, has_dropout: bool
) -> dict[str, float]:
    """Return the compile-time arguments of both kernels, by name.

    Args:
        instances, heads, head_width: N, number of heads, columns of a head.
        rows: of a tile, see `select_rows_and_warps`.
        shift: added to the scores of masked instances; 0 if there is no mask.
        has_dropout: draw a dropout mask.
    """
    return {
        "N": instances,
        "HEADS": heads,
        "K": head_width,
        "ROWS": rows,
        "COLUMNS": max(16, triton.next_power_of_2(head_width)),
        "SHIFT": shift,
        "DROPOUT": has_dropout,
    }
