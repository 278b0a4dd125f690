"""Orthogonal maps between the features of two models, in closed form.

For sums of products M = Σ a bᵀ of features a of the reference and b of the other model, the
orthogonal matrix that brings b closest to a is U Vᵀ of M = U S Vᵀ, and the inner product of a with
mapped b is the sum of S. A map of the residual stream keeps the vector of ones where norms are
LayerNorms. Inside heads queries and keys share a map, and values and their mean; with rotary
embeddings a map of queries and keys is an angle per plane.
Source: Schönemann 1966 (A generalized solution of the orthogonal Procrustes problem); Theus et al.
2025 (Generalized linear mode connectivity for transformers), section 3, for the classes of maps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megamod.errors import UserError
from megamod.merging.alignment.families import Family
from megamod.merging.alignment.groups import Hook, PermutationGroup
from megamod.merging.alignment.matching import FeatureMatch, assign_features
from megamod.merging.alignment.measure import FeatureStatistics
from megamod.merging.alignment.record import Maps
from megamod.merging.alignment.statistics import Moments

FREE, PLANES, SIGNS = "free", "planes", "signs"
"""Maps of queries and keys: any orthogonal matrix; a rotation of each plane (rotary embeddings); a
sign of each plane (and norms within heads)."""

_DEAD = 1e-7  # singular values below this part of the largest are directions without features
_QUERY_ROUNDS = 10  # at most, of maps and order of query heads in turn


@dataclass(frozen=True)
class GroupMatch:
    """Permutation and maps of a group.

    Attributes:
        permutation: [C] int64; None: the features stay in order.
        maps: by role; they act after the permutation.
        value: similarity of matched features, what the match maximises.
    """

    permutation: Tensor | None
    maps: Maps = field(default_factory=dict)
    value: float = 0.0


def solve_procrustes(products: Tensor) -> tuple[Tensor, Tensor]:
    """Find the orthogonal matrices that maximise the inner product with each matrix.

    Directions without features stay as they are.

    Args:
        products: [..., d, d] float64.
    Returns:
        [..., d, d], and the values of the maximum [...].
    """
    left, values, right = torch.linalg.svd(products, full_matrices=False)
    dead = values[..., -1] <= _DEAD * values[..., 0]
    if bool(dead.any()):
        size = products.shape[-1]
        scale = torch.linalg.matrix_norm(products) / size**0.5
        scale = torch.where(scale > 0, _DEAD * scale, torch.ones_like(scale)) * dead
        completed = products + scale[..., None, None] * torch.eye(size, dtype=products.dtype)
        left, _, right = torch.linalg.svd(completed, full_matrices=False)
    return left @ right, values.sum(-1)


def solve_stream_map(products: Tensor, keeps_ones: bool) -> tuple[Tensor, float]:
    """Find the orthogonal matrix of the residual stream and its value.

    Args:
        products: [d, d] float64.
        keeps_ones: map the vector of ones to itself, as LayerNorms need.
    """
    if not keeps_ones:
        matrix, value = solve_procrustes(products)
        return matrix, float(value)
    centred = products - products.mean(0)
    centred = centred - centred.mean(1, keepdim=True)
    added = torch.linalg.matrix_norm(centred) if centred.any() else centred.new_ones(())
    matrix, value = solve_procrustes(centred + added / len(products))
    return matrix, float(value - added)


def select_head_map_kind(family: Family) -> str:
    """Select the kind of the maps of queries and keys inside heads: `FREE`, `PLANES` or `SIGNS`."""
    return FREE if not family.rotary else SIGNS if family.head_norms else PLANES


def solve_head_maps(products: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Find the maps of a kind inside heads that maximise the inner product with each matrix.

    Args:
        products: [..., h, h] float64.
        kind: `FREE`, `PLANES` or `SIGNS`.
    Returns:
        [..., h, h], and the values of the maximum [...].
    """
    if kind == FREE:
        return solve_procrustes(products)
    real, imaginary = _extract_plane_products(products)
    if kind == SIGNS:
        cosine = torch.where(real < 0, -1.0, 1.0).to(real)
        return make_plane_rotations(cosine, torch.zeros_like(cosine)), real.abs().sum(-1)
    angle = torch.atan2(imaginary, real)
    return make_plane_rotations(angle.cos(), angle.sin()), torch.hypot(real, imaginary).sum(-1)


def _compute_head_map_values(products: Tensor, kind: str) -> Tensor:
    """Compute the values [...] of `solve_head_maps` without the maps, which takes less time.

    `products` and `kind` are the arguments of that function.
    """
    if kind == FREE:
        return torch.linalg.svdvals(products).sum(-1)
    return solve_head_maps(products, kind)[1]


def _extract_plane_products(products: Tensor) -> tuple[Tensor, Tensor]:
    """Extract the complex inner product of each plane from products of pairs of features.

    A plane is made of the features p and p + h / 2, read as one complex number. A rotation by an
    angle in it multiplies that number, so all that matters of the products is Σ a conj(b).

    Args:
        products: [..., h, h].
    Returns:
        real and imaginary part of Σ a conj(b), [..., h / 2] each.
    """
    half = products.shape[-1] // 2
    top, bottom = products[..., :half, :], products[..., half:, :]
    blocks = (top[..., :half], top[..., half:], bottom[..., :half], bottom[..., half:])
    first, right, below, last = (block.diagonal(dim1=-2, dim2=-1) for block in blocks)
    return first + last, below - right


def make_plane_rotations(cosine: Tensor, sine: Tensor) -> Tensor:
    """Make rotations [..., h, h] from cosine and sine of the angle of each plane, [..., h / 2]."""
    c, s = torch.diag_embed(cosine), torch.diag_embed(sine)
    return torch.cat([torch.cat([c, -s], -1), torch.cat([s, c], -1)], -2)


@dataclass(frozen=True)
class HeadProducts:
    """Sums of products of one kind of features inside heads, of all pairs of heads.

    There are G key heads with n query heads each, of h features.

    Attributes:
        per_query: [G, n, G, n, h, h], of features that each of n query heads of a key head has.
        per_key: [G, G, h, h], of those that key heads have; with n = 1 they may be in `per_query`.
    """

    per_query: Tensor
    per_key: Tensor

    def sum_in_query_order(self, first: int, second: int, order: Tensor) -> Tensor:
        """Sum the products [h, h] of a pair of key heads over their query heads.

        Args:
            first, second: number of the key head in the first model, and in the second.
            order: [n] number of the second model's query head for each of the first.
        """
        by_head = self.per_query[first, torch.arange(len(order)), second, order]
        return by_head.sum(0) + self.per_key[first, second]


def split_head_products(
    group: PermutationGroup, per_query: Tensor, per_key: Tensor | None
) -> HeadProducts:
    """Split products of the features of all heads by pairs of heads.

    Args:
        group: group of attention with G key heads, H query heads and heads of width h.
        per_query: [H h, H h] products of features that query heads have.
        per_key: [G h, G h] products of features that key heads have; None: zero.
    """
    heads, times, width = group.heads, group.queries_per_key, group.head_width
    queries = per_query.view(heads, times, width, heads, times, width).permute(0, 1, 3, 4, 2, 5)
    if per_key is None:
        keys = per_query.new_zeros(heads, heads, width, width)
    else:
        keys = per_key.view(heads, width, heads, width).transpose(1, 2)
    return HeadProducts(queries, keys)


def match_heads(
    group: PermutationGroup, qk: HeadProducts, values: HeadProducts, kind: str, mode: str
) -> GroupMatch:
    """Find the order of heads and the maps inside them.

    Query heads are reordered within their key head, in turn with the maps of the pair.

    Args:
        group: permutation group of attention.
        qk, values: products of queries and keys, and of values and their means.
        kind: kind of the maps of queries and keys, see `solve_head_maps`; those of values are
            `FREE`.
        mode: "head_perm", or "monotonic": heads stay in order.
    """
    heads, times, width = group.heads, group.queries_per_key, group.head_width
    orders = torch.arange(times).expand(heads, heads, times).clone()
    if times == 1:
        both = [part.per_query[:, 0, :, 0] + part.per_key for part in (qk, values)]
        scores = _compute_head_map_values(both[0], kind) + _compute_head_map_values(both[1], FREE)
    else:
        scores = torch.zeros(heads, heads, dtype=torch.float64)
        for j in range(heads):
            for k in [j] if mode == "monotonic" else range(heads):
                orders[j, k], scores[j, k] = _find_query_order(qk, values, kind, mode, (j, k))
    order = torch.arange(heads) if mode == "monotonic" else assign_features(scores).permutation
    pairs = list(enumerate(order.tolist()))
    summed = [
        torch.stack([part.sum_in_query_order(j, k, orders[j, k]) for j, k in pairs])
        for part in (qk, values)
    ]
    query_heads = torch.cat([k * times + orders[j, k] for j, k in pairs])
    permutation = (query_heads[:, None] * width + torch.arange(width)).flatten()
    (qk_maps, qk_values), (value_maps, value_values) = (
        solve_head_maps(summed[0], kind),
        solve_head_maps(summed[1], FREE),
    )
    maps = {"qk": qk_maps, "values": value_maps}
    return GroupMatch(permutation, maps, float((qk_values + value_values).sum()))


def _find_query_order(
    qk: HeadProducts, values: HeadProducts, kind: str, mode: str, pair: tuple[int, int]
) -> tuple[Tensor, float]:
    """Find the order of the query heads of a pair of key heads, in turn with the maps of the pair.

    Args:
        qk, values, kind, mode: see `match_heads`.
        pair: number of the key head in the first model, and in the second.
    Returns:
        order [n]: number of the second model's query head for each of the first; and the largest
        inner product of the pair.
    """
    j, k = pair
    per_pair = [part.per_query[j, :, k] for part in (qk, values)]
    order = torch.arange(len(per_pair[0]))
    if mode != "monotonic":
        order = assign_features(
            _compute_head_map_values(per_pair[0], kind)
            + _compute_head_map_values(per_pair[1], FREE)
        ).permutation
    best, best_order = -torch.inf, order
    for _ in range(_QUERY_ROUNDS):
        solved = [
            solve_head_maps(part.sum_in_query_order(j, k, order), inner)
            for part, inner in ((qk, kind), (values, FREE))
        ]
        value = float(solved[0][1] + solved[1][1])
        if value <= best:
            break
        best, best_order = value, order
        if mode == "monotonic":
            break
        similarity = sum(
            (products * maps).sum((-2, -1))
            for products, (maps, _) in zip(per_pair, solved, strict=True)
        )
        order = assign_features(similarity).permutation
    return best_order, best


def list_observed_parts(group: PermutationGroup, keeps_ones: bool) -> list[PermutationGroup]:
    """List the parts of an attention or residual-stream group whose features are observed.

    Features inside heads are observed where key heads have them and where query heads do: queries
    and keys under NAME:qk and NAME:qk:keys, values and their means under NAME:values:keys and
    NAME:values; with one query head per key head both under one name.

    Args:
        keeps_ones: the stream is observed without its mean, as LayerNorms read it.
    """
    if group.family == "res":
        return [replace(group, centred=keeps_ones)]
    query, key, value = group.projections
    hooks: dict[str, tuple[tuple[Hook, ...], tuple[Hook, ...]]] = {
        "qk": ((query,), (key,)),
        "values": (group.hooks, (value,)),
    }
    parts = []
    for role, (of_queries, of_keys) in hooks.items():
        name = f"{group.name}:{role}"
        if group.queries_per_key == 1:
            parts.append(replace(group, name=name, hooks=(*of_keys, *of_queries)))
            continue
        parts.append(replace(group, name=name, hooks=of_queries))
        size = group.size // group.queries_per_key
        parts.append(replace(group, name=f"{name}:keys", size=size, hooks=of_keys))
    return parts


def match_observed_heads(
    group: PermutationGroup, measured: FeatureStatistics, kind: str, mode: str
) -> GroupMatch:
    """Match the heads of an attention group by the observed parts.

    Products of each pair of heads are divided by the norms of both heads' features.

    Args:
        measured: statistics of the parts that `list_observed_parts` lists; overwritten.
        kind, mode: see `match_heads`.
    """
    split = []
    for role in ("qk", "values"):
        name = f"{group.name}:{role}"
        queries = measured.covariances[name].finalise_products()
        keys = None
        if group.queries_per_key > 1:
            keys = measured.covariances[f"{name}:keys"].finalise_products()
        norms = [_compute_head_norms(group, which, queries, keys) for which in ("first", "second")]
        scale = torch.outer(*norms).clamp(min=torch.finfo(torch.float64).tiny)
        products = split_head_products(group, queries.cross, keys and keys.cross)
        split.append(
            HeadProducts(
                products.per_query / scale[:, None, :, None, None, None],
                products.per_key / scale[:, :, None, None],
            )
        )
    return match_heads(group, *split, kind, mode)


def _compute_head_norms(
    group: PermutationGroup, which: str, queries: Moments, keys: Moments | None
) -> Tensor:
    """Compute the norm of all features of each key head, [G], in one model.

    Args:
        group: a group of attention heads.
        which: "first" or "second" model.
        queries, keys: sums of squares of the features of query heads and of key heads.
    """
    total = getattr(queries, which).view(group.heads, -1).sum(1)
    if keys is not None:
        total = total + getattr(keys, which).view(group.heads, -1).sum(1)
    return total.sqrt()


def match_observed_stream(
    moments_by_group: Mapping[str, Moments], width: int, count: int, keeps_ones: bool
) -> GroupMatch:
    """Find the map of the residual stream from the moments at all norms, each with equal weight.

    Args:
        moments_by_group: sums of products at each norm, by the name of its group.
        width: width of the stream; `count`: number of tokens.
        keeps_ones: see `solve_stream_map`.
    Raises:
        UserError: if there are fewer tokens than features.
    """
    if count < width:
        raise UserError(
            f"align.calibration: give more text: {count} tokens, width {width}; the residual "
            "stream needs as many tokens as features"
        )
    total = torch.zeros(width, width, dtype=torch.float64)
    for moments in moments_by_group.values():
        norms = moments.first.sum().sqrt() * moments.second.sum().sqrt()
        total += moments.cross / norms.clamp(min=torch.finfo(torch.float64).tiny)
    matrix, value = solve_stream_map(total, keeps_ones)
    return GroupMatch(None, {"stream": matrix[None]}, value / len(moments_by_group) * width)


def match_signed_features(signed: Tensor, plain: Tensor | None = None) -> GroupMatch:
    """Find the permutation of gated features, and the sign of each factor that the gate multiplies.

    The sign of that factor, a row of the up projection, is free, because the matrix that reads the
    product can change its sign too. That of the gate is not: it passes through the activation.

    Args:
        signed: similarity [C, C] of the factors of the first model (rows) and the second.
        plain: similarity [C, C] of their gates, which is added to the absolute values of `signed`;
            None: only `signed` counts.
    Returns:
        the match, with the map "sign" [C, 1, 1], float64 of -1 and 1, that acts after the
        permutation.
    """
    similarity = signed.abs() if plain is None else signed.abs() + plain
    match: FeatureMatch = assign_features(similarity)
    matched = signed.gather(1, match.permutation[:, None])[:, 0]
    signs = torch.where(matched < 0, -1.0, 1.0).double()
    return GroupMatch(match.permutation, {"sign": signs[:, None, None]}, match.value)
