"""Averaging models against a plain loop over state dicts, and the memory of both.

    python tests/bench/merge.py            four models of 40 million parameters
    python tests/bench/merge.py --large    eight of 125 million: 4 GB on disk

The loop loads every model, adds the weighted tensors, saves and syncs: the fewest lines that do it.
Ours reads by pieces, checks for NaN, syncs, and takes digests of all parents beside it.
Both sides run in turns, each in a process of its own, which does not count the time of imports.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

ROUNDS, REPEATS = 3, 3
SPEED = "averaging models: loop / ours"
MEMORY = "its memory / (output + 2 tensors)"
HEAD = """
import json, os, sys, threading, time
from pathlib import Path
import torch
folders, output = sys.argv[2:], Path(sys.argv[1])

def rss():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

peak, stop = 0, threading.Event()
def watch():
    global peak
    while not stop.wait(0.002):
        peak = max(peak, rss())
"""
TAIL = """
before = rss()
threading.Thread(target=watch, daemon=True).start()
started = time.perf_counter()
work()
seconds = time.perf_counter() - started
stop.set()
print(json.dumps([seconds, max(peak, rss()) - before]))
"""
OURS = """
from megamod.merging.merge import average_folders
def work():
    average_folders([(Path(f), None) for f in folders], [1.0] * len(folders), output)
"""
LOOP = """
from safetensors.torch import load_file, save_file
def work():
    states = [load_file(Path(f) / "model.safetensors") for f in folders]
    merged = {name: sum(s[name] / len(states) for s in states) for name in states[0]}
    output.mkdir()
    save_file(merged, output / "model.safetensors")
    descriptor = os.open(output / "model.safetensors", os.O_RDONLY)
    os.fsync(descriptor)
"""


def make_models(root: Path, count: int, layers: int, width: int, vocab: int) -> list[Path]:
    """Folders with random weights of a GPT's shapes."""
    folders = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        shapes = {"embeddings": (vocab, width)}
        for layer in range(layers):
            shapes |= {f"layers.{layer}.{p}_proj.weight": (width, width) for p in "qkvo"}
            shapes |= {f"layers.{layer}.fc1.weight": (4 * width, width)}
            shapes |= {f"layers.{layer}.fc2.weight": (width, 4 * width)}
        folder = root / f"model-{number}"
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "gpt"}')
        tensors = {k: torch.randn(s, generator=generator) for k, s in shapes.items()}
        save_file(tensors, folder / "model.safetensors")
        folders.append(folder)
    return folders


def once(program: str, output: Path, folders: list[Path]) -> tuple[float, int]:
    """Seconds and additional anonymous memory, in bytes, of one run."""
    command = [sys.executable, "-W", "ignore", "-c", HEAD + program + TAIL, output, *folders]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, check=True
    )
    shutil.rmtree(output)
    seconds, memory = json.loads(done.stdout.splitlines()[-1])
    return seconds, memory


def measure(large: bool = False, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Sorted ratios of the repeats: loop / ours in time, ours / (output + 2 tensors) in memory."""
    root = Path(tempfile.mkdtemp(dir=os.environ.get("BENCH_DIR", ".")))
    try:
        shape = (8, 12, 768, 50264) if large else (4, 6, 512, 32000)
        folders = make_models(root, *shape)
        size = (folders[0] / "model.safetensors").stat().st_size
        allowed = size + 2 * 4 * shape[2] * shape[3]
        speeds, memories = [], []
        once(OURS, root / "out", folders)  # reads everything into the page cache
        for _ in range(REPEATS):
            loop, ours = [], []
            for _ in range(rounds):
                loop.append(once(LOOP, root / "out", folders))
                ours.append(once(OURS, root / "out", folders))
            speeds.append(min(s for s, _ in loop) / min(s for s, _ in ours))
            memories.append(max(m for _, m in ours) / allowed)
            print(
                f"  loop {min(loop)[0]:.2f} s, {max(m for _, m in loop) / 1e6:.0f} MB; "
                f"ours {min(ours)[0]:.2f} s, {max(m for _, m in ours) / 1e6:.0f} MB"
            )
        return {
            SPEED: sorted(speeds),
            MEMORY: sorted(memories),
        }
    finally:
        shutil.rmtree(root)


def main() -> None:
    for name, ratios in measure("--large" in sys.argv).items():
        print(f"{name}: {ratios[1]:.3f} ({ratios[0]:.3f} to {ratios[2]:.3f})")


if __name__ == "__main__":
    main()
