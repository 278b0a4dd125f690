"""The planner's step times against measured ones: dense, DEMix and BTM on 1, 2 and 4 processes.

    python tests/bench/scaling.py [RANKS ...]

Two things are measured: a step of independent models (BTM, a domain each), which is operations
only, and the bytes per second at which a process sends in an all-reduce. The formulas of plans make
steps of dense and DEMix training out of these; the table has them beside measured ones. All kinds
take their steps in turns, in the same processes; minima are compared, three times over.
"""

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from ranks import on_ranks  # noqa: E402
from step import CLIP, REPEATS, make_engine, random_batch  # noqa: E402

ROUNDS = 6
KINDS = ("all", "feedforward", "none")
ELEMENTS = 4_000_000  # of the buffer that is reduced: 16 MB, about that of the model


def take_turns(rank: int) -> dict[str, list[float]]:
    """Minima of every repeat: seconds of a step of each kind, and of the all-reduce."""
    from megamod.train.engine import finish_micro_step
    from megamod.train.optim import set_learning_rate

    domains = ("law", "med", "code", "news")[: dist.get_world_size()]
    built = {untie: make_engine(untie, 1, domains) for untie in KINDS}
    buffer = torch.zeros(ELEMENTS)
    times: dict[str, list[float]] = {name: [] for name in (*KINDS, "reduce")}
    for number in range(ROUNDS * REPEATS + 1):
        batch = random_batch(number * 8 + rank, rank)
        for untie, (engine, topology) in built.items():
            dist.barrier()
            started = time.perf_counter()
            set_learning_rate(engine.optimizer, 1e-4)
            domain = topology.get_rank_domains(rank)[0] if untie == "feedforward" else None
            loss = engine(batch["input_ids"], shift_labels=batch["labels"], domain=domain).loss
            engine.backward(loss)
            finish_micro_step(engine, CLIP)
            dist.barrier()
            times[untie].append(time.perf_counter() - started)
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(buffer)
        times["reduce"].append(time.perf_counter() - started)
    pieces = range(1, ROUNDS * REPEATS + 1, ROUNDS)
    minima = {name: [min(row[i : i + ROUNDS]) for i in pieces] for name, row in times.items()}
    minima["wire"] = [_bytes(*built[untie]) for untie in KINDS]
    return minima


def _bytes(engine, topology) -> float:
    from megamod.dist.communication import compute_step_traffic

    sizes = {name: p.numel() for name, p in engine.module.named_parameters()}
    traffic = compute_step_traffic(sizes, topology, 1, 1, 4)
    return traffic.world + traffic.domain


def measure(ranks: int) -> dict[str, list[float]]:
    """For dense and DEMix: sorted ratios predicted / measured of the repeats."""
    output = on_ranks(ranks, take_turns)[0]
    ratios = {}
    for untie, wire in zip(KINDS[1:], output["wire"][1:], strict=True):
        result = []
        for alone, reduce, real in zip(output["all"], output["reduce"], output[untie], strict=True):
            speed = 2 * (ranks - 1) / ranks * ELEMENTS * 4 / reduce
            result.append((alone + (wire / speed if wire else 0.0)) / real)
        ratios[untie] = sorted(result)
        print(
            f"{ranks} processes, {'dense' if untie == 'none' else 'DEMix'}: measured "
            f"{1e3 * min(output[untie]):.0f} ms, BTM {1e3 * min(output['all']):.0f} ms, "
            f"{wire / 1e6:.1f} MB; predicted / measured {ratios[untie][1]:.3f} "
            f"({ratios[untie][0]:.3f} to {ratios[untie][2]:.3f})"
        )
    return ratios


def main() -> None:
    torch.set_num_threads(1)
    for ranks in map(int, sys.argv[1:] or ("1", "2", "4")):
        measure(ranks)


if __name__ == "__main__":
    main()
