"""The flags of a plan, apart, so that they can be read without torch."""

from dataclasses import dataclass

from megamod.flags import Arguments, option


@dataclass
class PlanArgs(Arguments):
    """Where a run would be, and what is asked about it."""

    world_size: int | None = option(None, "ranks; none: the slots of --hostfile", least=1)
    ranks_per_node: int = option(8, "GPUs of a machine, without a hostfile", least=1)
    gpu_memory_gb: float = option(80.0, "memory of a GPU in units of 1e9 bytes", least=0.001)
    peak_tflops: float = option(
        989.0, "peak of a GPU in the run's precision; 989: H100 and H200 in bf16", least=0.001
    )
    vocab_size: int | None = option(
        None, "tokens; none: those of --data if it is there, else 50264 or BERT's 30522", least=8
    )
    json: str | None = option(None, "file that the plan is written to as well")
    search: bool = option(False, "propose stage, micro-batch and checkpointing, best first")
    simulate: str | None = option(
        None, "PNG of tokens/s of dense, DEMix and BTM training against GPUs, up to 1,024"
    )
    step_ms: float | None = option(
        None, "measured time of a step of this recipe; none: from 40 % of the peak", least=0.001
    )
    step_world_size: int | None = option(None, "ranks it was measured on; none: --world_size")
    intra_gbs: float = option(
        300.0, "bandwidth of a GPU inside a machine, in 1e9 bytes per second", least=0.001
    )
    inter_gbs: float = option(
        25.0, "bandwidth of a GPU between machines, in 1e9 bytes per second", least=0.001
    )
