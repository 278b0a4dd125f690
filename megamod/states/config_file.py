"""Reader of config.json: an object, whose sizes are possible. Importing this needs no torch."""

from collections.abc import Mapping
from pathlib import Path

from megamod.errors import UserError
from megamod.schemas import read_json_object

SIZES = (
    *("num_hidden_layers", "n_layer", "num_layers", "hidden_size", "n_embd", "d_model"),
    *("vocab_size", "num_attention_heads", "intermediate_size"),
)
"""Fields that are numbers, or lists of them, in configurations of every family."""
_DEPTHS, _WIDTHS = SIZES[:3], SIZES[3:6]
_SIZE_LIMIT = 2**31  # first number that a signed integer of 32 bits cannot hold
_ELEMENTS_PER_BYTE = 8  # of weight files, at most: elements of one bit


def read_config_file(folder: Path) -> dict[str, object]:
    """Read the fields of config.json in a model folder.

    Raises:
        UserError: if it is missing, no JSON object, has a `model_type` that is no text, sizes that
            no model has, or more layers than the weight files beside it can hold.
    """
    file = Path(folder) / "config.json"
    try:
        fields = read_json_object(file)
    except FileNotFoundError:
        raise UserError(f"{folder}: there is no model (no config.json)") from None
    if not isinstance(fields.get("model_type", ""), str):
        raise UserError(f"{file}: model_type is {fields['model_type']!r:.80}, not a name")
    check_sizes(fields, str(file))
    check_layers_fit_files(fields, Path(folder))
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
        if type(value) is not int or not 0 <= value < _SIZE_LIMIT:
            raise UserError(
                f"{where}: {name} is {value!r:.80}, not a whole number from 0 to {_SIZE_LIMIT - 1}"
            )


def check_layers_fit_files(fields: Mapping[str, object], folder: Path) -> None:
    """Refuse a configuration with more layers than the weight files in `folder` can hold.

    Otherwise a file of a few bytes could make a command build a model of a billion layers. A layer
    counts as one vector of the model's width. A folder without weight files passes.

    Args:
        fields: fields of its config.json.
    Raises:
        UserError: naming config.json, the layers, their width and the bytes of the files.
    """
    files = (f for pattern in ("*.safetensors", "*.bin", "*.pt") for f in folder.glob(pattern))
    size = sum(file.stat().st_size for file in files if file.is_file())
    layers = next((fields[n] for n in _DEPTHS if isinstance(fields.get(n), int)), 0)
    width = next((fields[n] for n in _WIDTHS if isinstance(fields.get(n), int)), 1)
    if size and layers * width > _ELEMENTS_PER_BYTE * size:
        raise UserError(
            f"{folder / 'config.json'}: {layers} layers of width {width} cannot be in weight files "
            f"of {size:,} bytes"
        )
