"""Tokens per second of dense, DEMix and BTM training on more GPUs, from one measured step.

Each rank keeps its sequences per step, so its computation time is constant; only the bytes of a
ring and the speed of its slowest link change. Bytes are those of `dist/communication.py`. Two
curves bound the result: no overlap of communication with the backward pass, and full overlap.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megamod.dist.scope import Sharing
from megamod.dist.topology import DomainTopology
from megamod.errors import UserError
from megamod.planning.job import Job
from megamod.planning.model import build_network
from megamod.planning.plan import JobPlan
from megamod.planning.search import UTILISATION
from megamod.planning.speed import (
    compute_traffic,
    estimate_communication_seconds,
    estimate_compute_seconds,
)

MOST_GPUS = 1024
UNTIED = {Sharing.DENSE: "none", Sharing.DEMIX: "feedforward", Sharing.BTM: "all"}  # --untie


@dataclass(frozen=True)
class ScalingPoint:
    """Step time on some number of GPUs.

    Attributes:
        compute_seconds, communication_seconds: seconds of computation and communication per step.
        tokens: tokens per step over all ranks.
    """

    gpus: int
    compute_seconds: float
    communication_seconds: float
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second if communication does not overlap with computation."""
        return self.tokens / (self.compute_seconds + self.communication_seconds)

    @property
    def overlapped_tokens_per_second(self) -> float:
        """Tokens per second if communication overlaps with computation as far as possible."""
        return self.tokens / max(self.compute_seconds, self.communication_seconds)


Curves = Mapping[Sharing, Sequence[ScalingPoint]]


def compute_scaling_curves(
    plan: JobPlan, step_seconds: float | None, step_ranks: int | None
) -> Curves:
    """Compute the curves of dense, DEMix and BTM training on 1 to `MOST_GPUS` GPUs.

    The computation time of a step is the same everywhere: the measured time minus the communication
    of that run, or the estimate.

    Args:
        plan: the job whose settings and sequences per rank all points keep.
        step_seconds: measured step time of the job; None: FLOPs at 40 % of the peak.
        step_ranks: ranks of that measurement; None: those of the job.
    Raises:
        UserError: unless the job is a causal language model of several domains, and if the measured
            time is shorter than its communication.
    """
    job = plan.job
    if job.mux.objective != "causal_lm" or len(job.topology.domains) < 2:
        raise UserError("--simulate: compares causal language models of two domains or more")
    setting = job.setting
    compute = estimate_compute_seconds(plan.network, setting, UTILISATION * plan.flops_per_second)
    if step_seconds is not None:
        topology = replace(job.topology, world_size=step_ranks or job.topology.world_size)
        communication = _estimate_communication(plan, _change_topology(job, topology))
        compute = step_seconds - communication
        if compute <= 0:
            raise UserError(
                f"--step_ms {1e3 * step_seconds:g}: sending the bytes of a step takes "
                f"{1e3 * communication:.1f} ms at these links; give faster links or the measured "
                "time"
            )
    return {kind: _compute_curve(plan, kind, compute) for kind in Sharing}


def make_curves_record(curves: Curves) -> dict[str, list[dict[str, float]]]:
    """Make the JSON value of curves: by sharing, a list of points with step times and speeds."""
    return {
        kind.value: [
            {
                "gpus": point.gpus,
                "step_ms": 1e3 * (point.compute_seconds + point.communication_seconds),
                "step_ms_overlapped": 1e3 * max(point.compute_seconds, point.communication_seconds),
                "tokens_per_second": point.tokens_per_second,
                "tokens_per_second_overlapped": point.overlapped_tokens_per_second,
            }
            for point in points
        ]
        for kind, points in curves.items()
    }


def plot_scaling_curves(curves: Curves, tokens: int, title: str, path: Path) -> None:
    """Write a PNG of speed and cost by GPUs; bands show the gain by overlapping communication.

    Args:
        curves: points by kind of sharing.
        tokens: number of tokens of the whole training run; the cost is for all of them.
        title: of the figure.
        path: file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speed, cost) = pyplot.subplots(ncols=2, figsize=(11, 4.5), layout="constrained")
    for kind, points in curves.items():
        gpus = [point.gpus for point in points]
        slow, fast = (
            [point.tokens_per_second for point in points],
            [point.overlapped_tokens_per_second for point in points],
        )
        for axes, (low, high) in (
            (speed, (slow, fast)),
            (cost, (compute_gpu_days(gpus, slow, tokens), compute_gpu_days(gpus, fast, tokens))),
        ):
            (line,) = axes.plot(gpus, low, marker=".", label=kind.value)
            axes.fill_between(gpus, low, high, color=line.get_color(), alpha=0.15)
    for axes, ylabel in ((speed, "tokens/s"), (cost, f"GPU days for {tokens / 1e9:.3g} G tokens")):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set(xlabel="GPUs", ylabel=ylabel)
        axes.grid(alpha=0.3)
    speed.legend()  # one legend for both panels
    speed.set_yscale("log")
    cost.set_ylim(bottom=0)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def compute_gpu_days(gpus: Sequence[int], rates: Sequence[float], tokens: int) -> list[float]:
    """Compute the GPU days for `tokens` at each number of GPUs and its tokens per second.

    Args:
        gpus: numbers of GPUs.
        rates: tokens per second at each of them.
        tokens: tokens of the whole training run.
    Returns:
        GPU days at each number of GPUs.
    """
    return [n * tokens / rate / 86_400 for n, rate in zip(gpus, rates, strict=True)]


def _compute_curve(plan: JobPlan, kind: Sharing, compute: float) -> list[ScalingPoint]:
    """Compute a point for each power of two of GPUs that the sharing allows.

    Args:
        plan: the measured job; batch and domains are its own.
        kind: the sharing.
        compute: seconds of computation per step, the same at each point.
    """
    domains, points = plan.job.topology.domains, []
    gpus = 1
    while gpus <= MOST_GPUS:
        topology = _make_topology(gpus, domains, kind)
        if topology is not None:
            job = _change_topology(plan.job, topology)
            points.append(
                ScalingPoint(gpus, compute, _estimate_communication(plan, job), job.tokens_per_step)
            )
        gpus *= 2
    return points


def _make_topology(gpus: int, domains: tuple[str, ...], kind: Sharing) -> DomainTopology | None:
    """Make the topology of `gpus` ranks; None with experts whose number does not divide `gpus`.

    Fewer or unevenly divided ranks would hold other experts than the model that was measured.

    Args:
        domains: domains of the job.
        kind: the sharing of parameters.
    """
    if kind is not Sharing.DENSE and gpus % len(domains):
        return None
    return DomainTopology(gpus, domains, kind)


def _change_topology(job: Job, topology: DomainTopology) -> Job:
    """Return a copy of the job with another topology and its sharing, at equal sequences per rank.

    `untie` follows a change of the sharing; with DEMix the ZeRO stage is 2 at most.
    """
    model = copy.copy(job.model)
    if topology.sharing is not job.topology.sharing:
        model.untie = UNTIED[topology.sharing]
    setting = job.setting
    if topology.sharing is Sharing.DEMIX:
        setting = replace(setting, stage=min(2, setting.stage))
    return replace(job, topology=topology, model=model, setting=setting)


def _estimate_communication(plan: JobPlan, job: Job) -> float:
    """Estimate the seconds of communication per step of a job over the links of a plan."""
    traffic = compute_traffic(build_network(job), job.topology, job.setting)
    return estimate_communication_seconds(traffic, job.topology, plan.links)
