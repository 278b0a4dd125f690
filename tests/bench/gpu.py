"""Everything that needs a GPU, in less than eight minutes: `make bench-gpu`.

    python tests/bench/gpu.py
    python tests/bench/gpu.py --parts inference training
    python tests/bench/gpu.py --only_docs --output_dir runs/bench

First whether the kernels are right, and touch no memory but their own; then how fast they are, how
fast whole models answer, how fast they are trained. Wrong kernels are not timed. Every part is a
process of its own and writes to --output_dir as it goes; one that takes too long is ended and what
it has found by then counts. The tables go into docs/kernels.md and docs/results.md; --only_docs
writes these from an earlier run. The exit code is 1 if something failed or a floor was missed.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve()
REPOSITORY = HERE.parents[2]
sys.path[:0] = [str(HERE.parent), str(REPOSITORY / "kernels" / "bench")]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels")]

TOTAL = 460.0  # seconds
TOO_LONG = "took too long"


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        command: from the output folder and the seconds it has to the arguments of Python.
        limit: seconds after which it is ended.
        needed: what comes behind makes no sense if it fails. Being slow is no failure.
    """

    name: str
    command: Callable[[Path, float], list[str]]
    limit: float
    needed: bool = False


def tests_of_kernels(folder: Path, seconds: float) -> list[str]:
    """Side by side where pytest-xdist is there: most of the time is compiling."""
    command = ["-m", "pytest", "-q", "-m", "gpu", "tests/kernels", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(max(1, min(12, (os.cpu_count() or 1) * 3 // 4)))]
    return command


def memory_check(folder: Path, seconds: float) -> list[str]:
    """See `every_kernel.py`."""
    return ["kernels/bench/every_kernel.py", "--memcheck"]


def kernels(folder: Path, seconds: float) -> list[str]:
    """Begins nothing in the last 25 s: compiling once more may take that long."""
    return [
        *("kernels/bench/run.py", "--all", "--minutes", f"{max(0.0, seconds - 25) / 60:.2f}"),
        *("--json", str(folder / "kernels.json"), "--csv", str(folder / "kernels.csv")),
        *("--plot", str(folder / "kernels.png")),
    ]


def inference(folder: Path, seconds: float) -> list[str]:
    """See `gpu_inference.py`."""
    return ["tests/bench/gpu_inference.py", "--json", str(folder / "inference.json")]


def training(folder: Path, seconds: float) -> list[str]:
    """Begins no size in the last 40 s."""
    return [
        *("tests/bench/gpu_training.py", "--json", str(folder / "training.json")),
        *("--minutes", f"{max(0.0, seconds - 40) / 60:.2f}"),
    ]


PARTS = (
    Part("tests", tests_of_kernels, 130, needed=True),
    Part("memcheck", memory_check, 45),
    Part("kernels", kernels, 130),
    Part("inference", inference, 80),
    Part("training", training, 170),
)


def run(
    parts: Sequence[Part], folder: Path, total: float, python: str = sys.executable
) -> list[tuple[str, float, str]]:
    """Run one part after the other.

    Returns:
        name, seconds, and "ok" or what went wrong, of each.
    """
    ends, result, hopeless = time.monotonic() + total, [], False
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        seconds = min(part.limit, ends - time.monotonic())
        started = time.monotonic()
        if hopeless:
            said = "left out"
        elif seconds < 1:
            said = "no time left"
        else:
            print(f"--- {part.name}, at most {seconds:.0f} s", flush=True)
            said = _process([python, *part.command(folder, seconds)], seconds)
        result.append((part.name, time.monotonic() - started, said))
        hopeless |= part.needed and said not in ("ok", TOO_LONG)
    return result


def _process(command: Sequence[str], seconds: float) -> str:
    environment = dict(os.environ)
    for name in ("TRITON_INTERPRET", "DS_ACCELERATOR"):  # a GPU is what this is about
        environment.pop(name, None)
    paths = [str(REPOSITORY), str(REPOSITORY / "kernels"), environment.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    child = subprocess.Popen(command, cwd=REPOSITORY, env=environment, start_new_session=True)
    try:
        code = child.wait(seconds)
    except subprocess.TimeoutExpired:
        return TOO_LONG
    finally:
        _end(child)
    return "ok" if code == 0 else f"exit code {code}"


def _end(child: subprocess.Popen) -> None:
    """It and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def write_docs(folder: Path, docs: Path) -> list[str]:
    """Put what a folder holds into the documents; returns which were written."""
    import gpu_inference
    import gpu_report
    import gpu_training
    import report

    written, texts = [], []
    if (record := _read(folder / "kernels.json")) is not None:
        report.write_table_into_document(record, docs / "kernels.md")
        written.append("kernels.md")
    if (record := _read(folder / "inference.json")) is not None:
        texts.append(gpu_report.inference(record, gpu_inference.verdicts(record["inference"])))
    if (record := _read(folder / "training.json")) is not None:
        judged = [] if "skipped" in record else gpu_training.verdicts(record["parts"])
        texts.append(gpu_report.training(record, judged))
    if texts:
        gpu_report.write(texts, docs / "results.md")
        written.append("results.md")
    return written


def _read(path: Path) -> dict[str, object] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def main() -> int:
    """Run all parts, write documents, print how it went."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output_dir", type=Path, default=REPOSITORY / "runs" / "bench", help="JSON, CSV, plot")
    add("--docs", type=Path, default=REPOSITORY / "docs", help="folder of the documents")
    add("--no_docs", action="store_true", help="leave the documents as they are")
    add("--only_docs", action="store_true", help="run nothing, write the documents")
    add("--parts", nargs="+", choices=[part.name for part in PARTS], help="only these")
    add("--seconds", type=float, default=TOTAL, help="for everything (default: %(default)s)")
    args = parser.parse_args()
    folder, result = args.output_dir.resolve(), []
    if not args.only_docs:
        import torch

        if not torch.cuda.is_available():
            sys.exit(
                "bench-gpu: torch sees no CUDA device here. What needs none: make test, make bench"
            )
        parts = [part for part in PARTS if args.parts is None or part.name in args.parts]
        for part in parts:
            (folder / f"{part.name}.json").unlink(missing_ok=True)
        started = time.monotonic()
        result = run(parts, folder, args.seconds)
        print(f"--- all in {time.monotonic() - started:.0f} s", flush=True)
    if not args.no_docs:
        print(f"written: {', '.join(write_docs(folder, args.docs)) or 'nothing'}")
    for name, seconds, said in result:
        print(f"{name:12} {seconds:6.0f} s  {said}")
    return int(any(said != "ok" for _, _, said in result))


if __name__ == "__main__":
    from command import run_benchmark_main

    run_benchmark_main(main)
