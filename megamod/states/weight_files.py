"""Weight files of a model folder. Importing this needs no torch."""

import hashlib
import zlib
from collections.abc import Iterable
from pathlib import Path

from megamod.errors import UserError
from megamod.schemas import read_json_object

DENSE_FILE = "model.safetensors"
"""All weights of a model that is not sharded."""
INDEX_FILE = "model.safetensors.index.json"
"""File of each tensor, where weights are in several files."""
ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
"""Files of a LoRA adapter in the format of peft."""


def has_weights(folder: Path) -> bool:
    """Return True if a folder holds the weights of a model or of a LoRA adapter.

    Raises:
        UserError: as `list_weight_files`.
    """
    return bool(list_weight_files(folder)) or (folder / ADAPTER_FILE).is_file()


def list_weight_files(folder: Path) -> list[Path]:
    """List the weight files of a whole model, sorted by name; empty if there are none.

    These are the first that exists of model.safetensors, the shards of its index,
    pytorch_model.bin, and the shards of its index.

    Raises:
        UserError: if an index is malformed, a shard is missing, or the only weight files are other
            ones, which no index lists.
    """
    whole = (DENSE_FILE, INDEX_FILE, "pytorch_model.bin", "pytorch_model.bin.index.json")
    name = next((name for name in whole if (folder / name).exists()), None)
    if name is None:
        stray = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("pytorch_model*.bin"))
        stray = [file for file in stray if file.name != ADAPTER_FILE]
        if stray:
            raise UserError(f"{stray[0]}: no {INDEX_FILE} says which weights the file holds")
        return []
    if not name.endswith(".index.json"):
        return [folder / name]
    files = sorted(set(read_index(folder, name).values()))
    for file in files:
        if not (folder / file).is_file():
            raise UserError(f"{folder}: the weight file {file} is missing")
    return [folder / file for file in files]


def read_index(folder: Path, name: str = INDEX_FILE) -> dict[str, str]:
    """Read the index of sharded weights: tensor name -> file name.

    Args:
        folder: folder of the index.
        name: file name of the index.
    Raises:
        UserError: if it is missing or malformed, or names no files or files outside of its folder.
    """
    file = folder / name
    try:
        weight_map = read_json_object(file).get("weight_map")
    except FileNotFoundError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{file}: has no `weight_map` that names the file of each tensor")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            raise UserError(f"{file}: {tensor} is in {shard!r:.80}, not a file of this folder")
    return weight_map


def compute_files_digest(files: Iterable[Path]) -> str:
    """Compute a digest of files: SHA-256 of their names and of the CRC-32 of each MiB of them.

    It is computed faster than SHA-256 of the content. It reveals damaged or replaced weights, but
    not weights forged to have the same CRC-32. The order of files counts, their folders do not.
    Raises OSError if a file cannot be read.
    """
    hashed, buffer = hashlib.sha256(), bytearray(1 << 20)
    for file in files:
        hashed.update(file.name.encode())
        with open(file, "rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                part = memoryview(buffer)[:count]
                hashed.update(zlib.crc32(part).to_bytes(4, "little"))
    return f"crc32-sha256:{hashed.hexdigest()}"
