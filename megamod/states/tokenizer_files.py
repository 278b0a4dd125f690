"""Names of the files that make up a tokenizer in a model folder."""

from pathlib import Path

from megamod.files import write_atomic

VOCABULARIES = ("vocab.txt", "vocab.json", "merges.txt", "encoder.json", "vocab.bpe", "dict.txt")
"""Files that hold nothing but a vocabulary or merges, besides SentencePiece models."""

PATTERNS = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *(*VOCABULARIES, "*.model"),
)


def tokenizer_files(folder: Path) -> list[Path]:
    """Files of the tokenizer in a folder, sorted; none if it has no tokenizer."""
    return sorted({file for pattern in PATTERNS for file in folder.glob(pattern) if file.is_file()})


def lend_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer of one folder into another that has none."""
    if not tokenizer_files(folder):
        for file in tokenizer_files(source):
            write_atomic(folder / file.name, file.read_bytes())
