"""Plan of a job: memory, communication, time, and the nearest settings that fit."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from megamod.btm.placement import format_include
from megamod.dist.communication import Traffic
from megamod.dist.ds_config import apply_sharing_rules
from megamod.dist.scope import Scope, Sharing, find_scopes
from megamod.dist.topology import DomainTopology
from megamod.errors import UserError
from megamod.planning.job import Job
from megamod.planning.memory import MASTER, MOMENTS, USABLE, Memory, TrainingSetting, compute_memory
from megamod.planning.model import Network, build_network
from megamod.planning.plan_args import PlanArgs
from megamod.planning.speed import Links, compute_traffic
from megamod.train.compiled import check_compile_stage

UTILISATIONS = (0.3, 0.4, 0.5)  # of a GPU's peak, for which speeds are given
LINEAR_TOKENS = (
    4096  # scored tokens above which activation memory grows linearly with the micro-batch
)
SMALL_BUCKET = 50_000_000  # elements of the smaller reduction buffer that is proposed
MOST_RANKS = 1024  # that are proposed


@dataclass(frozen=True)
class JobPlan:
    """A job with its model, on given GPUs and links.

    Attributes:
        gpu_bytes: memory of a GPU.
        flops_per_second: peak of a GPU in the job's precision.
        links: bandwidths of a GPU.
    """

    job: Job
    network: Network
    gpu_bytes: float
    flops_per_second: float
    links: Links

    @cached_property
    def memory(self) -> Memory:
        """Memory of a rank with the job's settings."""
        return self.compute_memory_with_setting(self.job.setting)

    @property
    def traffic(self) -> Traffic:
        """Bytes that a rank sends in a step, over the ring of all ranks and that of a domain."""
        return compute_traffic(self.network, self.job.topology, self.job.setting)

    @property
    def fits(self) -> bool:
        """True if the job fits the memory of a GPU."""
        return self.can_gpu_hold(self.memory)

    def can_gpu_hold(self, needed: Memory) -> bool:
        """Return True if this memory fits the usable part of a GPU, see `memory.USABLE`."""
        return needed.peak <= USABLE * self.gpu_bytes

    def compute_memory_with_setting(
        self, setting: TrainingSetting, topology: DomainTopology | None = None
    ) -> Memory:
        """Compute the memory of a rank if the job had another setting or topology.

        Args:
            setting: training setting; a new micro-batch or recomputation costs a pass through the
                model without storage, see `_estimate_peak_activations`.
            topology: None: that of the job. A rank must hold as many experts as in the job.
        """
        passed = self._estimate_peak_activations(setting.micro_batch, setting.checkpointing)
        return compute_memory(
            self.network.trained_sizes,
            self.network.frozen_sizes,
            topology or self.job.topology,
            setting,
            passed,
            self.network.muon_names,
        )

    @cached_property
    def _measured_peaks(self) -> dict[tuple[int, bool], int]:
        """Cache of `_estimate_peak_activations`: peak bytes by (micro-batch, recomputation)."""
        return {}

    def _estimate_peak_activations(self, micro_batch: int, checkpointing: bool) -> int:
        """Estimate the peak bytes of activations of a micro-batch.

        They are measured, once for each pair of arguments; large micro-batches other than the job's
        are extrapolated linearly from two that are measured.

        Args:
            micro_batch: number of sequences.
            checkpointing: blocks are recomputed in the backward pass.
        """
        group, length = self.job.mux.num_instances, self.job.data.max_seq_length
        # The head works in chunks; below one full chunk its memory grows at another rate.
        low = group * math.ceil(LINEAR_TOKENS / (group * length * self.network.scored_share))
        high = 2 * low
        if micro_batch > high and micro_batch != self.job.setting.micro_batch:
            first, second = (
                self._estimate_peak_activations(low, checkpointing),
                self._estimate_peak_activations(high, checkpointing),
            )
            return second + (micro_batch - high) * (second - first) // (high - low)
        key = (micro_batch, checkpointing)
        if key not in self._measured_peaks:
            cost = self.network.measure_pass(micro_batch, checkpointing=checkpointing)
            self._measured_peaks[key] = cost.peak
        return self._measured_peaks[key]

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint on disk: weights, master weights and moments of all ranks.

        An adapter's has no frozen weights. Under Muon a matrix has one momentum, not two moments.
        """
        setting, sizes = self.job.setting, self.network.trained_sizes
        total, trained = (
            self.network.total_parameters,
            self.network.total_parameters - self.network.frozen_parameters,
        )
        if self.network.trains_adapter:  # the seed is not written again
            total = trained
        states = trained * (MASTER + MOMENTS)
        if setting.muon:  # domains have equal experts
            domains, held = self.job.topology.domains, self.job.topology.get_rank_domains(0)
            where = find_scopes(sizes, self.job.topology.sharing)
            copies = {Scope.WORLD: 1, Scope.DOMAIN: len(domains) // len(held)}
            hidden = sum(sizes[name] * copies[where[name]] for name in self.network.muon_names)
            states -= hidden * (MOMENTS - setting.element_bytes)
        return total * setting.element_bytes + states

    @property
    def tokens_per_second(self) -> dict[float, float]:
        """Tokens per second of all ranks together, by utilisation of the peak."""
        ranks, flops = self.job.topology.world_size, self.network.flops_per_token
        return {u: u * self.flops_per_second * ranks / flops for u in UTILISATIONS}

    @property
    def days(self) -> dict[float, float]:
        """Days for all steps, by utilisation of the peak."""
        tokens = self.job.steps * self.job.tokens_per_step
        return {u: tokens / rate / 86_400 for u, rate in self.tokens_per_second.items()}

    def list_fitting_changes(self) -> list[str]:
        """List single changes that make the job fit, the nearest first, with their peak memory."""
        return [
            f"{change}: {needed.peak / 1e9:.2f} GB"
            for change, needed in self._iterate_changes()
            if self.can_gpu_hold(needed)
        ]

    def _iterate_changes(self) -> Iterator[tuple[str, Memory]]:
        """Yield (change in words, memory with it) for single changes of the settings.

        The nearest come first: smaller micro-batches, recomputation, higher stages, smaller
        buffers, more ranks, offloading. Micro-batches and ranks end with the first that fits.
        """
        setting, topology = self.job.setting, self.job.topology
        for micro in sorted(list_micro_batches(self.job), reverse=True):
            if micro < setting.micro_batch:
                needed = self.compute_memory_with_setting(change_micro_batch(setting, micro))
                yield f"--per_device_train_batch_size {micro}", needed
                if self.can_gpu_hold(needed):
                    break
        if not setting.checkpointing:
            change = "--gradient_checkpointing true"
            yield change, self.compute_memory_with_setting(replace(setting, checkpointing=True))
        for stage in range(setting.stage + 1, 4):
            if is_stage_allowed(stage, self.job):
                change = f"ZeRO stage {stage}"
                yield change, self.compute_memory_with_setting(replace(setting, stage=stage))
        if setting.stage and setting.bucket > SMALL_BUCKET:
            change = f"reduce_bucket_size {SMALL_BUCKET}"
            yield change, self.compute_memory_with_setting(replace(setting, bucket=SMALL_BUCKET))
        ranks, steps = topology.world_size, setting.micro_steps
        while ranks < MOST_RANKS and steps % 2 == 0:
            ranks, steps = 2 * ranks, steps // 2
            if topology.sharing is Sharing.DEMIX and ranks <= len(topology.domains):
                continue  # a rank would hold fewer experts than the measured model
            more = replace(topology, world_size=ranks)
            needed = self.compute_memory_with_setting(replace(setting, micro_steps=steps), more)
            yield f"{ranks} ranks", needed
            if self.can_gpu_hold(needed):
                break
        if setting.muon:
            return  # it cannot be offloaded
        if setting.stage and setting.offload == "none":
            needed = self.compute_memory_with_setting(replace(setting, offload="cpu"))
            change = (
                f"offload_optimizer.device cpu ({needed.host / 1e9:.1f} GB of the host per rank)"
            )
            yield change, needed
        if setting.stage == 3 and setting.offload_param == "none":
            needed = self.compute_memory_with_setting(replace(setting, offload_param="cpu"))
            share = f"{needed.host_weights / 1e9:.1f} GB of the host per rank"
            yield f"offload_param.device cpu ({share})", needed

    def make_record(self) -> dict[str, object]:
        """Make the JSON value of the plan: settings, parameters, bytes, rates and hosts."""
        job, network = self.job, self.network
        return {
            "name": job.name,
            "alike": list(job.job_names),
            "sharing": job.topology.sharing.value,
            "domains": list(job.topology.domains),
            "ranks": job.topology.world_size,
            "ranks_per_domain": job.topology.ranks_per_domain,
            "setting": asdict(job.setting),
            "vocabulary": {"size": job.vocabulary.size, "assumed": job.vocabulary.assumed},
            "parameters": {
                "shared": network.shared_parameters,
                "per_expert": network.parameters_per_expert,
                "per_rank": network.parameters_per_rank,
                "active": network.parameters_per_token,
                "total": network.total_parameters,
            },
            "flops_per_token": network.flops_per_token,
            "memory": {**asdict(self.memory), "peak": self.memory.peak},
            "gpu_bytes": self.gpu_bytes,
            "fits": self.fits,
            "what_fits": [] if self.fits else self.list_fitting_changes(),
            "wire": asdict(self.traffic),
            "checkpoint_bytes": self.checkpoint_bytes,
            "sequences_per_step": job.sequences_per_step,
            "tokens_per_step": job.tokens_per_step,
            "steps": job.steps,
            "tokens_per_second": {f"{u:.0%}": rate for u, rate in self.tokens_per_second.items()},
            "days": {f"{u:.0%}": days for u, days in self.days.items()},
            "places": [format_include(placement) for placement in job.placements],
        }


def plan_job(job: Job, args: PlanArgs) -> JobPlan:
    """Plan a job on the GPUs and links of the flags `args`.

    Quantities of the plan are computed on first use, on the meta device.

    Raises:
        UserError: for a model that does not exist, or does not fit the data.
    """
    return JobPlan(
        job,
        build_network(job),
        args.gpu_memory_gb * 1e9,
        args.peak_tflops * 1e12,
        Links(args.intra_gbs * 1e9, args.inter_gbs * 1e9, _count_ranks_per_host(job, args)),
    )


def _count_ranks_per_host(job: Job, args: PlanArgs) -> int:
    """Count the ranks per host that links are computed with.

    For a job on several hosts they are those on the first. For a job on one host it is its own
    ranks or --ranks_per_node, whichever is more.

    Args:
        job: job whose first placement counts; it must not be empty.
        args: flags; --ranks_per_node is read.
    """
    placement = job.placements[0]
    return (
        len(placement[0].slots)
        if len(placement) > 1
        else max(args.ranks_per_node, len(placement[0].slots))
    )


def list_micro_batches(job: Job) -> list[int]:
    """List sizes of a micro-batch, in sequences, that keep the sequences per step of `job`.

    They are 1, 2, 4, ... 64 instance groups, as far as they divide a rank's sequences per step (per
    expert).
    """
    group = job.mux.num_instances
    dense = job.topology.sharing is Sharing.DENSE
    experts_per_rank = 1 if dense else len(job.topology.get_rank_domains(0))
    groups = job.sequences_per_step // job.topology.world_size // experts_per_rank // group
    return [group * n for n in (1, 2, 4, 8, 16, 32, 64) if groups % n == 0]


def change_micro_batch(setting: TrainingSetting, micro_batch: int) -> TrainingSetting:
    """Return a copy of the setting with another micro-batch size, at equal sequences per step.

    Args:
        micro_batch: sequences; divides those of a rank per step.
    """
    steps = setting.micro_steps * setting.micro_batch // micro_batch
    return replace(setting, micro_batch=micro_batch, micro_steps=steps)


def is_stage_allowed(stage: int, job: Job) -> bool:
    """Return True if a run accepts a ZeRO stage with the job's sharing, ranks, precision and
    compilation.
    """
    config: dict[str, object] = {"zero_optimization": {"stage": stage}}
    if job.setting.precision != "fp32":
        config[job.setting.precision] = {"enabled": True}
    try:
        apply_sharing_rules(config, job.topology.sharing, job.topology.world_size)
        if job.model.torch_compile:
            check_compile_stage(config)
    except UserError:
        return False
    return True


def count_hosts_by_domain(job: Job) -> dict[str, int]:
    """Count the hosts over which the ranks of each domain are spread, in the first placement."""
    hosts = [host.name for host in job.placements[0] for _ in host.slots]
    ranks = job.topology.get_domain_ranks
    return {d: len({hosts[rank] for rank in ranks(d)}) for d in job.topology.domains}
