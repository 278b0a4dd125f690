"""Attention that stops at the ends of documents, in rows that hold several."""

from collections.abc import Callable

import torch
from torch import Tensor


def compute_document_positions(input_ids: Tensor, end_id: int) -> Tensor:
    """Compute positions [B, L] that begin anew at every end of text.

    Stock models with rotary or GPT-2's positions read the borders of documents off them.
    """
    row_positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    starts = row_positions.where(input_ids == end_id, 0).cummax(dim=1).values
    return row_positions - starts


def compute_document_mask(positions: Tensor) -> Tensor:
    """Compute a mask [B, 1, L, L] bool: True at earlier positions of the same document."""
    length = positions.shape[1]
    documents = (positions == 0).cumsum(dim=1)
    same = documents[:, :, None] == documents[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=positions.device).tril()
    return (same & causal)[:, None]


def make_additive_mask(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Make [B, 1, L, L]: 0 where `compute_document_mask` is True, else the least of `dtype`."""
    allowed = compute_document_mask(positions)
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=positions.device)
    return zeros.masked_fill(~allowed, torch.finfo(dtype).min)


def make_alibi_of_rows(
    build_alibi_tensor: Callable[..., Tensor], attention_mask: Tensor, *args: object, **more: object
) -> Tensor:
    """Make the biases of BLOOM, which counts positions in a mask [B, L], for [B, 1, L, L] too.

    A softmax does not change if all keys of a document are some positions further on.
    """
    if attention_mask.dim() == 4:
        attention_mask = torch.ones_like(attention_mask[:, 0, 0])
    return build_alibi_tensor(attention_mask, *args, **more)
