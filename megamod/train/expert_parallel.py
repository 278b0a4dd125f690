"""Expert parallelism of a mixture of experts, by the AutoEP of DeepSpeed.

DeepSpeed puts a layer with E/n of the experts in the place of each sparse block, and two all-to-all
exchanges around them. Its tensors are named and split otherwise than those of the stock class: here
they are read and written under the stock names, so that checkpoints and model folders are those of
any other run of the mixture.

w1, w2, w3 [E/n, ...] of DeepSpeed's layer are the gate, down and up projections of consecutive
experts; the stock class has `gate_up_proj` [E, 2F, D], gate before up, and `down_proj` [E, D, F].
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import Tensor, nn
from transformers import PreTrainedConfig

from megamod.args import OptimArgs
from megamod.dist.communication import compute_exchange_traffic
from megamod.dist.ds_config import get_offload_device
from megamod.errors import UserError
from megamod.models.lm.moe_families import LAYERS, MOE_FAMILIES
from megamod.models.lm.routing import is_sparse_moe

KEY = "expert_parallel"
"""Name of the block in a DeepSpeed file."""
DESCRIPTIONS: dict[str, dict[str, object]] = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    # DeepSpeed has no preset of this one.
    "flex_olmo": {
        "moe_layer_pattern": r"model\.layers\.\d+\.mlp",
        "num_experts_attr": "num_experts",
    },
}
"""Model types that DeepSpeed spreads over ranks, with the keys that describe them to it."""
# Modules in DeepSpeed's layer -> modules in the stock block, of equal parameters.
_RENAMED = {
    "router.gate": "gate",
    "shared_experts": "shared_expert",
    "shared_experts_gate": "shared_expert_gate",
}


def apply_expert_parallel_rules(
    config: dict[str, object], model: PreTrainedConfig | None, optim: OptimArgs, world_size: int
) -> None:
    """Check the block `expert_parallel` of a DeepSpeed file, and complete it.

    A block that is not enabled is removed, so that the key is present only where it has an effect.

    Args:
        config: a resolved configuration; changed in place.
        model: configuration of the mixture that is trained; None: the run trains another model.
        optim: flags of the optimizer.
        world_size: number of ranks.
    Raises:
        UserError: if the model, the ranks or another setting do not go with it.
    """
    block = config.pop(KEY, None)
    if block is None or not block.get("enabled", False):
        return
    size = block.get("autoep_size", 1)
    kind = None if model is None else model.model_type
    if kind not in DESCRIPTIONS:
        raise UserError(
            f"{KEY}: the model is {'no mixture of experts' if kind is None else f'a {kind}'}; "
            f"DeepSpeed spreads the experts of a {', '.join(DESCRIPTIONS)}; remove the block"
        )
    experts = getattr(model, MOE_FAMILIES[kind].count)
    if type(size) is not int or size < 1 or experts % size or world_size % size:
        raise UserError(
            f"{KEY}.autoep_size is {size!r}: it must divide the {experts} experts and the "
            f"{world_size} ranks"
        )
    for name in ("enabled", "use_grouped_mm"):
        if type(block.get(name, True)) is not bool:
            raise UserError(f"{KEY}.{name} is {block[name]!r}; it must be true or false")
    if not MOE_FAMILIES[kind].always_norms and not model.norm_topk_prob:
        raise UserError(
            f"{KEY}: norm_topk_prob of the model is false, and DeepSpeed's layers divide the "
            "weights of a token's experts by their sum; remove the block"
        )
    zero = config["zero_optimization"]
    if zero["stage"] not in (1, 2):
        raise UserError(
            f"{KEY} with ZeRO stage {zero['stage']} is not supported: use stage 1 or 2, or remove "
            "the block"
        )
    if get_offload_device(zero, "optimizer") != "none":
        raise UserError(f"{KEY} with zero_optimization.offload_optimizer is not supported")
    if optim.optim != "adamw":
        raise UserError(f"{KEY}: the experts are trained by AdamW, not by --optim {optim.optim}")
    config[KEY] = {**DESCRIPTIONS[kind], **block, "autoep_size": size}


def is_expert_parallel(config: Mapping[str, object]) -> bool:
    """Return True if a resolved DeepSpeed configuration spreads experts over ranks."""
    return KEY in config


def get_parallel_layers(module: nn.Module) -> dict[str, AutoEPMoELayer]:
    """Return DeepSpeed's layers in a model by the path of the block that each replaced.

    Empty for a model that is no mixture, or whose experts are not spread over ranks.
    """
    config = getattr(module, "config", None)
    if config is None or not is_sparse_moe(config):
        return {}
    block = MOE_FAMILIES[config.model_type].module
    layers = {
        f"{LAYERS}.{number}.{block}": layer.get_submodule(block)
        for number, layer in enumerate(module.get_submodule(LAYERS))
    }
    return {path: part for path, part in layers.items() if isinstance(part, AutoEPMoELayer)}


def list_expert_names(module: nn.Module) -> list[str]:
    """List the names of the parameters that hold a rank's share of the experts."""
    return [f"{path}.experts.w{n}" for path in get_parallel_layers(module) for n in (1, 2, 3)]


def get_expert_data_parallel_size(module: nn.Module) -> int:
    """Return the number of ranks that hold the same experts of a model (data parallel size).

    It is world size / `ep_size`; the world size if experts are not spread.
    """
    size = max((layer.ep_size for layer in get_parallel_layers(module).values()), default=1)
    return dist.get_world_size() // size


def compute_parallel_exchange(module: nn.Module, tokens: int) -> float:
    """Compute the bytes that a rank sends in a step to exchange tokens with experts, evenly loaded.

    0 if the experts of the model are not spread over ranks.

    Args:
        module: the model.
        tokens: number of tokens of the rank's micro-batches in a step.
    """
    layers = list(get_parallel_layers(module).values())
    if not layers:
        return 0.0
    first = layers[0]
    return compute_exchange_traffic(
        tokens * first.top_k,
        first.ep_size,
        len(layers),
        first.hidden_size,
        first.experts.w1.element_size(),
        recomputed=module.is_gradient_checkpointing,
    )


def map_to_stock_names(module: nn.Module) -> dict[str, str]:
    """Map names in DeepSpeed's layers of a model to names of equal parameters in the stock class.

    These are routers and shared experts; the experts themselves are split otherwise.
    """
    names = {}
    for path, layer in get_parallel_layers(module).items():
        for name, _ in layer.named_parameters():
            for ours, stock in _RENAMED.items():
                if name.startswith(f"{ours}."):
                    names[f"{path}.{name}"] = f"{path}.{stock}{name.removeprefix(ours)}"
    return names


def gather_experts(module: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Gather the experts of all ranks under their stock names; collective.

    Peak memory on every rank: all experts of one layer, and with `keep` of all layers.

    Args:
        module: the model.
        keep: False on ranks that take part without keeping the result.
    Returns:
        name -> tensor of all E experts; empty without `keep`, or if nothing is spread over ranks.
    """
    state = {}
    for path, layer in get_parallel_layers(module).items():
        experts = layer.experts
        parts_of_rank = {
            f"{path}.experts.gate_up_proj": torch.cat([experts.w1, experts.w3], dim=1),
            f"{path}.experts.down_proj": experts.w2.detach(),
        }
        for name, tensor in parts_of_rank.items():
            parts = [torch.empty_like(tensor) for _ in range(layer.ep_size)]
            dist.all_gather(parts, tensor.detach().contiguous(), group=layer.ep_group)
            if keep:
                state[name] = torch.cat(parts)
    return state


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a parameter, and their place in a tensor of the stock class.

    Attributes:
        start, size: first element in the flattened parameter, and number of elements.
        name: name of the tensor in the stock class.
        stock_start: first element in that tensor, flattened.
    """

    start: int
    size: int
    name: str
    stock_start: int


def list_stock_pieces(module: nn.Module) -> dict[str, list[Piece]]:
    """List the pieces of each parameter with another name or split than in the stock class.

    Returns:
        by name in `module`; a piece is a range of the parameter and its place in a stock tensor.
    """
    pieces = {
        name: [Piece(0, module.get_parameter(name).numel(), stock, 0)]
        for name, stock in map_to_stock_names(module).items()
    }
    for path, layer in get_parallel_layers(module).items():
        # Part of an expert -> tensor, number of its parts, and the index among these.
        for part, (stock, count, index) in {
            "w1": ("gate_up_proj", 2, 0),
            "w2": ("down_proj", 1, 0),
            "w3": ("gate_up_proj", 2, 1),
        }.items():
            parameter = getattr(layer.experts, part)
            size, first = parameter[0].numel(), layer.ep_rank * layer.num_local_experts
            pieces[f"{path}.experts.{part}"] = [
                Piece(
                    number * size,
                    size,
                    f"{path}.experts.{stock}",
                    ((first + number) * count + index) * size,
                )
                for number in range(layer.num_local_experts)
            ]
    return pieces
