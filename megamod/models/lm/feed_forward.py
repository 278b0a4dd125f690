"""Parameters of a language model that belong to its feed-forward layers."""

from torch import nn

from megamod.models.lm.hosts import HOSTS, find_layers_path
from megamod.nn.anchored import AnchoredExperts


def list_feed_forward_names(model: nn.Module) -> set[str]:
    """List the names of the parameters inside feed-forwards of a dense language model.

    Args:
        model: the project's GPT or a stock model.
    Raises:
        KeyError: if the model is of a family without a row in the table of hosts.
    """
    kind = model.config.model_type
    if kind == "demix":
        parts = ("fc1", "fc2")
        paths = [f"feed_forward.{part}" for part in parts]
    else:
        paths = HOSTS[kind].feed_forward
    layers = find_layers_path(model.config)
    inside = tuple(
        f"{layers}.{number}.{path}."
        for number in range(len(model.get_submodule(layers)))
        for path in paths
    )
    return {name for name, _ in model.named_parameters() if name.startswith(inside)}


def freeze_all_but_experts(model: nn.Module) -> None:
    """Freeze every parameter of an anchored model but its experts, in place.

    The router row of an expert is one of its parameters, so it is trained too.
    """
    model.requires_grad_(False)
    for part in model.modules():
        if isinstance(part, AnchoredExperts):
            part.experts.requires_grad_(True)
