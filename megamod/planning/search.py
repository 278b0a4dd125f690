"""Search for settings that fit a GPU, ranked by computation and communication time."""

from dataclasses import dataclass, replace

from megamod.planning.memory import Memory, TrainingSetting
from megamod.planning.plan import (
    SMALL_BUCKET,
    JobPlan,
    change_micro_batch,
    is_stage_allowed,
    list_micro_batches,
)
from megamod.planning.speed import (
    compute_traffic,
    estimate_communication_seconds,
    estimate_compute_seconds,
)

UTILISATION = 0.4  # of the peak; weighs computation against communication
SHOWN = 6  # proposals at most


@dataclass(frozen=True)
class Proposal:
    """A setting with its memory and step time.

    Attributes:
        memory: memory of a rank with the setting.
        compute_seconds, communication_seconds: seconds of computation and communication per step.
        reasons: costs and savings in words.
    """

    setting: TrainingSetting
    memory: Memory
    compute_seconds: float
    communication_seconds: float
    reasons: tuple[str, ...]

    @property
    def step_seconds(self) -> float:
        """Seconds of a step: computation, then communication."""
        return self.compute_seconds + self.communication_seconds

    def make_record(self) -> dict[str, object]:
        """Make the JSON value of the proposal: its settings, bytes and seconds per step."""
        return {
            "stage": self.setting.stage,
            "micro_batch": self.setting.micro_batch,
            "micro_steps": self.setting.micro_steps,
            "gradient_checkpointing": self.setting.checkpointing,
            "offload": self.setting.offload,
            "offload_param": self.setting.offload_param,
            "peak_bytes": self.memory.peak,
            "host_bytes": self.memory.host + self.memory.host_weights,
            "step_seconds": self.step_seconds,
            "reasons": list(self.reasons),
        }


def propose_settings(plan: JobPlan, shown: int = SHOWN) -> list[Proposal]:
    """Search settings of a planned job that fit its GPUs; return up to `shown`, the fastest first.

    Each combination of ZeRO stage, micro-batch and recomputation is planned, at equal sequences per
    step. At equal speed the larger micro-batch comes first, because it keeps a GPU busier, then the
    lower ZeRO stage, because it is simpler. Smaller buffers, then offloading, are tried only if
    nothing else fits; if they do not help, the result is empty.
    """
    job_setting = plan.job.setting
    small = replace(job_setting, bucket=min(job_setting.bucket, SMALL_BUCKET))
    for base in (job_setting, small, replace(small, offload="cpu")):
        fitting = [
            p
            for setting in _list_candidate_settings(plan, base)
            if (p := _make_proposal(plan, setting))
        ]
        if fitting:
            fitting.sort(key=_make_sort_key)
            return fitting[:shown]
    return []


def _list_candidate_settings(plan: JobPlan, base: TrainingSetting) -> list[TrainingSetting]:
    """List the settings to try for the job of `plan`: stages, micro-batches and checkpointing.

    All else is as in `base`.
    """
    job = plan.job
    return [
        replace(change_micro_batch(base, micro), stage=stage, checkpointing=checkpointing)
        for stage in range(4)
        if is_stage_allowed(stage, job) and _supports_offloading(base, stage)
        for micro in list_micro_batches(job)
        for checkpointing in (False, True)
    ]


def _supports_offloading(base: TrainingSetting, stage: int) -> bool:
    """Return True if a ZeRO stage supports the offloading of `base`, which may be none."""
    least = {"none": 0, "cpu": 1, "nvme": 3}
    return stage >= least[base.offload] and (stage == 3 or base.offload_param == "none")


def _make_sort_key(proposal: Proposal) -> tuple[float, int, int]:
    """Return the key that sorts proposals, the best first.

    It is the step time to two digits, then the larger micro-batch, then the lower stage.
    """
    # Differences below a few percent are within the error of the estimate.
    rounded = float(f"{proposal.step_seconds:.2g}")
    return rounded, -proposal.setting.micro_batch, proposal.setting.stage


def _make_proposal(plan: JobPlan, setting: TrainingSetting) -> Proposal | None:
    """Make the proposal of a setting; None if it needs more memory than a GPU has.

    `plan` is that of the job with its own setting.
    """
    needed = plan.compute_memory_with_setting(setting)
    if not plan.can_gpu_hold(needed):
        return None
    compute = estimate_compute_seconds(plan.network, setting, UTILISATION * plan.flops_per_second)
    traffic = compute_traffic(plan.network, plan.job.topology, setting)
    communication = estimate_communication_seconds(traffic, plan.job.topology, plan.links)
    return Proposal(
        setting, needed, compute, communication, _list_reasons(plan, setting, needed, traffic.world)
    )


def _list_reasons(
    plan: JobPlan, setting: TrainingSetting, needed: Memory, world: float
) -> tuple[str, ...]:
    """List the costs and savings of a setting in words.

    Args:
        plan: the planned job, whose own setting is compared.
        setting: the proposed one.
        needed: memory of a rank with the setting.
        world: bytes that a rank sends per step to all ranks.
    """
    free = plan.gpu_bytes - needed.peak
    reasons = [f"{free / 1e9:.1f} GB of {plan.gpu_bytes / 1e9:g} remain free"]
    if setting.checkpointing:
        plain = plan.compute_memory_with_setting(replace(setting, checkpointing=False))
        saved = (plain.activations - needed.activations) / 1e9
        reasons.append(f"recomputation costs a third more FLOPs and saves {saved:.1f} GB")
    if setting.stage >= 2 and setting.micro_steps > 1:
        reasons.append(
            f"stage {setting.stage} reduces after each of {setting.micro_steps} micro-batches: "
            f"{world / 1e9:.1f} GB a step over all ranks"
        )
    if setting.stage and setting.bucket < plan.job.setting.bucket:
        reasons.append(f"needs reduce_bucket_size {setting.bucket:,} in the DeepSpeed file")
    if setting.offload != "none":
        device = "on the disk" if setting.offload == "nvme" else "on the host"
        reasons.append(
            f"{needed.host / 1e9:.1f} GB {device} per rank; the transfer is not in the step time"
        )
    if needed.host_weights:
        reasons.append(
            f"{needed.host_weights / 1e9:.1f} GB of weights on the host; "
            "host-to-GPU transfer is not in the step time"
        )
    return tuple(reasons)
