"""Common tensor names for all models of a merge.

Programs save the same model in several ways: with or without the prefix of the backbone (`bert.`,
`model.`), a tied matrix once or twice, with or without buffers such as masks, with or without a
head. Here every folder is read under the names of the template, whose configuration the result has.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megamod.errors import UserError
from megamod.merging.compatibility import get_vocab_size
from megamod.merging.tensors import RenamedFolder, TensorSource, describe_source, have_same_bits
from megamod.states.forest import read_model_config
from megamod.states.layer_names import split_at_layer_number
from megamod.states.stream import TensorSpec

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
"""Ending of the names of integers that may differ: batch norms count their batches in them."""


@dataclass(frozen=True)
class CommonNames:
    """Models under common tensor names.

    Attributes:
        folders: folders of all models, in order, under the names of the template.
        copied: names of tensors that are copied from the template, because other models lack them.
    """

    folders: Sequence[TensorSource]
    copied: frozenset[str] = frozenset()


def rename_to_template(
    folders: Sequence[TensorSource], template: int, *, all_tensors: bool = True
) -> CommonNames:
    """Match the tensors of all folders, and view them under the names of the template.

    Only headers are read, and contents where equal bits decide: copies of a matrix, and integers.
    Logs a warning for a model of another class, whose head is not merged.

    Args:
        folders: folders of the models, open.
        template: index of the folder whose names are used.
        all_tensors: compare all tensors; False: only those outside of layers, where layers are
            stacked.
    Raises:
        UserError: naming the first tensor that one model has and another lacks, or the first tensor
            of integers that differ.
    """
    for folder in folders:
        _check_not_packed(folder)
    first = folders[template]
    renamed = [
        folder if folder is first else _match_backbone_prefix(first, folder) for folder in folders
    ]
    added: dict[str, str] = {}
    for folder in renamed:
        for name in (
            _list_missing_tensors(folder, first, all_tensors)
            if _may_have_same_class(first, folder)
            else ()
        ):
            partner = _find_tied_counterpart(first, name, folder)
            if (
                partner is not None
                and _find_equal_tensor(folder, name, first.tensors) is None
                and _has_tied_output_matrix(first)
            ):
                added[name] = partner
    if added:
        first = RenamedFolder(first, {**{name: name for name in first.tensors}, **added})
    copied: set[str] = set()
    result: list[TensorSource] = []
    for number, folder in enumerate(renamed):
        if number == template:
            result.append(first)
            continue
        view, only_in_first = _match_names(first, folder, all_tensors)
        result.append(view)
        copied |= only_in_first
    for folder in result:
        if folder is not first:
            _check_integer_tensors(first, folder, all_tensors)
    return CommonNames(result, frozenset(copied))


def _check_not_packed(folder: TensorSource) -> None:
    """Refuse a folder with packed (quantised) weights.

    They come with tensors such as `X.weight.absmax`. Packed weights may be stored as floating-point
    numbers, so their dtype does not show it.

    Raises:
        UserError: naming the first of these tensors.
    """
    for name in folder.tensors:
        weight = name.rpartition(".")[0]
        if weight in folder.tensors:
            raise UserError(
                f"{describe_source(folder)}: {name} belongs to the tensor {weight}, so that is "
                "packed or quantised and cannot be merged; merge the models before quantisation"
            )


def list_tieable_pairs(specs: Mapping[str, TensorSpec]) -> list[tuple[str, str]]:
    """List the names (input embedding, output matrix) of all pairs of equal shape.

    These are candidates: the configuration decides if they are tied. Both are recognised by their
    names alone, outside of layers, so an embedding may be in several pairs.

    Args:
        specs: specifications of a model's tensors by name.
    """
    inputs = [name for name in specs if _INPUT.search(name) and split_at_layer_number(name) is None]
    outputs = [
        name for name in specs if _OUTPUT.search(name) and split_at_layer_number(name) is None
    ]
    return [
        (table, output)
        for table in inputs
        for output in outputs
        if table != output and specs[table].shape == specs[output].shape
    ]


def ties_output_matrix(config: Mapping[str, object]) -> bool:
    """Return True if a configuration ties the output matrix to the input embedding.

    If it does not say, the default of its class counts; without a known class it is taken as tied.

    Args:
        config: fields of config.json.
    """
    inner = config.get("text_config")
    tied = config.get("tie_word_embeddings")
    if tied is None and isinstance(inner, dict):
        tied = inner.get("tie_word_embeddings")
    if tied is None:
        from megamod.merging.known_models import build_config

        built = build_config(config)
        tied = getattr(built, "tie_word_embeddings", True)
    return bool(tied)


def _has_tied_output_matrix(folder: TensorSource) -> bool:
    """Return True if the folder's configuration ties the output matrix to the input embedding."""
    return ties_output_matrix(read_model_config(folder.folder))


def _match_backbone_prefix(first: TensorSource, other: TensorSource) -> TensorSource:
    """Return a view of `other` with the backbone prefix (such as `bert.`) of `first` added to or
    removed from its names; `other` itself if names agree already, or no prefix makes them agree.
    """
    ours, theirs = _list_layer_tensors(first), _list_layer_tensors(other)
    if ours & theirs or not ours or not theirs:
        return other
    for names, reference, add in ((theirs, ours, True), (ours, theirs, False)):
        ends = {full[dot + 1 :]: full for full in reference for dot in _list_dot_positions(full)}
        # A buffer may have no counterpart, so the first tensor that has one gives the prefix.
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
        if len(new) == len(other.tensors) and _list_layer_tensors(new) & ours:
            return RenamedFolder(other, new)
    return other


def _list_dot_positions(name: str) -> list[int]:
    """List the positions of all dots in a name."""
    return [position for position, letter in enumerate(name) if letter == "."]


def _list_layer_tensors(source: TensorSource | Mapping[str, str]) -> set[str]:
    """List the names of the tensors in layers, or of all tensors if there are no layers.

    Args:
        source: tensors, or a mapping whose keys are their names.
    """
    names = source if isinstance(source, Mapping) else source.tensors
    return {name for name in names if split_at_layer_number(name) is not None} or set(names)


def _match_names(
    first: TensorSource, other: TensorSource, all_tensors: bool
) -> tuple[TensorSource, set[str]]:
    """Match the tensors of two folders that should hold models of one architecture.

    Logs a warning if the models are of different classes, whose heads are not merged.

    Args:
        all_tensors: match all; False: match those outside of layers; those within keep their names.
    Returns:
        a view of `other` under the names of `first`, or `other` itself if they are equal; and the
        names of tensors to copy, because `other` lacks them.
    Raises:
        UserError: if a tensor is missing that is no copy, no buffer and no part of a head.
    """
    names = {name: name for name in first.tensors if name in other.tensors}
    only_in_first: set[str] = set()
    head_tensors: list[str] = []
    same_class = _may_have_same_class(first, other)
    for name in _list_missing_tensors(first, other, all_tensors):
        counterpart = _find_equal_tensor(first, name, other.tensors)
        if counterpart is None and _has_tied_output_matrix(other):
            counterpart = _find_tied_counterpart(other, name, first)
        if counterpart is not None:
            names[name] = counterpart
        elif _is_buffer(first, name):
            only_in_first.add(name)
        elif not same_class and split_at_layer_number(name) is None:
            only_in_first.add(name)
            head_tensors.append(name)
        else:
            raise UserError(
                f"{describe_source(other)} has no {name}, which {describe_source(first)} has"
            )
    for name in _list_missing_tensors(other, first, all_tensors):
        if _find_equal_tensor(other, name, first.tensors) is None and not _is_buffer(other, name):
            if same_class or split_at_layer_number(name) is not None:
                raise UserError(
                    f"{describe_source(first)} has no {name}, which {describe_source(other)} has"
                )
            head_tensors.append(name)
    for name in list(names):
        ours, theirs = first.tensors[name].dtype, other.tensors[names[name]].dtype
        if ours.is_floating_point != theirs.is_floating_point and _is_buffer(first, name):
            del names[name]
            only_in_first.add(name)
    if head_tensors:
        logger.warning(
            "%s and %s are of different classes: %s%s in one of them only; the result has those of "
            "%s as they are",
            *(describe_source(first), describe_source(other), head_tensors[0]),
            f" and {len(head_tensors) - 1} more are" if len(head_tensors) > 1 else " is",
            describe_source(first),
        )
    if not all_tensors:
        names |= {name: name for name in other.tensors if split_at_layer_number(name) is not None}
    if list(names.items()) == [(name, name) for name in other.tensors]:
        return other, only_in_first
    return RenamedFolder(other, names), only_in_first


def _list_missing_tensors(first: TensorSource, other: TensorSource, all_tensors: bool) -> list[str]:
    """List the names, sorted, of floating-point tensors of `first` that `other` lacks.

    Args:
        all_tensors: False: only those outside of layers.
    """
    return sorted(
        name
        for name in first.tensors.keys() - other.tensors.keys()
        if first.tensors[name].dtype.is_floating_point
        and (all_tensors or split_at_layer_number(name) is None)
    )


def _may_have_same_class(first: TensorSource, other: TensorSource) -> bool:
    """Return True unless two folders, `first` and `other`, are saved by different classes.

    A renamed folder is taken as one of another class, as is one whose config.json names another.
    """
    if isinstance(other, RenamedFolder):
        return False
    classes = [read_model_config(folder.folder).get("architectures") for folder in (first, other)]
    return None in classes or classes[0] == classes[1]


def _find_equal_tensor(folder: TensorSource, name: str, candidates: Iterable[str]) -> str | None:
    """Find the name of another tensor of the folder with the same bits; None: there is none.

    Only outside of layers: within them equal bits may be norms or biases that were never trained.

    Args:
        candidates: names to compare with, of which the folder may lack some; the first, sorted,
            that is equal is the result.
    """
    if split_at_layer_number(name) is not None:
        return None
    for other in sorted(set(candidates) & folder.tensors.keys() - {name}):
        if have_same_bits(folder, name, folder, other):
            return other
    return None


def _find_tied_counterpart(tied_model: TensorSource, name: str, other: TensorSource) -> str | None:
    """Find the tensor of a tied model that also serves as the tensor `name` of another model.

    An input embedding is found for an output matrix, and the other way round, by names and shapes;
    vocabularies may differ in size.

    Args:
        name: name of the tensor in `other`.
    Returns:
        the name in `tied_model`; None: there is none.
    """
    shape = other.tensors[name].shape
    kinds = [(_INPUT, _OUTPUT), (_OUTPUT, _INPUT)]
    for kind, counterpart in kinds:
        if kind.search(name) and split_at_layer_number(name) is None:
            for candidate, spec in tied_model.tensors.items():
                rows = (get_vocab_size(read_model_config(tied_model.folder)),)
                if (
                    counterpart.search(candidate)
                    and split_at_layer_number(candidate) is None
                    and candidate != name
                    and spec.shape[1:] == shape[1:]
                    and (spec.shape == shape or spec.shape[:1] == rows)
                ):
                    return candidate
    return None


def _is_buffer(folder: TensorSource, name: str) -> bool:
    """Return True if the tensor `name` of a folder is no weight.

    Its name says so, it is a causal mask, or it lies in a layer and the class of the model, if
    known, has no such parameter in any layer.
    """
    # GPT-2 calls its mask [1, 1, T, T] bias; no bias of a layer has four axes.
    mask = name.endswith(".bias") and len(folder.tensors[name].shape) == 4
    if _BUFFER.search(name) or mask:
        return True
    if split_at_layer_number(name) is None:
        return False
    from megamod.merging.known_models import list_parameter_names

    known = list_parameter_names(read_model_config(folder.folder))
    if known is None:
        return False
    layered = {n for n in known if split_at_layer_number(n) is not None}
    stored = {n for n in folder.tensors if split_at_layer_number(n) is not None}
    # The class is evidence only if it has at least half of the folder's tensors in layers.
    ends = {split_at_layer_number(n)[2] for n in layered}
    explained = sum(split_at_layer_number(n)[2] in ends for n in stored)
    return explained >= len(stored) / 2 and split_at_layer_number(name)[2] not in ends


def _check_integer_tensors(first: TensorSource, other: TensorSource, all_tensors: bool) -> None:
    """Refuse tensors of integers that differ, as they have no mean.

    Args:
        first, other: two models with the same tensor names.
        all_tensors: False: only those outside of layers.
    Raises:
        UserError: naming the first of them.
    """
    for name, spec in first.tensors.items():
        compared = name in other.tensors and (all_tensors or split_at_layer_number(name) is None)
        if compared and not spec.dtype.is_floating_point:
            check_equal_integers(first, name, other, name)


def check_equal_integers(
    first: TensorSource, name: str, other: TensorSource, other_name: str
) -> None:
    """Refuse two tensors, at least one of integers, unless all values are equal.

    Counters of batches may differ. Both tensors are read.

    Args:
        name: name of the tensor in `first`; `other_name`: in `other`.
    Raises:
        UserError: naming the tensor and both models.
    """
    if name.endswith(_COUNTERS) or have_same_bits(first, name, other, other_name):
        return
    ours, spec = first.tensors[name], other.tensors[other_name]
    if ours.shape == spec.shape and first.read(name).long().equal(other.read(other_name).long()):
        return
    raise UserError(
        f"{name} of {describe_source(first)} and {describe_source(other)} holds integers that "
        "differ, which have no mean (quantised weights, or tables); merge the models before "
        "quantisation"
    )
