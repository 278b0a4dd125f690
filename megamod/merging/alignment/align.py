"""Aligning one model to another: from two models and some text to permutations.

    options = Options(groups=("ff", "attn"))
    alignment = align(model_a, model_b, whole_batches(items, 8), options)
    symmetry = symmetry_of(model_b.config.to_dict(), shapes_of(model_b.state_dict()))
    merged = merge_states(model_a.state_dict(), model_b.state_dict(), symmetry, alignment)

Source: Verma and Elbayad 2024 (Merging text transformer models from different initializations).
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from megamod.data.corpus.fast_tokenizers import load_fast
from megamod.errors import UserError
from megamod.merging.alignment.calibration import Batch, read_items, whole_batches
from megamod.merging.alignment.groups import Group
from megamod.merging.alignment.matching import (
    Match,
    assign,
    assign_heads,
    identity,
    solver_of,
    transport,
    transport_heads,
)
from megamod.merging.alignment.measure import Measured, load_model, measure
from megamod.merging.alignment.options import Calibration, Options
from megamod.merging.alignment.record import Alignment, aligned_groups, followed
from megamod.merging.alignment.statistics import averaged
from megamod.merging.alignment.symmetry import Symmetry, symmetry_of
from megamod.merging.alignment.weight_matching import match_weights


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of weights that can be averaged, by name."""
    return {name: tuple(t.shape) for name, t in state.items() if t.is_floating_point()}


def align(
    first: PreTrainedModel,
    second: PreTrainedModel,
    batches: Iterable[Batch] | None,
    options: Options,
) -> Alignment:
    """Permutations that give the second model's features the order of the first's.

    Args:
        batches: calibration text; None where the method needs none.
    Raises:
        UserError: if the models are not of one shape and architecture, the text is empty or does
            not fit them, or the architecture lacks what the options ask for.
    """
    config, others = first.config.to_dict(), second.config.to_dict()
    if options.method == "weight":
        return align_weights(config, first.state_dict(), others, second.state_dict(), options)
    symmetry = _common_symmetry(
        config, shapes_of(first.state_dict()), others, shapes_of(second.state_dict()), options
    )
    if batches is None:
        if options.method != "identity":
            raise UserError(f"align.method: {options.method!r} needs calibration text")
        matches = {g.name: Match(torch.arange(g.size), 0.0) for g in _solved(symmetry, options)}
        return _alignment(symmetry, matches, options, costs=False)
    solved = _solved(symmetry, options)
    looked_at = _looked_at(solved, options)
    measured = measure(first, second, looked_at, symmetry.domains, batches, options)
    return _alignment(symmetry, _match(solved, measured, options), options)


def align_weights(
    config: Mapping[str, object],
    first: Mapping[str, Tensor],
    other_config: Mapping[str, object],
    second: Mapping[str, Tensor],
    options: Options,
) -> Alignment:
    """The same from weights alone, with the method "weight": no model is run.

    Args:
        config, other_config: configurations of the two.
        first, second: their weights by name.
    Raises:
        UserError: as `align`.
    """
    symmetry = _common_symmetry(config, shapes_of(first), other_config, shapes_of(second), options)
    groups = {group.name: group for group in aligned_groups(symmetry, options)}
    residual = [group for group in groups.values() if group.family == "res"]
    tied_head = groups.get(followed(symmetry, options) or "")
    units: list[list[list[Group]]] = []
    if options.residual == "sep":
        units += [[[group]] for group in residual]
    elif residual:
        units.append([[*residual, *([tied_head] if tied_head else [])]])
    for group in groups.values():
        if group.family == "attn":
            partner = groups.get(_partner(group.name))
            units.append([[group], *([[partner]] if partner else [])])
        elif group.family in ("ff", "head") and group is not tied_head:
            units.append([[group]])
    # Tied matrices say something of their own only where they read features of a head.
    alone = [g for g in groups.values() if g.family == "head" and g is not tied_head]
    read = {slot.tensor for group in alone for slot in group.into}
    states = []
    for state in (first, second):
        own = {name: tensor for name, tensor in state.items() if name not in symmetry.tied}
        states.append(own | {a: state[s] for a, s in symmetry.tied.items() if a in read})
    matches = match_weights(*states, units, options)
    return _alignment(symmetry, matches, options)


def _common_symmetry(
    config: Mapping[str, object],
    shapes: Mapping[str, tuple[int, ...]],
    other_config: Mapping[str, object],
    other_shapes: Mapping[str, tuple[int, ...]],
    options: Options,
) -> Symmetry:
    """The groups of both models, if they are of one kind.

    Raises:
        UserError: if they are not.
    """
    _check_configs(config, other_config)
    symmetry = symmetry_of(config, shapes, qk=options.qk)
    _check_same(shapes, other_shapes, symmetry.tied)
    rotated = any(slot.part == "queries" for group in symmetry.of("attn") for slot in group.out)
    mixed = options.attention == "ignore_heads" or options.method == "ot"
    if rotated and "attn" in options.groups and mixed:
        key = "method: ot" if options.method == "ot" else "attention: ignore_heads"
        raise UserError(
            f"align.{key}: queries and keys of a {config['model_type']} can be permuted by whole "
            "heads only; leave out 'attn' from align.groups, or choose another"
        )
    if "res" in options.groups and not symmetry.of("res"):
        raise UserError(
            f"align.groups: the residual stream of a {config['model_type']} cannot be permuted; "
            "leave out 'res'"
        )
    if "res" in options.groups and symmetry.unknown:
        raise UserError(
            f"{symmetry.unknown[0]}: what it does in the model is not known, so the residual "
            "stream cannot be permuted; leave out 'res' from align.groups"
        )
    return symmetry


def _check_same(
    first: Mapping[str, tuple[int, ...]],
    second: Mapping[str, tuple[int, ...]],
    tied: Mapping[str, str],
) -> None:
    """Refuse two models whose weights do not correspond.

    Args:
        tied: matrices that either may lack.
    Raises:
        UserError: naming the tensor.
    """
    for name in [*first, *second]:
        if name in first and name in second:
            if tuple(first[name]) != tuple(second[name]):
                raise UserError(
                    f"{name} has shape {list(first[name])} in the first model, "
                    f"{list(second[name])} in the second; only models of one shape can be aligned"
                )
        elif name not in tied:
            where = "first" if name in second else "second"
            raise UserError(f"{name} is missing in the {where} model")


def _check_configs(first: Mapping[str, object], second: Mapping[str, object]) -> None:
    """Refuse two models whose configurations give equal shapes another meaning.

    Raises:
        UserError: naming the field.
    """
    fields = ("model_type", "num_attention_heads", "n_head", "num_key_value_heads", "hidden_act")
    for key in (*fields, "activation_function", "vocab_size", "untie", "domains"):
        if first.get(key) != second.get(key):
            raise UserError(
                f"{key} is {first.get(key)!r} in the first model, {second.get(key)!r} in the "
                "second; only models of one architecture can be aligned"
            )


def _solved(symmetry: Symmetry, options: Options) -> list[Group]:
    """Groups whose permutations are found: those in effect, and heads, for their cost."""
    chosen = {group.name: group for group in aligned_groups(symmetry, options)}
    chosen |= {group.name: group for group in symmetry.of("head")}
    return list(chosen.values())


def _looked_at(groups: Sequence[Group], options: Options) -> list[Group]:
    """Those of them whose features must be seen."""
    residual = [group for group in groups if group.family == "res"]
    if options.method != "identity" and options.residual in ("first", "last"):
        wanted = residual[:1] if options.residual == "first" else residual[-1:]
    else:
        wanted = residual
    return [group for group in groups if group.family != "res" or group in wanted]


def _match(groups: Sequence[Group], measured: Measured, options: Options) -> dict[str, Match]:
    """A match of every group."""

    def similarity(*names: str) -> Tensor:
        # Only features of whole sequences are as many as something other than tokens.
        by_tokens = options.compat.pooler_by_tokens and names == ("pooler",)
        count = measured.columns if by_tokens else None
        moments = [measured.covariances[name].moments(count) for name in names]
        mean = averaged(moments) if len(moments) > 1 else moments[0]
        matrix = (mean.cross if options.covariance else mean.correlation()).cpu()
        return matrix.abs() if options.absolute else matrix

    if options.method == "identity":
        return {group.name: identity(similarity(group.name)) for group in groups}
    soft = options.method == "ot"
    solve = partial(transport, regularisation=options.regularisation) if soft else assign
    found: dict[str, Match] = {}
    residual = [group for group in groups if group.family == "res"]
    if residual and options.residual != "sep":
        places = {"first": residual[:1], "last": residual[-1:], "all": residual}
        shared = solve(similarity(*(group.name for group in places[options.residual])))
        found |= dict.fromkeys((group.name for group in residual), shared)
    # Queries and keys come in the order of heads that attention has, so they are matched behind.
    for group in sorted(groups, key=lambda group: group.family == "qk"):
        if group.name in found:
            continue
        matrix = similarity(group.name)
        if group.heads is None:
            found[group.name] = solve(matrix)
        else:
            order = found[_partner(group.name)].heads if group.family == "qk" else None
            heads, mode = group.heads, options.attention
            if soft:
                found[group.name] = transport_heads(
                    matrix, heads, mode, options.regularisation, order
                )
            else:
                inner = solver_of(group.queries, mode)
                found[group.name], *_ = assign_heads([matrix], heads, mode, order, inner)
    return found


def _partner(name: str) -> str:
    """The attention group of a group of queries and keys, and the other way round."""
    parts = name.split(".")
    parts[2] = {"qk": "attn", "attn": "qk"}[parts[2]]
    return ".".join(parts)


def _alignment(
    symmetry: Symmetry, matches: Mapping[str, Match], options: Options, costs: bool = True
) -> Alignment:
    names = [name for name in symmetry.groups if name in matches]
    found = {
        name: matches[name].value / (2 * symmetry.groups[name].size) for name in names if costs
    }
    for name in names:
        if symmetry.groups[name].family == "attn" and costs:
            found[name] = found.get(_partner(name), found[name])
    return Alignment({name: matches[name].permutation for name in names}, found, options)


def align_folders(
    first: str, second: str, options: Options, batches: Iterable[Batch] | None = None
) -> Alignment:
    """The same for models in folders, on the text that the options name.

    Args:
        first, second: folders, or hub ids.
        batches: text in place of that of the options.
    Raises:
        UserError: as `align`, or if the models or the text cannot be read.
    """
    models = [load_model(name) for name in (first, second)]
    calibration = options.calibration
    if batches is None and calibration.path is not None and options.method != "weight":
        batches = read_batches(first, models[0].config, calibration)
    return align(*models, batches, options)


def places_of(config: PreTrainedConfig) -> int | None:
    """How many tokens of a text a model has positions for; None: any number."""
    room = getattr(config, "max_position_embeddings", None)
    if room and config.model_type in ("roberta", "xlm-roberta"):
        room -= config.pad_token_id + 1  # positions are counted from there
    return room or None


def read_batches(name: str, config: PreTrainedConfig, calibration: Calibration) -> Iterable[Batch]:
    """Calibration text in the tokens of a model.

    Args:
        name: folder or hub id that has its tokenizer; `config`: its configuration.
    Raises:
        UserError: if there is no tokenizer, or the text cannot be read.
    """
    try:
        tokenizer = load_fast(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{name}: has no tokenizer to read calibration text with ({reason})"
        ) from error
    room = places_of(config) or tokenizer.model_max_length
    items = read_items(Path(calibration.path), lambda text: tokenizer(text)["input_ids"], room)
    pad_id = config.pad_token_id if config.pad_token_id is not None else 0
    return whole_batches(items, calibration.batch_size, calibration.fraction, pad_id=pad_id)
