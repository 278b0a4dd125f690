"""Reader of config.json: an object, whose sizes are possible. Importing this needs no torch."""

from collections.abc import Mapping
from pathlib import Path

from megamod.documents import read_object
from megamod.errors import UserError

SIZES = (
    *("num_hidden_layers", "n_layer", "num_layers", "hidden_size", "n_embd", "d_model"),
    *("vocab_size", "num_attention_heads", "intermediate_size"),
)
"""Fields that are numbers, or lists of them, in configurations of every family."""
LARGEST = 2**31
BITS = 8  # elements per byte of the weight files at most: one bit each


def read_config_file(folder: Path) -> dict[str, object]:
    """Read the fields of config.json in a model folder.

    Raises:
        UserError: if it is missing, no JSON object, or claims sizes that no model has or that the
            weight files beside it cannot hold.
    """
    file = Path(folder) / "config.json"
    try:
        fields = read_object(file)
    except FileNotFoundError:
        raise UserError(f"{folder}: there is no model (no config.json)") from None
    if not isinstance(fields.get("model_type", ""), str):
        raise UserError(f"{file}: model_type is {fields['model_type']!r:.80}, not a name")
    check_sizes(fields, str(file))
    check_claims(fields, Path(folder))
    return fields


def check_sizes(fields: Mapping[str, object], where: str) -> None:
    """Refuse fields of `SIZES` that are neither whole numbers of a possible size, lists, nor null.

    Args:
        fields: fields of a config.json.
        where: the file, for messages.
    Raises:
        UserError: naming `where` and the field.
    """
    for name in SIZES:
        value = fields.get(name)
        if value is None or isinstance(value, list):
            continue
        if type(value) is not int or not 0 <= value < LARGEST:
            raise UserError(f"{where}: {name} is {value!r:.80}, not a whole number of 0 or more")


def check_claims(fields: Mapping[str, object], folder: Path) -> None:
    """Refuse a configuration with more layers than the weight files in `folder` can hold.

    Otherwise a file of a few bytes could make a command build a model of a billion layers. A folder
    without weight files passes.

    Raises:
        UserError: naming the folder and the field.
    """
    files = (f for pattern in ("*.safetensors", "*.bin", "*.pt") for f in folder.glob(pattern))
    size = sum(file.stat().st_size for file in files if file.is_file())
    layers = next((fields[n] for n in SIZES[:3] if isinstance(fields.get(n), int)), 0)
    width = next((fields[n] for n in SIZES[3:6] if isinstance(fields.get(n), int)), 1)
    if size and layers * width > BITS * size:
        raise UserError(
            f"{folder / 'config.json'}: {layers} layers of width {width} cannot be in weight files "
            f"of {size:,} bytes"
        )
