"""Align two models by orthogonal maps: closed form from text, from weights, or both.

With text, one pass over it gives the sums of products of all features, and a map of each group; a
descent on the weights starts from these maps. Without text it starts from the identity.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megamod.errors import UserError
from megamod.merging.alignment.calibration import CalibrationBatch
from megamod.merging.alignment.folding import Folding, ReadTensor, find_folding
from megamod.merging.alignment.groups import PermutationGroup
from megamod.merging.alignment.matching import assign_features
from megamod.merging.alignment.measure import FeatureStatistics, measure_covariances
from megamod.merging.alignment.options import AlignmentOptions
from megamod.merging.alignment.orthogonal import (
    GroupMatch,
    list_observed_parts,
    match_observed_heads,
    match_observed_stream,
    match_signed_features,
    select_head_map_kind,
)
from megamod.merging.alignment.record import (
    Alignment,
    find_head_following_stream,
    list_aligned_groups,
)
from megamod.merging.alignment.symmetry import Symmetry
from megamod.merging.alignment.weight_descent import WeightDescent, make_identity_group_match
from megamod.states.weights import is_finite

DESCENT_ROUNDS = 2
"""Rounds of descent on the weights after the text."""
_MOST_ROUNDS = 100  # without text


_SAME = (
    *("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "head_dim", "sliding_window"),
    *("rope_theta", "rope_scaling", "rope_parameters", "activation_function", "hidden_act"),
)
"""Configuration fields in which two models must agree for one map to fit both."""


def check_configs_fit_maps(config: Mapping[str, object], other: Mapping[str, object]) -> None:
    """Refuse two models whose configurations orthogonal maps do not fit.

    Args:
        config, other: fields of config.json of the two.
    Raises:
        UserError: naming the field of `_SAME` in which they differ; or partial rotation of heads.
    """
    for key in _SAME:
        if config.get(key) != other.get(key):
            raise UserError(
                f"{key} is {config.get(key)!r} in the first model, {other.get(key)!r} in the "
                "second; only models that agree in it can be aligned by orthogonal maps"
            )
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    part = config.get("partial_rotary_factor") or rotary.get("partial_rotary_factor") or 1.0
    if part != 1.0:
        raise UserError(
            f"config.json: partial_rotary_factor is {part!r}; heads that are rotated in part "
            "cannot be aligned by orthogonal maps"
        )


def rotates_stream(symmetry: Symmetry, options: AlignmentOptions) -> bool:
    """Return True if the residual stream is rotated: options align it, and the model is pre-norm.

    `symmetry` has the family of the model. In post-norm models the stream is permuted instead.
    """
    return "res" in options.groups and symmetry.family.pre_norm


def align_by_maps(
    first: PreTrainedModel,
    second: PreTrainedModel,
    symmetry: Symmetry,
    batches: Iterable[CalibrationBatch],
    options: AlignmentOptions,
    descent_rounds: int,
) -> Alignment:
    """Find the maps from calibration text, then improve them by descent on the weights.

    Args:
        first: the reference; `second`: the model to align. Weights are not changed.
        symmetry: permutation groups of both models.
        batches: calibration text.
        options: groups to align, and what is measured.
        descent_rounds: rounds of the descent on the weights, at most; 0: none.
    Raises:
        UserError: if a weight is not finite, or the text is too short or does not fit the models.
    """
    states = (first.state_dict(), second.state_dict())
    _refuse_non_finite_weights(*states)
    matches = _match_by_text(first, second, symmetry, batches, options)
    return _improve_by_descent(*states, symmetry, options, matches, descent_rounds)


def align_weights_by_maps(
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    symmetry: Symmetry,
    options: AlignmentOptions,
) -> Alignment:
    """Find the maps from weights alone, starting at the identity.

    Args:
        first, second: weights by name, of the reference and of the model to align.
        symmetry: permutation groups of both models.
        options: groups to align.
    Raises:
        UserError: if a weight is not finite.
    """
    _refuse_non_finite_weights(first, second)
    groups = list_aligned_groups(symmetry, options)
    start = {group.name: make_identity_group_match(group) for group in groups}
    return _improve_by_descent(first, second, symmetry, options, start, _MOST_ROUNDS)


def _refuse_non_finite_weights(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Refuse weights with a NaN or an infinity, which have no singular value decomposition.

    Args:
        first, second: weights of the two models by name.
    Raises:
        UserError: naming the tensor, and which of the two models has it.
    """
    for state, which in ((first, "first"), (second, "second")):
        for name, tensor in state.items():
            if tensor.is_floating_point() and not is_finite(tensor):
                raise UserError(f"{name}: holds values that are not finite in the {which} model")


def _match_by_text(
    first: PreTrainedModel,
    second: PreTrainedModel,
    symmetry: Symmetry,
    batches: Iterable[CalibrationBatch],
    options: AlignmentOptions,
) -> dict[str, GroupMatch]:
    """Run both models on the text and match every aligned group by the products of its features.

    Groups of the residual stream, and a head that follows it, share one match.

    Args:
        first, second: the reference, and the model to align.
        symmetry: permutation groups of both models.
        batches: calibration text.
        options: groups to align, and what is measured.
    Returns:
        match of each aligned group by name.
    Raises:
        UserError: if the text is too short or does not fit the models.
    """
    groups = list_aligned_groups(symmetry, options)
    rotates, keeps_ones = rotates_stream(symmetry, options), not symmetry.family.rms
    following = find_head_following_stream(symmetry, options)
    observed: list[PermutationGroup] = []
    for group in groups:
        if group.family == "attn" or (group.family == "res" and rotates):
            observed += list_observed_parts(group, keeps_ones)
        elif group.name != following and (group.family != "res" or group.name == "res.emb"):
            observed.append(group)
    measured = measure_covariances(first, second, observed, symmetry.domains, batches, options)
    shared = _match_stream(groups, symmetry, measured, options)
    matches: dict[str, GroupMatch] = {}
    for group in groups:
        if group.family == "res" or group.name == following:
            matches[group.name] = shared
        elif group.family == "attn":
            kind = select_head_map_kind(symmetry.family)
            matches[group.name] = match_observed_heads(group, measured, kind, options.attention)
        else:
            matches[group.name] = _match_features(group, measured)
    return matches


def _match_stream(
    groups: list[PermutationGroup],
    symmetry: Symmetry,
    measured: FeatureStatistics,
    options: AlignmentOptions,
) -> GroupMatch | None:
    """Match the residual stream: by a map, or in post-norm models by a permutation.

    Args:
        groups: those to align; without one of the stream the result is None.
        symmetry, options: decide if the stream is rotated, see `rotates_stream`.
        measured: statistics of the stream's groups; overwritten.
    Raises:
        UserError: if the text is too short for a map.
    """
    stream = [group for group in groups if group.family == "res"]
    if not stream:
        return None
    if not rotates_stream(symmetry, options):
        return _match_features(stream[0], measured)
    places = {g.name: measured.covariances[g.name].finalise_products() for g in stream}
    keeps_ones = not symmetry.family.rms
    return match_observed_stream(places, stream[0].size, measured.row_count, keeps_ones)


def _match_features(group: PermutationGroup, measured: FeatureStatistics) -> GroupMatch:
    """Match the features of a group by their correlations; with signs if the group is gated.

    The sums of the group in `measured` are overwritten.
    """
    moments = measured.covariances[group.name].finalise_moments()
    correlation = moments.overwrite_cross_by_correlation().cpu()
    if any(axis.role == "sign" for axis in group.axes):
        return match_signed_features(correlation)
    match = assign_features(correlation)
    return GroupMatch(match.permutation, {}, match.value)


def _improve_by_descent(
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    symmetry: Symmetry,
    options: AlignmentOptions,
    start: Mapping[str, GroupMatch],
    rounds: int,
) -> Alignment:
    """Improve matches by descent on the weights, and build the alignment.

    Args:
        first, second: weights of the reference and of the model to align.
        symmetry, options: permutation groups of both models, and which to align.
        start: match of each aligned group by name.
        rounds: largest number of rounds of the descent.
    """
    groups = {group.name: group for group in list_aligned_groups(symmetry, options)}
    rotates = rotates_stream(symmetry, options)
    folding = find_folding(symmetry) if rotates else None
    following = groups.get(find_head_following_stream(symmetry, options) or "")
    stream = [group for group in groups.values() if group.family == "res"]
    units = [[*stream, *([following] if following else [])]] if stream else []
    units += [[g] for g in groups.values() if g not in stream and g is not following]
    # A tied matrix counts besides its original only if it has a norm or features of its own.
    untied_readers = {a.tensor for (g, *_) in units if g.family == "head" for a in g.reading_axes}
    descent = WeightDescent(
        _make_weight_reader(first, symmetry, folding),
        _make_weight_reader(second, symmetry, folding),
        units,
        lambda name: name not in symmetry.tied or folding is not None or name in untied_readers,
        folded=rotates,
        keeps_ones=not symmetry.family.rms,
        kind=select_head_map_kind(symmetry.family),
        mode=options.attention,
    )
    matches = descent.descend_on_weights(start, rounds)
    permutations, maps, costs = {}, {}, {}
    for name, group in groups.items():
        match = matches[name]
        kept = match.permutation
        permutations[name] = torch.arange(group.size) if kept is None else kept
        if match.maps and (group.family != "res" or name == "res.emb"):
            maps[name] = match.maps
        costs[name] = match.value / (2 * group.size)
    return Alignment(permutations, costs, options, maps)


def _make_weight_reader(
    state: Mapping[str, Tensor], symmetry: Symmetry, folding: Folding | None
) -> ReadTensor:
    """Make a function that reads tensors in float64 on the CPU, with norms folded.

    Tied matrices are read by either name.

    Args:
        state: weights of a model by name.
        symmetry: permutation groups of the model, which know its tied matrices.
        folding: None: norms stay as they are.
    """

    def read_stored(name: str) -> Tensor:
        """Return the stored tensor of that name, on the CPU."""
        return state[name if name in state else symmetry.tied[name]].cpu()

    if folding is None:
        return lambda name: read_stored(name).double()
    return lambda name: folding.compute_folded_tensor(name, read_stored)
