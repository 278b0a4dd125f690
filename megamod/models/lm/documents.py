"""Attention that stops at the ends of documents, in rows that hold several."""

from collections.abc import Callable

import torch
from torch import Tensor


def compute_document_positions(input_ids: Tensor, end_id: int) -> Tensor:
    """Compute positions [B, L] that restart at 0 at every end of text.

    Stock models with rotary or GPT-2's positions read the borders of documents off them.

    Args:
        input_ids: [B, L].
        end_id: id that ends a text; its token has position 0, as the first token of a row has.
    """
    row_positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    starts = row_positions.where(input_ids == end_id, 0).cummax(dim=1).values
    return row_positions - starts


def compute_document_mask(positions: Tensor) -> Tensor:
    """Compute an attention mask [B, 1, L, L] bool over queries and keys.

    True where the key is in the query's document and not after the query.

    Args:
        positions: [B, L], result of `compute_document_positions`; 0 begins a document.
    """
    length = positions.shape[1]
    documents = (positions == 0).cumsum(dim=1)
    same = documents[:, :, None] == documents[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=positions.device).tril()
    return (same & causal)[:, None]


def make_additive_mask(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Make a mask [B, 1, L, L] that is added to attention scores.

    It is 0 where `compute_document_mask` is True, else the smallest value of `dtype`.

    Args:
        positions: [B, L], result of `compute_document_positions`.
        dtype: dtype of the mask: that of the scores.
    """
    allowed = compute_document_mask(positions)
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=positions.device)
    return zeros.masked_fill(~allowed, torch.finfo(dtype).min)


def make_row_alibi(
    build_alibi_tensor: Callable[..., Tensor], attention_mask: Tensor, *args: object, **more: object
) -> Tensor:
    """Make the position biases (ALiBi) of BLOOM, also for a mask of documents.

    BLOOM counts the positions of keys in a mask [B, L]. For a mask [B, 1, L, L] positions are
    counted from the start of the row: all keys of a document are then shifted by the same number,
    which a softmax cancels.

    Args:
        build_alibi_tensor: the method of BLOOM's model in transformers.
        attention_mask: [B, L] or [B, 1, L, L].
        args, more: further arguments of that method, number of heads and dtype.
    Returns:
        the result of that method: [B * heads, 1, L].
    """
    if attention_mask.dim() == 4:
        attention_mask = torch.ones_like(attention_mask[:, 0, 0])
    return build_alibi_tensor(attention_mask, *args, **more)
