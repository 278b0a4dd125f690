"""Alignment as a step of a merge: read every model in the feature order of the first."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from megamod.errors import UserError
from megamod.merging.alignment.align import align_folders, align_weights, collect_float_shapes
from megamod.merging.alignment.folder import PermutedFolder, find_folder_symmetry
from megamod.merging.alignment.measure import load_model
from megamod.merging.alignment.options import AlignmentOptions, EffectiveAlignmentOptions
from megamod.merging.alignment.permute import apply_alignment
from megamod.merging.alignment.record import Alignment, make_identity_alignment
from megamod.merging.alignment.symmetry import find_symmetry
from megamod.merging.tensors import TensorSource, describe_source
from megamod.schemas import check_against_schema
from megamod.states.forest import read_model_config


def align_folder_views(
    block: Mapping[str, object], folders: Sequence[TensorSource], origin: str
) -> list[TensorSource]:
    """Return views of a recipe's folders, all with their features in the order of the first.

    With method "identity", without `compat.scale`, they are the folders themselves. Other methods
    read all weights, run models if they need text, and write `maps` if the block names a folder for
    them.

    Args:
        block: `align:` of the recipe.
        folders: under common names; the first is the reference.
        origin: file of the recipe, for messages.
    Raises:
        UserError: if the block is invalid, the models cannot be aligned, or the result would need
            an output matrix that is no longer tied.
    """
    options = check_against_schema(block, EffectiveAlignmentOptions, origin, "align")
    if options.method == "identity" and not options.compat.scale:
        return list(folders)
    views: list[TensorSource] = [folders[0]]
    for folder in folders[1:]:
        alignment = _align_two_folders(folders[0], folder, options, origin)
        view = PermutedFolder(folder, alignment)
        if options.compat.scale or alignment.maps:
            views[0] = PermutedFolder(folders[0], alignment, reference=True)
        extra = sorted(view.tensors.keys() - folder.tensors.keys())
        # Maps untie the reference as well.
        if extra and not alignment.maps:
            raise UserError(
                f"{origin}: aligned so, {extra[0]} is no longer tied; leave head_follow_residual "
                "on and head off in align"
            )
        views.append(view)
    return views


def load_aligned_model(source: TensorSource, auto: type | None = None) -> PreTrainedModel:
    """Load the model of a source of `align_folder_views` in float32, with aligned features.

    Args:
        source: a folder as it is, or the view of one.
        auto: see `load_model`.
    Raises:
        UserError: if the model cannot be loaded.
    """
    model = load_model(str(source.folder), auto)
    if isinstance(source, PermutedFolder):
        config, shapes = model.config.to_dict(), collect_float_shapes(model.state_dict())
        symmetry = find_symmetry(config, shapes, qk=source.alignment.options.qk)
        apply_alignment(model, symmetry, source.alignment, reference=source.reference)
    return model


def _align_two_folders(
    first: TensorSource, second: TensorSource, options: AlignmentOptions, origin: str
) -> Alignment:
    """Align the second folder to the first: by text if the options need it, else by weights.

    Args:
        first, second: the folders; the first is the reference.
        origin: file of the recipe, for messages.
    Raises:
        UserError: if there is no such text, the models cannot be run on it, or do not fit each
            other.
    """
    if options.reads_text:
        for folder in (first, second):
            if getattr(folder, "adapter", None) is not None:
                raise UserError(
                    f"{origin}: {describe_source(folder)}: a model with an adapter is not "
                    "run on text; give align the method weight, or merge the adapter first"
                )
            if folder.member is not None:
                raise UserError(
                    f"{origin}: {describe_source(folder)}: one expert of a folder is not "
                    "run on text; give align the method weight"
                )
        if options.calibration.path is None:
            raise UserError(f"{origin}: align.calibration.path is missing: text to compare on")
        return align_folders(str(first.folder), str(second.folder), options)
    if options.method == "identity":
        return make_identity_alignment(find_folder_symmetry(second, qk=options.qk), options)
    states = [{name: folder.read(name) for name in folder.tensors} for folder in (first, second)]
    configs = [read_model_config(folder.folder) for folder in (first, second)]
    return align_weights(configs[0], states[0], configs[1], states[1], options)
