"""Conversion of eight dense models to a mixture against mergekit-moe, same input, in turns.

    python tests/bench/moe_peers.py --mergekit_python PATH            eight models of 138 million
    python tests/bench/moe_peers.py --mergekit_python PATH --small    four of 3 million

PATH is the interpreter of an environment of mergekit's own, `pip install mergekit==0.1.5`. Both are
whole commands, imports included, with random router rows. mergekit takes the weights outside of
feed-forwards from the first model, ours averages them over all.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from merge_peers import REPOSITORY, run
from safetensors.torch import load_file
from to_moe import make_models

FLOORS = {"time": 0.5, "memory": 0.25}


def write_recipe(path: Path, folders: list[Path]) -> Path:
    """Write the recipe of mergekit-moe."""
    recipe = {
        "base_model": str(folders[0]),
        "architecture": "mixtral",
        "gate_mode": "random",
        "dtype": "float32",
        "experts": [
            {"source_model": str(folder), "positive_prompts": ["unused"]} for folder in folders
        ],
    }
    path.write_text(json.dumps(recipe))
    return path


def count_different_experts(ours: Path, theirs: Path) -> int:
    """Count expert tensors that are not the same bits in both results."""
    states = [
        {
            name: tensor
            for file in folder.glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        for folder in (ours, theirs)
    ]
    names = [name for name in states[0] if ".experts." in name]
    return sum(not bool((states[0][name] == states[1][name]).all()) for name in names)


def main() -> int:
    """Measure, and tell whether both floors were reached."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mergekit_python", type=Path, help="interpreter beside mergekit-moe")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.mergekit_python is None or not args.mergekit_python.with_name("mergekit-moe").exists():
        print("skipped: give --mergekit_python, an interpreter with mergekit-moe beside it")
        return 0
    root = Path(tempfile.mkdtemp(dir=os.environ.get("BENCH_DIR", ".")))
    try:
        folders = make_models(root, args.small)
        outputs = [root / "ours", root / "theirs"]
        recipe = write_recipe(root / "recipe.yml", folders)
        launcher = str(REPOSITORY / "launchers" / "to_moe.py")
        models = [str(folder) for folder in folders]
        program = str(args.mergekit_python.with_name("mergekit-moe"))
        commands = [
            [sys.executable, launcher, "--models", *models, "--output_dir", str(outputs[0])],
            [program, str(recipe), str(outputs[1]), "--no-copy-tokenizer", "--quiet"],
        ]
        results: list[list[tuple[float, float]]] = [[], []]
        for _ in range(args.rounds):
            for command, output, result in zip(commands, outputs, results, strict=True):
                shutil.rmtree(output, ignore_errors=True)
                result.append(run(command))
        (time, memory), (their_time, their_memory) = (
            (min(seconds for seconds, _ in result), max(used for _, used in result))
            for result in results
        )
        ratios = {"time": time / their_time, "memory": memory / their_memory}
        print(
            f"{len(folders)} models: {time:.1f} s / {their_time:.1f} s = {ratios['time']:.3f}   "
            f"{memory:.0f} MB / {their_memory:.0f} MB = {ratios['memory']:.3f}   "
            f"{count_different_experts(*outputs)} expert tensors differ"
        )
        return int(any(ratios[name] > floor for name, floor in FLOORS.items()))
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    sys.exit(main())
