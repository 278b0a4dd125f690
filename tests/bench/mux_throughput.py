"""Instances per second of multiplexed inference: MUX-BERT against stock BERT.

    python tests/bench/mux_throughput.py --size base --n 2 5 10 --kind sequence token --json FILE

Both sides answer the same rows of 128 tokens with random weights, in turns, in one process and on
one thread. What is compared is the thread's processor time, which on an idle machine is the time
that passes and on a busy one does not count others' work: minima of the rounds, three times over.

On some processors our linear layers call a faster library than those of torch. So the ratio to
stock BERT with these layers is told too; there the count of operations allows tokens a ratio of
1.94, 4.65 and 8.7 at most.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

KINDS = ("sequence", "token")
COUNTS = (2, 5, 10)
FLOORS = {  # instances per second, times those of stock BERT
    ("sequence", 2): 2.1,
    ("sequence", 5): 5.0,
    ("sequence", 10): 9.5,
    ("token", 2): 2.0,
    ("token", 5): 4.6,
    ("token", 10): 8.3,
}
ROUNDS, REPEATS = 3, 3
STOCK, ALIKE = 0, -1  # in place of N
ROWS, LENGTH, LABELS = 20, 128, 9


def row_name(kind: str, instances: int) -> str:
    """The name of the ratio in the table of all benchmarks."""
    return f"mux {kind} instances/s, N = {instances} / stock"


def make_stock(kind: str, shape: dict[str, int]) -> nn.Module:
    """The classifier of transformers that is the baseline."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        BertForTokenClassification,
    )

    config = BertConfig(**shape, num_labels=LABELS, attn_implementation="sdpa")
    if kind == "token":
        return BertForTokenClassification(config).eval()
    return BertForSequenceClassification(config).eval()


def make_mux(kind: str, shape: dict[str, int], instances: int) -> nn.Module:
    """A multiplexed one of the same size, as published: Hadamard keys, RSA, L = 3."""
    from megamod.models.mux.bert import (
        MuxBertForSequenceClassification,
        MuxBertForTokenClassification,
    )
    from megamod.models.mux.configuration import MuxBertConfig

    config = MuxBertConfig(**shape, num_labels=LABELS, num_instances=instances)
    if kind == "token":
        return MuxBertForTokenClassification(config).eval()
    return MuxBertForSequenceClassification(config).eval()


def with_our_layers(model: nn.Module) -> nn.Module:
    """A model whose linear layers are those of the multiplexed ones."""
    from megamod.nn.linear import Linear

    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    return model


def measure(
    size: str = "base",
    counts: Sequence[int] = COUNTS,
    kinds: Sequence[str] = KINDS,
    rounds: int = ROUNDS,
) -> dict[str, list[float]]:
    """Sorted ratios of the repeats: the middle one is the result, the others its spread."""
    return {
        row_name(kind, instances): sorted(stock / ours for ours, stock, _ in times)
        for kind in kinds
        for instances, times in _seconds(size, counts, kind, rounds).items()
    }


def _seconds(
    size: str, counts: Sequence[int], kind: str, rounds: int
) -> dict[int, list[tuple[float, float, float]]]:
    """By N and repeat: seconds for ROWS rows of ours, of stock BERT, of that with our layers."""
    from megamod.models.presets import PRESETS

    torch.set_num_threads(1)
    torch.manual_seed(1)
    shape = PRESETS["mux_bert"][size]
    ids = torch.randint(1000, 30000, (ROWS, LENGTH))
    ids[:, 0] = 101
    fields = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    models = {STOCK: make_stock(kind, shape), ALIKE: with_our_layers(make_stock(kind, shape))}
    models |= {instances: make_mux(kind, shape, instances) for instances in counts}
    result: dict[int, list[tuple[float, float, float]]] = {instances: [] for instances in counts}
    with torch.inference_mode():
        for model in models.values():
            assert len(model(**fields).logits) == ROWS
        for _ in range(REPEATS):
            least = dict.fromkeys(models, float("inf"))
            for _ in range(rounds):
                for instances, model in models.items():
                    seconds = _timed(lambda model=model: model(**fields))
                    least[instances] = min(least[instances], seconds)
            for instances in counts:
                result[instances].append((least[instances], least[STOCK], least[ALIKE]))
    return result


def _timed(work: Callable[[], object]) -> float:
    started = time.thread_time()
    work()
    return time.thread_time() - started


def main() -> None:
    """Measure what the flags ask for, and print it beside the floors."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="base", help="small, base, large")
    parser.add_argument("--n", type=int, nargs="+", default=COUNTS, help="instances of a group")
    parser.add_argument("--kind", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of which the least counts")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    args = parser.parse_args()
    for instances in args.n:
        if instances < 1 or ROWS % instances:
            parser.error(f"--n {instances}: not a divisor of {ROWS}, the rows of a batch")
    record = []
    for kind in args.kind:
        for instances, times in _seconds(args.size, args.n, kind, args.rounds).items():
            ratios = sorted(stock / ours for ours, stock, _ in times)
            alike = sorted(same / ours for ours, _, same in times)
            ours, stock, same = (min(item) for item in zip(*times, strict=True))
            floor = FLOORS.get((kind, instances)) if args.size == "base" else None
            record.append(
                {
                    "kind": kind,
                    "size": args.size,
                    "num_instances": instances,
                    "ratios": ratios,
                    "instances_per_second": ROWS / ours,
                    "stock_instances_per_second": ROWS / stock,
                    "ratios_to_stock_with_our_layers": alike,
                    "stock_with_our_layers_instances_per_second": ROWS / same,
                    "floor": floor,
                }
            )
            print(
                f"{row_name(kind, instances):44} {ratios[1]:6.3f}  ({ratios[0]:.3f} to "
                f"{ratios[-1]:.3f})  {ROWS / ours:6.2f} against {ROWS / stock:.2f} per second"
                + (f", floor {floor}" if floor else "")
                + f"; with our layers {alike[1]:.3f} ({ROWS / same:.2f})",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
