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

import torch
from merge_peers import REPOSITORY, run
from to_moe import make_models
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from megamod.states.stream import ModelFolder

FUSED = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
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


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer of two words, which mergekit-moe reads whatever the rows are made from."""
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def count_different_experts(ours: Path, theirs: Path) -> int:
    """Count parts of experts that are not the same bits in both results.

    mergekit has all experts of a layer in one tensor, rows of gate before those of up projections.
    """
    count = 0
    with ModelFolder(ours) as first, ModelFolder(theirs) as other:
        for name in other.tensors:
            layer, sign, part = name.partition(".mlp.experts.")
            for number, expert in enumerate(other.read(name) if sign else ()):
                block = f"{layer}.block_sparse_moe.experts.{number}"
                parts = [first.read(f"{block}.{name}.weight") for name in FUSED[part]]
                count += not torch.equal(torch.cat(parts), expert)
    return count


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
        for folder in folders:
            save_tokenizer(folder)
        outputs = [root / "ours", root / "theirs"]
        recipe = write_recipe(root / "recipe.yml", folders)
        launcher = str(REPOSITORY / "launchers" / "to_moe.py")
        sources = [str(folder) for folder in folders]
        program = str(args.mergekit_python.with_name("mergekit-moe"))
        commands = [
            [sys.executable, launcher, "--models", *sources, "--output_dir", str(outputs[0])],
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
            f"{count_different_experts(*outputs)} parts of experts differ"
        )
        return int(any(ratios[name] > floor for name, floor in FLOORS.items()))
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    sys.exit(main())
