"""Time the fused operations against plain torch and its compiler, in one run.

    python kernels/bench/run.py --list
    python kernels/bench/run.py --op rsa_demux --mode fwd_bwd --shape base-n5
    python kernels/bench/run.py --all --minutes 3 --json runs/kernels.json --plot runs/kernels.png

All variants of a case take turns, a buffer larger than the caches is written between two calls,
and the median of all rounds counts. Each time comes with the errors against float64, of the
value and the worst of all gradients, and the share of the floor: the time that the least possible
bytes or operations take at the copy bandwidth and the GEMM rate that the same run measured. SHAPE
is SIZE-nN[-sLENGTH][-gGROUPS], such as large-n10-s512: 32 groups of N instances of 128 tokens
unless it says otherwise.

With --all the most important cases come first, and the whole ends after --minutes; what there was
no time for is listed. On a GPU the speeds that must be reached are judged, and the exit code is 1
if one is missed; 2 is a mistake in the command.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from command import run_benchmark_main  # noqa: E402
from floors import MODES  # noqa: E402


def main() -> int:
    """Measure the requested operations, print a table and write files; return 1 for a missed floor.

    Raises:
        SystemExit: with a message, for a mistake in the command.
    """
    args = parse_arguments()
    if args.docs and args.from_json:
        return write_json_table_into_document(args.from_json, args.docs)
    from cases import CASES, parse_shape
    from schedule import SHAPES, Request, list_all_requests

    if args.list:
        for name, case in CASES.items():
            print(f"{name:16} {case.__doc__.splitlines()[0]}")
        print(f"modes   {' '.join(MODES)}\nshapes  {' '.join(SHAPES)} ...")
        return 0
    ops = list(CASES) if args.all else args.op
    if unknown := [op for op in ops if op not in CASES]:
        sys.exit(f"--op {unknown[0]}: there are {', '.join(CASES)}")
    requests = list_all_requests(ops)
    if not args.all or args.shape or args.mode:
        modes, shapes = tuple(args.mode or ["fwd_bwd"]), args.shape or ["base-n5"]
        requests = [Request(op, shape, modes, tuned=True) for op in ops for shape in shapes]
    for request in requests:
        parse_shape(request.shape)
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA device; --device cpu times the code for processors")
    record = measure_requests(args, requests)
    from report import list_verdicts, plot_times, write_csv, write_table_into_document

    if args.csv:
        write_csv(record["rows"], args.csv)
    if args.plot:
        plot_times(record["rows"], args.plot)
    if args.docs:
        write_table_into_document(record, args.docs)
    if record["not_measured"]:
        print(f"not measured, no time left: {', '.join(record['not_measured'])}")
    from clock import format_machine_speed

    print(format_machine_speed(record["yard"]))
    if args.device != "cuda":
        return 0
    result = list_verdicts(record)
    print("\n".join(map(str, result)))
    return int(any(verdict.met is False for verdict in result))


def measure_requests(args: argparse.Namespace, requests: list) -> dict[str, object]:
    """Measure all requests and return the record, which is written to --json after every request.

    Args:
        args: result of `parse_arguments`.
        requests: of class `schedule.Request`, the most important first.
    Returns:
        "yard", the speed of the machine; "overhead" of a launch; "rows", a row per variant and
        mode; "not_measured", requests that there was no time for.
    """
    from clock import format_machine_speed, measure_machine_speed
    from overhead import measure_launch_overhead
    from report import format_table, write_json
    from schedule import measure_all, replace_cases

    machine_speed = measure_machine_speed(args.device)
    print(format_machine_speed(machine_speed.make_record()), flush=True)
    rows, left = [], []
    record: dict[str, object] = {"yard": machine_speed.make_record(), "not_measured": left}
    record |= {"overhead": measure_launch_overhead(args.device), "rows": rows}
    for request, result in measure_all(
        requests,
        device=args.device,
        dtype=args.dtype,
        rounds=args.rounds,
        compiled=args.compile or ("floors" if args.all else "all"),
        machine_speed=machine_speed,
        seconds=60 * args.minutes if args.minutes is not None else float("inf"),
    ):
        if result is None:
            left.append(str(request))
            continue
        print(format_table(result, header=not rows), flush=True)
        rows[:] = replace_cases(rows, result)
        if args.json:
            write_json(record, args.json)
    if args.json:
        write_json(record, args.json)
    return record


def write_json_table_into_document(source: Path, document: Path) -> int:
    """Write the table of `source`, a --json file of an earlier run, into a document; return 0."""
    from report import write_table_into_document

    write_table_into_document(json.loads(source.read_text(encoding="utf-8")), document)
    return 0


def parse_arguments() -> argparse.Namespace:
    """Parse the command line of this program; exit with 2 for a mistake in it."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--list", action="store_true", help="print operations, modes and shapes")
    add("--op", nargs="+", metavar="OP", help="operations")
    add("--all", action="store_true", help="all operations and shapes, the most important first")
    add("--mode", nargs="+", choices=MODES, help="what is timed (default: fwd_bwd)")
    add("--shape", nargs="+", metavar="SHAPE", help="see above (default: base-n5)")
    add("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of tensors")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu times the torch code paths")
    add("--rounds", type=int, default=30, help="turns of each variant (default: 30)")
    add("--minutes", type=float, metavar="M", help="begin nothing later (default: no limit)")
    add(
        "--compile",
        choices=("none", "default", "floors", "all"),
        help="compiled variants to compare with; all: max-autotune too; floors: that only where it "
        "matters most (default: floors with --all, else all)",
    )
    add("--json", type=Path, metavar="FILE", help="write everything, after every case")
    add("--csv", type=Path, metavar="FILE", help="write the rows")
    add("--plot", type=Path, metavar="FILE", help="draw times and shares of the floor")
    add("--docs", type=Path, metavar="FILE.md", help="put the table between the file's markers")
    add("--from_json", type=Path, metavar="FILE", help="with --docs: of a run that --json wrote")
    args = parser.parse_args()
    if not (args.list or args.op or args.all or (args.docs and args.from_json)):
        parser.error("name operations with --op, or give --all or --list")
    return args


if __name__ == "__main__":
    run_benchmark_main(main)
