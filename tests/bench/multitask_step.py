"""Training steps of CA-MTL: against plain multi-task BERT, and what choosing rows costs besides.

    python tests/bench/multitask_step.py --size base --json FILE

Both models have the same shape and the same rows of eight tasks; a step is forward, backward and
AdamW, in float32 and on one thread. They are taken in turns; what is compared is the thread's
processor time: minima of the rounds, three times over. Choosing scores as many rows of every task
as a step has, in one forward pass without gradients.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

SHAPES = {
    "base": dict(num_hidden_layers=12, hidden_size=768, num_attention_heads=12),
    "small": dict(num_hidden_layers=4, hidden_size=256, num_attention_heads=4),
}
STEP = "CA-MTL base step / plain multi-task step"
CHOICE = "CA-MTL step with uncertainty sampling / without"
LIMIT = 1.15
TASKS, ROWS, LENGTH = 8, 8, 128
ROUNDS, REPEATS = 3, 3


def measure(size: str = "base", rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Sorted ratios of the repeats: the middle one is the result, the others its spread."""
    result = _seconds(size, rounds)
    return {STEP: sorted(ours / plain for ours, plain, _ in result)}


def _seconds(size: str, rounds: int) -> list[tuple[float, float, float]]:
    """By repeat: seconds of a step of CA-MTL, of plain BERT, and of scoring candidates."""
    from megamod.models.ca_mtl.configuration import CaMtlConfig
    from megamod.models.ca_mtl.model import CaMtlForMultiTask

    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = SHAPES[size]
    tasks = dict(
        tasks=[f"task{n}" for n in range(TASKS)],
        task_kinds=["sequence"] * TASKS,
        task_labels=[["no", "yes"]] * TASKS,
        intermediate_size=4 * shape["hidden_size"],
    )
    models = [
        CaMtlForMultiTask(CaMtlConfig(**shape, **tasks, variant=variant))
        for variant in ("base", "plain")
    ]
    steps = [_step_of(model) for model in models]

    def score() -> None:
        with torch.no_grad():
            models[0](**_batch(TASKS * ROWS))

    works: list[Callable[[], None]] = [*steps, score]
    result = []
    for _ in range(REPEATS):
        least = [float("inf")] * len(works)
        for _ in range(rounds):
            for position, work in enumerate(works):
                started = time.thread_time()
                work()
                least[position] = min(least[position], time.thread_time() - started)
        result.append((least[0], least[1], least[2]))
    return result


def _batch(rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(5, 1000, (rows, LENGTH), generator=generator),
        "attention_mask": torch.ones(rows, LENGTH, dtype=torch.int64),
        "token_type_ids": torch.zeros(rows, LENGTH, dtype=torch.int64),
        "task_ids": torch.arange(rows) % TASKS,
    }


def _step_of(model: torch.nn.Module) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    labels = torch.arange(ROWS).float() % 2
    batch = _batch(ROWS)

    def step() -> None:
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Measure, and print the ratios beside the limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=tuple(SHAPES), default="base")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of which the least counts")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    args = parser.parse_args()
    result = _seconds(args.size, args.rounds)
    record = {
        STEP: sorted(ours / plain for ours, plain, _ in result),
        CHOICE: sorted((ours + score) / ours for ours, _, score in result),
    }
    for name, ratios in record.items():
        limit = f", floor <= {LIMIT}" if name == STEP else ""
        print(f"{name:50} {ratios[1]:6.3f}  ({ratios[0]:.3f} to {ratios[-1]:.3f}){limit}")
    print("ms:", ", ".join(f"{1e3 * min(column):.0f}" for column in zip(*result, strict=True)))
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
