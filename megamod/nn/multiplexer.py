"""Multiplexers: embeddings of N instances become one sequence.

The keys (`instance_embedding`) and the blocks of the contextual multiplexers are parameters of the
model that uses them, because published checkpoints name them so.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megamod_kernels.instance_attention import instance_attention_packed, uses_kernels
from megamod_kernels.keyed_linear import keyed_linear
from megamod_kernels.mux import multiplex
from torch import Tensor, nn
from torch.nn import functional as F

from megamod.nn.encoder import EncoderLayer, make_key_mask
from megamod.nn.linear import are_standard_layers


@dataclass(frozen=True)
class KeySettings:
    """Settings of the keys to draw.

    Attributes:
        instances, size: N and D.
        norm: length of each vector (gaussian variants).
        epsilon: overlap of neighbouring chunks, from 0 to 1 (binary_hadamard).
        generator: source of the random numbers; None: torch's global one.
    """

    instances: int
    size: int
    norm: float = 1.0
    epsilon: float = 0.0
    generator: torch.Generator | None = None


@dataclass(frozen=True)
class Multiplexer:
    """A multiplexer.

    Attributes:
        draw: draws the keys in float32 on the CPU: [N, D], or [N, D, D] with `matrices`.
        mix: from x [B, N, L, D], keys and the implementation of kernels to [B, L, D]; None: mixing
            takes parameters besides the keys, and the model that has them does it.
        matrices: the key of an instance is a matrix [D, D], not a vector [D].
        divides_features: each instance has its part of the features, so that N is at most D.
    """

    draw: Callable[[KeySettings], Tensor]
    mix: Callable[[Tensor, Tensor, str], Tensor] | None
    matrices: bool
    divides_features: bool


MULTIPLEXERS: dict[str, Multiplexer] = {}


def multiplexer(
    name: str,
    mix: Callable[[Tensor, Tensor, str], Tensor] | None = multiplex,
    *,
    matrices: bool = False,
    divides_features: bool = False,
) -> Callable[[Callable[[KeySettings], Tensor]], Callable[[KeySettings], Tensor]]:
    """Return a decorator that enters a function that draws keys into `MULTIPLEXERS`.

    Args:
        name: value of --muxing_variant.
        mix, matrices, divides_features: attributes of `Multiplexer`.
    """

    def register_multiplexer(
        draw: Callable[[KeySettings], Tensor],
    ) -> Callable[[KeySettings], Tensor]:
        """Enter `draw`, from settings to keys, into `MULTIPLEXERS`; return it unchanged."""
        MULTIPLEXERS[name] = Multiplexer(draw, mix, matrices, divides_features)
        return draw

    return register_multiplexer


def compute_key_shape(variant: str, instances: int, size: int) -> tuple[int, ...]:
    """Return the shape of the keys: [N, D], a vector per instance, or [N, D, D], a matrix.

    Args:
        variant: a key of `MULTIPLEXERS`.
        instances, size: N and D.
    Raises:
        KeyError: if `variant` is not in `MULTIPLEXERS`.
    """
    return (instances, size, size) if MULTIPLEXERS[variant].matrices else (instances, size)


def draw_keys(variant: str, instances: int, size: int, **settings: object) -> Tensor:
    """Draw the keys of a multiplexer, in float32 on the CPU.

    Args:
        variant: a key of `MULTIPLEXERS`.
        instances, size: N and D.
        settings: further fields of `KeySettings`.
    Returns:
        [N, D] or [N, D, D], see `compute_key_shape`.
    Source: Murahari et al. 2022 (DataMUX), section 3.1; 2023 (MUX-PLM), section 3.1 and release.
    """
    return MULTIPLEXERS[variant].draw(KeySettings(instances, size, **settings))


def multiplex_orthogonal(x: Tensor, key: Tensor, implementation: str = "auto") -> Tensor:
    """Sum V_i x_i over instances and divide by sqrt(N), as one product over N * D columns.

    Args:
        x: [B, N, L, D].
        key: [N, D, D], matrices V_i, multiplied from the left.
        implementation: has no effect; the product has no kernel of its own.
    Returns:
        [B, L, D], in x's dtype.
    """
    instances = key.shape[0]
    concatenated = x.transpose(1, 2).flatten(2)  # [B, L, N * D]
    matrix = key.to(x.dtype).transpose(0, 1).flatten(1)  # [D, N * D]
    return F.linear(concatenated, matrix) / instances**0.5


def multiplex_contextual(
    x: Tensor,
    key: Tensor,
    token_block: EncoderLayer,
    instance_block: EncoderLayer,
    attention_mask: Tensor | None,
    mask_instances: bool,
    implementation: str = "auto",
) -> Tensor:
    """Attend over each instance's tokens, multiply by keys, attend over instances per position.

    Args:
        x: [B, N, L, D].
        key: [N, D].
        token_block, instance_block: the blocks that attend over tokens, and over instances.
        attention_mask: [B * N, L], nonzero at real tokens; None if all are.
        mask_instances: mask padding in the second attention too.
        implementation: implementation of the attention over instances, see `instance_attention`.
    Returns:
        [B, L, D].
    Source: Murahari et al. 2023, section 3.1, contextual multiplexer; `gaussian_attention_v2`.
    """
    groups, instances, length, size = x.shape
    rows = x.flatten(0, 1)
    mask = make_key_mask(attention_mask) if attention_mask is not None else None
    context = (token_block(rows, mask) + rows).view_as(x)
    instance_mask = None
    if mask_instances and attention_mask is not None:
        instance_mask = attention_mask.view(groups, instances, length)
    projections = instance_block.attention["self"].values()
    if are_standard_layers(*projections) and uses_kernels(x, instance_block.heads, implementation):
        mixed = _attend_over_instances(instance_block, context, key, instance_mask, implementation)
        return instance_block.apply_feed_forward(mixed).mean(1) + multiplex(
            context, key, implementation
        )
    keyed = context * key[:, None].to(x.dtype)
    by_position = keyed.transpose(1, 2).reshape(-1, instances, size)  # [B * L, N, D]
    mask = (
        make_key_mask(instance_mask.transpose(1, 2).flatten(0, 1))
        if instance_mask is not None
        else None
    )
    mixed = instance_block(by_position, mask) + by_position
    return mixed.mean(1).view(groups, length, size)


def _attend_over_instances(
    block: EncoderLayer, x: Tensor, key: Tensor, instance_mask: Tensor | None, implementation: str
) -> Tensor:
    """Run `block.attend` of x * key over instances, without storing x * key or its permutation.

    Args:
        x: [B, N, L, D].
        key: [N, D].
        instance_mask: [B, N, L], 0 where an instance is masked; None: no mask.
        implementation: "auto", "triton" or "reference", of both kernels.
    Returns:
        [B, N, L, D].
    """
    projections = [block.attention["self"][name] for name in ("query", "key", "value")]
    weight = torch.cat([projection.weight for projection in projections])
    bias = torch.cat([projection.bias for projection in projections])
    mixed = instance_attention_packed(
        keyed_linear(x, key, weight, bias, implementation),
        block.heads,
        instance_mask if instance_mask is None else instance_mask != 0,
        block.attention_dropout if block.training else 0.0,
        implementation,
    )
    output = block.attention["output"]
    update = block.dropout(output["dense"](mixed))
    return output["LayerNorm"](torch.addcmul(update, x, key[:, None].to(x.dtype)))


def multiplex_contextual_v1(
    x: Tensor,
    key: Tensor,
    token_block: EncoderLayer,
    mean_projection: nn.Linear,
    norm: nn.LayerNorm,
) -> Tensor:
    """Attend over the tokens of each keyed instance, average, and add a term of their mean.

    Args:
        x: [B, N, L, D].
        key: [N, D].
        token_block: attends over tokens.
        mean_projection, norm: layers that are applied to the mean over the instances.
    Returns:
        [B, L, D].
    Source: `gaussian_attention` of the release of Murahari et al. 2023.
    """
    keyed = x * key[:, None].to(x.dtype)
    mean_term = norm(F.gelu(mean_projection(keyed.mean(1))))
    return token_block(keyed.flatten(0, 1)).view_as(x).mean(1) + mean_term


@multiplexer("gaussian_hadamard")
@multiplexer("gaussian_attention", mix=None)
@multiplexer("gaussian_attention_v2", mix=None)
def draw_gaussian_keys(keys: KeySettings) -> Tensor:
    """Draw vectors [N, D] of random direction and length `norm`."""
    gaussian = torch.randn(keys.instances, keys.size, generator=keys.generator)
    return gaussian / gaussian.norm(dim=1, keepdim=True) * keys.norm


@multiplexer("binary_hadamard", divides_features=True)
def make_chunk_keys(keys: KeySettings) -> Tensor:
    """Make binary vectors [N, D], each 1 in its own chunk of D // N features, 0 elsewhere.

    Each chunk is extended by `keys.epsilon` / 2 of its width to both sides, and the last one to the
    end.
    """
    instances, size = keys.instances, keys.size
    width = size // instances
    overlap = keys.epsilon / 2 * width
    vectors = torch.zeros(instances, size)
    for i in range(instances):
        start = i * width - (overlap if i > 0 else 0)
        stop = (i + 1) * width + overlap if i < instances - 1 else size
        vectors[i, int(start) : int(stop)] = 1.0
    return vectors


@multiplexer("random_ortho", multiplex_orthogonal, matrices=True)
def draw_orthogonal_keys(keys: KeySettings) -> Tensor:
    """Draw N random orthogonal matrices, [N, D, D] float32."""
    matrices = (_draw_orthogonal_matrix(keys.size, keys.generator) for _ in range(keys.instances))
    return torch.stack([*matrices]).float()


@multiplexer("random_ortho_low_rank", multiplex_orthogonal, matrices=True, divides_features=True)
def draw_low_rank_keys(keys: KeySettings) -> Tensor:
    """Draw matrices [N, D, D] of rank D // N whose ranges are orthogonal to each other."""
    first, second = (
        _convert_to_rotation(_draw_orthogonal_matrix(keys.size, keys.generator)) for _ in range(2)
    )
    width = keys.size // keys.instances
    parts = [slice(i * width, (i + 1) * width) for i in range(keys.instances)]
    return torch.stack([second[:, part] @ first[:, part].T for part in parts]).float()


def _draw_orthogonal_matrix(size: int, generator: torch.Generator | None) -> Tensor:
    """Draw uniformly from the orthogonal group (Mezzadri 2007, section 5): [size, size] float64."""
    gaussian = torch.randn(size, size, dtype=torch.float64, generator=generator)
    matrix, triangle = torch.linalg.qr(gaussian)
    return matrix * triangle.diagonal().sign()


def _convert_to_rotation(matrix: Tensor) -> Tensor:
    """Flip the first column of an orthogonal [D, D] if its determinant is -1.

    From a uniform matrix this makes a uniform rotation.
    """
    sign = torch.linalg.det(matrix).sign()
    return torch.cat([matrix[:, :1] * sign, matrix[:, 1:]], 1)


KEYED = tuple(name for name, entry in MULTIPLEXERS.items() if entry.mix is not None)
"""Multiplexers that every family has, as they have no parameters besides their keys."""
