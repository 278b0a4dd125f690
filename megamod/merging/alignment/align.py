"""Align one model to another: from two models and calibration text to permutations.

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

from megamod.data.corpus.fast_tokenizers import load_fast_tokenizer
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
    """Shapes of floating-point tensors by name."""
    return {name: tuple(t.shape) for name, t in state.items() if t.is_floating_point()}


def align(
    first: PreTrainedModel,
    second: PreTrainedModel,
    batches: Iterable[Batch] | None,
    options: Options,
) -> Alignment:
    """Find the permutations that bring the features of the second model into the first's order.

    Args:
        batches: calibration text; None: the method needs none.
    Raises:
        UserError: if the models differ in shape or architecture, the text is empty or does not
            fit them, or the architecture does not support the options.
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
        matches = {
            g.name: Match(torch.arange(g.size), 0.0) for g in _matched_groups(symmetry, options)
        }
        return _alignment(symmetry, matches, options, costs=False)
    matched = _matched_groups(symmetry, options)
    observed = _observed_groups(matched, options)
    measured = measure(first, second, observed, symmetry.domains, batches, options)
    return _alignment(symmetry, _match(matched, measured, options), options)


def align_weights(
    config: Mapping[str, object],
    first: Mapping[str, Tensor],
    other_config: Mapping[str, object],
    second: Mapping[str, Tensor],
    options: Options,
) -> Alignment:
    """Find the permutations from weights alone (method "weight"); no model is run.

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
    # A tied matrix counts besides its original only where it reads features of a head.
    alone = [g for g in groups.values() if g.family == "head" and g is not tied_head]
    read = {slot.tensor for group in alone for slot in group.into}
    states = []
    for state in (first, second):
        untied = {name: tensor for name, tensor in state.items() if name not in symmetry.tied}
        states.append(untied | {a: state[s] for a, s in symmetry.tied.items() if a in read})
    matches = match_weights(*states, units, options)
    return _alignment(symmetry, matches, options)


def _common_symmetry(
    config: Mapping[str, object],
    shapes: Mapping[str, tuple[int, ...]],
    other_config: Mapping[str, object],
    other_shapes: Mapping[str, tuple[int, ...]],
    options: Options,
) -> Symmetry:
    """The permutation groups of both models.

    Raises:
        UserError: if the models do not fit each other or the options.
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
            f"{symmetry.unknown[0]}: its role in the model is not known, so the residual "
            "stream cannot be permuted; leave out 'res' from align.groups"
        )
    return symmetry


def _check_same(
    first: Mapping[str, tuple[int, ...]],
    second: Mapping[str, tuple[int, ...]],
    tied: Mapping[str, str],
) -> None:
    """Refuse two models whose weights differ in name or shape.

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
    """Refuse two models whose configurations give equal shapes different meanings.

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


def _matched_groups(symmetry: Symmetry, options: Options) -> list[Group]:
    """Groups that are matched: those in effect, and heads for their cost."""
    chosen = {group.name: group for group in aligned_groups(symmetry, options)}
    chosen |= {group.name: group for group in symmetry.of("head")}
    return list(chosen.values())


def _observed_groups(groups: Sequence[Group], options: Options) -> list[Group]:
    """Groups whose features must be observed."""
    residual = [group for group in groups if group.family == "res"]
    if options.method != "identity" and options.residual in ("first", "last"):
        observed = residual[:1] if options.residual == "first" else residual[-1:]
    else:
        observed = residual
    return [group for group in groups if group.family != "res" or group in observed]


def _match(groups: Sequence[Group], measured: Measured, options: Options) -> dict[str, Match]:
    """Match every group."""

    def similarity(*names: str) -> Tensor:
        # The pooler has one row per sequence; the original program divides by tokens.
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
    matches: dict[str, Match] = {}
    residual = [group for group in groups if group.family == "res"]
    if residual and options.residual != "sep":
        places = {"first": residual[:1], "last": residual[-1:], "all": residual}
        shared = solve(similarity(*(group.name for group in places[options.residual])))
        matches |= dict.fromkeys((group.name for group in residual), shared)
    # Queries and keys take the head order of attention, so they are matched after it.
    for group in sorted(groups, key=lambda group: group.family == "qk"):
        if group.name in matches:
            continue
        matrix = similarity(group.name)
        if group.heads is None:
            matches[group.name] = solve(matrix)
        else:
            order = matches[_partner(group.name)].heads if group.family == "qk" else None
            heads, mode = group.heads, options.attention
            if soft:
                matches[group.name] = transport_heads(
                    matrix, heads, mode, options.regularisation, order
                )
            else:
                inner = solver_of(group.queries, mode)
                matches[group.name], *_ = assign_heads([matrix], heads, mode, order, inner)
    return matches


def _partner(name: str) -> str:
    """Name of the attention group of a group of queries and keys, and vice versa."""
    parts = name.split(".")
    parts[2] = {"qk": "attn", "attn": "qk"}[parts[2]]
    return ".".join(parts)


def _alignment(
    symmetry: Symmetry, matches: Mapping[str, Match], options: Options, costs: bool = True
) -> Alignment:
    names = [name for name in symmetry.groups if name in matches]
    all_costs = {
        name: matches[name].value / (2 * symmetry.groups[name].size) for name in names if costs
    }
    for name in names:
        if symmetry.groups[name].family == "attn" and costs:
            all_costs[name] = all_costs.get(_partner(name), all_costs[name])
    return Alignment({name: matches[name].permutation for name in names}, all_costs, options)


def align_folders(
    first: str, second: str, options: Options, batches: Iterable[Batch] | None = None
) -> Alignment:
    """Align models in folders on the text that the options name.

    Args:
        first, second: folders, or hub ids.
        batches: calibration text instead of that of the options.
    Raises:
        UserError: as `align`, or if the models or the text cannot be read.
    """
    models = [load_model(name) for name in (first, second)]
    calibration = options.calibration
    if batches is None and calibration.path is not None and options.method != "weight":
        batches = read_batches(first, models[0].config, calibration)
    return align(*models, batches, options)


def places_of(config: PreTrainedConfig) -> int | None:
    """Largest number of tokens of a sequence; None: unlimited."""
    room = getattr(config, "max_position_embeddings", None)
    if room and config.model_type in ("roberta", "xlm-roberta"):
        room -= config.pad_token_id + 1  # positions start after the padding id
    return room or None


def read_batches(name: str, config: PreTrainedConfig, calibration: Calibration) -> Iterable[Batch]:
    """Read calibration text in the tokens of a model.

    Args:
        name: folder or hub id of the tokenizer; `config`: of the model.
    Raises:
        UserError: if there is no tokenizer, or the text cannot be read.
    """
    try:
        tokenizer = load_fast_tokenizer(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{name}: has no tokenizer to read calibration text with ({reason})"
        ) from error
    room = places_of(config) or tokenizer.model_max_length
    items = read_items(Path(calibration.path), lambda text: tokenizer(text)["input_ids"], room)
    pad_id = config.pad_token_id if config.pad_token_id is not None else 0
    return whole_batches(items, calibration.batch_size, calibration.fraction, pad_id=pad_id)
