"""Benchmark cases: each operation, its competitors, and lower bounds of its bytes and FLOPs.

A function `make_..._case(shape, dtype, device)` makes the case of an operation from the shape of
its inputs, a name in `DTYPES`, and "cuda" or "cpu". Bytes and FLOPs are derived in docs/kernels.md.
P is the number of mixed positions.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import flex
import torch
from megamod_kernels.demux import Chain, rsa_demux, rsa_demux_reference, split_projection
from megamod_kernels.instance_attention import instance_attention, instance_attention_reference
from megamod_kernels.keyed_linear import keyed_linear, keyed_linear_reference
from megamod_kernels.mux import multiplex
from megamod_kernels.mux_attention import mux_attention, mux_attention_reference
from megamod_kernels.mux_embed import Tables, mux_embed, mux_embed_reference
from megamod_kernels.norm_linear import Norm, norm_linear, norm_linear_reference
from torch import Tensor
from torch.nn import functional as F

SIZES = {
    "tiny": (32, 2),
    "small": (512, 8),
    "base": (768, 12),
    "large": (1024, 16),
    "1.3b": (2048, 32),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EPS = 1e-12
VOCABULARY = 30522


@dataclass(frozen=True)
class Shape:
    """Shape of the inputs of a case.

    Attributes:
        groups, instances: B, N.
        length: tokens of a sequence.
        size, heads: hidden size D, and attention heads.
    """

    groups: int
    instances: int
    length: int
    size: int
    heads: int

    @property
    def positions(self) -> int:
        """Number P of mixed positions, over all groups."""
        return self.groups * self.length


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    Attributes:
        device: "cuda" or "cpu".
        inputs: keyword arguments of every variant.
        variants: "ours" and its competitors, each from the inputs to one tensor.
        compiled: those of them that are measured compiled as well.
        differentiable: inputs whose gradients are computed.
        reference: the definition, which is computed in float64.
        bytes, flops: least numbers of bytes moved and of operations, by mode.
        compiled_only: further competitors that are never run as they are.
    """

    device: str
    inputs: Mapping[str, Tensor]
    variants: Mapping[str, Callable[..., Tensor]]
    compiled: tuple[str, ...]
    differentiable: tuple[str, ...]
    reference: Callable[..., Tensor]
    bytes: Mapping[str, float]
    flops: Mapping[str, float]
    compiled_only: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)


def parse_shape(text: str) -> Shape:
    """Parse SIZE-nN[-sLENGTH][-gGROUPS]; 128 tokens and 32 groups where they are missing.

    Args:
        text: such as "base-n5-s512"; SIZE is a name in `SIZES`.
    Raises:
        SystemExit: for anything else, with a message that names --shape.
    """
    result = re.fullmatch(r"(\w[\w.]*)-n(\d+)(?:-s(\d+))?(?:-g(\d+))?", text)
    if not result or result[1] not in SIZES:
        raise SystemExit(
            f"--shape {text}: write SIZE-nN[-sLENGTH][-gGROUPS] with one of {', '.join(SIZES)}"
        )
    size, heads = SIZES[result[1]]
    return Shape(int(result[4] or 32), int(result[2]), int(result[3] or 128), size, heads)


def _draw_parameter(device: str, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    """Draw a tensor of normal values times `scale`, which requires a gradient.

    `device`, `dtype` and `shape` are those of the tensor.
    """
    return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_()


def _make_bounds_by_mode(forward: float, backward: float) -> dict[str, float]:
    """Make the lower bounds by mode, "fwd", "bwd" and their sum "fwd_bwd".

    `forward` and `backward` are numbers of bytes or of FLOPs.
    """
    return {"fwd": forward, "bwd": backward, "fwd_bwd": forward + backward}


def make_multiplex_case(shape: Shape, dtype: str, device: str) -> Case:
    """Make the case of the multiplexer: the keyed mean of N instances, keys frozen.

    Arguments: see the top of the file.
    """
    kind = DTYPES[dtype]
    N, D, unit = shape.instances, shape.size, shape.positions * shape.size * kind.itemsize
    key = torch.randn(N, D, device=device)
    inputs = {
        "x": _draw_parameter(device, kind, shape.groups, N, shape.length, D),
        "key": key / key.norm(dim=1, keepdim=True),
    }

    def multiplex_eagerly(x: Tensor, key: Tensor) -> Tensor:
        """Multiplex in plain torch, rounded to the dtype of x after each operation."""
        return (x * key.to(x.dtype)[:, None]).mean(1)

    return Case(
        device,
        inputs,
        {"ours": multiplex, "eager": multiplex_eagerly},
        ("eager",),
        ("x",),
        multiplex_eagerly,
        _make_bounds_by_mode((N + 1) * unit, (N + 1) * unit),
        _make_bounds_by_mode(2 * N * shape.positions * D, N * shape.positions * D),
    )


def make_rsa_demux_case(shape: Shape, dtype: str, device: str, layers: int = 2) -> Case:
    """Make the case of RSA demultiplexing of all positions, with L layers.

    Args:
        shape, dtype, device: see the top of the file.
        layers: L, the split layer included.
    """
    kind, N, D, P = DTYPES[dtype], shape.instances, shape.size, shape.positions
    draw = partial(_draw_parameter, device, kind)
    inputs = {
        "hidden": draw(shape.groups, shape.length, D),
        "key": draw(N, D),
        "first": draw(D, 2 * D, scale=D**-0.5),
        "first_bias": draw(D, scale=0.1),
        "last": draw(D, D, scale=D**-0.5),
        "last_bias": draw(D, scale=0.1),
        "norm": draw(D),
        "norm_bias": draw(D),
    }
    for layer in range(2, layers):
        inputs |= {f"dense_{layer}": draw(D, D, scale=D**-0.5), f"dense_{layer}_bias": draw(D)}

    def make_chain(weights: Mapping[str, Tensor]) -> Chain:
        """Make the chain of the layers after the first from the inputs of their names."""
        names = (*(f"dense_{layer}" for layer in range(2, layers)), "last", "norm")
        *dense, last, norm = ((weights[name], weights[f"{name}_bias"]) for name in names)
        return Chain(dense, last, norm, EPS)

    def demux_concatenated(
        hidden: Tensor, key: Tensor, first: Tensor, first_bias: Tensor, **weights: Tensor
    ) -> Tensor:
        """Demultiplex in plain torch, with the concatenation of keys and states, as published.

        `hidden` [B, L, D], `key` [N, D], `first` [D, 2 D] and `first_bias` [D] of the first layer;
        `weights` are those of the others by name. Returns [B, N, L, D].
        """
        chain = make_chain(weights)
        keys = key[None, :, None].expand(len(hidden), -1, hidden.shape[1], -1)
        repeated = hidden[:, None].expand(-1, len(key), -1, -1)
        x = F.gelu(F.linear(torch.cat([keys, repeated], -1), first, first_bias))
        for dense in chain.dense:
            x = F.gelu(F.linear(x, *dense)) + x
        return F.layer_norm(F.gelu(F.linear(x, *chain.last)), (D,), *chain.norm, EPS) + x

    def demux_split(
        demux: Callable[..., Tensor],
        hidden: Tensor,
        key: Tensor,
        first: Tensor,
        first_bias: Tensor,
        **weights: Tensor,
    ) -> Tensor:
        """Demultiplex by `demux`, with the first layer split into two parts.

        `demux` is `rsa_demux` or its reference; other arguments as in `demux_concatenated`.
        """
        return demux(*split_projection(hidden, key, first, first_bias), make_chain(weights))

    variants = {"ours": partial(demux_split, rsa_demux)}
    if device == "cuda":
        variants["ours fused"] = partial(demux_split, partial(rsa_demux, implementation="triton"))
    unit = P * D * kind.itemsize
    forward = 2 * (N * (layers - 1) + 1) * P * D * D
    return Case(
        device,
        inputs,
        variants
        | {
            "eager split": partial(demux_split, rsa_demux_reference),
            "eager concat": demux_concatenated,
        },
        ("eager split", "eager concat"),
        tuple(inputs),
        demux_concatenated,
        _make_bounds_by_mode((N + 1) * unit, 2 * (N + 1) * unit),
        _make_bounds_by_mode(forward, 2 * forward),
    )


def make_rsa_demux_l3_case(shape: Shape, dtype: str, device: str) -> Case:
    """Make the case of RSA demultiplexing with L = 3, as in the published models.

    Arguments: see the top of the file.
    """
    return make_rsa_demux_case(shape, dtype, device, layers=3)


def _draw_embedding_inputs(shape: Shape, dtype: str, device: str) -> dict[str, Tensor]:
    """Draw ids [B * N, L], keys [N, D], and all parameters of `Tables`, by name.

    Arguments: see the top of the file.
    """
    kind, D = DTYPES[dtype], shape.size
    draw = partial(_draw_parameter, device, kind)
    key = torch.randn(shape.instances, D, device=device)
    ids = (shape.groups * shape.instances, shape.length)
    return {
        "ids": torch.randint(1, VOCABULARY, ids, device=device),
        "key": (key / key.norm(dim=1, keepdim=True)).to(kind),
        "word": draw(VOCABULARY, D, scale=0.02),
        "position": draw(max(512, shape.length), D, scale=0.02),
        "token_type": draw(2, D, scale=0.02),
        "weight": draw(D),
        "bias": draw(D),
    }


def make_mux_embed_case(shape: Shape, dtype: str, device: str) -> Case:
    """Make the case from token ids to the encoder's input: embedding, keyed mean, embedding.

    Arguments: see the top of the file.
    """
    N, D, P = shape.instances, shape.size, shape.positions
    inputs = _draw_embedding_inputs(shape, dtype, device)

    def embed_by_kernel(ids: Tensor, key: Tensor, **tables: Tensor) -> Tensor:
        """Embed ids [B * N, L] and multiplex them by `mux_embed`; returns [B, L, D]."""
        return mux_embed(ids, key, Tables(**tables, word_padding=0))

    def embed_eagerly(ids: Tensor, key: Tensor, **tables: Tensor) -> Tensor:
        """Embed ids [B * N, L] and multiplex them in plain torch; returns [B, L, D]."""
        return mux_embed_reference(ids, key, Tables(**tables, word_padding=0))

    unit = P * D * DTYPES[dtype].itemsize
    return Case(
        device,
        inputs,
        {"ours": embed_by_kernel, "eager": embed_eagerly},
        ("eager",),
        ("word", "position", "token_type", "weight", "bias"),
        embed_eagerly,
        _make_bounds_by_mode((N + 1) * unit + 8 * N * P, (3 * N + 2) * unit + 8 * N * P),
        _make_bounds_by_mode((10 * N + 8) * P * D, 2 * (10 * N + 8) * P * D),
    )


def make_mux_attention_case(shape: Shape, dtype: str, device: str) -> Case:
    """Make the case from token ids to the first block's attention, with the residual added.

    "ours" is what "auto" does; "ours fused" embeds and projects in one kernel. Arguments: see the
    top of the file.
    """
    kind, N, D, P = DTYPES[dtype], shape.instances, shape.size, shape.positions
    inputs = _draw_embedding_inputs(shape, dtype, device)
    names = [part + end for part in ("query", "key", "value") for end in ("_weight", "_bias")]
    for name in names:
        sizes = (D, D) if name.endswith("weight") else (D,)
        inputs[f"to_{name}"] = _draw_parameter(device, kind, *sizes, scale=D**-0.5)

    def add_residual(
        attention: Callable[..., tuple[Tensor, Tensor]],
        ids: Tensor,
        key: Tensor,
        **arguments: Tensor,
    ) -> Tensor:
        """Return the sum [B, L, D] of both results of `attention`, as a case has one result.

        `attention` is `mux_attention` or its reference; `arguments` are the tables and projections
        by name.
        """
        flat = [arguments.pop(f"to_{name}") for name in names]
        projections = list(zip(flat[::2], flat[1::2], strict=True))
        tables = Tables(**arguments, word_padding=0)
        attended, residual = attention(ids, key, tables, projections, shape.heads)
        return attended + residual

    variants = {"ours": partial(add_residual, mux_attention)}
    if device == "cuda":
        variants["ours fused"] = partial(
            add_residual, partial(mux_attention, implementation="triton")
        )
    unit, product = P * D * kind.itemsize, 6 * P * D * D
    attention = 4 * P * shape.length * D
    return Case(
        device,
        inputs,
        variants | {"eager": partial(add_residual, mux_attention_reference)},
        ("eager",),
        # Softmax does not see the bias of keys: its gradient is 0, and so has no relative error.
        tuple(name for name in inputs if name not in ("ids", "key", "to_key_bias")),
        partial(add_residual, mux_attention_reference),
        _make_bounds_by_mode((N + 9) * unit + 8 * N * P, (3 * N + 20) * unit + 8 * N * P),
        _make_bounds_by_mode(product + attention, 2 * product + 2.5 * attention),
    )


def make_norm_linear_case(shape: Shape, dtype: str, device: str) -> Case:
    """Make the case of the encoder's last norm and half of the demultiplexer's first layer.

    Arguments: see the top of the file.
    """
    kind, D, P = DTYPES[dtype], shape.size, shape.positions
    draw = partial(_draw_parameter, device, kind)
    inputs = {
        "x": draw(shape.groups, shape.length, D),
        "gain": draw(D),
        "shift": draw(D),
        "first": draw(D, 2 * D, scale=D**-0.5),
    }

    def apply_after_norm(
        linear: Callable[..., Tensor], x: Tensor, gain: Tensor, shift: Tensor, first: Tensor
    ) -> Tensor:
        """Apply `linear` to x [B, L, D], with a norm and half of the first layer's weight.

        `linear` is `norm_linear` or its reference; `gain` and `shift` [D] are of the norm. The half
        of `first` [D, 2 D] is that for mixed states.
        """
        return linear(x, Norm(gain, shift, EPS), first[:, D:])

    unit, product = P * D * kind.itemsize, 2 * P * D * D
    return Case(
        device,
        inputs,
        {
            "ours": partial(apply_after_norm, norm_linear),
            "eager": partial(apply_after_norm, norm_linear_reference),
        },
        ("eager",),
        tuple(inputs),
        partial(apply_after_norm, norm_linear_reference),
        _make_bounds_by_mode(3 * unit, 6 * unit),
        _make_bounds_by_mode(product, 2 * product),
    )


def make_instance_attention_case(shape: Shape, dtype: str, device: str) -> Case:
    """Make the case of attention among the N instances of each position.

    The competitor is stock attention on B * L sequences of N. Arguments: see the top of the file.
    """
    kind, N, D, P = DTYPES[dtype], shape.instances, shape.size, shape.positions
    sizes = (shape.groups, N, shape.length, D)
    inputs = {name: _draw_parameter(device, kind, *sizes) for name in ("q", "k", "v")}
    unit = P * D * kind.itemsize
    return Case(
        device,
        inputs,
        {
            "ours": partial(instance_attention, heads=shape.heads),
            "eager sdpa": partial(instance_attention_reference, heads=shape.heads),
        },
        ("eager sdpa",),
        ("q", "k", "v"),
        partial(instance_attention_reference, heads=shape.heads),
        _make_bounds_by_mode(4 * N * unit, 7 * N * unit),
        _make_bounds_by_mode(4 * N * N * D * P, 10 * N * N * D * P),
        flex.make_flex_variants(N, shape.length, shape.heads, device),
    )


def make_keyed_linear_case(shape: Shape, dtype: str, device: str) -> Case:
    """Make the case of query, key and value projections of instances times their keys.

    Arguments: see the top of the file.
    """
    kind, N, D, P = DTYPES[dtype], shape.instances, shape.size, shape.positions
    key = torch.randn(N, D, device=device)
    inputs = {
        "x": _draw_parameter(device, kind, shape.groups, N, shape.length, D),
        "key": (key / key.norm(dim=1, keepdim=True)).to(kind),
        "weight": _draw_parameter(device, kind, 3 * D, D, scale=D**-0.5),
        "bias": _draw_parameter(device, kind, 3 * D),
    }
    unit, product = P * D * kind.itemsize, 2 * N * P * D * 3 * D
    return Case(
        device,
        inputs,
        {"ours": keyed_linear, "eager": keyed_linear_reference},
        ("eager",),
        ("x", "weight", "bias"),
        keyed_linear_reference,
        _make_bounds_by_mode(4 * N * unit, 8 * N * unit),
        _make_bounds_by_mode(product, 2 * product),
    )


# `run.py --list` prints the first lines of these docstrings.
CASES: dict[str, Callable[[Shape, str, str], Case]] = {
    "multiplex": make_multiplex_case,
    "mux_embed": make_mux_embed_case,
    "mux_attention": make_mux_attention_case,
    "instance_attention": make_instance_attention_case,
    "keyed_linear": make_keyed_linear_case,
    "norm_linear": make_norm_linear_case,
    "rsa_demux": make_rsa_demux_case,
    "rsa_demux_l3": make_rsa_demux_l3_case,
}
