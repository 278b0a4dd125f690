"""Time of a step: FLOPs at a fraction of the peak, and bytes over links.

A ring is as fast as its slowest link, so a group on several hosts sends at the speed between hosts
(Thakur et al. 2005, section 4, without latency). No overlap is assumed, so these times are upper
bounds of the cost of communication.
"""

from dataclasses import dataclass

from megamod.dist.communication import Traffic, compute_step_traffic
from megamod.dist.topology import DomainTopology
from megamod.planning.memory import Setting
from megamod.planning.model import Network


@dataclass(frozen=True)
class Links:
    """Bytes per second that a GPU sends, inside a host and between hosts.

    Attributes:
        ranks_per_node: GPUs per host.
    """

    intra: float
    inter: float
    ranks_per_node: int

    def world(self, topology: DomainTopology) -> float:
        """Speed of the ring of all ranks."""
        return self.intra if topology.world_size <= self.ranks_per_node else self.inter

    def domain(self, topology: DomainTopology) -> float:
        """Speed of the ring of a domain's ranks; of the slowest domain if they differ."""
        inside = self.ranks_per_node % topology.ranks_per_domain == 0
        return self.intra if inside else self.world(topology)


def traffic_of(network: Network, topology: DomainTopology, setting: Setting) -> Traffic:
    """Bytes that a rank sends per step."""
    tied = [name for name in network.sizes if name.endswith("embeddings.tokens.weight")]
    return compute_step_traffic(
        network.sizes,
        topology,
        setting.stage,
        setting.micro_steps,
        setting.element,
        setting.persistent,
        setting.live,
        tied,
    )


def wire_seconds(traffic: Traffic, topology: DomainTopology, links: Links) -> float:
    """Seconds of communication per step."""
    return traffic.world / links.world(topology) + traffic.domain / links.domain(topology)


def compute_seconds(network: Network, setting: Setting, flops_per_second: float) -> float:
    """Seconds of computation per step on one rank.

    Recomputation adds a forward pass, a third of the FLOPs (Korthikanti et al. 2022, section 5).
    """
    tokens = setting.micro_batch * setting.micro_steps * network.job.data.max_seq_length
    extra = 4 / 3 if setting.checkpointing else 1.0
    return tokens * network.flops_per_token * extra / flops_per_second
