"""Bytes sent by a training step, in closed form.

Per rank, for a ring: an all-reduce of p bytes over n ranks sends 2 (n-1)/n p, an all-gather or
reduce-scatter half of that. Norms, flags and token counts (a few numbers per step) are ignored.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from megamod.dist.scope import Scope, find_scopes
from megamod.dist.topology import DomainTopology

ALIGNMENT = 2  # DeepSpeed pads flat buffers to a multiple of this times the ranks


@dataclass(frozen=True)
class Traffic:
    """Bytes sent by one rank in one step.

    Attributes:
        world: in collectives over all ranks, for shared parameters.
        domain: in collectives over the ranks of the domain, for its experts.
    """

    world: float
    domain: float


def compute_step_traffic(
    sizes: Mapping[str, int],
    topology: DomainTopology,
    stage: int,
    micro_steps: int,
    element_bytes: int,
    persistence_threshold: int = 100_000,
    live_limit: int = 10**9,
    tied: Collection[str] = (),
) -> Traffic:
    """Compute the bytes that one rank sends in a step.

    Args:
        sizes: elements of every parameter that a rank holds, by name.
        stage: ZeRO stage. 1 reduces gradients once per step, 2 and 3 after every micro-batch,
            because they store only a part of them; 3 gathers weights instead of storing them.
        micro_steps: micro-batches per rank and step.
        element_bytes: of a weight or gradient as sent: 4 in fp32, 2 in bf16 and fp16.
        persistence_threshold: elements up to which ZeRO 3 keeps a parameter whole.
        live_limit: elements of gathered weights that ZeRO 3 may hold (the lesser of its
            max_live_parameters and max_reuse_distance). A larger model is gathered a second time
            for the backward pass.
        tied: parameters used by two modules; a model beyond the limit gathers them for each.
    Source: Rajbhandari et al. 2020 (ZeRO), section 7; Gururangan et al. 2022 (DEMix), section 3.2.
    """
    where = find_scopes(sizes, topology.sharing)
    sent = {}
    for scope in Scope:
        ranks = topology.world_size
        if scope is Scope.DOMAIN:
            ranks = topology.ranks_per_domain
        held = {name: size for name, size in sizes.items() if where[name] is scope}
        if stage == 3:
            gathers = {
                name: (2 * (1 + (name in tied)) if sum(held.values()) > live_limit else 1)
                for name, size in held.items()
                if size > persistence_threshold
            }
            elements = _count_stage_3_elements(held, gathers, ranks, micro_steps)
        else:
            elements = _count_elements(sum(held.values()), ranks, stage, micro_steps)
        sent[scope] = (ranks - 1) / ranks * elements * element_bytes
    return Traffic(sent[Scope.WORLD], sent[Scope.DOMAIN])


def _count_elements(total: int, ranks: int, stage: int, micro_steps: int) -> int:
    """Count the elements in all-gathers and reduce-scatters of a step.

    An all-reduce is one of each.
    """
    if stage == 0:
        return 2 * total
    return 2 * total * (micro_steps if stage == 2 else 1) + _round_up(total, ALIGNMENT * ranks)


def _count_stage_3_elements(
    held: Mapping[str, int], gathers: Mapping[str, int], ranks: int, micro_steps: int
) -> int:
    """Count the elements in all-gathers and reduce-scatters of a step of ZeRO 3.

    Gradients are scattered after every micro-batch. Weights are gathered `gathers` times in it, and
    those that ZeRO 3 keeps whole once per step.
    """
    padded = {name: _round_up(size, ranks) for name, size in held.items()}
    gathered = sum(padded[name] * times for name, times in gathers.items())
    kept = sum(size for name, size in padded.items() if name not in gathers)
    return micro_steps * (sum(padded.values()) + gathered) + kept


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
