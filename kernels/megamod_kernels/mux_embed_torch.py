"""Input of a multiplexed encoder from token ids of N instances: reference in plain torch."""

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from megamod_kernels.mux import multiplex


class Tables(NamedTuple):
    """Parameters of an embedding module.

    Attributes:
        word, position, token_type: [V, D], [P, D], [S, D].
        weight, bias: [D], parameters of the LayerNorm.
        eps: epsilon of the LayerNorm.
        first_position: row of the position table for the first token.
        word_padding: row of `word` without gradient; None: all rows have one.
        position_padding: row of `position` without gradient, if positions are passed.
    """

    word: Tensor
    position: Tensor
    token_type: Tensor
    weight: Tensor
    bias: Tensor
    eps: float = 1e-12
    first_position: int = 0
    word_padding: int | None = None
    position_padding: int | None = None


def mux_embed_reference(
    ids: Tensor,
    key: Tensor,
    tables: Tables,
    token_type_ids: Tensor | None = None,
    first_positions: Tensor | None = None,
    second_positions: Tensor | None = None,
    dropout: float = 0.0,
    masks: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Compute `mux_embed` in plain torch; arguments and result [B, T, D] as there.

    Args:
        masks: factors of both dropouts, [B, N, T, D] and [B, T, D], for tests; None to draw them.
    """

    def embed(x: Tensor, types: Tensor | None, positions: Tensor | None) -> Tensor:
        """Add position and segment embeddings to x [rows, T, D] and norm the sum.

        `types` and `positions` are indices [rows, T] or [1, T]; None: segment 0, consecutive
        positions.
        """
        if positions is None:
            start = tables.first_position
            added = tables.position[start : start + x.shape[1]]
        else:
            added = F.embedding(positions, tables.position, tables.position_padding)
        segment = tables.token_type[0] if types is None else F.embedding(types, tables.token_type)
        norm_arguments = (tables.weight, tables.bias, tables.eps)
        return F.layer_norm(x + (added + segment), x.shape[-1:], *norm_arguments)

    words = F.embedding(ids, tables.word, tables.word_padding)
    instances = embed(words, token_type_ids, first_positions).unflatten(0, (-1, len(key)))
    instances = F.dropout(instances, dropout) if masks is None else instances * masks[0]
    mixed = embed(multiplex(instances, key, "reference"), None, second_positions)
    return F.dropout(mixed, dropout) if masks is None else mixed * masks[1]


def check_shapes(
    ids: Tensor,
    key: Tensor,
    tables: Tables,
    types: Tensor | None,
    firsts: Tensor | None,
    seconds: Tensor | None,
) -> None:
    """Check the shapes of the arguments of `mux_embed`, in its order.

    Args:
        types, firsts, seconds: `token_type_ids`, `first_positions` and `second_positions`.
    Raises:
        ValueError: naming the tensor, its shape and the one that is needed.
    """
    instances, size = key.shape if key.dim() == 2 else (0, 0)
    if ids.dim() != 2 or not instances or ids.shape[0] % instances:
        raise ValueError(
            f"ids {tuple(ids.shape)} and key {tuple(key.shape)} do not fit: expected [B * N, T] "
            "and [N, D], N at least 1"
        )
    for name, tensor in zip(Tables._fields[:5], tables[:5], strict=True):
        is_table = name not in ("weight", "bias")
        if tensor.dim() != 1 + is_table or tensor.shape[-1] != size:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} does not fit key {tuple(key.shape)}: expected "
                f"{'[rows, ' if is_table else '['}{size}]"
            )
    rows, length = ids.shape
    groups = rows // instances
    for name, tensor, allowed in (
        ("token_type_ids", types, (rows,)),
        ("first_positions", firsts, (rows, 1)),
        ("second_positions", seconds, (groups, 1)),
    ):
        if tensor is not None and tuple(tensor.shape) not in [(count, length) for count in allowed]:
            expected = " or ".join(str([count, length]) for count in allowed)
            raise ValueError(f"{name} {tuple(tensor.shape)} does not fit: expected {expected}")
    available = len(tables.position) - tables.first_position
    if length > available and (firsts is None or seconds is None):
        raise ValueError(f"{length} tokens need more than the {available} positions of the table")
