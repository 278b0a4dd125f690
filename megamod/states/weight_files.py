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
        try:
            files = set(json.loads((folder / name).read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / name}: is no index of weights: {error!r}") from error
        for file in sorted(map(str, files)):
            if not (folder / file).is_file():
                raise UserError(f"{folder}: the weight file {file} is missing")
    return True
