"""Tokens per second of the training loader, as a multiple of a nanoGPT-style reader's.

    python tests/bench/loader.py

Both read the same files in one process on one thread, in turns; minima of the rounds are compared,
three times over. Ours includes the shuffled order, the domains and all else of a batch.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megamod.data.batches import BatchDivision
from megamod.data.corpus.indexed import IndexedDataset, IndexedWriter
from megamod.data.lm.batches import AHEAD, TrainBatches, iterate_train_batches
from megamod.data.lm.blocks import TokenBlocks
from megamod.data.lm.order import BalancedSampler

SHAPES = ((8, 128), (8, 1024), (32, 128), (32, 1024))
DOMAINS = 4
TOKENS = 2_000_000  # per domain
ITEM = 500
REPEATS, ROUNDS = 3, 10


def write_domains(folder: Path) -> list[Path]:
    """Domains of random tokens; returns their prefixes."""
    generator = np.random.default_rng(0)
    prefixes = [folder / f"domain{number}" for number in range(DOMAINS)]
    for prefix in prefixes:
        with IndexedWriter(prefix, np.uint16) as writer:
            for item in generator.integers(4, 50_000, (TOKENS // ITEM, ITEM), dtype=np.uint16):
                writer.add_item(item)
    return prefixes


def nanogpt_reader(path: Path, size: int, length: int) -> Callable[[], object]:
    """A function that returns a batch the way nanoGPT's `get_batch` does."""

    def get_batch() -> object:
        data = np.memmap(path, dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - length, (size,))
        inputs = [torch.from_numpy(data[i : i + length].astype(np.int64)) for i in starts]
        labels = [torch.from_numpy(data[i + 1 : i + 1 + length].astype(np.int64)) for i in starts]
        return torch.stack(inputs), torch.stack(labels)

    return get_batch


def our_reader(prefixes: list[Path], size: int, length: int) -> Callable[[], object]:
    """A function that returns the next batch of dense training on the domains."""
    blocks = [TokenBlocks(IndexedDataset(prefix), length, 2, 1) for prefix in prefixes]
    sampler = BalancedSampler([len(item) for item in blocks], seed=0)
    batches = TrainBatches.build_shared_stream(blocks, sampler, BatchDivision(size, size, 0, 1))
    loader = iterate_train_batches(batches, 0, 0, False)
    return lambda: next(loader)


def seconds(reader: Callable[[], object], batches: int) -> float:
    """Time of some batches."""
    start = time.perf_counter()
    for _ in range(batches):
        reader()
    return time.perf_counter() - start


def measure() -> dict[str, tuple[float, float, float]]:
    """(middle, lowest, highest) speed ratio of the repeats, by shape and number of domains."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    ratios = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            prefixes = write_domains(Path(folder))
            for size, length in SHAPES:
                for used in (prefixes[:1], prefixes):
                    theirs = nanogpt_reader(prefixes[0].with_suffix(".bin"), size, length)
                    ours = our_reader(used, size, length)
                    # Then every round of ours works out the order of one stretch of samples.
                    batches, result = AHEAD // size, []
                    for _ in range(REPEATS):
                        times = [
                            (seconds(ours, batches), seconds(theirs, batches))
                            for _ in range(ROUNDS)
                        ]
                        mine, other = map(min, zip(*times, strict=True))
                        result.append(other / mine)
                    low, middle, high = sorted(result)
                    ratios[f"B{size}-T{length}-domains{len(used)}"] = (middle, low, high)
    finally:
        torch.set_num_threads(before)
    return ratios


def seconds_to_resume(step: int = 1_000_000) -> list[float]:
    """Sorted times from nothing open to the first batch after `step` steps."""
    times = []
    with tempfile.TemporaryDirectory() as folder:
        prefixes = write_domains(Path(folder))
        for _ in range(REPEATS):
            start = time.perf_counter()
            blocks = [TokenBlocks(IndexedDataset(prefix), 1024, 2, 1) for prefix in prefixes]
            order = BalancedSampler([len(item) for item in blocks], seed=0)
            next(
                iterate_train_batches(
                    TrainBatches.build_shared_stream(blocks, order, BatchDivision(8, 64, 0, 1)),
                    step,
                    0,
                    False,
                )
            )
            times.append(time.perf_counter() - start)
    return sorted(times)


def main() -> None:
    """Print one line of ratios, and one of seconds."""
    shown = (f"{n} {m:.1f}x ({low:.1f}-{high:.1f})" for n, (m, low, high) in measure().items())
    print("loader tokens/s over a nanoGPT-style reader: " + ", ".join(shown))
    print(f"first batch at step 1,000,000: {seconds_to_resume()[1]:.3f} s")


if __name__ == "__main__":
    main()
