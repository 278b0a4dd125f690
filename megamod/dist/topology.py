"""Layout of domains over ranks, and the process groups of the domains.

The layout is contiguous. With g ranks per domain, domain d has ranks [d*g, (d+1)*g), so an expert
stays inside a node if g divides the node's size. With fewer ranks than domains, a rank has
consecutive domains. Everything but `DomainGroup` is arithmetic and needs no process group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from megamod.dist.hostfile import find_groups_on_several_machines, format_range
from megamod.dist.scope import Sharing
from megamod.errors import UserError
from megamod.tables import format_table


@dataclass(frozen=True)
class DomainTopology:
    """Layout of domains over the ranks of a run.

    Attributes:
        world_size: number of ranks.
        domains: names of the domains, whose order decides their ranks.
        sharing: parameters that the domains share.

    Raises:
        UserError: with DEMix, if the world size is neither a multiple nor a divisor of the number
            of domains; with BTM, if it is no multiple. Dense training allows any world size.
    """

    world_size: int
    domains: tuple[str, ...]
    sharing: Sharing

    def __post_init__(self) -> None:
        """Raise UserError for a world size that the sharing does not allow, see the class."""
        ranks, experts = self.world_size, len(self.domains)
        if self.sharing is Sharing.DENSE:
            return
        allowed = [n for n in range(1, 4 * experts + 1) if n % experts == 0 or experts % n == 0]
        if self.sharing is Sharing.BTM:
            allowed = [n for n in allowed if n % experts == 0]
        if ranks % experts and (self.sharing is Sharing.BTM or experts % ranks):
            hint = (
                "; independent experts need at least one rank each: start one job per domain with "
                "--domains NAME --untie none instead"
                if self.sharing is Sharing.BTM
                else ""
            )
            raise UserError(
                f"{ranks} ranks cannot hold {experts} experts ({', '.join(self.domains)}): "
                f"use {', '.join(map(str, allowed))}, ... ranks{hint}"
            )

    @property
    def ranks_per_domain(self) -> int:
        """Number g of ranks that hold the same expert; 1 if a rank holds several experts.

        Without meaning in dense training, where every rank holds the same model.
        """
        return max(1, self.world_size // len(self.domains))

    @property
    def expert_parallel_size(self) -> int:
        """Number of different sets of experts: the expert-parallel size.

        Without meaning in dense training.
        """
        return min(self.world_size, len(self.domains))

    def get_rank_domains(self, rank: int) -> tuple[str, ...]:
        """Return the domains whose data and experts a rank holds; all domains in dense training."""
        if self.sharing is Sharing.DENSE:
            return self.domains
        domains_per_rank = len(self.domains) // self.expert_parallel_size
        first = rank // self.ranks_per_domain * domains_per_rank
        return self.domains[first : first + domains_per_rank]

    def get_domain_ranks(self, domain: str) -> range:
        """Return the ranks that hold a domain's expert; every rank in dense training.

        Raises:
            ValueError: for an unknown domain, except in dense training.
        """
        if self.sharing is Sharing.DENSE:
            return range(self.world_size)
        domains_per_rank = len(self.domains) // self.expert_parallel_size
        first = self.domains.index(domain) // domains_per_rank * self.ranks_per_domain
        return range(first, first + self.ranks_per_domain)

    def get_rank_in_group(self, rank: int) -> int:
        """Return the index of a rank among the ranks that hold the same experts."""
        return rank - self.get_domain_ranks(self.get_rank_domains(rank)[0])[0]

    def is_group_lead(self, rank: int) -> bool:
        """Return True for the first of the ranks with the same experts, which writes them."""
        return self.get_rank_in_group(rank) == 0

    def format_layout(self, hosts: Sequence[str], devices: Sequence[str]) -> str:
        """Format a table of rank, host, device, domains and groups, a line per rank.

        A last line warns of experts on several hosts where one host could hold all their ranks.

        Args:
            hosts: host name of each rank.
            devices: device of each rank, as text.
        """
        rows = [("rank", "host", "device", "domains", "shared over", "experts over")]
        for rank in range(self.world_size):
            domains = self.get_rank_domains(rank)
            group = format_range(self.get_domain_ranks(domains[0]))
            world = format_range(range(self.world_size))
            shared = group if self.sharing is Sharing.BTM else world
            experts = {Sharing.DENSE: "-", Sharing.DEMIX: group, Sharing.BTM: "-"}[self.sharing]
            rows.append((str(rank), hosts[rank], devices[rank], ",".join(domains), shared, experts))
        lines = [format_table(rows)]
        if self.sharing is not Sharing.DENSE:
            split_groups = find_groups_on_several_machines(
                hosts, {domain: self.get_domain_ranks(domain) for domain in self.domains}
            )
            listed = "; ".join(
                f"{domain} on {', '.join(names)}" for domain, names in split_groups.items()
            )
            if split_groups:
                lines.append(
                    f"warning: gradients of experts cross between hosts, though one host could "
                    f"hold all {self.ranks_per_domain} ranks of an expert: {listed}; use slots in "
                    f"multiples of {self.ranks_per_domain} on every host"
                )
        return "\n".join(lines)


class DomainGroup:
    """Ranks of one domain as DeepSpeed's data-parallel world (its `mpu` protocol).

    Passed to `deepspeed.initialize`, it makes the domains of a job independent of each other. Every
    rank must construct it, because creating process groups is collective.

    Args:
        topology: layout of independent models (BTM), in which a rank has one domain.
    """

    def __init__(self, topology: DomainTopology):
        self.ranks: tuple[int, ...] = ()
        for domain in topology.domains:
            ranks = tuple(topology.get_domain_ranks(domain))
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                self.ranks, self.group = ranks, group

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Return the process group of this rank's domain."""
        return self.group

    def get_data_parallel_world_size(self) -> int:
        """Return the number of ranks of this rank's domain."""
        return len(self.ranks)

    def get_data_parallel_rank(self) -> int:
        """Return the index of this rank among the ranks of its domain."""
        return self.ranks.index(dist.get_rank())

    def get_model_parallel_group(self) -> None:
        """Return None: models are not split over ranks."""
        return None

    def get_model_parallel_world_size(self) -> int:
        """Return 1: models are not split over ranks."""
        return 1

    def get_model_parallel_rank(self) -> int:
        """Return 0: models are not split over ranks."""
        return 0
