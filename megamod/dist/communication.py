"""Bytes sent by a training step, in closed form.

Per rank, for a ring: an all-reduce of p bytes over n ranks sends 2 (n-1)/n p, an all-gather or
reduce-scatter half of that. Norms, flags and token counts (a few numbers per step) are ignored.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megamod.dist.scope import Scope, find_scopes
from megamod.dist.topology import DomainTopology

ALIGNMENT = 2  # DeepSpeed pads flat buffers to a multiple of this many elements times the ranks


@dataclass(frozen=True)
class Traffic:
    """Bytes sent by one rank in one step.

    Attributes:
        world: in collectives over all ranks, for shared parameters; in dense training, all of them.
        domain: in collectives over the ranks of the domain, for its experts; with BTM, its model.
        expert: in collectives over the ranks with the same experts of a mixture, for these.
    """

    world: float
    domain: float
    expert: float = 0.0


def compute_step_traffic(
    element_counts: Mapping[str, int],
    topology: DomainTopology,
    zero_stage: int,
    micro_steps: int,
    element_bytes: int,
    persistence_threshold: int = 100_000,
    live_limit: int = 10**9,
    tied_names: Collection[str] = (),
    frozen: Mapping[str, int] = MappingProxyType({}),
    experts: Collection[str] = (),
    expert_data_parallel_size: int = 1,
) -> Traffic:
    """Compute the bytes that one rank sends in a step.

    Args:
        element_counts: elements of every trained parameter that a rank holds, by name.
        topology: ranks and domains of the run.
        zero_stage: ZeRO stage. 1 reduces gradients once per step, 2 and 3 after every micro-batch,
            because they store only a part of them; 3 gathers weights instead of storing them.
        micro_steps: micro-batches per rank and step.
        element_bytes: bytes of a weight or gradient as sent: 4 in fp32, 2 in bf16 and fp16.
        persistence_threshold: elements up to which ZeRO 3 keeps a parameter whole.
        live_limit: elements of gathered weights that ZeRO 3 may hold (the lesser of its
            max_live_parameters and max_reuse_distance). A larger model is gathered a second time
            for the backward pass.
        tied_names: parameters used by two modules; a model beyond the limit gathers them for each.
        frozen: elements of every frozen parameter, which only ZeRO 3 sends.
        experts: parameters with a rank's share of the experts of a mixture. The exchange of tokens
            with them is not included, see `compute_exchange_traffic`.
        expert_data_parallel_size: number of ranks that hold the same share of the experts.
    Source: Rajbhandari et al. 2020 (ZeRO), section 7; Gururangan et al. 2022 (DEMix), section 3.2.
    """
    parameter_scopes = find_scopes({**element_counts, **frozen}, topology.sharing, experts)
    sent_bytes = {}
    for scope in Scope:
        ranks = topology.world_size
        if scope is Scope.DOMAIN:
            ranks = topology.ranks_per_domain
        elif scope is Scope.EXPERT:
            ranks = expert_data_parallel_size
        scope_counts = {
            name: size for name, size in element_counts.items() if parameter_scopes[name] is scope
        }
        if zero_stage == 3:
            weights = scope_counts | {
                name: size for name, size in frozen.items() if parameter_scopes[name] is scope
            }
            gathers = {
                name: 2 * (1 + (name in tied_names)) if sum(weights.values()) > live_limit else 1
                for name, size in weights.items()
                if size > persistence_threshold
            }
            elements = _count_elements_sent_by_stage_3(
                scope_counts, weights, gathers, ranks, micro_steps
            )
        else:
            elements = _count_sent_elements(
                sum(scope_counts.values()), ranks, zero_stage, micro_steps
            )
        sent_bytes[scope] = (ranks - 1) / ranks * elements * element_bytes
    return Traffic(*(sent_bytes[scope] for scope in (Scope.WORLD, Scope.DOMAIN, Scope.EXPERT)))


def compute_exchange_traffic(
    assignments: float,
    rank_count: int,
    layer_count: int,
    hidden_size: int,
    element_bytes: int,
    recomputed: bool = False,
) -> float:
    """Compute the bytes that a rank sends in a step to exchange tokens with the experts' ranks.

    A token's state is sent to the rank of its expert and the result back, in the forward and
    again in the backward pass; with even loads (n-1)/n of them leave the rank.

    Args:
        assignments: tokens of a rank's micro-batches in the step, times the experts per token.
        rank_count: number n of ranks that the experts are spread over.
        layer_count: number of layers with experts.
        hidden_size: features of a token's state.
        element_bytes: bytes of a feature as sent.
        recomputed: with gradient checkpointing, whose second forward pass sends as much as the
            first.
    """
    passes, share = 3 if recomputed else 2, (rank_count - 1) / rank_count
    return 2 * passes * layer_count * assignments * share * hidden_size * element_bytes


def _count_sent_elements(
    parameter_elements: int, ranks: int, zero_stage: int, micro_steps: int
) -> int:
    """Count the elements in all-gathers and reduce-scatters of a step of ZeRO 0, 1 or 2.

    An all-reduce counts as one of each.

    Args:
        parameter_elements: elements of the trained parameters of one scope.
        ranks: ranks of the scope.
        zero_stage, micro_steps: see `compute_step_traffic`.
    """
    if zero_stage == 0:
        return 2 * parameter_elements
    reductions = micro_steps if zero_stage == 2 else 1
    return 2 * parameter_elements * reductions + _round_up_to_multiple(
        parameter_elements, ALIGNMENT * ranks
    )


def _count_elements_sent_by_stage_3(
    trained: Mapping[str, int],
    weights: Mapping[str, int],
    gather_counts: Mapping[str, int],
    ranks: int,
    micro_steps: int,
) -> int:
    """Count the elements in all-gathers and reduce-scatters of a step of ZeRO 3.

    Args:
        trained: elements of trained parameters, whose gradients are scattered after every
            micro-batch.
        weights: elements of all parameters, frozen ones included.
        gather_counts: number of times that a weight is gathered in a micro-batch; a weight that is
            absent is kept whole, and gathered once per step.
        ranks: ranks of the scope, to whose multiples tensors are padded.
        micro_steps: see `compute_step_traffic`.
    """
    padded = {name: _round_up_to_multiple(size, ranks) for name, size in weights.items()}
    gathered = sum(padded[name] * times for name, times in gather_counts.items())
    whole_elements = sum(size for name, size in padded.items() if name not in gather_counts)
    return micro_steps * (sum(padded[name] for name in trained) + gathered) + whole_elements


def _round_up_to_multiple(size: int, multiple: int) -> int:
    """Round `size` up to a multiple of `multiple`."""
    return -(-size // multiple) * multiple
