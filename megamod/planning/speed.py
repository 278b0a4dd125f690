"""Time of a step: FLOPs at a fraction of the peak, and bytes over links.

A ring is as fast as its slowest link, so a group on several hosts sends at the speed between hosts
(Thakur et al. 2005, section 4, without latency). No overlap is assumed, so these times are upper
bounds of the cost of communication.
"""

from dataclasses import dataclass

from megamod.dist.communication import Traffic, compute_step_traffic
from megamod.dist.topology import DomainTopology
from megamod.planning.memory import TrainingSetting
from megamod.planning.model import Network


@dataclass(frozen=True)
class Links:
    """Links of the GPUs.

    Attributes:
        intra, inter: bytes per second that a GPU sends, inside a host and between hosts.
        ranks_per_node: GPUs per host.
    """

    intra: float
    inter: float
    ranks_per_node: int

    def get_world_speed(self, topology: DomainTopology) -> float:
        """Return the speed of the ring of all ranks, in bytes per second: `inter` unless they fit
        on one host.
        """
        return self.intra if topology.world_size <= self.ranks_per_node else self.inter

    def get_domain_speed(self, topology: DomainTopology) -> float:
        """Return the speed of the ring of a domain's ranks, in bytes per second.

        It is that of the slowest domain of `topology`: `intra` if none is spread over several
        hosts.
        """
        inside = self.ranks_per_node % topology.ranks_per_domain == 0
        return self.intra if inside else self.get_world_speed(topology)


def compute_traffic(
    network: Network, topology: DomainTopology, setting: TrainingSetting
) -> Traffic:
    """Compute the bytes that a rank sends per step, to all ranks and to those of its domain.

    Args:
        network: model of the job, for the sizes of its parameters.
        topology, setting: the ranks and settings to compute it for, not those of the job.
    """
    # The decoder's token table, which the output head uses too.
    tied = [name for name in network.trained_sizes if name.endswith("embeddings.tokens.weight")]
    return compute_step_traffic(
        element_counts=network.trained_sizes,
        topology=topology,
        zero_stage=setting.stage,
        micro_steps=setting.micro_steps,
        element_bytes=setting.element_bytes,
        persistence_threshold=setting.persistent,
        live_limit=setting.live,
        tied_names=tied,
        frozen=network.frozen_sizes,
    )


def estimate_communication_seconds(
    traffic: Traffic, topology: DomainTopology, links: Links
) -> float:
    """Estimate the seconds of communication per step: all ranks' ring, then the domain's ring.

    Args:
        traffic: bytes that a rank sends over each of the two rings.
        topology: ranks and domains.
        links: speeds within and between hosts.
    """
    return traffic.world / links.get_world_speed(
        topology
    ) + traffic.domain / links.get_domain_speed(topology)


def estimate_compute_seconds(
    network: Network, setting: TrainingSetting, flops_per_second: float
) -> float:
    """Estimate the seconds of computation per step on one rank.

    Recomputation adds a forward pass, a third of the FLOPs (Korthikanti et al. 2022, section 5).

    Args:
        network: gives the FLOPs per token and the tokens per sequence.
        setting: gives the sequences per step, and if blocks are recomputed.
        flops_per_second: FLOP/s that a GPU reaches, not its peak.
    """
    tokens = setting.micro_batch * setting.micro_steps * network.job.data.max_seq_length
    extra = 4 / 3 if setting.checkpointing else 1.0
    return tokens * network.flops_per_token * extra / flops_per_second
