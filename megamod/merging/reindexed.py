"""Model folders read as if they had another vocabulary: embeddings and output matrices by row."""

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megamod.errors import UserError
from megamod.merging.fitting import counterpart
from megamod.merging.settings import layer_of
from megamod.merging.vocabulary import Donors, Vocabulary
from megamod.states.forest import read_config
from megamod.states.rows import read_rows
from megamod.states.stream import PIECE, ModelFolder, Spec

_EMBEDDING = r"embed_tokens|wte|word_embeddings?|tok_embeddings|embed_in|shared|tokens"
_OUTPUT = r"lm_head|embed_out|output|decoder|generator_lm_head|predictions"
_KNOWN = re.compile(rf"(?:^|\.)({_EMBEDDING}|{_OUTPUT})(?:\.experts\.[^.]+)?\.(?:weight|bias)$")
_ELSE = re.compile(r"position|wpe|token_type")
_INPUT = re.compile(rf"(?:^|\.)(?:{_EMBEDDING})(?:\.experts\.[^.]+)?\.weight$")


class ReindexedFolder:
    """An open `ModelFolder` with the vocabulary of the result of a merge.

    It is read like a `ModelFolder`. Rows that it lacks are read from other folders.

    Args:
        number: of the folder among `folders`, which are those of all models.
        by_word: for each folder its tensors with a row for every word.
    Attributes:
        tensors: specification of every tensor.
    """

    def __init__(
        self,
        number: int,
        folders: Sequence[ModelFolder],
        by_word: Sequence[Sequence[str]],
        vocabulary: Vocabulary,
    ):
        self.source = folders[number]
        self.folder, self.member = self.source.folder, self.source.member
        self._folders = folders
        self._rows, self._donors = vocabulary.rows[number], vocabulary.donors[number]
        self.tensors: dict[str, Spec] = dict(self.source.tensors)
        self._there: dict[str, list[str]] = {}
        used = {model for donors in self._donors.values() for model, _ in donors}
        for name in by_word[number]:
            spec = self.source.tensors[name]
            self.tensors[name] = Spec(spec.dtype, (len(vocabulary), *spec.shape[1:]))
            self._there[name] = [
                counterpart(self.source, name, other, name) if model in used else name
                for model, other in enumerate(folders)
            ]
            for model in used:
                shape = folders[model].tensors[self._there[name][model]].shape
                if shape[1:] != spec.shape[1:]:
                    raise UserError(
                        f"{name} has shape {list(spec.shape)} in {self.folder}, {list(shape)} in "
                        f"{folders[model].folder}"
                    )

    def read_into(self, name: str, start: int, buffer: Tensor) -> None:
        """As `ModelFolder.read_into`."""
        if name not in self._there:
            self.source.read_into(name, start, buffer)
            return
        spec = self.tensors[name]
        width = math.prod(spec.shape[1:])
        if not len(buffer) or not width:
            return
        first, last = start // width, (start + len(buffer) - 1) // width
        rows = self._rows[first : last + 1]
        found = torch.empty(len(rows), width, dtype=spec.dtype)
        if self.source.tensors[name].nbytes <= PIECE:
            whole = self.source.read(name).view(-1, width)
            found.copy_(whole[rows.clamp(min=0)])
        else:
            own = (rows >= 0).nonzero()[:, 0]
            read = torch.empty(len(own), width, dtype=spec.dtype)
            read_rows(self.source, name, rows[own], read)
            found[own] = read
        for place in (rows < 0).nonzero()[:, 0].tolist():
            found[place] = self._mean(name, self._donors[first + place], width)
        buffer.copy_(found.view(-1)[start - first * width :][: len(buffer)])

    def _mean(self, name: str, donors: Donors, width: int) -> Tensor:
        """The mean of rows of other models, [width]; of none zeros."""
        total = torch.zeros(width, dtype=torch.float64)
        for model, row in donors:
            source, theirs = self._folders[model], self._there[name][model]
            read = torch.empty(width, dtype=source.tensors[theirs].dtype)
            source.read_into(theirs, row * width, read)
            total += read
        return total / max(1, len(donors))

    def read(self, name: str) -> Tensor:
        """A whole tensor, in memory of its own."""
        spec = self.tensors[name]
        flat = torch.empty(spec.numel, dtype=spec.dtype)
        self.read_into(name, 0, flat)
        return flat.view(spec.shape)

    def digest(self) -> str:
        """The digest of what is on disk."""
        return self.source.digest()


def reindexed(folders: Sequence[ModelFolder], vocabulary: Vocabulary) -> list[ReindexedFolder]:
    """The folders of a merge, each with the vocabulary of the result.

    Raises:
        UserError: naming folder and tensor, if it is not known what is an embedding, or rows are
            missing.
    """
    by_word = [_by_word(folder) for folder in folders]
    needed = [int(rows.max()) for rows in vocabulary.rows]
    for donors in vocabulary.donors:
        for model, row in (donor for every in donors.values() for donor in every):
            needed[model] = max(needed[model], row)
    for folder, names, most in zip(folders, by_word, needed, strict=True):
        for name in names:
            if folder.tensors[name].shape[0] <= most:
                raise UserError(
                    f"{folder.folder}: {name} has {folder.tensors[name].shape[0]} rows, none of "
                    f"number {most}, which a word is said to have"
                )
    return [ReindexedFolder(n, folders, by_word, vocabulary) for n in range(len(folders))]


def _by_word(folder: ModelFolder) -> list[str]:
    """Tensors with a row for every word.

    Raises:
        UserError: if there is no embedding, or a tensor of such a shape is not known.
    """
    size = _vocab_size(read_config(folder.folder))
    shaped = [
        name
        for name, spec in folder.tensors.items()
        if spec.dtype.is_floating_point and spec.shape[:1] == (size,) and layer_of(name) is None
    ]
    known = [name for name in shaped if _KNOWN.search(name)]
    unknown = [
        name
        for name in shaped
        if name not in known and len(folder.tensors[name].shape) > 1 and not _ELSE.search(name)
    ]
    if unknown or not any(_INPUT.search(name) for name in known):
        tensor = f"whether {unknown[0]}" if unknown else "which tensor"
        raise UserError(
            f"{folder.folder}: cannot tell {tensor} ({size} rows = vocab_size) is an embedding, "
            "so its rows cannot be reordered"
        )
    return known


def _vocab_size(config: Mapping[str, object]) -> object:
    inner = config.get("text_config")
    return config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None)
