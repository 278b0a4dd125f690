"""How fast the fused operations are, against plain torch and its compiler, in one run.

    python kernels/bench/run.py --list
    python kernels/bench/run.py --op rsa_demux --mode fwd_bwd --shape base-n5
    python kernels/bench/run.py --all --json runs/kernels.json --plot runs/kernels.png

All variants of a case take turns, a buffer larger than the caches is written between any two calls,
and the middle of many rounds counts. Beside each time stand the error against float64 and the share
of the floor: the time that the least possible bytes or operations take at the copy bandwidth and
the GEMM rate that the same run measured. SHAPE is SIZE-nN[-sLENGTH][-gGROUPS], such as
large-n10-s512: 32 groups of N instances of 128 tokens unless it says otherwise.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

SHAPES = ("base-n2", "base-n5", "base-n10", "base-n5-s512", "large-n5")
MODES = ("fwd", "bwd", "fwd_bwd")


def main() -> int:
    """Measure what was asked for, print a table, write files."""
    args = parse_arguments()
    from cases import CASES, parse_shape

    if args.list:
        for name, case in CASES.items():
            print(f"{name:16} {case.__doc__.splitlines()[0]}")
        print(f"modes   {' '.join(MODES)}\nshapes  {' '.join(SHAPES)} ...")
        return 0
    ops = list(CASES) if args.all else args.op
    shapes = list(SHAPES) if args.all and args.shape is None else args.shape or ["base-n5"]
    if unknown := [op for op in ops if op not in CASES]:
        sys.exit(f"--op {unknown[0]}: there are {', '.join(CASES)}")
    from measure import measure_case, yardsticks
    from report import plot, table, write_docs

    yard = yardsticks(args.device)
    rows = []
    for op in ops:
        for shape in shapes:
            case = CASES[op](parse_shape(shape), args.dtype, args.device)
            for mode in args.mode or ["fwd_bwd"]:
                found = measure_case(case, mode, yard, args.rounds, args.compile)
                rows += [
                    {"op": op, "shape": shape, "mode": mode, "dtype": args.dtype, **row}
                    for row in found
                ]
                print(table(rows[-len(found) :], header=len(rows) == len(found)), flush=True)
    record = {"device": yard.device, "copy_gb_s": yard.bytes_per_second / 1e9}
    record |= {"gemm_tflop_s": yard.flops_per_second / 1e12, "rows": rows}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(rows, args.plot)
    if args.docs:
        write_docs(record, args.docs)
    print(
        f"{yard.device}: copy {record['copy_gb_s']:.0f} GB/s, "
        f"GEMM {record['gemm_tflop_s']:.3g} TFLOP/s"
    )
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--list", action="store_true", help="print operations, modes and shapes")
    add("--op", nargs="+", metavar="OP", help="operations")
    add("--all", action="store_true", help="all operations, and all shapes unless --shape is given")
    add("--mode", nargs="+", choices=MODES, help="what is timed (default: fwd_bwd)")
    add("--shape", nargs="+", metavar="SHAPE", help="see above (default: base-n5)")
    add("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of tensors")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu times the torch code paths")
    add("--rounds", type=int, default=30, help="turns of each variant (default: 30)")
    add(
        "--compile",
        choices=("none", "default", "all"),
        default="all",
        help="compiled variants to compare with; all: max-autotune too (default: all)",
    )
    add("--json", type=Path, metavar="FILE", help="write everything")
    add("--csv", type=Path, metavar="FILE", help="write the rows")
    add("--plot", type=Path, metavar="FILE", help="draw times and shares of the floor")
    add("--docs", type=Path, metavar="FILE.md", help="put the table between the file's markers")
    args = parser.parse_args()
    if not (args.list or args.op or args.all):
        parser.error("name operations with --op, or give --all or --list")
    return args


if __name__ == "__main__":
    sys.exit(main())
