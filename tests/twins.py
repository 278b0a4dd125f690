"""Models that compute what another one does, with their features in another order."""

import torch
from transformers import PreTrainedModel

from megamod.merging.alignment.align import collect_float_shapes
from megamod.merging.alignment.options import AlignmentOptions
from megamod.merging.alignment.permute import permute_state
from megamod.merging.alignment.record import Alignment, list_aligned_groups
from megamod.merging.alignment.symmetry import find_symmetry

ALL = AlignmentOptions(head_follow_residual=True)


def twin(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A model that computes the same, its features in another order."""
    symmetry = find_symmetry(model.config.to_dict(), collect_float_shapes(model.state_dict()))
    options = ALL if symmetry.select_groups("res") else AlignmentOptions(groups=("ff", "attn"))
    generator = torch.Generator().manual_seed(seed)
    result, shared = {}, None
    for group in list_aligned_groups(symmetry, options):
        if group.family in ("res", "head"):
            shared = torch.randperm(group.size, generator=generator) if shared is None else shared
            result[group.name] = shared
        elif group.heads is None:
            result[group.name] = torch.randperm(group.size, generator=generator)
        else:
            within = group.size // group.heads
            order = torch.randperm(group.heads, generator=generator)
            parts = [head * within + torch.randperm(within, generator=generator) for head in order]
            result[group.name] = torch.cat(parts)
    state = permute_state(model.state_dict(), symmetry, Alignment(result, {}, options))
    other = type(model)(model.config)
    other.load_state_dict(state)
    return other
