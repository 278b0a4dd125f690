"""Optimizer state as named fragments of parameters, at any ZeRO stage.

ZeRO keeps float32 masters and moments in flat buffers that are divided over the ranks. Only the
same world could read a checkpoint of those buffers. Here the share of a rank is a list of ranges of
named parameters, which any world size and stage can read.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import deepspeed
import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from megamod.train.expert_parallel import Piece, get_parallel_layers, list_stock_pieces


@dataclass(frozen=True)
class Fragment:
    """A range of one parameter that this rank's optimizer updates.

    Attributes:
        name: the parameter's name in the module.
        start: offset of the range in the flattened parameter, in elements.
        tensors: one-dimensional views of equal length; "master" (the weight, float32), and the
            moments of the optimizer, AdamW's "exp_avg" and "exp_avg_sq" (float32) or Muon's
            "momentum". Writing into them changes the optimizer's state.
        whole: views of state that this rank holds for the whole parameter, flattened, a range of
            which is among `tensors`: the momentum of a matrix that ZeRO 1 or 2 divides. All of it
            must be written.
    """

    name: str
    start: int
    tensors: dict[str, Tensor]
    whole: dict[str, Tensor] = field(default_factory=dict)


def iterate_fragment_shards(engine: deepspeed.DeepSpeedEngine) -> Iterator[list[Fragment]]:
    """Yield this rank's share of the optimizer state of an engine, as fragments.

    Missing moments are created, at zero. One list, unless the state is swapped to a disk
    (ZeRO-Infinity): then one list for each group of parameters that is swapped together. It is in
    memory, and may be written to, until the next one is requested.
    """
    names = {
        parameter: name
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }
    optimizer = engine.optimizer
    if get_parallel_layers(engine.module):
        fragments = list(_iterate_stage_1_2_fragments(optimizer, names))
        yield from _divide_by_stock_names(engine.module, fragments)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        yield from _iterate_stage_3_shards(optimizer, names)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        yield list(_iterate_stage_1_2_fragments(optimizer, names))
    else:
        yield [
            _make_fragment(
                names[parameter],
                0,
                parameter.data,
                optimizer,
                parameter,
                0,
                parameter.numel(),
                group.get("use_muon", False),
            )
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]


def iterate_fragments(engine: deepspeed.DeepSpeedEngine) -> Iterator[Fragment]:
    """Yield the fragments of all lists of `iterate_fragment_shards`."""
    for shard in iterate_fragment_shards(engine):
        yield from shard


def copy_masters_to_weights(engine: deepspeed.DeepSpeedEngine) -> None:
    """Copy the float32 masters of an engine to its module's weights, in place.

    Without ZeRO the masters are the weights, and nothing happens.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for group in range(len(optimizer.fp16_groups)):
            with _swap_group_in(optimizer, group):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
        # Small parameters stay gathered between steps, so their full copies are refreshed.
        persistent = optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.update_lp_params()


def read_optimizer_steps(engine: deepspeed.DeepSpeedEngine) -> float:
    """Read the number of updates that an engine's Adam counts, the exponent of its bias correction.

    0 before the first update, and if every group is trained by Muon.
    """
    states = _unwrap_optimizer(engine).state.values()
    return max((float(state["step"]) for state in states if "step" in state), default=0.0)


def set_optimizer_steps(engine: deepspeed.DeepSpeedEngine, steps: float) -> None:
    """Set the number of updates that an engine's Adam counts, see `read_optimizer_steps`.

    Call it after `iterate_fragments` created the optimizer's state: there is no count before.
    """
    for state in _unwrap_optimizer(engine).state.values():
        if "step" in state:  # Muon counts none
            state["step"].fill_(steps)


def _unwrap_optimizer(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    """Return the optimizer of torch that DeepSpeed's optimizer of the engine wraps."""
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def _iterate_stage_1_2_fragments(
    zero: DeepSpeedZeroOptimizer, names: dict[torch.nn.Parameter, str]
) -> Iterator[Fragment]:
    """Yield this rank's fragments of ZeRO stage 1 and 2.

    Args:
        zero: DeepSpeed's optimizer.
        names: of the parameters in the module.
    """
    for group, flat in enumerate(zero.single_partition_of_fp32_groups):
        momenta = _get_whole_momenta(zero, group, flat)
        for parameter in zero.bit16_groups[group]:
            mapping = parameter._hp_mapping
            if mapping is None:
                continue
            name, start = names[parameter], mapping.lp_fragment_address.start
            offset, size = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
            if momenta is None:
                yield _make_fragment(name, start, flat.data, zero.optimizer, flat, offset, size)
                continue
            momentum = momenta[parameter]
            tensors = {
                "master": flat.data.narrow(0, offset, size),
                "momentum": momentum.narrow(0, start, size),
            }
            yield Fragment(name, start, tensors, {"momentum": momentum})


def _get_whole_momenta(
    zero: DeepSpeedZeroOptimizer, group: int, flat: Tensor
) -> dict[torch.nn.Parameter, Tensor] | None:
    """Return Muon's momentum of each matrix in this rank's part; None for a group of AdamW.

    A momentum is flattened and covers the whole matrix; it is created at zero if it is missing.

    Args:
        group: number of the parameter group; `flat`: the float32 masters of its part on this rank.
    """
    if not zero.optimizer.param_groups[group].get("use_muon"):
        return None
    held, state = zero.params_in_partition[group], zero.optimizer.state[flat]
    sizes = [parameter.numel() for parameter in held]
    if "momentum_buffer" not in state:
        # In the precision of gradients, as DeepSpeed allocates it at the first step.
        dtype = held[0].dtype if held else flat.dtype
        state["momentum_buffer"] = torch.zeros(sum(sizes), dtype=dtype, device=flat.device)
    return dict(zip(held, state["momentum_buffer"].split(sizes), strict=True))


def _iterate_stage_3_shards(
    zero: DeepSpeedZeroOptimizer_Stage3, names: dict[torch.nn.Parameter, str]
) -> Iterator[list[Fragment]]:
    """Yield the fragments of all groups in memory, then the fragments of each group on a disk.

    A group of the disk is in memory until the next list is requested.

    Args:
        zero: DeepSpeed's optimizer.
        names: of the parameters in the module.
    """
    groups = range(len(zero.fp16_groups))
    swapped = [group for group in groups if zero._swappable_optimizer_subgroup(group)]
    in_memory = [group for group in groups if group not in swapped]
    for members in (in_memory, *([group] for group in swapped)):
        if members:
            with _swap_group_in(zero, members[0]):
                yield [
                    cut
                    for group in members
                    for cut in _iterate_stage_3_fragments(zero, group, names)
                ]


def _iterate_stage_3_fragments(
    zero: DeepSpeedZeroOptimizer_Stage3, group_index: int, names: dict[torch.nn.Parameter, str]
) -> Iterator[Fragment]:
    """Yield this rank's fragments of ZeRO stage 3 in a group of parameters.

    Args:
        zero: DeepSpeed's optimizer.
        group_index: number of the group, which must be in memory.
        names: of the parameters in the module.
    """
    muon = zero.use_muon and zero.sub_groups_using_muon[group_index]
    for parameter in zero.fp16_groups[group_index]:
        _, offset, size = zero.grad_position[zero.get_param_id(parameter)]
        start = size * zero._get_param_partition_rank(parameter)
        numel = min(size, parameter.ds_numel - start)  # the last rank's share is padded
        if numel > 0:
            flat = zero.fp32_partitioned_groups_flat[group_index]
            optimizer = zero.optimizer
            yield _make_fragment(
                names[parameter], start, flat.data, optimizer, flat, offset, numel, muon
            )


def _divide_by_stock_names(
    module: torch.nn.Module, fragments: Sequence[Fragment]
) -> Iterator[list[Fragment]]:
    """Divide fragments of a rank into ranges of the tensors of the stock class.

    Args:
        module: a mixture whose experts are spread over ranks.
    Yields:
        lists in which no tensor occurs twice, as a file of fragments needs it.
    """
    pieces = list_stock_pieces(module)
    lists: list[list[Fragment]] = []
    seen: dict[str, int] = {}
    for fragment in fragments:
        size = next(iter(fragment.tensors.values())).numel()
        whole = [Piece(fragment.start, size, fragment.name, fragment.start)]
        for piece in pieces.get(fragment.name, whole):
            low = max(piece.start, fragment.start)
            high = min(piece.start + piece.size, fragment.start + size)
            if low >= high:
                continue
            tensors = {
                kind: tensor.narrow(0, low - fragment.start, high - low)
                for kind, tensor in fragment.tensors.items()
            }
            number = seen.get(piece.name, 0)
            seen[piece.name] = number + 1
            lists.extend([] for _ in range(number + 1 - len(lists)))
            start = piece.stock_start + low - piece.start
            lists[number].append(replace(fragment, name=piece.name, start=start, tensors=tensors))
    yield from lists


@contextmanager
def _swap_group_in(zero: DeepSpeedZeroOptimizer_Stage3, group_index: int) -> Iterator[None]:
    """Hold masters and moments of a group in memory within the block, if they are on a disk.

    They are written back at its end.

    Args:
        zero: DeepSpeed's optimizer.
        group_index: number of the group of parameters.
    """
    swapped = zero._swappable_optimizer_subgroup(group_index)
    if swapped:
        zero._optimizer_states_and_gradient_swap_in(group_index)
    try:
        yield
    finally:
        if swapped:
            zero._optimizer_states_and_gradient_swap_out(group_index)


def _make_fragment(
    name: str,
    start: int,
    flat_masters: Tensor,
    optimizer: torch.optim.Optimizer,
    optimized_tensor: Tensor,
    offset: int,
    size: int,
    muon: bool = False,
) -> Fragment:
    """Make a fragment of elements [offset, offset + size) of the flat masters and moments.

    Moments that do not exist yet are created in the optimizer's state, at 0.

    Args:
        start: offset of the fragment in the parameter `name`, flattened.
        flat_masters: any shape; `offset` counts its elements.
        optimized_tensor: key of the moments in the optimizer's state.
        muon: True if Muon trains the parameter, whose only moment is a momentum.
    """
    state = optimizer.state[optimized_tensor]
    if muon:
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(optimized_tensor)
        moments = {"momentum": state["momentum_buffer"]}
    else:
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=optimized_tensor.device)
            state["exp_avg"] = torch.zeros_like(optimized_tensor)
            state["exp_avg_sq"] = torch.zeros_like(optimized_tensor)
        moments = {kind: state[kind] for kind in ("exp_avg", "exp_avg_sq")}
    flat_tensors = {"master": flat_masters, **moments}
    return Fragment(
        name,
        start,
        {kind: tensor.view(-1).narrow(0, offset, size) for kind, tensor in flat_tensors.items()},
    )
