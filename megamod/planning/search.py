"""Settings that fit a GPU, the fastest first, by operations and bytes on the wire alone."""

from dataclasses import dataclass, replace

from megamod.planning.memory import Memory, Setting
from megamod.planning.plan import (
    SMALL_BUCKET,
    JobPlan,
    micro_batches,
    stage_allowed,
    with_micro_batch,
)
from megamod.planning.timing import compute_seconds, traffic_of, wire_seconds

UTILISATION = 0.4  # of the peak; it weighs operations against bytes
SHOWN = 6


@dataclass(frozen=True)
class Proposal:
    """A setting, what it needs and how long a step takes.

    Attributes:
        compute, wire: seconds of a step, one after the other.
        reasons: what it costs and what it saves, in words.
    """

    setting: Setting
    memory: Memory
    compute: float
    wire: float
    reasons: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.compute + self.wire

    def record(self) -> dict[str, object]:
        """For JSON."""
        return {
            "stage": self.setting.stage,
            "micro_batch": self.setting.micro_batch,
            "micro_steps": self.setting.micro_steps,
            "gradient_checkpointing": self.setting.checkpointing,
            "offload": self.setting.offload,
            "offload_param": self.setting.offload_param,
            "peak_bytes": self.memory.peak,
            "host_bytes": self.memory.host + self.memory.host_weights,
            "step_seconds": self.seconds,
            "reasons": list(self.reasons),
        }


def proposals(plan: JobPlan, shown: int = SHOWN) -> list[Proposal]:
    """Settings of a job that fit its GPUs, at most `shown`; best first, with reasons.

    The sequences of a step stay as they are. Of equally fast ones the larger micro-batch comes
    first, which keeps a GPU busier, then the lower stage, whose code path is simpler. Smaller
    buffers, then offloading, are looked at only where nothing else fits.
    """
    given = plan.job.setting
    small = replace(given, bucket=min(given.bucket, SMALL_BUCKET))
    for base in (given, small, replace(small, offload="cpu")):
        found = [p for setting in _settings(plan, base) if (p := _proposal(plan, setting))]
        if found:
            found.sort(key=_order)
            return found[:shown]
    return []


def _settings(plan: JobPlan, base: Setting) -> list[Setting]:
    job = plan.job
    return [
        replace(with_micro_batch(base, micro), stage=stage, checkpointing=checkpointing)
        for stage in range(4)
        if stage_allowed(stage, job) and _offloads(base, stage)
        for micro in micro_batches(job)
        for checkpointing in (False, True)
    ]


def _offloads(base: Setting, stage: int) -> bool:
    """Whether optimizer and weights can be where they are with another stage."""
    least = {"none": 0, "cpu": 1, "nvme": 3}
    return stage >= least[base.offload] and (stage == 3 or base.offload_param == "none")


def _order(proposal: Proposal) -> tuple[float, int, int]:
    # Differences of less than a percent are not what this can tell.
    rounded = float(f"{proposal.seconds:.2g}")
    return rounded, -proposal.setting.micro_batch, proposal.setting.stage


def _proposal(plan: JobPlan, setting: Setting) -> Proposal | None:
    needed = plan.memory_with(setting)
    if not plan.holds(needed):
        return None
    compute = compute_seconds(plan.network, setting, UTILISATION * plan.flops_per_second)
    traffic = traffic_of(plan.network, plan.job.topology, setting)
    wire = wire_seconds(traffic, plan.job.topology, plan.links)
    return Proposal(setting, needed, compute, wire, _reasons(plan, setting, needed, traffic.world))


def _reasons(plan: JobPlan, setting: Setting, needed: Memory, world: float) -> tuple[str, ...]:
    free = plan.gpu_bytes - needed.peak
    told = [f"{free / 1e9:.1f} GB of {plan.gpu_bytes / 1e9:g} stay free"]
    if setting.checkpointing:
        plain = plan.memory_with(replace(setting, checkpointing=False))
        saved = (plain.activations - needed.activations) / 1e9
        told.append(f"recomputing costs a third of the operations, saves {saved:.1f} GB")
    if setting.stage >= 2 and setting.micro_steps > 1:
        told.append(
            f"stage {setting.stage} reduces after each of {setting.micro_steps} micro-batches: "
            f"{world / 1e9:.1f} GB a step over all ranks"
        )
    if setting.stage and setting.bucket < plan.job.setting.bucket:
        told.append(f"needs reduce_bucket_size {setting.bucket:,} in the DeepSpeed file")
    if setting.offload != "none":
        place = "on the disk" if setting.offload == "nvme" else "on the host"
        told.append(f"{needed.host / 1e9:.1f} GB {place} per rank; its bus is not in the time")
    if needed.host_weights:
        told.append(f"{needed.host_weights / 1e9:.1f} GB of weights on the host, nor is their bus")
    return tuple(told)
