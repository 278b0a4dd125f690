"""Multiplexers: embeddings of N instances become one sequence.

`instance_embedding` (the keys) and the blocks of the contextual multiplexers belong to the model
that uses them: so they are called in published checkpoints.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megamod.nn.encoder import EncoderLayer, key_mask

HADAMARD = ("gaussian_hadamard", "binary_hadamard", "gaussian_attention", "gaussian_attention_v2")
ORTHOGONAL = ("random_ortho", "random_ortho_low_rank")


def key_shape(variant: str, instances: int, size: int) -> tuple[int, ...]:
    """Shape of the keys: a vector per instance, or a matrix."""
    return (instances, size) if variant in HADAMARD else (instances, size, size)


def draw_keys(
    variant: str,
    instances: int,
    size: int,
    *,
    norm: float = 1.0,
    epsilon: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """New keys of a multiplexer, in float32 on the CPU.

    Args:
        norm: length of each vector (gaussian variants).
        epsilon: by how much neighbouring chunks overlap, from 0 to 1 (binary_hadamard).
    Returns:
        [N, D] or [N, D, D], see `key_shape`.
    Source: Murahari et al. 2022 (DataMUX), section 3.1; 2023 (MUX-PLM), section 3.1 and release.
    """
    if variant == "binary_hadamard":
        return _chunks(instances, size, epsilon)
    if variant == "random_ortho":
        return torch.stack([_orthogonal(size, generator) for _ in range(instances)]).float()
    if variant == "random_ortho_low_rank":
        first, second = (_rotation(_orthogonal(size, generator)) for _ in range(2))
        width = size // instances
        slices = [slice(i * width, (i + 1) * width) for i in range(instances)]
        return torch.stack([second[:, part] @ first[:, part].T for part in slices]).float()
    drawn = torch.randn(instances, size, generator=generator)
    return drawn / drawn.norm(dim=1, keepdim=True) * norm


def multiplex_orthogonal(x: Tensor, key: Tensor) -> Tensor:
    """Sum of V_i x_i over instances, divided by sqrt(N): one product over N * D columns.

    Args:
        x: [B, N, L, D].
        key: [N, D, D], matrices that are applied from the left.
    Returns:
        [B, L, D].
    """
    instances = key.shape[0]
    side_by_side = x.transpose(1, 2).flatten(2)  # [B, L, N * D]
    return F.linear(side_by_side, key.transpose(0, 1).flatten(1)) / instances**0.5


def multiplex_contextual(
    x: Tensor,
    key: Tensor,
    over_tokens: EncoderLayer,
    over_instances: EncoderLayer,
    attention_mask: Tensor | None,
    mask_instances: bool,
) -> Tensor:
    """Attention over each instance's tokens, keys, attention over the instances of each position.

    Args:
        x: [B, N, L, D].
        key: [N, D].
        attention_mask: [B * N, L], nonzero at real tokens; None if all are.
        mask_instances: whether padding is masked in the second attention as well.
    Returns:
        [B, L, D].
    Source: Murahari et al. 2023, section 3.1, contextual multiplexer; `gaussian_attention_v2`.
    """
    groups, instances, length, size = x.shape
    rows = x.flatten(0, 1)
    mask = key_mask(attention_mask) if attention_mask is not None else None
    context = over_tokens(rows, mask) + rows
    marked = context.view_as(x) * key[:, None].to(x.dtype)
    at_positions = marked.transpose(1, 2).reshape(-1, instances, size)  # [B * L, N, D]
    mask = None
    if mask_instances and attention_mask is not None:
        by_position = attention_mask.view(groups, instances, length).transpose(1, 2)
        mask = key_mask(by_position.reshape(-1, instances))
    mixed = over_instances(at_positions, mask) + at_positions
    return mixed.mean(1).view(groups, length, size)


def multiplex_contextual_v1(
    x: Tensor, key: Tensor, over_tokens: EncoderLayer, across: nn.Linear, norm: nn.LayerNorm
) -> Tensor:
    """Attention over each marked instance's tokens, plus what the instances have in common.

    Args:
        x: [B, N, L, D].
        key: [N, D].
    Returns:
        [B, L, D].
    Source: `gaussian_attention` of the release of Murahari et al. 2023.
    """
    marked = x * key[:, None].to(x.dtype)
    common = norm(F.gelu(across(marked.mean(1))))
    return over_tokens(marked.flatten(0, 1)).view_as(x).mean(1) + common


def _chunks(instances: int, size: int, epsilon: float) -> Tensor:
    width = size // instances
    overlap = epsilon / 2 * width
    keys = torch.zeros(instances, size)
    for i in range(instances):
        start = i * width - (overlap if i > 0 else 0)
        stop = (i + 1) * width + overlap if i < instances - 1 else size
        keys[i, int(start) : int(stop)] = 1.0
    return keys


def _orthogonal(size: int, generator: torch.Generator | None) -> Tensor:
    """Uniform over the orthogonal group (Mezzadri 2007, section 5), float64."""
    drawn = torch.randn(size, size, dtype=torch.float64, generator=generator)
    matrix, triangle = torch.linalg.qr(drawn)
    return matrix * triangle.diagonal().sign()


def _rotation(matrix: Tensor) -> Tensor:
    """The same with determinant 1: uniform over rotations if it was over the group."""
    sign = torch.linalg.det(matrix).sign()
    return torch.cat([matrix[:, :1] * sign, matrix[:, 1:]], 1)
