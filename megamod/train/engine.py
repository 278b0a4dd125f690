"""DeepSpeed engine of a model, with the process groups of a topology.

Only this file, `fragments.py`, `expert_parallel.py` and `muon.py` use internals of DeepSpeed.
"""

import copy
import functools
from collections.abc import Callable, Mapping

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups
from torch import nn

from megamod.dist.scope import Sharing
from megamod.dist.topology import DomainGroup, DomainTopology
from megamod.errors import PolicyStop, UserError
from megamod.nn.demix import DomainExperts, iterate_domain_experts
from megamod.train.expert_parallel import get_parallel_layers, is_expert_parallel
from megamod.train.hidden_matrices import mark_hidden_matrices

MakeOptimizer = Callable[[list[dict[str, object]]], torch.optim.Optimizer]
"""From parameter groups, as torch takes them, to an optimizer."""


class _EngineLayer:
    """Addition to `DomainExperts` that makes them a layer of DeepSpeed's engine."""

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Create DeepSpeed's groups of this expert size if they do not exist.

        DeepSpeed calls it, and the argument is DeepSpeed's.
        """
        if self.expert_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(
                self.ep_size, use_data_before_expert_parallel_=use_data_before_expert_parallel_
            )


@functools.cache
def _make_engine_class(experts: type[DomainExperts]) -> type[MoE]:
    """Make the class of domain experts that is an instance of DeepSpeed's MoE layer.

    The engine recognises expert parameters only inside modules of that class. There is no gate and
    no all-to-all; the only effect is that gradients stay in the group of the domain.
    """
    return type(experts.__name__, (_EngineLayer, experts, MoE), {"__doc__": experts.__doc__})


def build_engine(
    model: nn.Module,
    make_optimizer: MakeOptimizer,
    config: Mapping[str, object],
    topology: DomainTopology,
    *,
    decay_vectors: bool = True,
    muon: bool = False,
) -> deepspeed.DeepSpeedEngine:
    """Wrap a model, in place, for training; parameters that require no gradient do not change.

    Dense models share every parameter over the world. In a DEMix model, parameters inside
    `DomainExperts` are reduced over the ranks of their domain only, summed and divided by the world
    size: the gradient of the joint loss (Gururangan et al. 2022, section 3). Independent models
    (BTM) get a data-parallel world of their domain's ranks. With expert parallelism, the experts of
    a mixture are reduced over the ranks that hold the same ones.

    Args:
        make_optimizer: called with the groups of trained parameters.
        config: resolved DeepSpeed configuration; not changed.
        decay_vectors: False for no weight decay of norms and biases.
        muon: True if `make_optimizer` makes Muon, which needs hidden matrices in a group of theirs.
    Raises:
        UserError: if the device does not support the precision, or expert parallelism is used and
            a parameter is frozen.
        AssertionError: if DeepSpeed groups other ranks together than `topology` does.
    """
    mpu = DomainGroup(topology) if topology.sharing is Sharing.BTM else None
    config = copy.deepcopy(dict(config))
    zero = config["zero_optimization"]
    if zero["stage"] == 0:
        config["gradient_clipping"] = 0.0  # `finish_micro_step` clips, having checked the norm
    if not torch.accelerator.is_available():
        for block in ("offload_optimizer", "offload_param"):
            if block in zero:  # without a GPU no memory is pinned for transfers
                zero[block]["pin_memory"] = False
    parameters = _make_parameter_groups(model, decay_vectors, muon)
    if topology.sharing is Sharing.DEMIX:
        group_name = _mark_deepspeed_experts(model, topology)
        parameters = split_params_into_different_moe_groups_for_optimizer(parameters)
        parameters = [group for group in parameters if group["params"]]
    if is_expert_parallel(config):
        if not all(parameter.requires_grad for parameter in model.parameters()):
            raise UserError(
                "expert_parallel is for runs that train all weights, and this one (--train router) "
                "does not: remove the block"
            )

        def make_optimizer_of_model(_: object) -> torch.optim.Optimizer:
            """Make the optimizer of the model after DeepSpeed replaced layers.

            DeepSpeed calls it with parameters, which are not used.
            """
            parts = _make_parameter_groups(model, decay_vectors, muon)
            parts = split_params_into_different_moe_groups_for_optimizer(parts)
            return make_optimizer([part for part in parts if part["params"]])

        # DeepSpeed replaces the sparse blocks first, and then calls this.
        optimizer = {"optimizer": make_optimizer_of_model, "model_parameters": model.parameters()}
    else:
        optimizer = {"optimizer": make_optimizer(parameters)}
    groups.mpu = mpu  # DeepSpeed sets it, but never back, so a second engine would inherit it
    try:
        engine, *_ = deepspeed.initialize(
            model=model,
            **optimizer,
            config=config,
            mpu=mpu,
            dist_init_required=False,
        )
    except ValueError as error:
        if "is not supported on your device" not in str(error):
            raise
        raise UserError(
            f"--precision, or the precision of --deepspeed: {error} {_list_precisions()}"
        ) from error
    if topology.sharing is Sharing.DEMIX:
        _check_expert_groups(group_name, topology)
    if zero["stage"] == 0 and dist.get_world_size() == 1:
        # DeepSpeed would copy all gradients to one buffer, reduce it with nobody, and copy it back.
        engine.enable_backward_allreduce = False
    return engine


def _make_parameter_groups(
    model: nn.Module, decay_vectors: bool, muon: bool
) -> list[dict[str, object]]:
    """Group the trained parameters of a model with their settings; no group is empty.

    Args:
        decay_vectors: False: norms and biases are a group without weight decay.
        muon: hidden matrices are a group of their own; sets `use_muon` of every parameter.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, object]] = []
    if muon:
        mark_hidden_matrices(model)
        hidden = [parameter for parameter in trained if parameter.use_muon]
        groups = [{"params": hidden, "name": "hidden", "use_muon": True}]
        trained = [parameter for parameter in trained if not parameter.use_muon]
    kind = {"use_muon": False} if muon else {}
    if decay_vectors:
        groups.append({"params": trained, "name": "all", **kind})
    else:
        matrices = [parameter for parameter in trained if parameter.dim() > 1]
        vectors = [parameter for parameter in trained if parameter.dim() <= 1]
        groups.append({"params": matrices, "name": "matrices", **kind})
        groups.append({"params": vectors, "name": "vectors", "weight_decay": 0.0, **kind})
    return [group for group in groups if group["params"]]


def _mark_deepspeed_experts(model: nn.Module, topology: DomainTopology) -> str:
    """Give every `DomainExperts` of a model the class and marks of DeepSpeed, in place.

    Return DeepSpeed's name of the process groups of the topology's expert-parallel size.
    """
    size = topology.expert_parallel_size
    name = f"ep_size_{size}"
    for module in iterate_domain_experts(model):
        module.__class__ = _make_engine_class(type(module))
        module.num_experts = len(topology.domains)
        module.ep_size = size
        module.num_local_experts = len(module.experts)
        module.use_residual = False
        module.expert_group_name = name
        for parameter in module.experts.parameters():
            parameter.allreduce, parameter.group_name = False, name
    return name


def _list_precisions() -> str:
    """Return a sentence with the values of --precision that this device can compute in."""
    device = get_accelerator()
    names = ["fp32"]
    names += ["bf16"] if device.is_bf16_supported() else []
    names += ["fp16"] if device.is_fp16_supported() else []
    return f"Allowed here ({device.device_name()}) are {', '.join(names)}"


def _check_expert_groups(name: str, topology: DomainTopology) -> None:
    """Check that experts are averaged over exactly the ranks that read their domain's data.

    `name` is DeepSpeed's name of the group; `topology` gives the ranks of each domain. Raise
    AssertionError otherwise.
    """
    rank = dist.get_rank()
    averaged = dist.get_process_group_ranks(groups._get_expert_data_parallel_group(name))
    expected = list(topology.get_domain_ranks(topology.get_rank_domains(rank)[0]))
    assert averaged == expected, (
        f"rank {rank}: DeepSpeed averages its experts over ranks {averaged}, "
        f"but their domain's data is read by ranks {expected}"
    )


def get_loss_group(engine: deepspeed.DeepSpeedEngine) -> dist.ProcessGroup | None:
    """Return the group whose tokens form one loss: the domain's ranks for BTM, else None (all)."""
    return engine.mpu.get_data_parallel_group() if engine.mpu is not None else None


def runs_forward_together(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Return True if ranks must run forward passes together.

    With several ranks ZeRO 3 gathers weights in them, and expert parallelism exchanges tokens.
    """
    spread = engine.zero_optimization_stage() == 3 or bool(get_parallel_layers(engine.module))
    return dist.get_world_size() > 1 and spread


def finish_micro_step(engine: deepspeed.DeepSpeedEngine, max_grad_norm: float) -> float | None:
    """Finish a micro-step after its backward pass; the last one of a step updates the weights.

    Every expert counts once in the norm. (The DEMix release counts it once per rank with it.)

    Args:
        max_grad_norm: largest norm of the gradient without ZeRO, 0 for no limit; with ZeRO the
            engine's configuration has it.
    Returns:
        the gradient norm before clipping; None before the last micro-step, and if the update was
        skipped because the norm is not finite.
    Raises:
        PolicyStop: fp16 gradients overflow at the smallest loss scale.
    """
    boundary = engine.is_gradient_accumulation_boundary()
    if not boundary or engine.zero_optimization_stage() > 0:
        _step_engine(engine)
        return float(engine.get_global_grad_norm()) if engine.was_step_applied() else None
    # Without ZeRO the engine would apply gradients that are NaN.
    parameters = [p for p in engine.module.parameters() if p.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:  # unused here; several ranks would send zeros, which decay it
            parameter.grad = torch.zeros_like(parameter)
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    applied = bool(norm.isfinite())
    if not applied:
        for parameter in parameters:
            parameter.grad = None
    elif max_grad_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    _step_engine(engine)
    return float(norm) if applied else None


def _step_engine(engine: deepspeed.DeepSpeedEngine) -> None:
    """Call the engine's step; raise PolicyStop if the smallest fp16 loss scale overflows."""
    try:
        engine.step()
    except Exception as error:
        if "loss scale already at minimum" not in str(error):
            raise
        raise PolicyStop(
            "fp16: gradients overflow at the smallest loss scale, so training has diverged; "
            "--precision bf16 or a smaller --learning_rate may help"
        ) from error
