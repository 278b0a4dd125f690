"""A plan as text."""

from collections.abc import Mapping, Sequence

from megamod.btm.placement import format_include
from megamod.dist.scope import Sharing
from megamod.planning.memory import USABLE
from megamod.planning.plan import JobPlan, machines_of_domains
from megamod.planning.search import Proposal
from megamod.planning.simulate import Point
from megamod.tables import format_table


def format_job(plan: JobPlan) -> str:
    """Format the requirements of a job."""
    job, network, setting = plan.job, plan.network, plan.job.setting
    ranks = job.topology.world_size
    count = f"{len(job.alike)} jobs of {ranks}" if len(job.alike) > 1 else f"{ranks}"
    states = "no ZeRO" if setting.stage == 0 else f"ZeRO stage {setting.stage}"
    recompute = ", gradient checkpointing" if setting.checkpointing else ""
    assumed = " (assumed)" if job.vocabulary.assumed else ""
    counted = "" if job.mux.objective == "causal_lm" else ", counted"
    rows: list[tuple[str, str]] = [
        ("ranks", f"{count}, {job.topology.sharing.value}, {setting.precision}, {states}"),
        (
            "batch",
            f"{setting.micro_batch} sequences x {setting.micro_steps} micro-batches x {ranks} "
            f"ranks = {job.sequences:,}; {job.tokens:,} tokens per step{recompute}",
        ),
        ("vocabulary", f"{job.vocabulary.size:,}{assumed}"),
        *_parameters(plan),
        ("FLOPs per token", f"{network.flops_per_token / 1e9:.3f} GFLOP{counted}"),
        *_memory(plan),
        *_wire(plan),
        ("checkpoint", _gb(plan.checkpoint_bytes)),
        *_time(plan),
        *_places(plan),
    ]
    return f"== {job.name}\n{format_table(rows)}"


def format_proposals(proposals: Sequence[Proposal]) -> str:
    """Format proposed settings, the best first."""
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
            f"{1e3 * proposal.compute:,.0f} + {1e3 * proposal.wire:,.0f} ms"
        )
        lines.append(f"   {'; '.join(proposal.reasons)}")
    return "\n".join(lines)


def format_curves(curves: Mapping[Sharing, Sequence[Point]]) -> str:
    """Format tokens per second by number of GPUs, without and with full overlap."""
    kinds = list(curves)
    gpus = sorted({point.gpus for points in curves.values() for point in points})
    by_kind = {(kind, p.gpus): p for kind, points in curves.items() for p in points}
    head = ["GPUs", *(f"{kind.value} tokens/s" for kind in kinds)]
    lines = [head]
    for number in gpus:
        cells = [by_kind.get((kind, number)) for kind in kinds]
        lines.append([str(number), *(f"{p.slow:,.0f} - {p.fast:,.0f}" if p else "" for p in cells)])
    return format_table(lines, right=range(len(head)))


def _parameters(plan: JobPlan) -> list[tuple[str, str]]:
    network = plan.network
    rows = [("parameters", f"{network.per_rank:,} on a rank, {network.active:,} active")]
    if network.per_expert:
        rows.append(("", f"{network.shared:,} shared, {network.per_expert:,} per expert"))
    if network.total != network.per_rank:
        rows.append(("", f"{network.total:,} over all domains"))
    if len(plan.job.alike) > 1:
        rows.append(("", f"{len(plan.job.alike) * network.total:,} over all jobs"))
    return rows


def _memory(plan: JobPlan) -> list[tuple[str, str]]:
    needed = plan.memory
    usable = USABLE * plan.gpu_bytes
    rows = [
        ("memory per rank", f"weights {_gb(needed.weights)}, gradients {_gb(needed.gradients)}, "
         f"optimizer {_gb(needed.optimizer)}"),
        ("", f"activations {_gb(needed.activations)}, buffers {_gb(needed.buffers)}, with "
         f"{_gb(needed.kept)} of accumulated gradients; update: all gradients and "
         f"{_gb(max(needed.collected, needed.update))}"),
        ("", f"peak {_gb(needed.peak)}; {_gb(usable)} of {_gb(plan.gpu_bytes)} are "
         f"usable: {'fits' if plan.fits else 'DOES NOT FIT'}"),
    ]  # fmt: skip
    if needed.host:
        device = "on the disk" if plan.job.setting.offload == "nvme" else "in memory"
        rows.append(("", f"{_gb(needed.host)} {device} of the host"))
    if needed.host_weights:
        rows.append(("", f"{_gb(needed.host_weights)} of weights in memory of the host"))
    if not plan.fits:
        changes = plan.what_fits() or ["no single change; --search tries several at once"]
        rows += [
            ("settings that fit" if i == 0 else "", change) for i, change in enumerate(changes)
        ]
    return rows


def _wire(plan: JobPlan) -> list[tuple[str, str]]:
    traffic, topology = plan.traffic, plan.job.topology
    rows = [("sent per step", f"{_gb(traffic.world)} over all {topology.world_size} ranks")]
    if topology.sharing is not Sharing.DENSE:
        rows.append(("", f"{_gb(traffic.domain)} inside a domain's {topology.ranks_per_domain}"))
    return rows


def _time(plan: JobPlan) -> list[tuple[str, str]]:
    peak = plan.flops_per_second / 1e12
    rates = plan.tokens_per_second
    speeds = ", ".join(f"{rate:,.0f} at {u:.0%}" for u, rate in rates.items())
    days = ", ".join(f"{days:.2f}" for days in plan.days.values())
    return [
        ("tokens/s", f"{speeds} of {peak:g} TFLOP/s per GPU"),
        ("days", f"{days} for {plan.job.steps:,} steps"),
    ]


def _places(plan: JobPlan) -> list[tuple[str, str]]:
    job = plan.job
    rows = []
    if len(job.alike) > 1:
        return [
            (name, format_include(placement) or "waits for free slots")
            for name, placement in zip(job.alike, job.places, strict=True)
        ]
    first = 0
    for host in job.places[0]:
        ranks = range(first, first + len(host.slots))
        first += len(host.slots)
        domains = dict.fromkeys(d for rank in ranks for d in job.topology.get_rank_domains(rank))
        label = f"ranks {ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]}"
        rows.append((host.name, f"{label}: {', '.join(domains)}"))
    if job.topology.sharing is not Sharing.DENSE:
        spread = [domain for domain, count in machines_of_domains(job).items() if count > 1]
        if spread:
            rows.append(("", f"gradients inside {', '.join(spread)} cross machines"))
    return rows


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e7 else f"{size / 1e6:.3g} MB"
