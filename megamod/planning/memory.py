"""Bytes of one rank in closed form: weights, gradients, optimizer, and what a step needs besides.

Source of the stages: Rajbhandari et al. 2020 (ZeRO), section 5. Adam has two moments in float32
(Kingma and Ba 2015); with a ZeRO stage the weights have a float32 copy too, in float32 training as
well. What is padded, and how, is that of DeepSpeed; `tests/planning` counts an engine's tensors.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from megamod.dist.scope import Scope, Sharing, scopes
from megamod.dist.topology import DomainTopology
from megamod.dist.wire import ALIGNMENT

MASTER, MOMENTS = 4, 8
ELEMENT = {"fp32": 4, "bf16": 2, "fp16": 2}
BUCKET, LIVE, PERSISTENT = 500_000_000, 1_000_000_000, 100_000  # DeepSpeed's defaults
EXPERT_GROUP = 178_956_970  # elements of experts that DeepSpeed updates together, at most
USABLE = 0.92  # of a GPU's memory: the rest is its context, NCCL's buffers and gaps


@dataclass(frozen=True)
class Setting:
    """How a model is trained on its ranks.

    Attributes:
        stage: of ZeRO.
        precision: "fp32", "bf16" or "fp16".
        micro_batch: sequences per rank and micro-batch.
        micro_steps: micro-batches per rank and step.
        checkpointing: recompute blocks in the backward pass.
        offload: where masters, moments and gradients live instead: "cpu" (the memory of the host),
            "nvme" (a disk), or "none".
        offload_param: where the rank's share of the weights lives (stage 3): "cpu" or "none".
        sum_in_fp32: gradients are summed in float32 over the micro-batches.
        bucket: elements of a buffer that gradients are reduced in.
        buffers: how many of these (two where reduction overlaps with the backward pass).
        live: elements of weights that ZeRO 3 may hold gathered.
        persistent: elements up to which ZeRO 3 keeps a parameter whole.
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

    @property
    def element(self) -> int:
        """Bytes of a weight."""
        return ELEMENT[self.precision]


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        weights, optimizer: held from step to step; the optimizer's are masters and moments.
        gradients: at the end of a step's last backward pass.
        kept: gradients that are there while activations are: the sum of earlier micro-batches.
        activations: of a micro-batch at its fullest.
        buffers: that gradients are reduced and weights gathered in, during the backward pass.
        collected: the rank's share of what a backward pass reduced, beside `gradients`.
        update: float32 copies of gradients, during the update.
        host: what an offloaded optimizer has outside the GPU: in the memory of the machine, or on
            its disk.
        host_weights: weights that are in the memory of the machine.
    """

    weights: int
    gradients: int
    optimizer: int
    kept: int
    activations: int
    buffers: int
    collected: int
    update: int
    host: int = 0
    host_weights: int = 0

    @property
    def peak(self) -> int:
        """The fullest moment: the end of the last forward or backward pass, or the update.

        (With stage 1 a little less: the update begins when whole gradients are gone.)
        """
        forward = self.kept + self.activations + self.buffers
        backward = self.gradients + max(self.collected, self.update)
        return self.weights + self.optimizer + max(forward, backward)


def memory(
    sizes: Mapping[str, int],
    frozen: int,
    topology: DomainTopology,
    setting: Setting,
    activations: int = 0,
) -> Memory:
    """What a rank needs.

    Args:
        sizes: elements of every trained parameter that a rank holds, by name.
        frozen: elements of parameters that are not trained.
        activations: bytes of a micro-batch.
    """
    parts = [_part(*group, setting) for group in _groups(sizes, topology) if group[0]]
    buffers = _buffers(sizes, setting)
    whole = Memory(frozen * setting.element, 0, 0, 0, activations, buffers, 0, 0)
    for part in parts:
        whole = replace(
            whole,
            weights=whole.weights + part.weights,
            gradients=whole.gradients + part.gradients,
            optimizer=whole.optimizer + part.optimizer,
            kept=whole.kept + part.kept,
            collected=whole.collected + part.collected,
            update=max(whole.update, part.update),  # groups are updated one after the other
            host_weights=whole.host_weights + part.host_weights,
        )
    if setting.offload == "none":
        return whole
    own = whole.optimizer // (MASTER + MOMENTS)
    if setting.stage > 1:
        whole = replace(whole, gradients=0, kept=0)
    return replace(whole, optimizer=0, collected=0, update=0, host=whole.optimizer + MASTER * own)


def _groups(
    sizes: Mapping[str, int], topology: DomainTopology
) -> list[tuple[list[int], int, float]]:
    """Elements of the parameters of each group of ranks, its ranks, and elements of an update."""
    where = scopes(sizes, topology.sharing)
    world = [size for name, size in sizes.items() if where[name] is Scope.WORLD]
    domain = [size for name, size in sizes.items() if where[name] is Scope.DOMAIN]
    limit = EXPERT_GROUP if topology.sharing is Sharing.DEMIX else math.inf
    return [
        (world, topology.world_size, math.inf),
        (domain, topology.ranks_per_domain, limit),
    ]


def _part(held: list[int], ranks: int, limit: float, setting: Setting) -> Memory:
    element, total, away = setting.element, sum(held), 0
    summed = 4 if setting.sum_in_fp32 else element
    earlier = setting.micro_steps > 1 or setting.stage == 3  # whose buffer is never given back
    if setting.stage == 0:
        held_bytes = element * total
        return Memory(held_bytes, held_bytes, MOMENTS * total, held_bytes * earlier, 0, 0, 0, 0)
    if setting.stage == 3:
        own = sum(-(-size // ranks) for size in held)
        whole = sum(size for size in held if size <= setting.persistent)
        away = own if setting.offload_param != "none" else 0
        weights = element * (own - away + whole)
    else:
        unit = ALIGNMENT * ranks
        padded = -(-total // unit) * unit
        own, weights = padded // ranks, element * padded
    stage_1 = setting.stage == 1
    gradients = summed * (total if stage_1 else own)
    copies = (4 if element < 4 else 0) + (summed if setting.stage < 3 else 0)
    update = copies * round(min(own, limit / ranks))
    # The rank's share is collected anew in every reduction, beside the sum of earlier ones.
    anew = stage_1 or (setting.stage == 2 and setting.micro_steps > 1)
    return Memory(
        weights,
        gradients,
        (MASTER + MOMENTS) * own,
        gradients * earlier,
        0,
        0,
        element * own * anew,
        update,
        host_weights=element * away,
    )


def _buffers(sizes: Mapping[str, int], setting: Setting) -> int:
    if setting.stage == 0:
        return 0
    gathered = 0
    if setting.stage == 3:
        gathered = min(setting.live, sum(s for s in sizes.values() if s > setting.persistent))
    return setting.element * (setting.bucket * setting.buffers + gathered)
