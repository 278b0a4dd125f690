"""Reader of config.json: an object, whose sizes are possible. Importing this needs no torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megamod.errors import UserError
from megamod.schemas import read_json_object

SIZES = (
    *("num_hidden_layers", "n_layer", "num_layers", "hidden_size", "n_embd", "d_model"),
    *("vocab_size", "num_attention_heads", "intermediate_size"),
)
"""Fields that are numbers, or lists of them, in configurations of every family."""
_DEPTHS, _WIDTHS = SIZES[:3], SIZES[3:6]
_EMBEDDING_WIDTHS = ("embedding_size", "word_embed_proj_dim")  # where it is not that of the model
_NO_WEIGHTS = ("training_args.bin", "scheduler.pt")  # files of a Trainer
_SIZE_LIMIT = 2**31  # first number that a signed integer of 32 bits cannot hold
_ELEMENTS_PER_BYTE = 8  # of weight files, at most: elements of one bit


def read_config_file(folder: Path) -> dict[str, object]:
    """Read the fields of config.json in a model folder.

    Raises:
        UserError: if it is missing, no JSON object, has a `model_type` that is no text, sizes that
            no model has, or a larger model than the weight files beside it can hold.
    """
    file = Path(folder) / "config.json"
    try:
        fields = read_json_object(file)
    except FileNotFoundError:
        raise UserError(f"{folder}: there is no model (no config.json)") from None
    if not isinstance(fields.get("model_type", ""), str):
        raise UserError(f"{file}: model_type is {fields['model_type']!r:.80}, not a name")
    check_sizes(fields, str(file))
    check_model_fits_files(fields, Path(folder))
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


def check_model_fits_files(fields: Mapping[str, object], folder: Path) -> None:
    """Refuse a configuration of a model that the weight files in `folder` cannot hold.

    Otherwise a file of a few bytes could make a command build a model of billions of parameters,
    by its sizes or by the defaults of a family. Counted are the token embeddings, and of a layer
    one vector of the model's width and one matrix of a feed-forward. A folder without weight files
    passes.

    Args:
        fields: fields of its config.json, with or without defaults.
    Raises:
        UserError: naming config.json, the sizes and the bytes of the files.
    """
    files = (f for pattern in ("*.safetensors", "*.bin", "*.pt") for f in folder.glob(pattern))
    size = sum(f.stat().st_size for f in files if f.is_file() and f.name not in _NO_WEIGHTS)
    if not size:
        return

    def get_first_size(names: Sequence[str], default: int) -> int:
        """Return the first of these fields that is a whole number, else `default`."""
        return next((fields[name] for name in names if type(fields.get(name)) is int), default)

    layers, width = get_first_size(_DEPTHS, 0), get_first_size(_WIDTHS, 1)
    inner, words = get_first_size(("intermediate_size",), 0), get_first_size(("vocab_size",), 0)
    elements = layers * width * (1 + inner) + words * min(
        width, get_first_size(_EMBEDDING_WIDTHS, width)
    )
    if elements > _ELEMENTS_PER_BYTE * size:
        raise UserError(
            f"{folder / 'config.json'}: {layers} layers of width {width} and intermediate size "
            f"{inner}, and {words} token embeddings, cannot be in weight files of {size:,} bytes"
        )
