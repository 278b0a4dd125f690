"""Whether models can be merged: found out from headers and configurations, before any work."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from megamod.errors import UserError
from megamod.states.forest import read_config
from megamod.states.stream import PIECE, ModelFolder, Spec, pieces
from megamod.states.tokenizer_files import VOCABULARIES

# Fields of configurations that change what weights of the same shapes mean.
_MEANING = (
    *("model_type", "vocab_size", "num_attention_heads", "num_key_value_heads", "n_head"),
    *("hidden_act", "activation_function"),
)


def check_configs(folders: Sequence[Path], *, cut: bool = False, same_words: bool = True) -> None:
    """Refuse models whose weights mean different things.

    Args:
        cut: whether one vocabulary may be longer than another.
        same_words: whether equal ids must be equal words.
    Raises:
        UserError: naming two folders and what differs: a field of the configuration, or the
            vocabulary of the tokenizer.
    """
    base = folders[0]
    config, words = read_config(base), _vocabulary(base)
    for folder in dict.fromkeys(folders[1:]):
        other = read_config(folder)
        for name in _MEANING:
            if (cut or not same_words) and name == "vocab_size":
                continue
            if name in config and name in other and config[name] != other[name]:
                raise UserError(
                    f"{base} and {folder} cannot be merged: {name} is {config[name]!r} in the "
                    f"first, {other[name]!r} in the second"
                )
        for file, content in _vocabulary(folder).items() if same_words else ():
            if file in words and words[file] != content:
                raise UserError(
                    f"{base} and {folder} cannot be merged: their tokenizers differ, as {file} "
                    "shows, so equal ids are different words"
                )


def match_names(base: ModelFolder, other: ModelFolder, *, cut: bool = False) -> dict[str, str]:
    """For each tensor of the base, the name of the tensor that stands for it in the other model.

    Names differ only where tensors are tied: some programs store both of the pair, some one. A
    second copy is taken for such if it is equal to the first, bit by bit. Buffers of integers may
    be missing, they are not merged.

    Args:
        cut: whether embeddings may be of vocabularies of unequal size.
    Raises:
        UserError: naming the first tensor that has no counterpart, or one of another shape.
    """
    missing = _floating(base, base.tensors.keys() - other.tensors.keys())
    surplus = _floating(other, other.tensors.keys() - base.tensors.keys())
    twins = {}
    for name in missing:
        twins[name] = _twin(base, name, other.tensors.keys())
        if twins[name] is None:
            raise UserError(f"{_label(other)} has no {name}, which {_label(base)} has")
    for name in surplus:
        if _twin(other, name, base.tensors.keys()) is None:
            raise UserError(f"{_label(base)} has no {name}, which {_label(other)} has")
    names = {name: twins.get(name) or name for name, spec in base.tensors.items() if _float(spec)}
    for name, theirs in names.items():
        check_shapes(base, name, other, theirs, cut=cut)
    return names


def counterpart(base: ModelFolder, name: str, other: ModelFolder, theirs: str) -> str:
    """The name of the tensor that stands for this one in the other model: `theirs` or its twin.

    Raises:
        UserError: if there is none.
    """
    if theirs in other.tensors:
        return theirs
    twin = _twin(base, name, other.tensors.keys())
    if twin is None:
        raise UserError(f"{_label(other)} has no {theirs}, for {name} of {_label(base)}")
    return twin


def check_shapes(
    base: ModelFolder, name: str, other: ModelFolder, theirs: str, *, cut: bool = False
) -> None:
    """Refuse two tensors that cannot be merged.

    Args:
        cut: as in `match_names`.
    Raises:
        UserError: naming the tensor and both models.
    """
    ours, spec = base.tensors[name], other.tensors[theirs]
    longer = (
        cut
        and ours.shape[1:] == spec.shape[1:]
        and _spans_vocabularies((base, ours), (other, spec))
    )
    if ours.shape != spec.shape and not longer:
        raise UserError(
            f"{name} has shape {list(ours.shape)} in {_label(base)}, {list(spec.shape)} in "
            f"{_label(other)}"
        )
    if not _float(spec):
        raise UserError(
            f"{name} has dtype {ours.dtype} in {_label(base)}, {spec.dtype} in {_label(other)}"
        )


def _spans_vocabularies(*tensors: tuple[ModelFolder, Spec]) -> bool:
    """Whether each of these tensors has a row for every word of its model."""
    return all(
        spec.shape[:1] == (read_config(folder.folder).get("vocab_size"),)
        for folder, spec in tensors
    )


def _label(folder: ModelFolder) -> str:
    return str(folder.folder) + (f" ({folder.member})" if folder.member else "")


def _float(spec: Spec) -> bool:
    return spec.dtype.is_floating_point


def _floating(folder: ModelFolder, names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if _float(folder.tensors[name]))


def _twin(folder: ModelFolder, name: str, among: Iterable[str]) -> str | None:
    """Another tensor of the folder that is equal to this one, from among these names."""
    spec = folder.tensors[name]
    for other in sorted(set(among) & folder.tensors.keys() - {name}):
        if folder.tensors[other] == spec and _equal(folder, name, other):
            return other
    return None


def _equal(folder: ModelFolder, one: str, other: str) -> bool:
    spec = folder.tensors[one]
    raw = torch.empty(2, PIECE // spec.dtype.itemsize, dtype=spec.dtype)
    for start, stop in pieces(spec.numel, spec.dtype.itemsize):
        first, second = raw[:, : stop - start]
        folder.read_into(one, start, first)
        folder.read_into(other, start, second)
        if not torch.equal(first.view(torch.uint8), second.view(torch.uint8)):
            return False
    return True


def _vocabulary(folder: Path) -> Mapping[str, object]:
    """Content of the files that say which word has which id, by file name."""
    found: dict[str, object] = {}
    for path in [folder / name for name in VOCABULARIES] + sorted(folder.glob("*.model")):
        if path.is_file():
            found[path.name] = _content(path)
    if (folder / "tokenizer.json").is_file():
        content = _content(folder / "tokenizer.json")
        model = content.get("model") if isinstance(content, dict) else None
        # The rest may differ without harm: how long texts are cut or padded.
        found["tokenizer.json"] = model.get("vocab") if isinstance(model, dict) else content
    return found


def _content(path: Path) -> object:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if path.suffix != ".json":
        return raw
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON: {error}") from error
