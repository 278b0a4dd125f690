"""Weight files of a model folder. Importing this needs no torch."""

import json
from pathlib import Path

from megamod.errors import UserError

DENSE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def has_weights(folder: Path) -> bool:
    """Return True if a model folder holds weights, of any format that transformers reads.

    Raises:
        UserError: if a file that an index names is missing.
    """
    whole = (DENSE_FILE, INDEX_FILE, "pytorch_model.bin", "pytorch_model.bin.index.json")
    name = next((name for name in whole if (folder / name).exists()), None)
    if name is None:
        stray = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("pytorch_model*.bin"))
        if stray:
            raise UserError(f"{stray[0]}: no {INDEX_FILE} says which weights the file holds")
        return False
    if name.endswith(".index.json"):
        for file in sorted(set(read_index(folder, name).values())):
            if not (folder / file).is_file():
                raise UserError(f"{folder}: the weight file {file} is missing")
    return True


def read_index(folder: Path, name: str = INDEX_FILE) -> dict[str, str]:
    """Read the index of sharded weights: file names by tensor.

    Raises:
        UserError: if it is not such an index, or names files outside of its folder.
    """
    file = folder / name
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        weight_map = {str(tensor): shard for tensor, shard in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: is not the index of a model: {error!r:.300}") from error
    if not weight_map:
        raise UserError(f"{file}: names no files")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            raise UserError(f"{file}: {tensor} is in {shard!r:.80}, not a file of this folder")
    return weight_map
