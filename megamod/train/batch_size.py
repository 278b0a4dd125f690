"""Batch sizes of a run: from flags and ranks to micro-batches per step."""

from megamod.args import RunArgs
from megamod.data.batches import check_global_batch_size
from megamod.dist.scope import Sharing
from megamod.dist.topology import DomainTopology


def count_domains_per_rank(topology: DomainTopology) -> int:
    """Count the domains that take turns on a rank; 1 in dense runs: micro-batches mix domains."""
    return 1 if topology.sharing is Sharing.DENSE else len(topology.get_rank_domains(0))


def count_micro_steps(run: RunArgs, topology: DomainTopology) -> int:
    """Count the micro-batches of a rank in a step.

    With --global_batch_size the ranks share its rows evenly. Without, --gradient_accumulation_steps
    counts micro-batches per domain: a rank with several domains takes that many of each.

    Args:
        run: its batch flags are in sequences.
        topology: ranks and domains.
    Raises:
        UserError: if --global_batch_size is not a whole number of micro-batches of all ranks, and
            of all domains of a rank.
    """
    domains_per_rank, micro_batch = (
        count_domains_per_rank(topology),
        run.per_device_train_batch_size,
    )
    if run.global_batch_size is None:
        return domains_per_rank * run.gradient_accumulation_steps
    parts = {"ranks": topology.world_size, "(--per_device_train_batch_size)": micro_batch}
    if domains_per_rank > 1:
        parts["domains of a rank"] = domains_per_rank
    check_global_batch_size(run.global_batch_size, parts)
    return run.global_batch_size // (topology.world_size * micro_batch)
