"""Layouts of a mixture's tensors: in memory all experts of a layer are one tensor, in files each
expert has its own.

Inference engines, and the commands that change one expert, read the layout of files.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megamod.merging.moe.configuration import read_moe_config
from megamod.models.lm.moe_families import LAYERS, PARTS, MoeFamily
from megamod.states.stream import ModelFolder, TensorSpec, iterate_pieces, write_streamed_tensors
from megamod.states.weights import DENSE_FILE

_GATE, _UP, _DOWN = PARTS
FUSED = {"experts.gate_up_proj": (_GATE, _UP), "experts.down_proj": (_DOWN,)}
"""Names in a sparse block in memory -> parts of feed-forwards, rows after rows, for each expert."""

_Slice = tuple[str, str, int, TensorSpec]
"""A tensor of the files: its name, the tensor in memory that holds it, its first element there, and
its specification."""


def split_fused_experts(folder: Path) -> None:
    """Rewrite the weights of a mixture in the layout of files: a tensor per expert.

    In memory, and so in what `save_pretrained` writes, all experts of a layer are one tensor.

    The weights become one whole model.safetensors. Until that is complete, it lies in the subfolder
    `.split`, which remains after an error.

    Args:
        folder: model folder in the layout of memory.
    Raises:
        UserError: if the folder holds no mixture of the families in `MOE_FAMILIES`.
        OSError: if it cannot be written, or a `.split` is in it.
    """
    _, family = read_moe_config(folder)
    with ModelFolder(folder) as source:
        slices = {entry[0]: entry for entry in _split_tensors(source, family)}
        specs = {name: entry[3] for name, entry in slices.items()}
        temporary = folder / ".split"
        temporary.mkdir()

        def read_pieces(name: str) -> Iterator[Tensor]:
            """Yield the elements of the tensor `name` of the files, cut from that in memory."""
            _, stored, first, spec = slices[name]
            for start, stop in iterate_pieces(spec.numel, spec.dtype.itemsize):
                buffer = torch.empty(stop - start, dtype=spec.dtype)
                source.read_into(stored, first + start, buffer)
                yield buffer

        write_streamed_tensors(temporary, {DENSE_FILE: list(specs)}, specs, read_pieces)
    (temporary / DENSE_FILE).replace(folder / DENSE_FILE)
    temporary.rmdir()


def _split_tensors(source: ModelFolder, family: MoeFamily) -> Iterator[_Slice]:
    """Yield the tensors that the files should have, and where each lies in `source`.

    `family` has their names. Tensors outside of sparse blocks, and those already in their place,
    keep their names.
    """
    for name, spec in source.tensors.items():
        match = re.fullmatch(rf"({re.escape(LAYERS)}\.\d+)\.{family.module}\.(.+)", name)
        if match is None:
            yield name, name, 0, spec
            continue
        layer, inner = match[1], match[2]
        block = f"{layer}.{family.block}"
        if inner == f"{family.router}.weight":
            yield f"{block}.{family.row_name}", name, 0, spec
        elif inner.startswith(f"{family.router}."):
            yield (
                f"{layer}.{family.module}.{inner.removeprefix(family.router + '.')}",
                name,
                0,
                spec,
            )
        elif inner in FUSED:
            yield from _split_experts(name, spec, block, family, FUSED[inner])
        else:
            yield name, name, 0, spec


def _split_experts(
    name: str, spec: TensorSpec, block: str, family: MoeFamily, parts: tuple[str, ...]
) -> Iterator[_Slice]:
    """Yield the tensors of the files that lie in a fused tensor [E, rows, columns].

    A family whose files have the fused tensor too gets it whole.

    Args:
        name, spec: name and specification of the fused tensor.
        block: prefix of the names in files.
        parts: parts of a feed-forward, such as gate and up, whose rows follow one another in each
            expert.
    """
    for target, covered in family.tensors.items():
        if "{e}" not in target and covered == parts:
            yield f"{block}.{target}", name, 0, spec
        elif "{e}" in target and covered[0] in parts:
            experts, rows, columns = spec.shape
            part = TensorSpec(spec.dtype, (rows // len(parts), columns))
            for expert in range(experts):
                first = (expert * len(parts) + parts.index(covered[0])) * part.numel
                yield f"{block}.{target.format(e=expert)}", name, first, part
