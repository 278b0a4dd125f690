"""Merging GPT-2-shaped models against mergekit, same recipe, same machine, in turns.

    python tests/bench/merge_peers.py --mergekit_python PATH              350 million, float32
    python tests/bench/merge_peers.py --mergekit_python PATH --sizes 125m 350m 1.3b

PATH is the interpreter of an environment of mergekit's own, `pip install mergekit==0.1.5`. Time is
that of the whole command, memory the largest RssAnon it had: what is in neither files nor caches.
Three models of random weights are made, in BENCH_DIR or the working directory: 4.3 GB at 350
million, 8 GB at 1.3 billion in bfloat16, and twice the result. Outputs are compared besides: how
many entries differ by more than 1e-6, or for DARE the fraction that is kept and its norm. With TIES
some do: of magnitudes that are equal to the last one kept, mergekit takes any, and ours the first.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from megamod.states.stream import (  # noqa: E402
    DENSE_FILE,
    ModelFolder,
    TensorSpec,
    iterate_pieces,
    write_streamed_tensors,
)

SIZES = {  # layers, width, dtype
    "125m": (12, 768, torch.float32),
    "350m": (24, 1024, torch.float32),
    "1.3b": (24, 2048, torch.bfloat16),
}
FLOORS = {  # of ours / mergekit: time, memory
    "linear": (0.5, 0.25),
    "slerp": (0.5, 0.25),
    "ties": (0.25, 0.25),
    "dare_ties": (0.25, 0.25),
}
SAME_MEMORY = 1.1  # the largest model's, over the smallest one's


def shapes(layers: int, width: int) -> dict[str, tuple[int, ...]]:
    """Tensors of GPT-2 of this size."""
    result = {"transformer.wte.weight": (50257, width), "transformer.wpe.weight": (1024, width)}
    for layer in range(layers):
        at = f"transformer.h.{layer}"
        for name, wide in (("attn.c_attn", 3), ("attn.c_proj", 1), ("mlp.c_fc", 4)):
            result[f"{at}.{name}.weight"] = (width, wide * width)
            result[f"{at}.{name}.bias"] = (wide * width,)
        result[f"{at}.mlp.c_proj.weight"], result[f"{at}.mlp.c_proj.bias"] = (
            (4 * width, width),
            (width,),
        )
        for norm in ("ln_1", "ln_2"):
            result |= {f"{at}.{norm}.weight": (width,), f"{at}.{norm}.bias": (width,)}
    return result | {"transformer.ln_f.weight": (width,), "transformer.ln_f.bias": (width,)}


def make_models(root: Path, size: str) -> list[Path]:
    """A base and two models near it, of random weights."""
    layers, width, dtype = SIZES[size]
    specs = {name: TensorSpec(dtype, shape) for name, shape in shapes(layers, width).items()}
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257}
    config |= {"n_layer": layers, "n_embd": width, "n_head": width // 64, "n_positions": 1024}
    folders = []
    for number in range(3):
        folder = root / f"{size}-{number}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        write_streamed_tensors(
            folder, {DENSE_FILE: list(specs)}, specs, partial(_random, specs, number)
        )
        folders.append(folder)
    return folders


def _random(specs: dict[str, TensorSpec], number: int, name: str) -> Iterator[torch.Tensor]:
    """The same for all models, and besides the base a tenth of something of their own."""
    common, own_values = (
        torch.Generator().manual_seed(zlib.crc32(f"{name} {n}".encode())) for n in (0, number)
    )
    for start, stop in iterate_pieces(specs[name].numel):
        values = torch.randn(stop - start, generator=common) / 50
        if number:
            values += torch.randn(stop - start, generator=own_values) / 500
        yield values.to(specs[name].dtype)


def write_recipe(path: Path, method: str, folders: list[Path]) -> Path:
    """A recipe that both programs read."""
    base, *others = map(str, folders)
    recipe: dict[str, object] = {"merge_method": method, "dtype": "float32"}
    if method == "slerp":
        recipe |= {"base_model": base, "parameters": {"t": [0.2, 0.7]}}
        recipe["models"] = [{"model": base}, {"model": others[0]}]
    else:
        settings = {"weight": 0.6} if method == "linear" else {"weight": 0.6, "density": 0.5}
        recipe["models"] = [{"model": model, "parameters": settings} for model in others]
        recipe |= {} if method == "linear" else {"base_model": base}
    recipe["out_dtype"] = "bfloat16" if "1.3b" in base else "float32"
    path.write_text(yaml.safe_dump(recipe))
    return path


def run(command: list[str]) -> tuple[float, float]:
    """Seconds, and the most anonymous memory in MB, of one command."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    started, most = time.perf_counter(), 0
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                break
            most = max([most, *(int(x.split()[1]) for x in status.splitlines() if "RssAnon" in x)])
            time.sleep(0.005)
        process.wait()
        seconds = time.perf_counter() - started
        if process.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{log.read().decode()[-3000:]}")
    return seconds, most * 1024 / 1e6


def differences(method: str, base: Path, ours: Path, theirs: Path) -> str:
    """Describe the difference of the two results."""
    far, count, sums = 0, 0, torch.zeros(4, dtype=torch.float64)
    with ModelFolder(base) as start, ModelFolder(ours) as first, ModelFolder(theirs) as other:
        for name, spec in first.tensors.items():
            a, b, anchor = (folder.read(name).float() for folder in (first, other, start))
            rounding = a.abs() / 100 if spec.dtype is torch.bfloat16 else 0
            far += int(((a - b).abs() > 1e-6 + rounding).sum())
            count += spec.numel
            if method == "dare_ties" and len(spec.shape) == 2:
                taus = (a - anchor, b - anchor)
                sums += torch.tensor([f(t) for t in taus for f in (_kept, _norm)]).double()
    if method != "dare_ties":
        return f"{far} of {count:,} entries differ"
    return f"kept {sums[0] / sums[2]:.4f}, norm {sums[1] / sums[3]:.4f} of mergekit's"


def _kept(tau: torch.Tensor) -> float:
    return float((tau.abs() > 1e-7).sum())


def _norm(tau: torch.Tensor) -> float:
    return float(tau.abs().sum())


def measure(mergekit: Path, size: str, methods: list[str], rounds: int) -> tuple[float, bool]:
    """Prints a table. Gives our most memory in MB, and whether every floor was reached."""
    root = Path(tempfile.mkdtemp(dir=os.environ.get("BENCH_DIR", ".")))
    most, reached = 0.0, True
    try:
        folders = make_models(root, size)
        for method in methods:
            recipe = write_recipe(root / f"{method}.yml", method, folders)
            launcher = str(REPOSITORY / "launchers" / "merge.py")
            outputs = [root / "ours", root / "theirs"]
            commands = [
                [sys.executable, launcher, str(recipe), "--output_dir", str(outputs[0])],
                [str(mergekit.with_name("mergekit-yaml")), str(recipe), str(outputs[1]), "--quiet"],
            ]
            results: list[list[tuple[float, float]]] = [[], []]
            for _ in range(rounds):
                for command, output, result in zip(commands, outputs, results, strict=True):
                    shutil.rmtree(output, ignore_errors=True)
                    result.append(run(command))
            message = differences(method, folders[0], *outputs)
            (time_ours, memory_ours), (time_theirs, memory_theirs) = (
                (min(seconds for seconds, _ in result), max(memory for _, memory in result))
                for result in results
            )
            most = max(most, memory_ours)
            times, memories = time_ours / time_theirs, memory_ours / memory_theirs
            ok = times <= FLOORS[method][0] and memories <= FLOORS[method][1]
            reached &= ok or size != "350m"
            print(
                f"{size} {method:10} {time_ours:6.1f} s / {time_theirs:6.1f} s = {times:.3f}   "
                f"{memory_ours:6.0f} MB / {memory_theirs:6.0f} MB = {memories:.3f}   {message}"
                f"{'' if ok else '   above the floor'}",
                flush=True,
            )
    finally:
        shutil.rmtree(root)
    return most, reached


def main() -> int:
    """Measure, and tell whether every floor was reached."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mergekit_python", type=Path, help="interpreter beside mergekit-yaml")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["350m"])
    parser.add_argument("--methods", nargs="+", choices=FLOORS, default=list(FLOORS))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.mergekit_python is None or not args.mergekit_python.with_name("mergekit-yaml").exists():
        print("skipped: give --mergekit_python, an interpreter with mergekit-yaml beside it")
        return 0
    result = {
        size: measure(args.mergekit_python, size, args.methods, args.rounds) for size in args.sizes
    }
    reached = all(ok for _, ok in result.values())
    if "125m" in result and "1.3b" in result:
        growth = result["1.3b"][0] / result["125m"][0]
        print(f"our memory at 1.3b / at 125m: {growth:.3f}, floor <= {SAME_MEMORY}")
        reached &= growth <= SAME_MEMORY
    return int(not reached)


if __name__ == "__main__":
    sys.exit(main())
