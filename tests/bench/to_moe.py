"""Conversion of eight dense models to a mixture of experts: time against `cp`, and memory.

    python tests/bench/to_moe.py            eight models of 138 million parameters, float32
    python tests/bench/to_moe.py --small    four of 3 million

The models are Llamas with random weights. `cp` copies the files of all models; the conversion reads
them, writes as many bytes as the mixture has, and takes digests of all models. Both run in turns,
each in a process of its own, which does not count the time of imports.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from merge import once
from transformers import LlamaConfig, LlamaForCausalLM

ROUNDS = 3
OURS = """
from megamod.runs.to_moe import MoeArgs, run_to_moe
import megamod.merging.moe.convert, megamod.merging.moe.rows
def work():
    run_to_moe(MoeArgs(models=folders, output_dir=str(output), quiet=True))
"""
COPY = """
import shutil
def work():
    output.mkdir()
    for number, folder in enumerate(folders):
        shutil.copyfile(Path(folder) / "model.safetensors", output / str(number))
    for file in output.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
"""


def make_models(root: Path, small: bool) -> list[Path]:
    """Folders of Llamas with random weights."""
    shape = (
        dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, vocab_size=8000)
        if small
        else dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, vocab_size=32000)
    )
    config = LlamaConfig(**shape, num_attention_heads=4, tie_word_embeddings=True)
    folders = []
    for number in range(4 if small else 8):
        torch.manual_seed(number)
        folders.append(root / f"model-{number}")
        LlamaForCausalLM(config).save_pretrained(folders[-1])
    return folders


def main() -> None:
    root = Path(tempfile.mkdtemp(dir=os.environ.get("BENCH_DIR", ".")))
    try:
        folders = make_models(root, "--small" in sys.argv)
        size = sum((folder / "model.safetensors").stat().st_size for folder in folders)
        once(COPY, root / "out", folders)  # reads everything into the page cache
        runs = [
            (once(COPY, root / "out", folders), once(OURS, root / "out", folders))
            for _ in range(ROUNDS)
        ]
        copy, ours = zip(*runs, strict=True)
        print(f"{len(folders)} models, {size:,} bytes")
        print(f"cp: {min(copy)[0]:.1f} s ({', '.join(f'{s:.1f}' for s, _ in copy)})")
        print(f"ours: {min(ours)[0]:.1f} s ({', '.join(f'{s:.1f}' for s, _ in ours)})")
        print(f"anonymous memory, MB: {max(memory for _, memory in ours) / 1e6:.0f}")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
