"""The ids of tokens in the tokenizer files of a model folder, and their comparison between folders.

Added tokens count like those of the base vocabulary: tokenizer.json, added_tokens.json and
tokenizer_config.json (`added_tokens_decoder`) all list some.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from megamod.errors import UserError

_RAW = ("merges.txt", "vocab.bpe", "dict.txt")
"""Files of subword merges and dictionaries, which are not parsed; their bytes must be equal."""


def _read_token_ids(folder: Path) -> dict[str, int]:
    """Map the tokens in the vocabulary files of a folder (`_READERS`) to their ids; empty without
    such files.

    Of a token in two files the later file counts; values that are no whole numbers are skipped.

    Raises:
        UserError: naming a file that cannot be read, or whose content does not fit its name.
    """
    folder, ids = Path(folder), {}
    for name, read in _READERS.items():
        if (folder / name).is_file():
            try:
                ids |= dict(read(_read_vocabulary_content(folder / name)))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise UserError(
                    f"{folder / name}: is not the file of a tokenizer: {error!r}"
                ) from error
    return ids


def check_same_token_ids(first: Path, second: Path, remedy: str = "") -> None:
    """Refuse two folders whose tokenizers give one id to two tokens, or one token two ids.

    Tokens that only one of them has are allowed. Folders without tokenizer files pass. Files of
    merges and SentencePiece models must be equal if both folders have them.

    Args:
        first, second: model or tokenizer folders.
        remedy: end of the message, such as "; unite them".
    Raises:
        UserError: naming both folders, and the token and id or the file in which they differ; or a
            file that cannot be read.
    """
    first, second = Path(first), Path(second)
    if _have_identical_files(first, second):
        return
    ids, other = _read_token_ids(first), _read_token_ids(second)
    tokens = {number: token for token, number in ids.items()}
    for token, number in other.items():
        known = tokens.get(number, token)
        if known != token:
            raise UserError(
                f"{first} and {second}: their tokenizers differ: id {number} is {known!r} in the "
                f"first and {token!r} in the second, so equal ids are different tokens{remedy}"
            )
        if ids.get(token, number) != number:
            raise UserError(
                f"{first} and {second}: their tokenizers differ: {token!r} has id {ids[token]} in "
                f"the first and {number} in the second{remedy}"
            )
    for name in (*_RAW, *sorted({file.name for file in first.glob("*.model")})):
        files = first / name, second / name
        if all(file.is_file() for file in files) and not _have_equal_bytes(*files):
            raise UserError(
                f"{first} and {second}: their tokenizers differ, as {name} shows, so equal ids are "
                f"different tokens{remedy}"
            )


def _have_identical_files(first: Path, second: Path) -> bool:
    """Return True if two folders, `first` and `second`, hold byte-identical tokenizer files."""
    names = (*_READERS, *_RAW)
    pairs = [(first / name, second / name) for name in names]
    pairs += [(file, second / file.name) for file in sorted(first.glob("*.model"))]
    pairs += [(first / file.name, file) for file in sorted(second.glob("*.model"))]
    return all(
        file.is_file() is other.is_file() and (not file.is_file() or _have_equal_bytes(file, other))
        for file, other in pairs
    )


def _have_equal_bytes(first: Path, second: Path) -> bool:
    """Return True if the files `first` and `second` have the same content.

    Raise UserError if one cannot be read.
    """
    return _read_bytes(first) == _read_bytes(second)


def _read_bytes(file: Path) -> bytes:
    """Read a tokenizer file; raise UserError, naming the file, if that fails."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error


def _read_vocabulary_content(file: Path) -> object:
    """Read a file as parsed JSON, or as a list of lines if its name does not end in .json.

    Raise UserError if it cannot be read, is not UTF-8 or is not JSON.
    """
    raw = _read_bytes(file)
    try:
        text = raw.decode("utf-8")
        return json.loads(text) if file.suffix == ".json" else text.removesuffix("\n").split("\n")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error


def _parse_tokenizer_json(content: Mapping) -> Iterator[tuple[str, int]]:
    """Yield token and id of the vocabulary and the added tokens of tokenizer.json.

    `content` is the parsed file.
    """
    model = content.get("model") or {}
    listed = model.get("vocab") or {}
    if isinstance(listed, list):  # unigrams, each with its score
        listed = {token: number for number, (token, _) in enumerate(listed)}
    yield from listed.items()
    for entry in content.get("added_tokens") or ():
        yield entry["content"], entry["id"]


def _parse_id_mapping(content: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Yield token and id of a vocabulary; values that are no whole numbers are skipped.

    `content` is a parsed file that maps tokens to ids.
    """
    # Some tokenizers nest a vocabulary per language; those ids are not comparable by token.
    for token, number in content.items():
        if type(number) is int:
            yield token, number


def _parse_added_tokens(content: Mapping) -> Iterator[tuple[str, int]]:
    """Yield token and id of the added tokens of tokenizer_config.json."""
    for number, entry in (content.get("added_tokens_decoder") or {}).items():
        yield entry["content"] if isinstance(entry, dict) else str(entry), int(number)


def _parse_vocabulary_lines(content: list[str]) -> Iterator[tuple[str, int]]:
    """Yield token and id of a vocabulary with one token a line: the line and its number from 0."""
    for number, line in enumerate(content):
        yield line.rstrip("\r"), number


# Later files win where two list a token.
_READERS = {
    "vocab.txt": _parse_vocabulary_lines,
    "vocab.json": _parse_id_mapping,
    "encoder.json": _parse_id_mapping,
    "tokenizer.json": _parse_tokenizer_json,
    "added_tokens.json": _parse_id_mapping,
    "tokenizer_config.json": _parse_added_tokens,
}
