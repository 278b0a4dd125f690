"""Views of model folders with another vocabulary: embeddings and output matrices by row."""

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from megamod.errors import UserError
from megamod.merging.compatibility import get_vocab_size
from megamod.merging.naming import INPUT_NAMES, OUTPUT_NAMES
from megamod.merging.tensors import TensorSource, TensorView
from megamod.merging.vocabulary import Donors, Vocabulary
from megamod.states.forest import read_model_config
from megamod.states.layer_names import split_at_layer_number
from megamod.states.rows import read_tensor_rows
from megamod.states.stream import PIECE, TensorSpec

_EXPERT = r"(?:\.experts\.[^.]+)?"  # in models with a matrix of tokens per expert
_KNOWN = re.compile(rf"(?:^|\.)({INPUT_NAMES}|{OUTPUT_NAMES}){_EXPERT}\.(?:weight|bias)$")
_NOT_VOCABULARY = re.compile(r"position|wpe|token_type")
_INPUT = re.compile(rf"(?:^|\.)(?:{INPUT_NAMES}){_EXPERT}\.weight$")


class VocabularyView(TensorView):
    """A source with the vocabulary of the result of a merge.

    Rows that it lacks are read from other sources, which must stay open.

    Args:
        number: index of the source in `folders`, which are those of all models.
        vocabulary_tensors: for each source the names of its tensors with a row for every token.
        vocabulary: vocabulary of the result.
    Raises:
        UserError: if a row comes from a model whose tensor is of another width.
    """

    def __init__(
        self,
        number: int,
        folders: Sequence[TensorSource],
        vocabulary_tensors: Sequence[Sequence[str]],
        vocabulary: Vocabulary,
    ):
        super().__init__(folders[number])
        self._folders = folders
        self._rows, self._donors = vocabulary.rows[number], vocabulary.donors[number]
        self._vocabulary_tensors: set[str] = set()
        used = {model for donors in self._donors.values() for model, _ in donors}
        for name in vocabulary_tensors[number]:
            spec = self.source.tensors[name]
            self.tensors[name] = TensorSpec(spec.dtype, (len(vocabulary), *spec.shape[1:]))
            self._vocabulary_tensors.add(name)
            for model in used:
                shape = folders[model].tensors[name].shape
                if shape[1:] != spec.shape[1:]:
                    raise UserError(
                        f"{name} has shape {list(spec.shape)} in {self.folder}, {list(shape)} in "
                        f"{folders[model].folder}"
                    )

    def read_into(self, name: str, start: int, buffer: Tensor) -> None:
        """Fill a buffer (1-D, of the tensor's dtype) with elements of `name` from `start` on.

        In tensors of tokens, rows are in the order of the result's vocabulary, and the row of a
        missing token is the average of its donors' rows.
        """
        if name not in self._vocabulary_tensors:
            self.source.read_into(name, start, buffer)
            return
        spec = self.tensors[name]
        width = math.prod(spec.shape[1:])
        if not len(buffer) or not width:
            return
        first, last = start // width, (start + len(buffer) - 1) // width
        rows = self._rows[first : last + 1]
        result = torch.empty(len(rows), width, dtype=spec.dtype)
        if self.source.tensors[name].nbytes <= PIECE:
            whole = self.source.read(name).view(-1, width)
            result.copy_(whole[rows.clamp(min=0)])
        else:
            stored = (rows >= 0).nonzero()[:, 0]
            read = torch.empty(len(stored), width, dtype=spec.dtype)
            read_tensor_rows(self.source, name, rows[stored], read)
            result[stored] = read
        for row in (rows < 0).nonzero()[:, 0].tolist():
            result[row] = self._average_donor_rows(name, self._donors[first + row], width)
        buffer.copy_(result.view(-1)[start - first * width :][: len(buffer)])

    def _average_donor_rows(self, name: str, donors: Donors, width: int) -> Tensor:
        """Average rows of the models' tensors `name`, [width] float64; zeros without donors.

        Args:
            name: common name of the tensors.
            donors: rows to average, as (number of the model, number of the row).
            width: elements of a row.
        """
        total = torch.zeros(width, dtype=torch.float64)
        for model, row in donors:
            source = self._folders[model]
            read = torch.empty(width, dtype=source.tensors[name].dtype)
            source.read_into(name, row * width, read)
            total += read
        return total / max(1, len(donors))


def view_with_vocabulary(
    folders: Sequence[TensorSource], vocabulary: Vocabulary
) -> list[VocabularyView]:
    """Return views of the folders of a merge with the vocabulary of the result.

    Raises:
        UserError: naming folder and tensor, if it is not clear which tensors have a row for every
            token, or rows are missing or of several widths.
    """
    vocabulary_tensors = [_list_vocabulary_tensors(folder) for folder in folders]
    needed = [int(rows.max()) for rows in vocabulary.rows]
    for donors in vocabulary.donors:
        for model, row in (donor for token_donors in donors.values() for donor in token_donors):
            needed[model] = max(needed[model], row)
    for folder, names, most in zip(folders, vocabulary_tensors, needed, strict=True):
        for name in names:
            if folder.tensors[name].shape[0] <= most:
                raise UserError(
                    f"{folder.folder}: {name} has {folder.tensors[name].shape[0]} rows, but a "
                    f"word has row {most}"
                )
    return [VocabularyView(n, folders, vocabulary_tensors, vocabulary) for n in range(len(folders))]


def _list_vocabulary_tensors(folder: TensorSource) -> list[str]:
    """List the tensors of a folder with a row for every token, by name.

    Raises:
        UserError: if there is no embedding, or a tensor of that shape has an unknown name.
    """
    size = get_vocab_size(read_model_config(folder.folder))
    shaped = [
        name
        for name, spec in folder.tensors.items()
        if spec.dtype.is_floating_point
        and spec.shape[:1] == (size,)
        and split_at_layer_number(name) is None
    ]
    known = [name for name in shaped if _KNOWN.search(name)]
    unknown = [
        name
        for name in shaped
        if name not in known
        and len(folder.tensors[name].shape) > 1
        and not _NOT_VOCABULARY.search(name)
    ]
    if unknown or not any(_INPUT.search(name) for name in known):
        tensor = f"whether {unknown[0]}" if unknown else "which tensor"
        raise UserError(
            f"{folder.folder}: cannot tell {tensor} ({size} rows = vocab_size) is an embedding, "
            "so its rows cannot be reordered"
        )
    return known
