"""Weight files of dense models and of models with experts.

    dense, ELM    model.safetensors
    DEMix         shared.safetensors, expert_<domain>.safetensors, model.safetensors.index.json

The index is the one of sharded Hugging Face checkpoints, so `from_pretrained` reads both kinds.
"""

import json
import math
import struct
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megamod.dist.scope import convert_to_dense_name, parse_expert_domain
from megamod.errors import UserError, report_damage
from megamod.files import write_json
from megamod.states.weight_files import DENSE_FILE, INDEX_FILE, read_index

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of element types in a safetensors header."""


def select_weight_file(name: str, has_experts: bool) -> str:
    """Select the name of the weight file that holds the parameter `name`.

    Args:
        has_experts: True for a model with domain experts, whose weights are in several files;
            False for a sparse mixture, whose experts have no domains.
    """
    if not has_experts:
        return DENSE_FILE
    domain = parse_expert_domain(name)
    return f"expert_{domain}.safetensors" if domain else "shared.safetensors"


def build_safetensors_header(
    specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, list[str]]:
    """Build the header of a safetensors file.

    Args:
        specs: element type, one of `DTYPES`, and shape of each tensor by name.
        metadata: text entries of the header.
    Returns:
        the header, its length in the first 8 bytes included, and the names in the order in which
        their tensors must follow it.
    Source: the format is described at https://github.com/huggingface/safetensors.
    """
    # Widest types first, so that every tensor begins at a multiple of its element's size.
    names = sorted(specs, key=lambda name: (-specs[name][0].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in names:
        dtype, shape = specs[name]
        stop = offset + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, names


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file from the memory of the tensors, which may be views of one storage.

    Unlike the writer of the safetensors library, this does not copy tensors that are contiguous on
    the CPU, and accepts views: the optimizer state of checkpoints is views of flat buffers. The
    file is not written atomically: after an error it is incomplete.

    Args:
        path: file to create or replace.
        tensors: tensors by name, on any device.
        metadata: text entries of the header.
    Raises:
        OSError: if the file cannot be written.
    """
    header, names = build_safetensors_header(
        {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, metadata
    )
    with open(path, "wb") as file:
        file.write(header)
        for name in names:
            plain = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(memoryview(plain.view(torch.uint8).numpy()))


def write_weights(folder: Path, state: Mapping[str, Tensor], has_experts: bool) -> list[Path]:
    """Write tensors into the weight files of `select_weight_file`; return the paths of the files.

    Existing files are replaced, not atomically. No index is written, see `write_index`.

    Args:
        folder: existing folder.
        state: tensors by name, on any device.
        has_experts: see `select_weight_file`.
    Raises:
        OSError: if a file cannot be written.
    """
    files: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        files.setdefault(select_weight_file(name, has_experts), {})[name] = tensor
    for file, tensors in files.items():
        write_tensors(folder / file, tensors, {"format": "pt"})
    return [folder / file for file in files]


def write_index(folder: Path, names: Iterable[str], total_bytes: int) -> Path:
    """Write the index of the weight files of a model with experts; return its path.

    Args:
        names: names of all tensors.
        total_bytes: bytes of all tensors.
    """
    weight_map = {name: select_weight_file(name, has_experts=True) for name in names}
    write_json(
        folder / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    )
    return folder / INDEX_FILE


def is_sharded(folder: Path) -> bool:
    """Return True if the weights of a folder are in the files of model.safetensors.index.json.

    False if there is no index, or a model.safetensors as well: that is read then, as transformers
    does.
    """
    return (folder / INDEX_FILE).exists() and not (folder / DENSE_FILE).exists()


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read every tensor of a model folder, by name, onto the CPU.

    Raises:
        UserError: if the folder has no weights, its index is malformed, or a weight file is missing
            or damaged.
    """
    folder = Path(folder)
    files = sorted(set(read_index(folder).values())) if is_sharded(folder) else [DENSE_FILE]
    state: dict[str, Tensor] = {}
    for file in files:
        if not (folder / file).exists():
            raise UserError(f"{folder}: the weight file {file} is missing")
        with (
            report_damage(f"{folder / file}: cannot be read as weights"),
            safe_open(folder / file, framework="pt") as tensors,
        ):
            state |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return state


def find_non_finite_weight(folder: Path) -> str | None:
    """Find the first tensor with a NaN or an infinity in the weight files at or below `folder`.

    Only safetensors files are read, one tensor at a time.

    Returns:
        name and file of the tensor, for a message; None if all are finite.
    Raises:
        SafetensorError, OSError: if a file cannot be read.
    """
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if not is_finite(tensors.get_tensor(name)):
                    return f"{name} in {file.relative_to(folder)}"
    return None


def is_finite(tensor: Tensor) -> bool:
    """Return True if no element of a tensor is NaN or infinite; True for integers."""
    # A finite sum has finite terms, and is cheaper to compute than a mask of all elements. Only a
    # sum that overflows needs the mask.
    return not tensor.is_floating_point() or bool(
        tensor.sum(dtype=torch.float32).isfinite() or tensor.isfinite().all()
    )


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Refuse weights with a NaN or an infinity.

    Args:
        tensors: names and weights.
        where: origin of the weights, for the message.
    Raises:
        UserError: naming the first such tensor.
    """
    bad = next((name for name, tensor in tensors if not is_finite(tensor)), None)
    if bad is not None:
        raise UserError(f"{where}: {bad} holds values that are not finite (NaN or infinite)")


def extract_expert_weights(state: Mapping[str, Tensor], domain: str) -> dict[str, Tensor]:
    """Extract the shared weights and one expert's, by their names in a dense model.

    Args:
        state: weights of a model with experts by name; the result shares its tensors.
    Raises:
        UserError: if the state holds no expert of that domain.
    """
    experts = {owner for name in state if (owner := parse_expert_domain(name))}
    if domain not in experts:
        known = ", ".join(sorted(experts)) or "none"
        raise UserError(f"no expert of domain {domain!r}; there are {known}")
    return {
        convert_to_dense_name(name): tensor
        for name, tensor in state.items()
        if parse_expert_domain(name) in (None, domain)
    }


def assign_to_experts(state: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Assign the weights of a dense model to the parameters of a model with experts.

    Every expert gets the same weights. The tensors themselves are shared and not copied.

    Args:
        state: weights of the dense model by name.
        names: parameter names of the model with experts.
    Returns:
        a weight for each of `names`.
    Raises:
        UserError: if the dense model lacks a weight.
    """
    missing = [name for name in names if convert_to_dense_name(name) not in state]
    if missing:
        raise UserError(
            f"the weights lack {convert_to_dense_name(missing[0])} (and {len(missing) - 1} more)"
        )
    return {name: state[convert_to_dense_name(name)] for name in names}
