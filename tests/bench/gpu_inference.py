"""Rows per second of multiplexed inference on a GPU: MUX-BERT against stock BERT.

    python tests/bench/gpu_inference.py --json runs/bench/inference.json

Both sides answer the same rows of 128 tokens in bf16 with random weights, in turns, plain and with
their blocks compiled; the faster of the two counts on each side. Beside the ratio stands the
ceiling: by how much fewer operations ours needs per row, counted on models without storage.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parents[2] / "kernels" / "bench")]
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parents[2] / "kernels")]

from clock import Clock, compute_percentiles, format_machine_speed, measure_machine_speed  # noqa: E402
from floors import Verdict  # noqa: E402
from measure import format_error  # noqa: E402
from mux_throughput import COUNTS, KINDS, make_mux, make_stock  # noqa: E402
from report import write_json  # noqa: E402

LENGTH, ROWS, ROUNDS = 128, 1280, 10
STOCK = 1  # rows that share a pass of stock BERT
SHARE = 0.93  # of the ceiling, that is to be reached
BASE = "base"

Times = dict[tuple[str, int], dict[str, float]]


def flops_per_row(model: nn.Module, rows: int, length: int = LENGTH) -> float:
    """Operations of a forward pass per row, matrix products and attention.

    Args:
        model: on the meta device.
        rows: a multiple of the instances that share a pass.
    """
    ids = torch.zeros(rows, length, dtype=torch.int64, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    return counter.get_total_flops() / rows


def make(kind: str, shape: dict[str, int], instances: int) -> nn.Module:
    """Stock BERT for one instance, else a multiplexed one."""
    return make_stock(kind, shape) if instances == STOCK else make_mux(kind, shape, instances)


def compile_blocks(model: nn.Module) -> nn.Module:
    """Compile every block, and stock BERT's embeddings.

    Equal blocks share what is compiled for the first of them, so this takes seconds where the model
    in one piece would take the better part of a minute.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                block.compile(dynamic=False)
        elif name == "bert.embeddings":
            module.compile(dynamic=False)
    return model


def measure(
    shape: dict[str, int],
    *,
    device: str,
    kinds: Sequence[str] = KINDS,
    counts: Sequence[int] = COUNTS,
    rows: int = ROWS,
    rounds: int = ROUNDS,
    compiled: bool = True,
) -> list[dict[str, object]]:
    """A record for each kind and N: rows per second of both sides, ratio, ceiling, share of it."""
    torch.manual_seed(1)
    torch._dynamo.config.recompile_limit = 64  # a block is compiled for every number of groups
    result = []
    for kind in kinds:
        times = _seconds(kind, shape, counts, device, rows, rounds, compiled)
        with torch.device("meta"):
            metas = {n: make(kind, shape, n) for n in (STOCK, *counts)}
        flops = {n: flops_per_row(metas[n], 2 * n) for n in metas}
        for instances in counts:
            row = {"kind": kind, "num_instances": instances}
            row["ceiling"] = flops[STOCK] / flops[instances]
            row["failed"] = {
                f"N = {n}, {way}": said
                for n in (STOCK, instances)
                for way, said in times[n].items()
                if isinstance(said, str)
            }
            (stock, with_stock), (ours, with_ours) = _best(times[STOCK]), _best(times[instances])
            if stock and ours:
                row |= {"rows_per_second": rows / ours, "ours_is": with_ours}
                row |= {"stock_rows_per_second": rows / stock, "stock_is": with_stock}
                row["ratio"] = stock / ours
                row["share"] = row["ratio"] / row["ceiling"]
            result.append(row)
            print(line(row), flush=True)
    return result


def line(row: dict[str, object]) -> str:
    """One record as text."""
    if "ratio" not in row:
        return f"{row['kind']:8} N = {row['num_instances']:2}: failed, {row['failed']}"
    return (
        f"{row['kind']:8} N = {row['num_instances']:2}: {row['rows_per_second']:9.1f} rows/s "
        f"({row['ours_is']}), stock {row['stock_rows_per_second']:9.1f} ({row['stock_is']}): "
        f"{row['ratio']:.2f}x, ceiling {row['ceiling']:.2f}x, {row['share']:.3f} of it"
    )


def verdicts(result: Sequence[dict[str, object]]) -> list[Verdict]:
    """Return True if the share of the ceiling is enough; False too where nothing was measured."""
    return [
        Verdict(
            f"{row['kind']} classification, N = {row['num_instances']}",
            "share of the ceiling", row.get("share", 0.0), SHARE,
        )
        for row in result
    ]  # fmt: skip


def _seconds(
    kind: str,
    shape: dict[str, int],
    counts: Sequence[int],
    device: str,
    rows: int,
    rounds: int,
    compiled: bool,
) -> dict[int, dict[str, float | str]]:
    """By N and way: the middle of all rounds, or why there is none."""
    clock = Clock(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ids = torch.randint(1000, 30000, (rows, LENGTH), device=device)
    ids[:, 0] = 101
    result: dict[int, dict[str, float | str]] = {n: {} for n in (STOCK, *counts)}
    calls = {}
    with torch.inference_mode():
        for instances in result:
            for way in ("eager", "compiled")[: 1 + compiled]:
                try:
                    model = make(kind, shape, instances).to(device, dtype)
                    model = compile_blocks(model) if way == "compiled" else model
                    assert len(model(input_ids=ids).logits) == rows
                    model(input_ids=ids)
                    calls[instances, way] = lambda model=model: model(input_ids=ids)
                except Exception as error:
                    result[instances][way] = format_error(error)
        times: dict[tuple[int, str], list[float]] = {key: [] for key in calls}
        for _ in range(rounds):
            for key, call in calls.items():
                times[key].append(clock(call, 0.005))
    for (instances, way), took in times.items():
        result[instances][way] = compute_percentiles(took)[1]
    return result


def _best(ways: dict[str, float | str]) -> tuple[float, str]:
    """The faster way; 0 seconds if all failed."""
    timed = {name: seconds for name, seconds in ways.items() if isinstance(seconds, float)}
    name = min(timed, key=timed.__getitem__, default="")
    return timed.get(name, 0.0), name


def main() -> int:
    """Measure, print, write; 1 if the share of the ceiling is too small somewhere."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--n", type=int, nargs="+", default=COUNTS, help="instances of a group")
    parser.add_argument("--kind", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--rows", type=int, default=ROWS, help="of a batch")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if any(args.rows % n for n in args.n):
        parser.error(f"--rows {args.rows}: not a multiple of each of {args.n}")
    from megamod.models.presets import PRESETS

    machine_speed = measure_machine_speed(args.device).make_record()
    print(format_machine_speed(machine_speed), flush=True)
    result, arguments = [], {"device": args.device, "rows": args.rows, "rounds": args.rounds}
    for kind in args.kind:
        result += measure(PRESETS["mux_bert"][BASE], kinds=[kind], counts=args.n, **arguments)
        if args.json:
            write_json({"yard": machine_speed, "inference": result}, args.json)
    judged = verdicts(result)
    print("\n".join(map(str, judged)))
    return int(args.device == "cuda" and any(verdict.met is False for verdict in judged))


if __name__ == "__main__":
    sys.exit(main())
