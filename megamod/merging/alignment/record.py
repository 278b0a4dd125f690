"""An alignment and its folder on disk: `alignment.json`, `permutations.safetensors`, and
`maps.safetensors` if there are orthogonal maps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megamod.errors import UserError
from megamod.files import create_folder_atomically, write_json
from megamod.merging.alignment.groups import PermutationGroup
from megamod.merging.alignment.options import AlignmentOptions
from megamod.merging.alignment.symmetry import Symmetry
from megamod.schemas import Schema, read_checked_file
from megamod.states.weights import write_tensors

_RECORD, _PERMUTATIONS = "alignment.json", "permutations.safetensors"
_MAPS = "maps.safetensors"
_ORTHOGONAL = 1e-8
"""Largest entry of M Mᵀ - I in a stored map."""
_ONES = 1e-6
"""Largest entry of Q 1 - 1 in the map of a stream between LayerNorms."""

Maps = Mapping[str, Tensor]
"""Orthogonal matrices [m, h, h] of a group by the role of the entries that they act on."""


class _Record(Schema):
    """The content of alignment.json.

    Attributes:
        residual: the change of the residual stream where there are maps; None: there are none.
    """

    format: Literal[1, 2]
    options: AlignmentOptions
    costs: dict[str, float]
    residual: Literal["rotation", "permutation", "unchanged"] | None = None


@dataclass(frozen=True)
class Alignment:
    """Permutations that bring the features of a model into the order of a reference.

    Attributes:
        permutations: group -> [C] int64; feature r of the reference is matched with feature
            `permutation[r]` of this model. With the method "ot" [C, C] float64, whose row r mixes
            features. Not all are applied, see `find_applied_permutations`.
        costs: group -> summed similarity of matched features / (2 C): half the mean correlation.
            With `qk` the cost of an attention group is that of its queries and keys.
        options: options that the alignment was computed with.
        maps: group -> role -> [m, h, h] float64, orthogonal matrices that act on the permuted
            features, with the method "orthogonal". All groups of the residual stream have the map
            of "res.emb".
    """

    permutations: Mapping[str, Tensor]
    costs: Mapping[str, float]
    options: AlignmentOptions
    maps: Mapping[str, Maps] = field(default_factory=dict)

    def find_maps(self, group: PermutationGroup) -> Maps:
        """Return the maps of a group by role; empty if it has none."""
        return self.maps.get(get_map_name(group), {})

    def find_applied_permutations(self, symmetry: Symmetry) -> dict[str, Tensor]:
        """Return the permutations that are applied to a model, by group of its symmetry.

        A head that follows the residual stream has the permutation of that.

        Raises:
            UserError: if one is missing, or it or a map does not fit the model's group.
        """
        applied = {}
        for group in list_aligned_groups(symmetry, self.options):
            name = group.name
            if name == find_head_following_stream(symmetry, self.options):
                name = "res.emb"
            permutation = self.permutations.get(name)
            if permutation is None or len(permutation) != group.size:
                size = "none" if permutation is None else f"one of {len(permutation)} features"
                raise UserError(
                    f"alignment: {group.name} has {group.size} features in this model; there is "
                    f"{size} for it"
                )
            self._check_maps(group, symmetry)
            applied[group.name] = permutation
        return applied

    def _check_maps(self, group: PermutationGroup, symmetry: Symmetry) -> None:
        """Refuse maps that do not fit a group of `symmetry`.

        Raises:
            UserError: naming the group, if a map has another size than its features, or that of a
                stream between LayerNorms does not keep the vector of ones.
        """
        for role, blocks in self.find_maps(group).items():
            size = group.size
            if role in ("qk", "values"):
                size //= group.queries_per_key
            if blocks.shape[0] * blocks.shape[1] != size:
                raise UserError(
                    f"alignment: {group.name} has {size} features in this model; there is a map "
                    f"{role} of {blocks.shape[0] * blocks.shape[1]}"
                )
            ones = blocks.sum(-1)
            if role == "stream" and not symmetry.family.rms and (ones - 1).abs().max() > _ONES:
                raise UserError(
                    f"alignment: the map of {group.name} does not keep the vector of ones, as the "
                    "norms of this model need"
                )

    def _describe_stream_change(self) -> str:
        """Return the word of alignment.json for the change of the residual stream."""
        if "res.emb" in self.maps:
            return "rotation"
        return "permutation" if "res.emb" in self.permutations else "unchanged"

    def save(self, folder: Path) -> None:
        """Write the folder of the alignment, whole or not at all; `load_alignment` reads it.

        Raises:
            UserError: if it exists.
            OSError: if it cannot be written.
        """
        try:
            with create_folder_atomically(folder) as temporary:
                write_tensors(
                    temporary / _PERMUTATIONS,
                    {name: index.contiguous() for name, index in self.permutations.items()},
                    {"format": "pt"},
                )
                named = {
                    f"{name}:{role}": blocks.contiguous()
                    for name, maps in self.maps.items()
                    for role, blocks in maps.items()
                }
                if named:
                    write_tensors(temporary / _MAPS, named, {"format": "pt"})
                options = self.options.model_dump()
                version = 2 if named else 1
                record = {"format": version, "options": options, "costs": dict(self.costs)}
                if named:
                    record["residual"] = self._describe_stream_change()
                write_json(temporary / _RECORD, record)
        except FileExistsError as error:
            raise UserError(f"{folder}: exists already") from error


def get_map_name(group: PermutationGroup) -> str:
    """Return the name under which `Alignment.maps` has the maps of a group.

    All groups of the residual stream share those of "res.emb": there is one stream, and the layers
    add to it.
    """
    return "res.emb" if group.family == "res" else group.name


def make_identity_alignment(symmetry: Symmetry, options: AlignmentOptions) -> Alignment:
    """Make the alignment that leaves every feature at its index; it has no costs.

    Args:
        symmetry: permutation groups of the model; `options`: options of the alignment, which select
            the groups.
    """
    groups = list_aligned_groups(symmetry, options)
    return Alignment({group.name: torch.arange(group.size) for group in groups}, {}, options)


def list_aligned_groups(symmetry: Symmetry, options: AlignmentOptions) -> list[PermutationGroup]:
    """List the groups of a model that these options permute.

    Layers and residual stream are in the order of the computation; output heads follow.
    """
    families = [*options.groups, *(["qk"] if options.qk and "attn" in options.groups else [])]
    selected = symmetry.select_groups(*families)
    if options.compat.res_attn_without_embeddings and set(options.groups) == {"attn", "res"}:
        selected = [group for group in selected if group.name != "res.emb"]
    heads = [
        group
        for group in symmetry.select_groups("head")
        if options.head or group.name == find_head_following_stream(symmetry, options)
    ]
    return selected + heads


def find_head_following_stream(symmetry: Symmetry, options: AlignmentOptions) -> str | None:
    """Find the output head of a model whose features are permuted like the residual stream.

    That is the one with a tied matrix, if the options permute the stream and let it follow.

    Returns:
        name of its group in `symmetry`; None: there is none.
    """
    if not (options.head_follow_residual and "res" in options.groups):
        return None
    for group in symmetry.select_groups("head"):
        if any(axis.tensor in symmetry.tied for axis in group.reading_axes):
            return group.name
    return None


def load_alignment(folder: Path) -> Alignment:
    """Read a folder that `Alignment.save` wrote.

    Raises:
        UserError: if a file cannot be read, or holds no permutations or no orthogonal matrices.
    """
    folder = Path(folder)
    record = read_checked_file(folder / _RECORD, _Record)
    permutations = _read_tensors(folder / _PERMUTATIONS)
    for name, index in permutations.items():
        if index.dim() == 2 and record.options.method == "ot":
            sums = torch.cat([index.sum(0), index.sum(1)])
            good = bool((index >= 0).all()) and torch.allclose(sums, sums.new_ones(()), atol=1e-4)
        else:
            good = index.dim() == 1 and torch.equal(index.sort().values, torch.arange(len(index)))
        if not good:
            raise UserError(f"{folder / _PERMUTATIONS}: {name} is not a permutation")
    maps: dict[str, dict[str, Tensor]] = {}
    for key, blocks in (_read_tensors(folder / _MAPS) if record.format == 2 else {}).items():
        name, _, role = key.rpartition(":")
        if not _is_orthogonal(blocks):
            raise UserError(f"{folder / _MAPS}: {key} is not made of orthogonal matrices")
        maps.setdefault(name, {})[role] = blocks
    return Alignment(permutations, record.costs, record.options, maps)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file; raise UserError if it cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _is_orthogonal(blocks: Tensor) -> bool:
    """Return True if the matrices M of `blocks` [m, h, h] float64 have M Mᵀ = I.

    The largest difference allowed is `_ORTHOGONAL`.
    """
    if blocks.dtype != torch.float64 or blocks.dim() != 3 or blocks.shape[1] != blocks.shape[2]:
        return False
    error = blocks @ blocks.mT - torch.eye(blocks.shape[1], dtype=blocks.dtype)
    return bool(error.abs().max() <= _ORTHOGONAL)
