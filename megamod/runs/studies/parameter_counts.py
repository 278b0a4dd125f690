"""Numbers of parameters of the models in a cell, which tables of studies divide tokens by."""

from collections.abc import Sequence
from pathlib import Path

from megamod.models.lm.configuration import read_lm_config
from megamod.models.lm.moe_families import MOE_FAMILIES
from megamod.models.lm.routing import is_sparse_moe
from megamod.states.weights import read_weights


def count_parameters(models: Sequence[Path]) -> dict[str, int]:
    """Count the parameters in the weight files of model folders.

    Args:
        models: folders of a dense model or mixture, or of each expert of a forest.
    Returns:
        `total`: of all models together; of one model (the last) `active`: those that a token passes
        through, and `outside_embeddings`: the part of these outside the embeddings.
    """
    total, active, outside_embeddings = 0, 0, 0
    for model in models:
        sizes = {name: tensor.numel() for name, tensor in read_weights(model).items()}
        owners = {n: n.split(".experts.")[1].split(".")[0] for n in sizes if ".experts." in n}
        used = list(dict.fromkeys(owners.values()))[: _count_experts_per_token(model)]
        active_sizes = {
            name: size for name, size in sizes.items() if name not in owners or owners[name] in used
        }
        total += sum(sizes.values())
        active = sum(active_sizes.values())
        outside_embeddings = sum(size for name, size in active_sizes.items() if "embed" not in name)
    return {"total": total, "active": active, "outside_embeddings": outside_embeddings}


def _count_experts_per_token(model: Path) -> int:
    """Count the experts that compute a token in a model folder: 1, or the top k of a mixture."""
    config = read_lm_config(model)
    if not is_sparse_moe(config):
        return 1
    return getattr(config, MOE_FAMILIES[config.model_type].experts_per_token)
