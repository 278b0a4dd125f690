"""Training speed on a GPU: tokens per second, MFU, memory; against a compiled hand-written loop.

    python tests/bench/gpu_training.py --json runs/bench/training.json --minutes 2

Our decoder goes through the engine and the loop of the launchers, with the settings that the
planner has read; whenever the loop asks for a step's first batch, the peer (`gpu_peer.py`) makes a
step on the same tokens. MFU counts (6 N + 12 L D T) operations per token. A step with an expert,
and one of multiplexed pretraining, follow. What there is no time for is listed.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parents[2] / "kernels" / "bench")]
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parents[2] / "kernels")]

import gpu_peer  # noqa: E402
from clock import MachineSpeed, format_machine_speed, measure_machine_speed  # noqa: E402
from floors import Verdict  # noqa: E402
from gpu_steps import (  # noqa: E402
    CLIP,
    Job,
    Size,
    in_turns,
    least,
    random_batches,
    whole_step,
)
from measure import format_error  # noqa: E402
from report import write_json  # noqa: E402

ROUNDS = 6
PEAK = 989e12  # bf16 FLOP/s of an H100 or H200, dense, by the data sheet
RATIO, MEMORY, DEMIX = 1.05, 0.10, 1.02

SIZES = (
    Size("125m", 32, 2, 0.35),
    Size("350m", 16, 4, 0.42),
    Size("1.3b", 8, 4, 0.47),
)


def measure_size(
    size: Size, device: torch.device, machine_speed: MachineSpeed, rounds: int, compiled: bool
) -> dict[str, object]:
    """Tokens per second of ours alone and plain; then compiled, in turns with the peer; memory.

    Ratio and MFU are those of the faster of the two.
    """
    job = Job(*size.flags)
    network, tokens = job.plan.network, size.tokens
    flops = network.flops_per_token
    before = _start_of_memory(device)
    engine = job.engine(device)
    batches = random_batches(network.config.vocab_size, size, device)
    plain = in_turns(engine, batches, {}, device, rounds)["ours"]
    used = _memory_since(before, device)
    config = network.config
    with device:
        peer = gpu_peer.Gpt(
            config.vocab_size, config.hidden_size, config.num_hidden_layers,
            config.num_attention_heads, size.length,
        )  # fmt: skip
    pairs = [(batch["input_ids"].to(device), batch["labels"].to(device)) for batch in batches]
    step = gpu_peer.stepping(peer, pairs, CLIP, compiled)
    if compiled:
        _compile(engine)
    result = in_turns(engine, batches, {"peer": step}, device, rounds)
    engine.destroy()
    best = min(plain, result["ours"])
    planned = job.plan.memory.peak
    return {
        "name": size.model,
        "parameters": network.total_parameters,
        "tokens_per_step": tokens,
        "plain_tokens_per_second": tokens / plain,
        "in_turns_tokens_per_second": tokens / result["ours"],
        "peer_tokens_per_second": tokens / result["peer"],
        "ratio": result["peer"] / best,
        "mfu": mfu(tokens / best, flops, PEAK),
        "peer_mfu": mfu(tokens / result["peer"], flops, PEAK),
        "of_gemm": mfu(tokens / best, flops, machine_speed.flops_per_second),
        "mfu_floor": size.floor,
        "planned_bytes": planned,
        "measured_bytes": used,
        "planned_over_measured": planned / used if used else None,
    }


def mfu(tokens_per_second: float, flops_per_token: float, peak: float) -> float:
    """Share of the peak that the operations of a model without recomputing take."""
    return tokens_per_second * flops_per_token / peak


def measure_demix(
    size: Size, device: torch.device, machine_speed: MachineSpeed, rounds: int, compiled: bool
) -> dict[str, object]:
    """A step with one expert against one of a dense model of the same shape."""
    from megamod.train.objectives import CausalLMObjective

    sides = {}
    for untie in ("none", "feedforward"):
        engine = Job(*size.flags, "--domains", "text", "--untie", untie).engine(device)
        if compiled:
            _compile(engine)
        objective = CausalLMObjective(("text",), device, selects_expert=untie != "none")
        batches = random_batches(engine.module.config.vocab_size, size, device)
        sides[untie] = whole_step(engine, objective, batches)
    took = least(sides, device, rounds)
    return {
        "name": "DEMix",
        "model": size.model,
        "tokens_per_second": size.tokens / took["feedforward"],
        "dense_tokens_per_second": size.tokens / took["none"],
        "time_over_dense": took["feedforward"] / took["none"],
    }


def measure_mux(
    size: Size, device: torch.device, machine_speed: MachineSpeed, rounds: int, compiled: bool
) -> dict[str, object]:
    """A step of masked-token pretraining of MUX-BERT, N = 5; `rows` are instances."""
    from megamod.train.encoder_objective import EncoderObjective, compute_masked_lm_losses

    instances = 5
    job = Job(*size.flags, "--objective", "masked_lm", "--num_instances", str(instances))
    engine, vocabulary = job.engine(device), job.plan.network.config.vocab_size
    losses = partial(compute_masked_lm_losses, device=device, multiplexed=True)
    objective = EncoderObjective(losses, ("masked", "positions"), "task_loss")
    batches = random_batches(vocabulary, size, device)
    for batch in batches:
        ids = batch["input_ids"]
        hidden = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.15
        batch["labels"] = torch.where(hidden, ids, -100)
        batch["retrieved_instances"] = torch.zeros(
            size.rows // instances, size.length, dtype=torch.int64
        )
        batch["masked"] = batch["positions"] = int(hidden.sum())
    sides = {"ours": whole_step(engine, objective, batches)}
    took = least(sides, device, rounds)["ours"]
    if compiled:
        _compile(engine)
        took = min(took, least(sides, device, rounds)["ours"])
    flops = job.plan.network.flops_per_token
    return {
        "name": f"MUX-BERT {size.model}, N = {instances}",
        "tokens_per_second": size.tokens / took,
        "flops_per_token": flops,
        "mfu": mfu(size.tokens / took, flops, PEAK),
        "of_gemm": mfu(size.tokens / took, flops, machine_speed.flops_per_second),
    }


MUX = Size("base", 320, 1, 0.0, length=128)
PARTS: dict[str, tuple[Callable[..., dict[str, object]], Size]] = {
    **{size.model: (measure_size, size) for size in SIZES},
    "mux": (measure_mux, MUX),
    "demix": (measure_demix, SIZES[0]),
}


def verdicts(record: Mapping[str, Mapping[str, object]], gpu: bool = True) -> list[Verdict]:
    """Of every part that was measured; without a GPU memory is not."""
    result = []
    for size in SIZES:
        row = record.get(size.model, {})
        if "mfu" not in row:
            continue
        result += [
            Verdict(f"training {size.model}", "MFU", row["mfu"], row["mfu_floor"]),
            Verdict(f"training {size.model}", "tokens/s over the peer's", row["ratio"], RATIO),
        ]
        ratio = row["planned_over_measured"]
        off = None if ratio is None else abs(ratio - 1)
        result.append(
            Verdict(f"training {size.model}", "planned memory is off by", off, MEMORY, False)
        )
    demix = record.get("demix", {}).get("time_over_dense")
    if demix is not None:
        result.append(Verdict("DEMix step", "time over a dense one", demix, DEMIX, False))
    return result


def missing() -> str | None:
    """Why nothing can be trained here."""
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        return f"training needs deepspeed: {format_error(error)}"
    return None


def measure(
    parts: Mapping[str, tuple[Callable[..., dict[str, object]], Size]],
    *,
    machine_speed: MachineSpeed,
    rounds: int,
    compiled: bool,
    seconds: float,
    into: Path | None = None,
) -> dict[str, object]:
    """Records by part; a part that fails says why, one that there is no time for is listed."""
    from megamod.dist.process import join_process_group

    deadline = time.monotonic() + seconds
    device = join_process_group(600)
    record: dict[str, object] = {"yard": machine_speed.make_record(), "parts": {}}
    record["not_measured"] = []
    for name, (part, size) in parts.items():
        if time.monotonic() > deadline:
            record["not_measured"].append(name)
            continue
        started = time.monotonic()
        try:
            record["parts"][name] = part(size, device, machine_speed, rounds, compiled)
        except Exception as error:
            record["parts"][name] = {"name": name, "failed": format_error(error)}
        _tidy(device)
        took = time.monotonic() - started
        print(f"{name} ({took:.0f} s): {_told(record['parts'][name])}", flush=True)
        if into:
            write_json(record, into)
    if into:
        write_json(record, into)
    return record


def _told(row: Mapping[str, object]) -> str:
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())


def _tidy(device: torch.device) -> None:
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _compile(engine) -> None:
    from megamod.train.compiled import compile_blocks

    compile_blocks(engine.module)


def _start_of_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _memory_since(before: int, device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated() - before if device.type == "cuda" else None


def main() -> int:
    """Measure, print, write; 1 if a floor was missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="steps that count, of each side")
    parser.add_argument("--minutes", type=float, default=10.0, help="begin no part later")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if (why := missing()) is not None:
        print(why)
        if args.json:
            write_json({"parts": {}, "not_measured": [], "skipped": why}, args.json)
        return 0
    torch._dynamo.config.recompile_limit = 64
    machine_speed = measure_machine_speed("cuda" if torch.cuda.is_available() else "cpu")
    print(format_machine_speed(machine_speed.make_record()), flush=True)
    record = measure(
        {name: PARTS[name] for name in args.part},
        machine_speed=machine_speed,
        rounds=args.rounds,
        compiled=True,
        seconds=60 * args.minutes,
        into=args.json,
    )
    if record["not_measured"]:
        print(f"not measured, no time left: {', '.join(record['not_measured'])}")
    result = verdicts(record["parts"])
    print("\n".join(map(str, result)))
    return int(any(verdict.met is False for verdict in result))


if __name__ == "__main__":
    sys.exit(main())
