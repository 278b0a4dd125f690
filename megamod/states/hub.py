"""Models of the Hugging Face hub as local folders."""

import re
from functools import cache
from pathlib import Path

from megamod.errors import UserError

TOKENIZER_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
"""Patterns of the files that are downloaded for a tokenizer, and for its model's configuration."""
HUB_FILES = [*TOKENIZER_FILES, "*.safetensors", "*.bin"]
"""Patterns of the files that are downloaded for a model: configuration, weights and tokenizer."""


def is_hub_name(name: str) -> bool:
    """Return True for `owner/model`, unless it is an existing path; the hub is not asked."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def try_download_from_hub(name: str, weights: bool = True) -> tuple[Path | None, str]:
    """Download the repository `name` of the hub, if it is not in the cache; no error if missing.

    Args:
        name: repository of the hub, or any other text.
        weights: False for a tokenizer alone, see `download_from_hub`.
    Returns:
        the folder and ""; or None and the reason, which is empty if `is_hub_name` is False.
    """
    if not is_hub_name(name):
        return None, ""
    try:
        return download_from_hub(name, weights), ""
    except UserError as error:
        return None, str(error)


def find_or_download_folder(name: str, flag: str, weights: bool = True) -> Path:
    """Return the path that a flag names; download the hub's repository if no such path exists.

    Args:
        name: path or repository of the hub.
        flag: flag of the command line that named it, for messages.
        weights: False for a tokenizer alone, see `download_from_hub`.
    Raises:
        UserError: if there is neither; without a network, if it is not in the cache.
    """
    if Path(name).exists():
        return Path(name)
    downloaded, reason = try_download_from_hub(name, weights)
    if downloaded is None:
        reason = reason and f"; {reason}"
        raise UserError(f"{flag} {name}: is no folder and no repository of the hub{reason}")
    return downloaded


@cache
def download_from_hub(name: str, weights: bool = True) -> Path:
    """Download the files of a model from the hub; return their folder in its cache.

    These are `HUB_FILES`, or without `weights` `TOKENIZER_FILES`. Files that are in the cache are
    not downloaded again. Within a process the hub is asked once for each call.

    Raises:
        UserError: with the reason, if there is none or it cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        patterns = HUB_FILES if weights else TOKENIZER_FILES
        return Path(snapshot_download(name, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"the hub: {name} is not in the cache, and the hub cannot be reached; fetch it with "
            f"`hf download {name}` where there is a network, and take HF_HOME along"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise UserError(f"the hub: {' '.join(str(error).split())[:200]}") from error
