"""Model folders read as if they had another vocabulary: embeddings and output matrices by row."""

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from megamod.errors import UserError
from megamod.merging.compatibility import vocab_size
from megamod.merging.naming import INPUT_NAMES, OUTPUT_NAMES
from megamod.merging.settings import layer_of
from megamod.merging.tensors import TensorSource, View
from megamod.merging.vocabulary import Donors, Vocabulary
from megamod.states.forest import read_config
from megamod.states.rows import read_rows
from megamod.states.stream import PIECE, Spec

_EXPERT = r"(?:\.experts\.[^.]+)?"
_KNOWN = re.compile(rf"(?:^|\.)({INPUT_NAMES}|{OUTPUT_NAMES}){_EXPERT}\.(?:weight|bias)$")
_ELSE = re.compile(r"position|wpe|token_type")
_INPUT = re.compile(rf"(?:^|\.)(?:{INPUT_NAMES}){_EXPERT}\.weight$")


class ReindexedFolder(View):
    """A source with the vocabulary of the result of a merge.

    Rows that it lacks are read from other folders.

    Args:
        number: of the folder among `folders`, which are those of all models.
        by_word: for each folder its tensors with a row for every word.
    Attributes:
        tensors: specification of every tensor.
    """

    def __init__(
        self,
        number: int,
        folders: Sequence[TensorSource],
        by_word: Sequence[Sequence[str]],
        vocabulary: Vocabulary,
    ):
        super().__init__(folders[number])
        self._folders = folders
        self._rows, self._donors = vocabulary.rows[number], vocabulary.donors[number]
        self._by_word: set[str] = set()
        used = {model for donors in self._donors.values() for model, _ in donors}
        for name in by_word[number]:
            spec = self.source.tensors[name]
            self.tensors[name] = Spec(spec.dtype, (len(vocabulary), *spec.shape[1:]))
            self._by_word.add(name)
            for model in used:
                shape = folders[model].tensors[name].shape
                if shape[1:] != spec.shape[1:]:
                    raise UserError(
                        f"{name} has shape {list(spec.shape)} in {self.folder}, {list(shape)} in "
                        f"{folders[model].folder}"
                    )

    def read_into(self, name: str, start: int, buffer: Tensor) -> None:
        """As `TensorSource.read_into`."""
        if name not in self._by_word:
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
            source = self._folders[model]
            read = torch.empty(width, dtype=source.tensors[name].dtype)
            source.read_into(name, row * width, read)
            total += read
        return total / max(1, len(donors))


def reindexed(folders: Sequence[TensorSource], vocabulary: Vocabulary) -> list[ReindexedFolder]:
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


def _by_word(folder: TensorSource) -> list[str]:
    """Tensors with a row for every word.

    Raises:
        UserError: if there is no embedding, or a tensor of such a shape is not known.
    """
    size = vocab_size(read_config(folder.folder))
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
