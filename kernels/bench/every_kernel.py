"""Run every kernel once, forward and backward, at odd sizes, for a memory checker.

    python kernels/bench/every_kernel.py
    python kernels/bench/every_kernel.py --memcheck

With --memcheck it runs itself under `compute-sanitizer --tool memcheck`; without that tool it says
so and exits with 0.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

FAULT = 9  # exit code of the checker for a bad memory access


def main() -> int:
    """Run all kernels here, or under the checker; return 1 if a result is not finite."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--memcheck", action="store_true", help="under compute-sanitizer")
    args = parser.parse_args()
    if args.memcheck:
        return run_under_checker(args.device)
    from cases import CASES, Shape
    from torch.autograd import grad

    # The sizes of a test on a GPU, so that some of them have been compiled by then.
    shape = Shape(groups=3, instances=7, length=37, size=200, heads=2)
    for name, make in CASES.items():
        for dtype in ("bf16", "fp32"):
            case = make(shape, dtype, args.device)
            value = case.variants["ours"](**case.inputs)
            grads = grad(value.float().sum(), [case.inputs[n] for n in case.differentiable])
            finite = all(bool(tensor.isfinite().all()) for tensor in (value, *grads))
            print(f"{name} {dtype}: {'finite' if finite else 'NOT FINITE'}", flush=True)
            if not finite:
                return 1
    return 0


def run_under_checker(device: str) -> int:
    """Run this program under compute-sanitizer and return the exit code; 0 if that is missing.

    `device` is passed on as --device.
    """
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        print("compute-sanitizer is not on the PATH: memory accesses were not checked")
        return 0
    command = [checker, "--tool", "memcheck", "--error-exitcode", str(FAULT)]
    command += [sys.executable, __file__, "--device", device]
    # Every tensor an allocation of its own, so that reading past one is seen.
    return subprocess.run(
        command, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
