"""Memory of one rank in closed form: weights, gradients, optimizer state and buffers.

Source of the stages: Rajbhandari et al. 2020 (ZeRO), section 5. Adam keeps two float32 moments
(Kingma and Ba 2015), Muon one momentum in the precision of gradients; with a ZeRO stage there is a
float32 master copy too, even in float32 training. Padding follows DeepSpeed; `tests/planning`
counts the tensors of an engine.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from megamod.dist.communication import ALIGNMENT
from megamod.dist.scope import Scope, Sharing, find_scopes
from megamod.dist.topology import DomainTopology

MASTER, MOMENTS = 4, 8  # bytes per element of a float32 copy, and of Adam's two moments
ELEMENT = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes
BUCKET, LIVE, PERSISTENT = 500_000_000, 1_000_000_000, 100_000  # elements: DeepSpeed's defaults
EXPERT_GROUP = 178_956_970  # largest number of expert elements that DeepSpeed updates together
# Fraction of GPU memory; the rest is the CUDA context, NCCL buffers and fragmentation.
USABLE = 0.92


@dataclass(frozen=True)
class TrainingSetting:
    """Training settings that determine memory and communication.

    Attributes:
        stage: ZeRO stage.
        precision: "fp32", "bf16" or "fp16".
        micro_batch: sequences per rank and micro-batch.
        micro_steps: micro-batches per rank and optimizer step.
        checkpointing: recompute blocks in the backward pass.
        offload: device of master weights, moments and gradients: "cpu" (host memory), "nvme" (disk)
            or "none" (GPU).
        offload_param: device of the rank's weight shard (stage 3): "cpu" or "none" (GPU).
        sum_in_fp32: accumulate gradients in float32 over the micro-batches.
        bucket: elements of a gradient reduction buffer.
        buffers: number of these buffers (two if reduction overlaps with the backward pass).
        live: largest number of weight elements that ZeRO 3 holds gathered.
        persistent: ZeRO 3 keeps parameters up to this many elements unpartitioned.
        muon: hidden matrices are trained by Muon.
    """

    stage: int
    precision: str
    micro_batch: int
    micro_steps: int
    checkpointing: bool
    offload: str = "none"
    offload_param: str = "none"
    sum_in_fp32: bool = False
    bucket: int = BUCKET
    buffers: int = 1
    live: int = LIVE
    persistent: int = PERSISTENT
    muon: bool = False

    @property
    def element_bytes(self) -> int:
        """Bytes of a weight on the GPU: 4 in fp32, else 2."""
        return ELEMENT[self.precision]


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        weights, optimizer: held permanently; optimizer state is master weights and moments.
        gradients: gradients after the last backward pass of a step.
        kept: accumulated gradients of earlier micro-batches, held while activations are.
        activations: peak activations of a micro-batch.
        buffers: reduction and gather buffers of the backward pass.
        collected: the rank's shard of newly reduced gradients, in addition to `gradients`.
        update: copies of gradients, flat and in float32, during the optimizer update.
        host: offloaded optimizer state, in host memory or on disk.
        host_weights: offloaded weights, in host memory.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    kept: int = 0
    activations: int = 0
    buffers: int = 0
    collected: int = 0
    update: int = 0
    host: int = 0
    host_weights: int = 0

    @property
    def peak(self) -> int:
        """Peak memory: at the end of the last forward or backward pass, or during the update.

        An upper bound for stage 1, where full gradients are freed before the update.
        """
        forward = self.kept + self.activations + self.buffers
        backward = self.gradients + max(self.collected, self.update)
        return self.weights + self.optimizer + max(forward, backward)


def compute_memory(
    sizes: Mapping[str, int],
    frozen: Mapping[str, int],
    topology: DomainTopology,
    setting: TrainingSetting,
    activations: int = 0,
    muon_names: Collection[str] = (),
) -> Memory:
    """Compute the memory of a rank, every part in bytes.

    Args:
        sizes: elements of each trained parameter that a rank holds, by name.
        frozen: elements of each frozen parameter, which has neither gradient nor optimizer state.
        topology: ranks and domains, which say how many ranks share a parameter.
        setting: settings of the training.
        activations: peak activation bytes of a micro-batch.
        muon_names: names of the parameters that Muon trains, if `setting` has it.
    """
    by_muon = {name: size for name, size in sizes.items() if setting.muon and name in muon_names}
    by_adam = {name: size for name, size in sizes.items() if name not in by_muon}
    parts = [
        _compute_group_memory(*group, setting, muon)
        for some, muon in ((by_muon, True), (by_adam, False))
        for group in _group_parameters_by_ranks(some, topology)
        if group[0]
    ]
    buffers = _compute_buffer_bytes({**sizes, **frozen}, setting)
    whole = Memory(activations=activations, buffers=buffers)
    for group_sizes, ranks, _ in _group_parameters_by_ranks(frozen, topology):
        on_device, on_host = _compute_weight_bytes(group_sizes, ranks, setting)
        whole = replace(
            whole,
            weights=whole.weights + on_device,
            host_weights=whole.host_weights + on_host,
        )
    for part in parts:
        whole = replace(
            whole,
            weights=whole.weights + part.weights,
            gradients=whole.gradients + part.gradients,
            optimizer=whole.optimizer + part.optimizer,
            kept=whole.kept + part.kept,
            collected=whole.collected + part.collected,
            update=max(whole.update, part.update),  # groups are updated one at a time
            host_weights=whole.host_weights + part.host_weights,
        )
    if setting.offload == "none":
        return whole
    shard = whole.optimizer // (MASTER + MOMENTS)
    if setting.stage > 1:
        whole = replace(whole, gradients=0, kept=0)
    return replace(whole, optimizer=0, collected=0, update=0, host=whole.optimizer + MASTER * shard)


def _group_parameters_by_ranks(
    sizes: Mapping[str, int], topology: DomainTopology
) -> list[tuple[list[int], int, float]]:
    """Group parameters by the ranks that share them: all ranks, and those of a domain.

    Args:
        sizes: elements of each parameter, by name.
        topology: ranks, domains and sharing of the job.
    Returns:
        for each of the two (elements of each of its parameters, number of ranks, largest number of
        elements that DeepSpeed updates together); the first may be empty.
    """
    where = find_scopes(sizes, topology.sharing)
    world = [size for name, size in sizes.items() if where[name] is Scope.WORLD]
    domain = [size for name, size in sizes.items() if where[name] is Scope.DOMAIN]
    limit = EXPERT_GROUP if topology.sharing is Sharing.DEMIX else math.inf
    return [
        (world, topology.world_size, math.inf),
        (domain, topology.ranks_per_domain, limit),
    ]


def _compute_group_memory(
    group_sizes: list[int], ranks: int, limit: float, setting: TrainingSetting, muon: bool
) -> Memory:
    """Compute the memory that the trained parameters of one group take on a rank.

    Activations, buffers and offloading of the optimizer are not in it: `compute_memory` adds them.

    Args:
        group_sizes, ranks, limit: see `_group_parameters_by_ranks`.
        setting: ZeRO stage, precision and micro-batches.
        muon: these parameters are trained by Muon; False: by Adam.
    """
    element, total, offloaded = setting.element_bytes, sum(group_sizes), 0  # bytes, elements, bytes
    summed = 4 if setting.sum_in_fp32 else element
    accumulates = setting.micro_steps > 1 or setting.stage == 3  # stage 3 never frees this buffer
    if setting.stage == 0:
        full_bytes = element * total
        moments = (element if muon else MOMENTS) * total
        return Memory(
            weights=full_bytes,
            gradients=full_bytes,
            optimizer=moments,
            kept=full_bytes * accumulates,
        )
    if setting.stage == 3:
        shard = _count_shard_elements(group_sizes, ranks)
        weights, offloaded = _compute_weight_bytes(group_sizes, ranks, setting)
    else:
        unit = ALIGNMENT * ranks
        padded = -(-total // unit) * unit
        shard, weights = padded // ranks, element * padded
    moments = MOMENTS * shard
    if muon and setting.stage == 3:
        moments = element * shard
    elif muon:  # DeepSpeed holds whole matrices, and a second copy for steps that are skipped
        divided = min(2, ranks - 1)  # boundaries of a rank's shard
        moments = 2 * summed * min(total, shard + divided * max(group_sizes))
    stage_1 = setting.stage == 1
    gradients = summed * (total if stage_1 else shard)
    # DeepSpeed converts the gradients of a group to float32, and below stage 3 first flattens them.
    bytes_per_element = (4 if element < 4 else 0) + (summed if setting.stage < 3 else 0)
    update = bytes_per_element * round(min(shard, limit / ranks))
    # Each reduction allocates the rank's shard again, in addition to the accumulated gradients.
    allocates_again = stage_1 or (setting.stage == 2 and setting.micro_steps > 1)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=MASTER * shard + moments,
        kept=gradients * accumulates,
        collected=element * shard * allocates_again,
        update=update,
        host_weights=offloaded,
    )


def _compute_weight_bytes(
    group_sizes: list[int], ranks: int, setting: TrainingSetting
) -> tuple[int, int]:
    """Compute the bytes of a rank's weights without padding: (on the GPU, on the host).

    Below stage 3 a rank holds all of them; with stage 3 its shard, and small parameters whole. Only
    shards may be on the host.

    Args:
        group_sizes, ranks: see `_group_parameters_by_ranks`.
        setting: its stage, precision and offloading of parameters count.
    """
    if setting.stage < 3:
        return setting.element_bytes * sum(group_sizes), 0
    shard = _count_shard_elements(group_sizes, ranks)
    whole = sum(size for size in group_sizes if size <= setting.persistent)
    offloaded = shard if setting.offload_param != "none" else 0
    return setting.element_bytes * (shard - offloaded + whole), setting.element_bytes * offloaded


def _count_shard_elements(group_sizes: list[int], ranks: int) -> int:
    """Count the elements of a rank's part of each parameter under ZeRO 3.

    Arguments: see `_group_parameters_by_ranks`.
    """
    return sum(-(-size // ranks) for size in group_sizes)


def _compute_buffer_bytes(sizes: Mapping[str, int], setting: TrainingSetting) -> int:
    """Compute the bytes of a rank's buffers: to reduce gradients, and to gather with ZeRO 3.

    Args:
        sizes: elements of every parameter of the rank, trained or frozen.
        setting: its stage, precision and sizes of buffers count; without ZeRO the result is 0.
    """
    if setting.stage == 0:
        return 0
    gathered = 0
    if setting.stage == 3:
        gathered = min(setting.live, sum(s for s in sizes.values() if s > setting.persistent))
    return setting.element_bytes * (setting.bucket * setting.buffers + gathered)
