"""Align one model to another: from two models and calibration text to permutations and maps.

    options = AlignmentOptions(groups=("ff", "attn"))
    alignment = align_models(model_a, model_b, iterate_whole_batches(items, 8), options)
    weights_a, weights_b = model_a.state_dict(), model_b.state_dict()
    symmetry = find_symmetry(model_b.config.to_dict(), collect_float_shapes(weights_b))
    merged = merge_states(weights_a, weights_b, symmetry, alignment)

Source: Verma and Elbayad 2024 (Merging text transformer models from different initializations).
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megamod.errors import UserError
from megamod.merging.alignment.align_orthogonal import (
    DESCENT_ROUNDS,
    align_by_maps,
    align_weights_by_maps,
    check_configs_fit_maps,
)
from megamod.merging.alignment.calibration import CalibrationBatch, read_calibration_batches
from megamod.merging.alignment.groups import PermutationGroup
from megamod.merging.alignment.matching import (
    FeatureMatch,
    assign_features,
    assign_heads,
    make_identity_feature_match,
    select_solver,
    transport_features,
    transport_heads,
)
from megamod.merging.alignment.measure import (
    FeatureStatistics,
    load_model,
    measure_covariances,
)
from megamod.merging.alignment.options import AlignmentOptions
from megamod.merging.alignment.record import (
    Alignment,
    find_head_following_stream,
    list_aligned_groups,
)
from megamod.merging.alignment.refine import Refinement
from megamod.merging.alignment.reuse import load_or_compute_alignment
from megamod.merging.alignment.statistics import average_moments
from megamod.merging.alignment.symmetry import Symmetry, find_symmetry
from megamod.merging.alignment.weight_matching import match_weights


def collect_float_shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Collect the shapes of a model's floating-point tensors by name; others are not aligned."""
    return {name: tuple(t.shape) for name, t in state.items() if t.is_floating_point()}


def align_models(
    first: PreTrainedModel,
    second: PreTrainedModel,
    batches: Iterable[CalibrationBatch] | None,
    options: AlignmentOptions,
    *,
    descent_rounds: int = DESCENT_ROUNDS,
) -> Alignment:
    """Find the permutations and maps that bring the second model's features into the first's order.

    Args:
        first: the reference; `second`: the model to align. Weights are not changed.
        batches: calibration text; None: the method needs none.
        descent_rounds: rounds of descent on the weights that "orthogonal" makes after the text.
    Raises:
        UserError: if the models differ in shape or architecture, the text is empty or does not
            fit them, or the architecture does not support the options.
    """
    config, others = first.config.to_dict(), second.config.to_dict()
    without_text = options.method == "orthogonal" and batches is None
    if without_text and options.refine_steps:
        raise UserError(f"align.refine_steps: {options.refine_steps} steps need calibration text")
    if options.method == "weight" or without_text:
        return align_weights(config, first.state_dict(), others, second.state_dict(), options)
    symmetry = _find_common_symmetry(
        config,
        collect_float_shapes(first.state_dict()),
        others,
        collect_float_shapes(second.state_dict()),
        options,
    )
    if batches is None:
        if options.method != "identity":
            raise UserError(f"align.method: {options.method!r} needs calibration text")
        matches = {
            g.name: FeatureMatch(torch.arange(g.size), 0.0)
            for g in _list_matched_groups(symmetry, options)
        }
        return _build_alignment(symmetry, matches, options, costs=False)
    if options.method == "orthogonal":
        batches = list(batches)
        return _align_and_refine_maps(first, second, symmetry, batches, options, descent_rounds)
    matched = _list_matched_groups(symmetry, options)
    observed = _list_observed_groups(matched, options)
    measured = measure_covariances(first, second, observed, symmetry.domains, batches, options)
    return _build_alignment(symmetry, _match_groups(matched, measured, options), options)


def _align_and_refine_maps(
    first: PreTrainedModel,
    second: PreTrainedModel,
    symmetry: Symmetry,
    batches: Sequence[CalibrationBatch],
    options: AlignmentOptions,
    descent_rounds: int,
) -> Alignment:
    """Find orthogonal maps from text and weights, and refine them by `refine_steps`.

    With `options.maps` they are read from that folder if they are there, else stored in it.

    Args:
        first, second: the reference, and the model to align; weights are not changed.
        symmetry: permutation groups of both models.
        batches: calibration text.
        descent_rounds: rounds of descent on the weights after the text.
    Raises:
        UserError: if the text does not fit the models, or they cannot be refined.
    """

    def compute_alignment(progress_file: Path | None) -> Alignment:
        """Compute the alignment; a refinement saves its state in `progress_file`, if not None."""
        alignment = align_by_maps(first, second, symmetry, batches, options, descent_rounds)
        if not options.refine_steps:
            return alignment
        models, seed = (first, second), options.seed
        refinement = Refinement(*models, symmetry, alignment, batches, seed, progress_file)
        return refinement.refine_maps(options.refine_steps)

    states = (first.state_dict(), second.state_dict())
    return load_or_compute_alignment(options, states, batches, compute_alignment, descent_rounds)


def align_weights(
    config: Mapping[str, object],
    first: Mapping[str, Tensor],
    other_config: Mapping[str, object],
    second: Mapping[str, Tensor],
    options: AlignmentOptions,
) -> Alignment:
    """Find the alignment from weights alone (method "weight" or "orthogonal"); no model is run.

    Args:
        config, other_config: configurations of the two, as in config.json.
        first, second: their weights by name, of the reference and of the model to align.
        options: see `AlignmentOptions`.
    Raises:
        UserError: as `align_models`.
    """
    symmetry = _find_common_symmetry(
        config, collect_float_shapes(first), other_config, collect_float_shapes(second), options
    )
    if options.method == "orthogonal":
        states = (first, second)
        return load_or_compute_alignment(
            options, states, (), lambda _: align_weights_by_maps(*states, symmetry, options), 0
        )
    groups = {group.name: group for group in list_aligned_groups(symmetry, options)}
    residual = [group for group in groups.values() if group.family == "res"]
    tied_head = groups.get(find_head_following_stream(symmetry, options) or "")
    units: list[list[list[PermutationGroup]]] = []
    if options.residual == "sep":
        units += [[[group]] for group in residual]
    elif residual:
        units.append([[*residual, *([tied_head] if tied_head else [])]])
    for group in groups.values():
        if group.family == "attn":
            partner = groups.get(_find_partner_name(group.name))
            units.append([[group], *([[partner]] if partner else [])])
        elif group.family in ("ff", "head") and group is not tied_head:
            units.append([[group]])
    # A tied matrix counts besides its original only where it reads features of a head.
    alone = [g for g in groups.values() if g.family == "head" and g is not tied_head]
    read = {axis.tensor for group in alone for axis in group.reading_axes}
    states = []
    for state in (first, second):
        untied = {name: tensor for name, tensor in state.items() if name not in symmetry.tied}
        states.append(untied | {a: state[s] for a, s in symmetry.tied.items() if a in read})
    matches = match_weights(*states, units, options)
    return _build_alignment(symmetry, matches, options)


def _find_common_symmetry(
    config: Mapping[str, object],
    shapes: Mapping[str, tuple[int, ...]],
    other_config: Mapping[str, object],
    other_shapes: Mapping[str, tuple[int, ...]],
    options: AlignmentOptions,
) -> Symmetry:
    """Find the permutation groups of both models, after a check that the models and options fit.

    Args:
        config, other_config: configurations of the two, as in config.json.
        shapes, other_shapes: shapes of their floating-point tensors by name.
    Raises:
        UserError: if the models do not fit each other or the options.
    """
    check_same_architecture(config, other_config)
    symmetry = find_symmetry(config, shapes, qk=options.qk)
    if options.method == "orthogonal":
        check_configs_fit_maps(config, other_config)
    _check_same_shapes(shapes, other_shapes, symmetry.tied)
    queries_move_whole = any(
        axis.part == "queries"
        for group in symmetry.select_groups("attn")
        for axis in group.producing_axes
    )
    mixed = options.attention == "ignore_heads" or options.method == "ot"
    if queries_move_whole and "attn" in options.groups and mixed:
        key = "method: ot" if options.method == "ot" else "attention: ignore_heads"
        raise UserError(
            f"align.{key}: queries and keys of a {config['model_type']} can be permuted by whole "
            "heads only; leave out 'attn' from align.groups, or choose another"
        )
    if "res" in options.groups and not symmetry.select_groups("res"):
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


def _check_same_shapes(
    first: Mapping[str, tuple[int, ...]],
    second: Mapping[str, tuple[int, ...]],
    tied: Mapping[str, str],
) -> None:
    """Refuse two models whose weights differ in name or shape.

    Args:
        first, second: shapes of the models' weights, by name.
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


def check_same_architecture(first: Mapping[str, object], second: Mapping[str, object]) -> None:
    """Refuse two models whose configurations give equal shapes different meanings.

    Args:
        first, second: fields of config.json of the two.
    Raises:
        UserError: naming the field.
    """
    fields = ("model_type", "num_attention_heads", "n_head", "num_key_value_heads", "hidden_act")
    fields += ("activation_function", "vocab_size", "untie")
    if first.get("untie") != "none":  # else the domains only say what the model was trained on
        fields += ("domains",)
    for key in fields:
        if first.get(key) != second.get(key):
            raise UserError(
                f"{key} is {first.get(key)!r} in the first model, {second.get(key)!r} in the "
                "second; only models of one architecture can be aligned"
            )


def _list_matched_groups(symmetry: Symmetry, options: AlignmentOptions) -> list[PermutationGroup]:
    """List the groups to match: all that `options` permute, and all heads.

    The cost of a head is recorded even if it stays in order.
    """
    matched = {group.name: group for group in list_aligned_groups(symmetry, options)}
    matched |= {group.name: group for group in symmetry.select_groups("head")}
    return list(matched.values())


def _list_observed_groups(
    groups: Sequence[PermutationGroup], options: AlignmentOptions
) -> list[PermutationGroup]:
    """List the groups, of those to match, whose features must be observed.

    These are all but groups of the residual stream that take the permutation of another group, as
    `options.residual` says.
    """
    residual = [group for group in groups if group.family == "res"]
    if options.method != "identity" and options.residual in ("first", "last"):
        observed = residual[:1] if options.residual == "first" else residual[-1:]
    else:
        observed = residual
    return [group for group in groups if group.family != "res" or group in observed]


def _match_groups(
    groups: Sequence[PermutationGroup], measured: FeatureStatistics, options: AlignmentOptions
) -> dict[str, FeatureMatch]:
    """Find the best match of each group by the similarity of measured features.

    Args:
        groups: to match.
        measured: statistics of those in `_list_observed_groups`; they are overwritten.
        options: method, and handling of the residual stream.
    Returns:
        matches by name of the group.
    Raises:
        UserError: if a soft assignment does not converge.
    """

    def compute_similarity(*names: str) -> Tensor:
        """Return the correlations (or covariances) [C, C] of the named groups' averaged moments.

        They are absolute if the options say so. The moments are overwritten: once per group.
        """
        # The pooler has one row per sequence; the original program divides by tokens.
        by_tokens = options.compat.pooler_by_tokens and names == ("pooler",)
        count = measured.row_count if by_tokens else None
        moments = [measured.covariances[name].finalise_moments(count) for name in names]
        mean = average_moments(moments) if len(moments) > 1 else moments[0]
        matrix = (mean.cross if options.covariance else mean.overwrite_cross_by_correlation()).cpu()
        return matrix.abs() if options.absolute else matrix

    if options.method == "identity":
        return {
            group.name: make_identity_feature_match(compute_similarity(group.name))
            for group in groups
        }
    soft = options.method == "ot"
    solve = (
        partial(transport_features, regularisation=options.regularisation)
        if soft
        else assign_features
    )
    matches: dict[str, FeatureMatch] = {}
    residual = [group for group in groups if group.family == "res"]
    if residual and options.residual != "sep":
        residual_sources = {"first": residual[:1], "last": residual[-1:], "all": residual}
        shared = solve(
            compute_similarity(*(group.name for group in residual_sources[options.residual]))
        )
        matches |= dict.fromkeys((group.name for group in residual), shared)
    # Queries and keys take the head order of attention, so they are matched after it.
    for group in sorted(groups, key=lambda group: group.family == "qk"):
        if group.name in matches:
            continue
        matrix = compute_similarity(group.name)
        if group.heads is None:
            matches[group.name] = solve(matrix)
        else:
            order = matches[_find_partner_name(group.name)].heads if group.family == "qk" else None
            heads, mode = group.heads, options.attention
            if soft:
                matches[group.name] = transport_heads(
                    matrix, heads, mode, options.regularisation, order
                )
            else:
                inner = select_solver(group.queries_per_key, mode)
                matches[group.name], *_ = assign_heads([matrix], heads, mode, order, inner)
    return matches


def _find_partner_name(name: str) -> str:
    """Find the name of the other group of the same attention heads: layer.N.attn of layer.N.qk, and
    the other way round.
    """
    parts = name.split(".")
    parts[2] = {"qk": "attn", "attn": "qk"}[parts[2]]
    return ".".join(parts)


def _build_alignment(
    symmetry: Symmetry,
    matches: Mapping[str, FeatureMatch],
    options: AlignmentOptions,
    costs: bool = True,
) -> Alignment:
    """Build the alignment from the matches of groups.

    The cost of a group is its summed similarity over twice its size; a group of attention has that
    of its queries and keys if they were matched separately.

    Args:
        symmetry, options: permutation groups of the model, and the options to record.
        matches: best match of each group by name.
        costs: record costs; False: none.
    """
    names = [name for name in symmetry.groups if name in matches]
    all_costs = {
        name: matches[name].value / (2 * symmetry.groups[name].size) for name in names if costs
    }
    for name in names:
        if symmetry.groups[name].family == "attn" and costs:
            all_costs[name] = all_costs.get(_find_partner_name(name), all_costs[name])
    return Alignment({name: matches[name].permutation for name in names}, all_costs, options)


def align_folders(
    first: str,
    second: str,
    options: AlignmentOptions,
    batches: Iterable[CalibrationBatch] | None = None,
) -> Alignment:
    """Load two models in float32, and align the second to the first by the options.

    Args:
        first, second: folders, or hub ids.
        batches: calibration text instead of that of the options; None: read that, if the method
            runs models.
    Raises:
        UserError: as `align_models`, or if the models or the text cannot be read.
    """
    models = [load_model(name) for name in (first, second)]
    calibration = options.calibration
    if batches is None and options.reads_text and calibration.path is not None:
        batches = read_calibration_batches(first, models[0].config, calibration)
    return align_models(*models, batches, options)
