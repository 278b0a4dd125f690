"""Flags of a plan, importable without torch."""

from dataclasses import dataclass

from megamod.flags import Arguments, option


@dataclass
class PlanArgs(Arguments):
    """Cluster, GPU and requested outputs of a plan."""

    world_size: int | None = option(None, "ranks; none: the slots of --hostfile", least=1)
    ranks_per_node: int = option(8, "GPUs per host, if there is no hostfile", least=1)
    gpu_memory_gb: float = option(80.0, "memory of a GPU in units of 1e9 bytes", least=0.001)
    peak_tflops: float = option(
        989.0, "peak of a GPU in the run's precision; 989: H100 and H200 in bf16", least=0.001
    )
    vocab_size: int | None = option(
        None,
        "vocabulary size; none: that of --data if it exists, else 50264, or 30522 for encoders",
        least=8,
    )
    json: str | None = option(None, "write the plan to this JSON file too")
    search: bool = option(False, "propose ZeRO stage, micro-batch and checkpointing, best first")
    simulate: str | None = option(
        None, "PNG of tokens/s of dense, DEMix and BTM training against GPUs, up to 1,024"
    )
    step_ms: float | None = option(
        None,
        "measured time of a step of this recipe; none: estimated from 40 % of the peak",
        least=0.001,
    )
    step_world_size: int | None = option(None, "ranks of that measurement; none: --world_size")
    intra_gbs: float = option(
        300.0, "bandwidth of a GPU inside a host, in 1e9 bytes per second", least=0.001
    )
    inter_gbs: float = option(
        25.0, "bandwidth of a GPU between hosts, in 1e9 bytes per second", least=0.001
    )
