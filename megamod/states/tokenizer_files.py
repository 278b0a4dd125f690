"""Files that make up a tokenizer in a model folder."""

from pathlib import Path

from megamod.files import write_atomic
from megamod.states.adapter import resolve_seed_folder

VOCABULARIES = ("vocab.txt", "vocab.json", "merges.txt", "encoder.json", "vocab.bpe", "dict.txt")
"""Files that hold nothing but a vocabulary or merges, besides SentencePiece models."""

PATTERNS = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *(*VOCABULARIES, "*.model", "bpe.codes"),
)
"""Glob patterns of all files of a tokenizer, whatever its format."""


def list_tokenizer_files(folder: Path) -> list[Path]:
    """List the files of the tokenizer in a folder, sorted; empty if it has no tokenizer."""
    return sorted({file for pattern in PATTERNS for file in folder.glob(pattern) if file.is_file()})


def find_tokenizer_folder(folder: Path) -> Path:
    """Find the folder of a model's tokenizer: `folder`, or else the seed's if it is an adapter.

    The folder of a whole model is returned even if it has no tokenizer.

    Raises:
        UserError: as `resolve_seed_folder`, for an adapter without a tokenizer of its own.
    """
    return folder if list_tokenizer_files(folder) else resolve_seed_folder(folder)


def copy_tokenizer(source: Path, folder: Path) -> list[Path]:
    """Copy the tokenizer files of `source` into `folder`, unless that has a tokenizer.

    Each file appears whole or not at all.

    Returns:
        paths of the copies; empty if there was nothing to copy.
    """
    if list_tokenizer_files(folder):
        return []
    files = list_tokenizer_files(source)
    for file in files:
        write_atomic(folder / file.name, file.read_bytes())
    return [folder / file.name for file in files]
