"""One set of tensor names for all models of a merge.

Programs save one model in several ways: with or without the prefix of its backbone (`bert.`,
`model.`), with a tied matrix once or twice, with or without buffers such as masks, with or without
a head. Every folder is read here under the names of the model whose configuration the result has.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megamod.errors import UserError
from megamod.merging.compatibility import vocab_size
from megamod.merging.settings import layer_of
from megamod.merging.tensors import RenamedFolder, TensorSource, label, same_bits
from megamod.states.forest import read_config

logger = logging.getLogger(__name__)

INPUT_NAMES = r"embed_tokens|wte|word_embeddings?|tok_embeddings|embed_in|shared|tokens"
OUTPUT_NAMES = r"lm_head|embed_out|output|decoder|generator_lm_head|predictions"
_INPUT = re.compile(rf"(?:^|\.)(?:{INPUT_NAMES})\.weight$")
_OUTPUT = re.compile(rf"(?:^|\.)(?:{OUTPUT_NAMES})\.weight$")
_BUFFER = re.compile(
    r"(?:^|\.)(?:inv_freq|original_inv_freq|masked_bias|position_ids|token_type_ids|causal_mask|"
    r"cos_cached|sin_cached|relative_position_index|num_batches_tracked)$"
)
_COUNTERS = "num_batches_tracked"


@dataclass(frozen=True)
class Harmonised:
    """Models under common names.

    Attributes:
        folders: of all models, in order.
        copied: tensors that are taken from the template as they are, as others lack them.
    """

    folders: Sequence[TensorSource]
    copied: frozenset[str] = frozenset()


def harmonise(folders: Sequence[TensorSource], template: int, *, whole: bool = True) -> Harmonised:
    """Read all folders under the names of one of them.

    Args:
        template: number of that folder.
        whole: compare layers, too; without, as when layers are stacked, only what is outside.
    Raises:
        UserError: naming the first tensor that one model has and another lacks.
    """
    first = folders[template]
    renamed = [one if one is first else _with_prefix_of(first, one) for one in folders]
    added: dict[str, str] = {}
    for one in renamed:
        for name in _surplus(one, first, whole) if _shares(first, one) else ():
            partner = _partner(first, name, one)
            if partner is not None and _twin(one, name, first.tensors) is None and _is_tied(first):
                added[name] = partner
    if added:
        first = RenamedFolder(first, {**{name: name for name in first.tensors}, **added})
    copied: set[str] = set()
    result: list[TensorSource] = []
    for number, one in enumerate(renamed):
        if number == template:
            result.append(first)
            continue
        found, alone = _matched(first, one, whole)
        result.append(found)
        copied |= alone
    for one in result:
        if one is not first:
            _check_integers(first, one, whole)
    return Harmonised(result, frozenset(copied))


def tied_pairs(tensors: Mapping[str, object]) -> list[tuple[str, str]]:
    """Input and output matrices of a language model that one configuration may tie, by name."""
    inputs = [name for name in tensors if _INPUT.search(name) and layer_of(name) is None]
    outputs = [name for name in tensors if _OUTPUT.search(name) and layer_of(name) is None]
    return [
        (one, other)
        for one in inputs
        for other in outputs
        if one != other and tensors[one].shape == tensors[other].shape
    ]


def is_tied(config: Mapping[str, object]) -> bool:
    """Whether a configuration ties the output matrix to the embeddings.

    Where it says nothing its class decides, and for a type that transformers does not know, yes.
    """
    inner = config.get("text_config")
    told = config.get("tie_word_embeddings")
    if told is None and isinstance(inner, dict):
        told = inner.get("tie_word_embeddings")
    if told is None:
        from megamod.merging.known_models import built_config

        built = built_config(config)
        told = getattr(built, "tie_word_embeddings", True)
    return bool(told)


def _is_tied(folder: TensorSource) -> bool:
    return is_tied(read_config(folder.folder))


def _with_prefix_of(first: TensorSource, other: TensorSource) -> TensorSource:
    """The other folder with the prefix of its backbone as the first one has it."""
    ours, theirs = _layered(first), _layered(other)
    if ours & theirs or not ours or not theirs:
        return other
    for names, reference, add in ((theirs, ours, True), (ours, theirs, False)):
        ends = {one[dot + 1 :]: one for one in reference for dot in _dots(one)}
        # A buffer may have no counterpart; the first weight that has one tells the prefix.
        pair = next(((name, ends[name]) for name in sorted(names) if name in ends), None)
        if pair is None:
            continue
        prefix = pair[1].removesuffix(pair[0])
        if add:
            known = first.tensors
            new = {
                n if n in known and prefix + n not in known else prefix + n: n
                for n in other.tensors
            }
        else:
            new = {n.removeprefix(prefix): n for n in other.tensors}
        if len(new) == len(other.tensors) and _layered(new) & ours:
            return RenamedFolder(other, new)
    return other


def _dots(name: str) -> list[int]:
    return [place for place, letter in enumerate(name) if letter == "."]


def _layered(source: TensorSource | Mapping[str, str]) -> set[str]:
    """Names of tensors in layers; of all if there are no layers."""
    names = source if isinstance(source, Mapping) else source.tensors
    return {name for name in names if layer_of(name) is not None} or set(names)


def _matched(
    first: TensorSource, other: TensorSource, whole: bool
) -> tuple[TensorSource, set[str]]:
    """The other folder with exactly the names of the first, and those names that it lacks.

    Raises:
        UserError: if a tensor is missing that is neither a copy nor a buffer nor part of a head.
    """
    names = {name: name for name in first.tensors if name in other.tensors}
    alone: set[str] = set()
    heads: list[str] = []
    same_class = _shares(first, other)
    for name in _surplus(first, other, whole):
        twin = _twin(first, name, other.tensors)
        if twin is None and _is_tied(other):
            twin = _partner(other, name, first)
        if twin is not None:
            names[name] = twin
        elif _is_buffer(first, name):
            alone.add(name)
        elif not same_class and layer_of(name) is None:
            alone.add(name)
            heads.append(name)
        else:
            raise UserError(f"{label(other)} has no {name}, which {label(first)} has")
    for name in _surplus(other, first, whole):
        if _twin(other, name, first.tensors) is None and not _is_buffer(other, name):
            if same_class or layer_of(name) is not None:
                raise UserError(f"{label(first)} has no {name}, which {label(other)} has")
            heads.append(name)
    for name in list(names):
        ours, theirs = first.tensors[name].dtype, other.tensors[names[name]].dtype
        if ours.is_floating_point != theirs.is_floating_point and _is_buffer(first, name):
            del names[name]
            alone.add(name)
    if heads:
        logger.warning(
            "%s and %s are of different classes: %s%s in one of them only; the result has those of "
            "%s as they are",
            *(label(first), label(other), heads[0]),
            f" and {len(heads) - 1} more are" if len(heads) > 1 else " is",
            label(first),
        )
    if not whole:
        names |= {name: name for name in other.tensors if layer_of(name) is not None}
    if list(names.items()) == [(name, name) for name in other.tensors]:
        return other, alone
    return RenamedFolder(other, names), alone


def _surplus(one: TensorSource, other: TensorSource, whole: bool) -> list[str]:
    """Floating-point tensors of the one that the other lacks."""
    return sorted(
        name
        for name in one.tensors.keys() - other.tensors.keys()
        if one.tensors[name].dtype.is_floating_point and (whole or layer_of(name) is None)
    )


def _shares(first: TensorSource, other: TensorSource) -> bool:
    """Whether both were saved by the same class, as far as it is known."""
    if isinstance(other, RenamedFolder):
        return False
    classes = [read_config(one.folder).get("architectures") for one in (first, other)]
    return None in classes or classes[0] == classes[1]


def _twin(folder: TensorSource, name: str, among: Iterable[str]) -> str | None:
    """Another tensor of the folder with the same bits, from among these names.

    Only outside of layers: there equal bits may be norms or biases that were never trained.
    """
    if layer_of(name) is not None:
        return None
    for other in sorted(set(among) & folder.tensors.keys() - {name}):
        if same_bits(folder, name, folder, other):
            return other
    return None


def _partner(tied: TensorSource, name: str, other: TensorSource) -> str | None:
    """The tensor of a tied model that stands for one that another model stores besides."""
    shape = other.tensors[name].shape
    kinds = [(_INPUT, _OUTPUT), (_OUTPUT, _INPUT)]
    for mine, partner in kinds:
        if mine.search(name) and layer_of(name) is None:
            for candidate, spec in tied.tensors.items():
                rows = (vocab_size(read_config(tied.folder)),)
                if (
                    partner.search(candidate)
                    and layer_of(candidate) is None
                    and candidate != name
                    and spec.shape[1:] == shape[1:]
                    and (spec.shape == shape or spec.shape[:1] == rows)
                ):
                    return candidate
    return None


def _is_buffer(folder: TensorSource, name: str) -> bool:
    """Whether a tensor holds no weight: by its name, or as its class has no such parameter."""
    mask = name.endswith(".bias") and len(folder.tensors[name].shape) == 4
    if _BUFFER.search(name) or mask:
        return True
    if layer_of(name) is None:
        return False
    from megamod.merging.known_models import parameter_names

    known = parameter_names(read_config(folder.folder))
    if known is None:
        return False
    layered = {n for n in known if layer_of(n) is not None}
    stored = {n for n in folder.tensors if layer_of(n) is not None}
    # Only if the class explains the other tensors does it tell that this one is none of its own.
    ends = {layer_of(n)[2] for n in layered}
    explained = sum(layer_of(n)[2] in ends for n in stored)
    return explained >= len(stored) / 2 and layer_of(name)[2] not in ends


def _check_integers(first: TensorSource, other: TensorSource, whole: bool) -> None:
    """Refuse tensors of integers that differ: there is no mean of them.

    Raises:
        UserError: naming the first of them.
    """
    for name, spec in first.tensors.items():
        compared = name in other.tensors and (whole or layer_of(name) is None)
        if compared and not spec.dtype.is_floating_point:
            check_equal_integers(first, name, other, name)


def check_equal_integers(first: TensorSource, name: str, other: TensorSource, theirs: str) -> None:
    """Refuse two tensors of which one holds integers, unless all values are equal.

    Raises:
        UserError: naming the tensor and both models.
    """
    if name.endswith(_COUNTERS) or same_bits(first, name, other, theirs):
        return
    ours, spec = first.tensors[name], other.tensors[theirs]
    if ours.shape == spec.shape and first.read(name).long().equal(other.read(theirs).long()):
        return
    raise UserError(
        f"{name} of {label(first)} and {label(other)} holds integers that differ, which have no "
        "mean: quantised weights or tables; merge the models as they were before"
    )
