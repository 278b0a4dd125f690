"""Routers of a stock mixture of experts: their outputs in a forward pass, and the load balance."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from megamod.errors import UserError
from megamod.models.lm.moe_families import LAYERS, MOE_FAMILIES, MoeFamily


@dataclass(frozen=True)
class Routing:
    """Output of a layer's router for N tokens.

    Attributes:
        logits: [N, E].
        weights: [N, K] of the selected experts; `experts`: [N, K] their numbers.
    """

    logits: Tensor
    weights: Tensor
    experts: Tensor

    @property
    def shares(self) -> Tensor:
        """Weight of every expert for each token, [N, E] float32; 0 where it was not selected."""
        shares = torch.zeros_like(self.logits, dtype=torch.float32)
        return shares.scatter_add_(1, self.experts, self.weights.float())


def is_sparse_moe(config: PreTrainedConfig) -> bool:
    """Return True for a stock sparse mixture of experts, of a type in `MOE_FAMILIES`.

    False for a DEMix model and a forest, which have experts but no routers.
    """
    return config.model_type in MOE_FAMILIES


def find_routers(model: nn.Module) -> list[nn.Module]:
    """Return the routers of a mixture, one per layer, in the order of the layers.

    `model.config` must be of a type in `MOE_FAMILIES`.
    """
    family: MoeFamily = MOE_FAMILIES[model.config.model_type]
    blocks = [layer.get_submodule(family.module) for layer in model.get_submodule(LAYERS)]
    return [
        block.router if _is_expert_parallel(block) else block.get_submodule(family.router)
        for block in blocks
    ]


def _is_expert_parallel(block: nn.Module) -> bool:
    """Return True for a layer of DeepSpeed that took the place of a sparse block."""
    # By DeepSpeed's own mark, because models must not import deepspeed.
    return getattr(block, "_is_autoep_layer", False)


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[Routing]]:
    """Yield a list that each forward pass of `model` inside the block adds its routing to.

    An entry is the routing of one layer. Gradients flow through the logits. A pass that is
    recomputed after the block adds nothing.
    """
    family: MoeFamily = MOE_FAMILIES[model.config.model_type]
    recorded: list[Routing] = []
    parallel_logits: dict[nn.Module, Tensor] = {}

    def record_layer(
        module: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]
    ) -> None:
        """Add the routing of a layer to the list, after its router's forward pass.

        A forward hook of torch: `module` is the router, `outputs` its results.
        """
        if module in parallel_logits:  # the router of DeepSpeed's layer returns no logits
            recorded.append(Routing(parallel_logits.pop(module), outputs[0], outputs[1]))
        else:
            recorded.append(Routing(*(outputs[position] for position in family.outputs)))

    def make_gate_hook(router: nn.Module) -> Callable[[nn.Module, object, Tensor], None]:
        """Make a hook that keeps the logits of a gate of DeepSpeed for `record_layer`."""
        return lambda gate, inputs, logits: parallel_logits.update({router: logits})

    routers = find_routers(model)
    handles = [router.register_forward_hook(record_layer) for router in routers]
    handles += [
        router.gate.register_forward_hook(make_gate_hook(router))
        for router in routers
        if isinstance(getattr(router, "gate", None), nn.Linear)
    ]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def compute_balance_losses(layers: Sequence[Routing], mask: Tensor | None = None) -> Tensor:
    """Compute the load-balance loss of each layer, E sum over e of f_e P_e, [L].

    f_e is the number of assignments to expert e per token, P_e its mean probability over all
    experts' softmax. Uniform routing to K experts gives K.

    Args:
        layers: routing of N tokens in each of the L layers.
        mask: [N] bool, tokens that count; None: all.
    Source: Fedus et al. 2022 (Switch Transformers), section 2.2.
    """
    losses = []
    for routing in layers:
        probabilities = routing.logits.float().softmax(-1)
        tokens, count = probabilities.shape
        weights = probabilities.new_ones(tokens) if mask is None else mask.float()
        # Sums weighted by the mask: selecting rows would wait for the device.
        total = weights.sum().clamp_min(1.0)
        assigned = weights[:, None].expand(routing.experts.shape).flatten()
        load = torch.zeros_like(probabilities[0]).index_add_(0, routing.experts.flatten(), assigned)
        mean = weights @ probabilities / total
        losses.append(count * (load / total * mean).sum())
    return torch.stack(losses)


def freeze_all_but_routers(model: nn.Module) -> None:
    """Freeze every parameter of a mixture but the weights [E, D] of its routers, in place."""
    rows = {id(router.weight) for router in find_routers(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in rows)


def check_router_training(where: str, config: PreTrainedConfig) -> None:
    """Refuse to train the router alone where the loss does not depend on it.

    Args:
        where: beginning of the message: the option or the folder.
        config: configuration of a mixture in `MOE_FAMILIES`.
    Raises:
        UserError: if a token has one expert whose weight is always 1.
    """
    family = MOE_FAMILIES[config.model_type]
    norms = family.always_norms or getattr(config, "norm_topk_prob", False)
    if norms and getattr(config, family.experts_per_token) == 1:
        raise UserError(
            f"{where}: {family.experts_per_token} is 1, so the weight of the only expert is 1 and "
            "the router gets no gradient; convert with --topk 2"
        )
