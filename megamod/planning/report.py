"""Plans, proposals and scaling curves as text tables."""

from collections.abc import Mapping, Sequence

from megamod.btm.placement import format_include
from megamod.dist.scope import Sharing
from megamod.planning.memory import USABLE
from megamod.planning.plan import JobPlan, count_hosts_by_domain
from megamod.planning.scaling import ScalingPoint
from megamod.planning.search import Proposal
from megamod.tables import format_table


def format_job_plan(plan: JobPlan) -> str:
    """Format a plan as a title and a table: batch, parameters, memory, traffic, time and hosts."""
    job, network, setting = plan.job, plan.network, plan.job.setting
    ranks = job.topology.world_size
    count = f"{len(job.job_names)} jobs of {ranks}" if len(job.job_names) > 1 else f"{ranks}"
    states = "no ZeRO" if setting.stage == 0 else f"ZeRO stage {setting.stage}"
    recompute = ", gradient checkpointing" if setting.checkpointing else ""
    assumed = " (assumed)" if job.vocabulary.assumed else ""
    counted = "" if job.mux.objective == "causal_lm" else ", counted"
    rows: list[tuple[str, str]] = [
        ("ranks", f"{count}, {job.topology.sharing.value}, {setting.precision}, {states}"),
        (
            "batch",
            f"{setting.micro_batch} sequences x {setting.micro_steps} micro-batches x {ranks} "
            f"ranks = {job.sequences_per_step:,}; {job.tokens_per_step:,} tokens per "
            f"step{recompute}",
        ),
        ("vocabulary", f"{job.vocabulary.size:,}{assumed}"),
        *_list_parameter_rows(plan),
        ("FLOPs per token", f"{network.flops_per_token / 1e9:.3f} GFLOP{counted}"),
        *_list_memory_rows(plan),
        *_list_traffic_rows(plan),
        ("checkpoint", _format_bytes(plan.checkpoint_bytes)),
        *_list_time_rows(plan),
        *_list_placement_rows(plan),
    ]
    return f"== {job.name}\n{format_table(rows)}"


def format_proposals(proposals: Sequence[Proposal]) -> str:
    """Format proposed settings in order, two lines each: setting with its cost, and reasons.

    Without proposals it is one sentence that says so.
    """
    if not proposals:
        return "no setting fits; use more ranks or larger GPUs"
    lines = ["settings that fit, best first (step time: computation + communication)"]
    for number, proposal in enumerate(proposals, start=1):
        setting = proposal.setting
        parts = [
            f"ZeRO stage {setting.stage}" if setting.stage else "no ZeRO",
            f"micro-batch {setting.micro_batch} x {setting.micro_steps}",
            "recomputation" if setting.checkpointing else "no recomputation",
        ]
        parts += [f"offload_optimizer {setting.offload}"] if setting.offload != "none" else []
        lines.append(
            f"{number}. {', '.join(parts)}: {proposal.memory.peak / 1e9:.2f} GB, "
            f"{1e3 * proposal.compute_seconds:,.0f} + "
            f"{1e3 * proposal.communication_seconds:,.0f} ms"
        )
        lines.append(f"   {'; '.join(proposal.reasons)}")
    return "\n".join(lines)


def format_curves(curves: Mapping[Sharing, Sequence[ScalingPoint]]) -> str:
    """Format tokens per second by number of GPUs as a table, a column per kind of sharing.

    Each value is a range: without overlap of computation and communication, and with full overlap.
    A kind of `curves` without a point at a number of GPUs has an empty cell.
    """
    kinds = list(curves)
    gpus = sorted({point.gpus for points in curves.values() for point in points})
    by_kind = {(kind, p.gpus): p for kind, points in curves.items() for p in points}
    head = ["GPUs", *(f"{kind.value} tokens/s" for kind in kinds)]
    lines = [head]
    for number in gpus:
        cells = [by_kind.get((kind, number)) for kind in kinds]
        lines.append(
            [
                str(number),
                *(
                    f"{p.tokens_per_second:,.0f} - {p.overlapped_tokens_per_second:,.0f}"
                    if p
                    else ""
                    for p in cells
                ),
            ]
        )
    return format_table(lines, right_aligned_columns=range(len(head)))


def _list_parameter_rows(plan: JobPlan) -> list[tuple[str, str]]:
    """List (title, value) of the numbers of parameters, on a rank and active.

    Where they differ, also those per expert, over all domains and over all jobs.
    """
    network = plan.network
    rows = [
        (
            "parameters",
            f"{network.parameters_per_rank:,} on a rank, {network.parameters_per_token:,} active",
        )
    ]
    if network.parameters_per_expert:
        rows.append(
            (
                "",
                f"{network.shared_parameters:,} shared, {network.parameters_per_expert:,} per "
                "expert",
            )
        )
    if network.total_parameters != network.parameters_per_rank:
        rows.append(("", f"{network.total_parameters:,} over all domains"))
    if len(plan.job.job_names) > 1:
        rows.append(("", f"{len(plan.job.job_names) * network.total_parameters:,} over all jobs"))
    return rows


def _list_memory_rows(plan: JobPlan) -> list[tuple[str, str]]:
    """List (title, value) of a rank's memory by kind.

    If it does not fit the GPU, also the changes of settings that do.
    """
    needed = plan.memory
    usable = USABLE * plan.gpu_bytes
    states = (
        f"weights {_format_bytes(needed.weights)}, gradients {_format_bytes(needed.gradients)}, "
        f"optimizer {_format_bytes(needed.optimizer)}"
    )
    passes = (
        f"activations {_format_bytes(needed.activations)}, buffers "
        f"{_format_bytes(needed.buffers)}, with {_format_bytes(needed.kept)} of accumulated "
        "gradients; update: all gradients and "
        f"{_format_bytes(max(needed.collected, needed.update))}"
    )
    peak = (
        f"peak {_format_bytes(needed.peak)}; {_format_bytes(usable)} of "
        f"{_format_bytes(plan.gpu_bytes)} are usable: {'fits' if plan.fits else 'DOES NOT FIT'}"
    )
    rows = [("memory per rank", states), ("", passes), ("", peak)]
    if needed.host:
        device = "on the disk" if plan.job.setting.offload == "nvme" else "in memory"
        rows.append(("", f"{_format_bytes(needed.host)} {device} of the host"))
    if needed.host_weights:
        rows.append(("", f"{_format_bytes(needed.host_weights)} of weights in memory of the host"))
    if not plan.fits:
        changes = plan.list_fitting_changes() or [
            "no single change; --search tries several at once"
        ]
        rows += [
            ("settings that fit" if i == 0 else "", change) for i, change in enumerate(changes)
        ]
    return rows


def _list_traffic_rows(plan: JobPlan) -> list[tuple[str, str]]:
    """List (title, value) of the bytes that a rank sends per step to all ranks.

    Unless training is dense, also those it sends to the ranks of its domain.
    """
    traffic, topology = plan.traffic, plan.job.topology
    rows = [
        ("sent per step", f"{_format_bytes(traffic.world)} over all {topology.world_size} ranks")
    ]
    if topology.sharing is not Sharing.DENSE:
        rows.append(
            ("", f"{_format_bytes(traffic.domain)} inside a domain's {topology.ranks_per_domain}")
        )
    return rows


def _list_time_rows(plan: JobPlan) -> list[tuple[str, str]]:
    """List (title, value) of tokens per second and of days for all steps, by utilisation.

    Utilisation is the fraction of the GPU's peak that a run reaches.
    """
    peak = plan.flops_per_second / 1e12
    rates = plan.tokens_per_second
    speeds = ", ".join(f"{rate:,.0f} at {u:.0%}" for u, rate in rates.items())
    days = ", ".join(f"{days:.2f}" for days in plan.days.values())
    return [
        ("tokens/s", f"{speeds} of {peak:g} TFLOP/s per GPU"),
        ("days", f"{days} for {plan.job.steps:,} steps"),
    ]


def _list_placement_rows(plan: JobPlan) -> list[tuple[str, str]]:
    """List (host, its ranks and their domains) of one job, and domains that are spread over hosts.

    If the plan is of several equal jobs, list (job, its hosts, or that it waits for free slots).
    """
    job = plan.job
    rows = []
    if len(job.job_names) > 1:
        return [
            (name, format_include(placement) or "waits for free slots")
            for name, placement in zip(job.job_names, job.placements, strict=True)
        ]
    first = 0
    for host in job.placements[0]:
        ranks = range(first, first + len(host.slots))
        first += len(host.slots)
        domains = dict.fromkeys(d for rank in ranks for d in job.topology.get_rank_domains(rank))
        label = f"ranks {ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]}"
        rows.append((host.name, f"{label}: {', '.join(domains)}"))
    if job.topology.sharing is not Sharing.DENSE:
        spread = [domain for domain, count in count_hosts_by_domain(job).items() if count > 1]
        if spread:
            rows.append(("", f"gradients inside {', '.join(spread)} cross machines"))
    return rows


def _format_bytes(size: float) -> str:
    """Format bytes in GB or MB with three digits."""
    return f"{size / 1e9:.3g} GB" if size >= 1e7 else f"{size / 1e6:.3g} MB"
