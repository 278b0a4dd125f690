"""Triton kernels of `slot_attention`: one tile holds all instances of several positions.

Row r of a tile is instance r % N of its position r // N, for one head. Leftover rows form a
position of zeros, which is never stored.
"""

import triton
import triton.language as tl

from megamod_kernels.dot import dot

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _dot_wide(wide, narrow):
    """Product of a float32 matrix and a possibly narrower one, without rounding the first.

    Rounding the probabilities would cause half of the error. The second product, of the rounding
    remainder, costs no time because the kernel is limited by memory.
    """
    if narrow.dtype == tl.float32:
        return dot(wide, narrow)
    else:
        high = wide.to(narrow.dtype)
        low = (wide - high.to(tl.float32)).to(narrow.dtype)
        return dot(high, narrow) + dot(low, narrow)


@triton.jit
def _probabilities(q, k, mask_ptr, seen_rows, valid, tile_position, scale, SHIFT: tl.constexpr):
    """softmax(q k^T * scale) of the rows of a tile among those of the same position.

    SHIFT is added to the scores of masked instances; 0 if there is no mask.
    """
    scores = dot(q, tl.trans(k)) * (scale * _LOG2_E)
    same = tile_position[:, None] == tile_position[None, :]
    if SHIFT != 0:
        seen = tl.load(mask_ptr + seen_rows, mask=valid, other=0).to(tl.int32)
        # If no instance is visible, all scores would be shifted equally, so none is.
        any_seen = tl.max(tl.where(same, seen[None, :], 0), axis=1)
        hidden = (seen[None, :] == 0) & (any_seen[:, None] != 0)
        scores += tl.where(hidden, SHIFT * _LOG2_E, 0.0)
    scores = tl.where(same, scores, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit
def _dropout_mask(seed_ptr, position, head, slot, dropout, HEADS: tl.constexpr, N: tl.constexpr):
    """Dropout mask of a tile's probabilities: Philox counter (position, head, pair)."""
    first = (position.to(tl.int64) * HEADS + head) * (N * N) + slot * N
    uniform = tl.rand(tl.load(seed_ptr), first[:, None] + slot[None, :])
    return uniform >= dropout


@triton.jit
def slot_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    mask_ptr,
    seed_ptr,
    positions,
    length,
    scale,
    dropout,
    q_group,
    q_slot,
    q_token,
    k_group,
    k_slot,
    k_token,
    v_group,
    v_slot,
    v_token,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHIFT: tl.constexpr,
    USES_DROPOUT: tl.constexpr,
):
    """softmax(q k^T) v over the instances of each position, for one head and tile."""
    head = tl.program_id(0) % HEADS
    rows = tl.arange(0, ROWS)
    tile_position, slot = rows // N, rows % N
    position = tl.program_id(0) // HEADS * (ROWS // N) + tile_position
    valid = (tile_position < ROWS // N) & (position < positions)
    group = (position // length).to(tl.int64)
    token = (position % length).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = valid[:, None] & (columns < K)[None, :]
    columns += head * K

    q_rows = group * q_group + slot * q_slot + token * q_token
    k_rows = group * k_group + slot * k_slot + token * k_token
    v_rows = group * v_group + slot * v_slot + token * v_token
    out_rows = (group * N + slot) * length + token
    q = tl.load(q_ptr + q_rows[:, None] + columns[None, :], mask=inside, other=0.0)
    k = tl.load(k_ptr + k_rows[:, None] + columns[None, :], mask=inside, other=0.0)
    v = tl.load(v_ptr + v_rows[:, None] + columns[None, :], mask=inside, other=0.0)

    p = _probabilities(q, k, mask_ptr, out_rows, valid, tile_position, scale, SHIFT)
    if USES_DROPOUT:
        keep = _dropout_mask(seed_ptr, position, head, slot, dropout, HEADS, N)
        p = tl.where(keep, p / (1.0 - dropout), 0.0)
    out = _dot_wide(p, v)
    at = out_ptr + out_rows[:, None] * (HEADS * K) + columns[None, :]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def slot_attention_bwd_kernel(
    up_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    mask_ptr,
    seed_ptr,
    positions,
    length,
    scale,
    dropout,
    up_group,
    up_slot,
    up_token,
    q_group,
    q_slot,
    q_token,
    k_group,
    k_slot,
    k_token,
    v_group,
    v_slot,
    v_token,
    grad_token,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHIFT: tl.constexpr,
    USES_DROPOUT: tl.constexpr,
):
    """Recompute the probabilities, then the gradients of q, k and v."""
    head = tl.program_id(0) % HEADS
    rows = tl.arange(0, ROWS)
    tile_position, slot = rows // N, rows % N
    position = tl.program_id(0) // HEADS * (ROWS // N) + tile_position
    valid = (tile_position < ROWS // N) & (position < positions)
    group = (position // length).to(tl.int64)
    token = (position % length).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = valid[:, None] & (columns < K)[None, :]
    columns += head * K

    q_rows = group * q_group + slot * q_slot + token * q_token
    k_rows = group * k_group + slot * k_slot + token * k_token
    v_rows = group * v_group + slot * v_slot + token * v_token
    up_rows = group * up_group + slot * up_slot + token * up_token
    mask_rows = (group * N + slot) * length + token
    q = tl.load(q_ptr + q_rows[:, None] + columns[None, :], mask=inside, other=0.0)
    k = tl.load(k_ptr + k_rows[:, None] + columns[None, :], mask=inside, other=0.0)
    v = tl.load(v_ptr + v_rows[:, None] + columns[None, :], mask=inside, other=0.0)
    up = tl.load(up_ptr + up_rows[:, None] + columns[None, :], mask=inside, other=0.0)
    grads = mask_rows[:, None] * grad_token + columns[None, :]

    p = _probabilities(q, k, mask_ptr, mask_rows, valid, tile_position, scale, SHIFT)
    dp = dot(up, tl.trans(v))
    if USES_DROPOUT:
        keep = _dropout_mask(seed_ptr, position, head, slot, dropout, HEADS, N)
        dp = tl.where(keep, dp / (1.0 - dropout), 0.0)
        dropped = tl.where(keep, p / (1.0 - dropout), 0.0)
        dv = _dot_wide(tl.trans(dropped), up)
    else:
        dv = _dot_wide(tl.trans(p), up)
    tl.store(dv_ptr + grads, dv.to(dv_ptr.dtype.element_ty), mask=inside)

    ds = p * (dp - tl.sum(p * dp, axis=1)[:, None]) * scale
    tl.store(dq_ptr + grads, _dot_wide(ds, k).to(dq_ptr.dtype.element_ty), mask=inside)
    tl.store(dk_ptr + grads, _dot_wide(tl.trans(ds), q).to(dk_ptr.dtype.element_ty), mask=inside)


def tile(instances: int, head: int, element_size: int) -> tuple[int, int]:
    """Rows of a tile and warps.

    More rows waste more scores between positions, so 64 only if 32 rows leave clearly more rows
    unused, as for N = 12 (24 used). float32 products run without tensor cores, where wasted scores
    cost more than unused rows.
    """
    if element_size == 4:
        rows = max(16, triton.next_power_of_2(instances))
    else:
        share = {rows: rows // instances * instances / rows for rows in (32, 64)}
        rows = 32 if share[32] + 0.05 >= share[64] else 64
    work = rows * triton.next_power_of_2(head) * (1 if element_size == 2 else 3)
    return rows, 4 if work <= 4096 else 8 if work <= 8192 else 16


def constants_of(
    instances: int, heads: int, head: int, rows: int, shift: float, drops: bool
) -> dict[str, float]:
    """Compile-time arguments of both kernels; `head` is the columns of one head.

    Args:
        shift: added to the scores of masked instances; 0 if there is no mask.
    """
    return {
        "N": instances,
        "HEADS": heads,
        "K": head,
        "ROWS": rows,
        "COLUMNS": max(16, triton.next_power_of_2(head)),
        "SHIFT": shift,
        "USES_DROPOUT": drops,
    }
