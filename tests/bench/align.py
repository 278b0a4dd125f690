"""Time of aligning two models of BERT-base size, against the least it can be.

    python tests/bench/align.py [--rows 200] [--rounds 1]
    python tests/bench/align.py --method orthogonal [--rows 200] [--model gpt2]

The least is the two models' forward passes over the rows, the products of their features, and the
assignments, each by itself. Processor time of one thread; everything is permuted (feed-forward,
attention by heads, residual stream). With --method orthogonal the time and the peak memory of
orthogonal maps in closed form, with the descent on weights after it, against those of permutations
on the same rows.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import torch

LENGTH, BATCH, LAYERS, WIDTH, INNER = 128, 8, 12, 768, 3072
LIMIT = 1.3
TIME = "orthogonal maps / permutations, time"
MEMORY = "orthogonal maps, memory / models and sums"


def timed(call: Callable[[], object]) -> float:
    """Seconds of processor time that a call takes."""
    started = time.process_time()
    call()
    return time.process_time() - started


def products(batches: int) -> float:
    """Seconds of the correlation products alone: one of each group and batch."""
    sizes = {INNER: LAYERS, WIDTH: LAYERS + 2}  # and the residual stream, and the head
    features = {size: torch.randn(2, BATCH * LENGTH, size) for size in sizes}

    def all_of_them() -> None:
        for size, count in sizes.items():
            first, second = features[size]
            for _ in range(count * batches):
                first.T @ second

    return timed(all_of_them)


def read_resident_bytes() -> int:
    """Resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def align_once(options: argparse.Namespace) -> None:
    """Print processor seconds and bytes of one alignment in this process: of its peak above that
    of the imports, and of what it cannot do without, the two models and the sums of statistics.
    """
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

    import megamod.merging.alignment.measure as measure
    from megamod.merging.alignment.align import align_models
    from megamod.merging.alignment.calibration import iterate_whole_batches
    from megamod.merging.alignment.options import AlignmentOptions

    torch.set_num_threads(1)
    torch.manual_seed(0)
    imports = read_resident_bytes()
    kind, config = {
        "bert": (BertForMaskedLM, BertConfig(num_hidden_layers=options.layers)),
        "gpt2": (GPT2LMHeadModel, GPT2Config(n_layer=options.layers)),
    }[options.model]
    models = [kind(config).eval() for _ in range(2)]
    needed = sum(p.nbytes for model in models for p in model.parameters())
    original = measure.CrossCovariance

    def count_sums(size: int, *arguments: object) -> object:
        """Make the sums of a group, and add their bytes to those needed."""
        nonlocal needed
        needed += 8 * size * (size + 4)
        return original(size, *arguments)

    measure.CrossCovariance = count_sums
    rows = torch.randint(1000, 30000, (options.rows, LENGTH)).tolist()
    batches = list(iterate_whole_batches(rows, options.batch_size))
    seconds = timed(lambda: align_models(*models, batches, AlignmentOptions(method=options.method)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{seconds:.1f} {peak - imports} {needed}")


def compare_methods(
    model: str, layers: int, rows: int, rounds: int, batch_size: int = BATCH
) -> dict[str, list[float]]:
    """Align by permutations and by orthogonal maps in turns, each in a process of its own.

    Prints a line for each round.

    Args:
        model: "bert" or "gpt2".
        rows: of 128 tokens each; `batch_size` of them in a forward pass.
    Returns:
        sorted ratios by row of the table of `make bench`.
    """
    ratios: dict[str, list[float]] = {TIME: [], MEMORY: []}
    for _ in range(rounds):
        measured = {}
        for method in ("activation", "orthogonal"):
            command = [sys.executable, __file__, "--alone", "--method", method, "--model", model]
            command += ["--rows", str(rows), "--layers", str(layers)]
            command += ["--batch_size", str(batch_size)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            measured[method] = [float(word) for word in output.split()[-3:]]
        (before, peak_before, _), (now, peak_now, needed) = measured.values()
        ratios[TIME].append(now / before)
        ratios[MEMORY].append(peak_now / needed)
        print(
            f"{model}, {layers} layers, {rows} rows, {batch_size} a pass: permutations "
            f"{before:.1f} s, {peak_before / 1e9:.2f} GB; orthogonal maps {now:.1f} s, "
            f"{peak_now / 1e9:.2f} GB: {now / before:.2f} of the time, "
            f"{peak_now / peak_before:.2f} of the memory, {peak_now / needed:.2f} of that of "
            "models and sums",
            flush=True,
        )
    return {row: sorted(values) for row, values in ratios.items()}


def measure() -> dict[str, list[float]]:
    """Ratios of a pair of GPT-2 size for `make bench`, of one round three times."""
    ratios = compare_methods("gpt2", LAYERS, rows=200, rounds=1)
    return {row: 3 * values for row, values in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200, help="of 128 tokens each")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--method", choices=("activation", "orthogonal"), default="activation")
    parser.add_argument("--model", choices=("bert", "gpt2"), default="bert")
    parser.add_argument("--layers", type=int, default=LAYERS, help="with --method orthogonal")
    parser.add_argument("--batch_size", type=int, default=BATCH, help="with --method orthogonal")
    parser.add_argument("--alone", action="store_true", help="align once and print what it took")
    options = parser.parse_args()
    if options.alone:
        align_once(options)
        return
    if options.method == "orthogonal":
        shape = (options.model, options.layers, options.rows)
        compare_methods(*shape, options.rounds, options.batch_size)
        return

    from transformers import BertConfig, BertForMaskedLM

    import megamod.merging.alignment.matching as matching
    from megamod.merging.alignment.align import align_models
    from megamod.merging.alignment.calibration import iterate_whole_batches
    from megamod.merging.alignment.options import AlignmentOptions, Calibration

    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = [BertForMaskedLM(BertConfig()).eval() for _ in range(2)]
    rows = torch.randint(1000, 30000, (options.rows, LENGTH)).tolist()
    batches = list(iterate_whole_batches(rows, BATCH))
    groups = AlignmentOptions(
        groups=("ff", "attn", "res"), calibration=Calibration(special_tokens=True)
    )

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                for model in models:
                    model(input_ids=batch.input_ids, attention_mask=batch.mask)

    spent = [0.0]
    original = matching.linear_sum_assignment

    @wraps(original)
    def assignment(*arguments, **named):
        started = time.process_time()
        result = original(*arguments, **named)
        spent[0] += time.process_time() - started
        return result

    matching.linear_sum_assignment = assignment
    for _ in range(options.rounds):
        spent[0] = 0.0
        passes, multiplied = timed(forward), products(len(batches))
        whole = timed(lambda: align_models(*models, batches, groups))
        ratio = whole / (passes + multiplied + spent[0])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(
            f"forward passes {passes:.1f} s, products {multiplied:.1f} s, assignments "
            f"{spent[0]:.1f} s; align {whole:.1f} s: {ratio:.3f} (limit {LIMIT}); {peak:.2f} GB",
            flush=True,
        )


if __name__ == "__main__":
    main()
