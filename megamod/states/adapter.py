"""Folders of LoRA adapters as peft writes them, and the seed whose weights each of them needs.

The folder of an adapter need not hold a configuration or a tokenizer: those of its seed are used.
Importing this needs no torch.
"""

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from megamod.errors import UserError
from megamod.schemas import read_json_object
from megamod.states.hub import try_download_from_hub
from megamod.states.weight_files import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    DENSE_FILE,
    INDEX_FILE,
    compute_files_digest,
    list_weight_files,
)

SEED_DIGEST = "seed_digest"
"""Entry in the metadata of an adapter's weight file: digest of the weights of its seed."""


def is_adapter(folder: Path) -> bool:
    """Return True for a folder of a LoRA adapter.

    It has adapter_config.json and no weights of a whole model.
    """
    # os.path.isfile is False for a name that is too long, where Path.is_file raises.
    whole = any(os.path.isfile(folder / name) for name in (DENSE_FILE, INDEX_FILE))
    return os.path.isfile(folder / ADAPTER_CONFIG) and not whole


def get_config_file(folder: Path) -> Path:
    """Return the path of adapter_config.json for an adapter, else of config.json.

    The file need not exist.
    """
    return folder / (ADAPTER_CONFIG if is_adapter(folder) else "config.json")


def resolve_seed_folder(folder: Path) -> Path:
    """Resolve an adapter to the folder of the model it was trained on; others are returned as is.

    The path of the seed is relative to the working directory, else to `folder`. A seed that is
    named as a repository of the hub is downloaded.

    Raises:
        UserError: if adapter_config.json cannot be read, or its seed is neither a folder here nor
            a repository of the hub.
    """
    folder = Path(folder)
    if not is_adapter(folder):
        return folder
    file = folder / ADAPTER_CONFIG
    name = read_adapter_config(folder).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{file}: base_model_name_or_path is {name!r}, not the folder of a model")
    for seed in (Path(name), folder / name):
        if (seed / "config.json").is_file():
            return seed.resolve()  # one path for one seed, however adapters spell it
    downloaded, reason = try_download_from_hub(name)
    if downloaded is not None:
        return downloaded
    reason = reason and f" ({reason})"
    raise UserError(
        f"{file}: there is no model at its base_model_name_or_path {name!r}{reason}; write the "
        "folder of the seed there"
    )


def read_adapter_config(folder: Path) -> dict[str, object]:
    """Read the fields of adapter_config.json in an adapter's folder.

    Raises:
        UserError: if there is none, or it is no JSON object.
    """
    file = folder / ADAPTER_CONFIG
    try:
        return read_json_object(file)
    except FileNotFoundError:
        raise UserError(
            f"{folder}: is not the folder of an adapter (no {ADAPTER_CONFIG})"
        ) from None


def check_seed_weights(folder: Path) -> None:
    """Refuse the folder of an adapter whose seed has other weights than it was trained on.

    Whole models pass, and adapters of other programs, which do not record the digest of their seed.

    Raises:
        UserError: if the weights differ, or the seed or a file is missing or damaged.
    """
    if not is_adapter(folder):
        return
    seed, file = resolve_seed_folder(folder), folder / ADAPTER_FILE
    try:
        with safe_open(file, framework="np") as tensors:
            recorded = (tensors.metadata() or {}).get(SEED_DIGEST)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be opened: {error}") from error
    if recorded is not None and recorded != compute_seed_digest(seed):
        raise UserError(
            f"{folder}: the adapter was trained on other weights than those that are in {seed} now"
        )


def compute_seed_digest(seed: Path) -> str:
    """Compute the digest of the weight files in a seed's folder, as adapters record it.

    Raises:
        UserError: as `list_weight_files`.
    """
    return compute_files_digest(list_weight_files(seed))
