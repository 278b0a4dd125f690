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
from megamod.planning.model import network_of
from megamod.planning.plan import JobPlan
from megamod.planning.search import UTILISATION
from megamod.planning.speed import compute_seconds, traffic_of, wire_seconds

MOST_GPUS = 1024
UNTIED = {Sharing.DENSE: "none", Sharing.DEMIX: "feedforward", Sharing.BTM: "all"}


@dataclass(frozen=True)
class Point:
    """Step time on some number of GPUs.

    Attributes:
        compute, wire: seconds of computation and communication per step.
        tokens: tokens per step over all ranks.
    """

    gpus: int
    compute: float
    wire: float
    tokens: int

    @property
    def slow(self) -> float:
        """Tokens per second without overlap."""
        return self.tokens / (self.compute + self.wire)

    @property
    def fast(self) -> float:
        """Tokens per second with full overlap."""
        return self.tokens / max(self.compute, self.wire)


Curves = Mapping[Sharing, Sequence[Point]]


def simulate(plan: JobPlan, step_seconds: float | None, step_ranks: int | None) -> Curves:
    """Compute the curves of dense, DEMix and BTM training.

    Args:
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
    compute = compute_seconds(plan.network, setting, UTILISATION * plan.flops_per_second)
    if step_seconds is not None:
        topology = replace(job.topology, world_size=step_ranks or job.topology.world_size)
        communication = _wire(plan, _with_topology(job, topology))
        compute = step_seconds - communication
        if compute <= 0:
            raise UserError(
                f"--step_ms {1e3 * step_seconds:g}: sending the bytes of a step takes "
                f"{1e3 * communication:.1f} ms at these links; give faster links or the measured "
                "time"
            )
    return {kind: _curve(plan, kind, compute) for kind in Sharing}


def record(curves: Curves) -> dict[str, list[dict[str, float]]]:
    """For JSON."""
    return {
        kind.value: [
            {
                "gpus": point.gpus,
                "step_ms": 1e3 * (point.compute + point.wire),
                "step_ms_overlapped": 1e3 * max(point.compute, point.wire),
                "tokens_per_second": point.slow,
                "tokens_per_second_overlapped": point.fast,
            }
            for point in points
        ]
        for kind, points in curves.items()
    }


def draw(curves: Curves, tokens: int, title: str, path: Path) -> None:
    """Speed and cost by GPUs as a PNG; the band of each curve is what overlap can gain.

    Args:
        tokens: number of tokens of the whole training run; the cost is for all of them.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speed, cost) = pyplot.subplots(ncols=2, figsize=(11, 4.5), layout="constrained")
    for kind, points in curves.items():
        gpus = [point.gpus for point in points]
        slow, fast = [point.slow for point in points], [point.fast for point in points]
        for axes, (low, high) in (
            (speed, (slow, fast)),
            (cost, (gpu_days(gpus, slow, tokens), gpu_days(gpus, fast, tokens))),
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


def gpu_days(gpus: Sequence[int], rates: Sequence[float], tokens: int) -> list[float]:
    """GPU days for `tokens` at each number of GPUs and its tokens per second."""
    return [n * tokens / rate / 86_400 for n, rate in zip(gpus, rates, strict=True)]


def _curve(plan: JobPlan, kind: Sharing, compute: float) -> list[Point]:
    domains, points = plan.job.topology.domains, []
    gpus = 1
    while gpus <= MOST_GPUS:
        topology = _topology(gpus, domains, kind)
        if topology is not None:
            job = _with_topology(plan.job, topology)
            points.append(Point(gpus, compute, _wire(plan, job), job.tokens))
        gpus *= 2
    return points


def _topology(gpus: int, domains: tuple[str, ...], kind: Sharing) -> DomainTopology | None:
    """None if a rank would hold another number of experts than the measured model."""
    if kind is not Sharing.DENSE and gpus % len(domains):
        return None
    return DomainTopology(gpus, domains, kind)


def _with_topology(job: Job, topology: DomainTopology) -> Job:
    """Change topology and sharing of a job at equal sequences per rank."""
    model = copy.copy(job.model)
    if topology.sharing is not job.topology.sharing:
        model.untie = UNTIED[topology.sharing]
    setting = job.setting
    if topology.sharing is Sharing.DEMIX:
        setting = replace(setting, stage=min(2, setting.stage))
    return replace(job, topology=topology, model=model, setting=setting)


def _wire(plan: JobPlan, job: Job) -> float:
    traffic = traffic_of(network_of(job), job.topology, job.setting)
    return wire_seconds(traffic, job.topology, plan.links)
