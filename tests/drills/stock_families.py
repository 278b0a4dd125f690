"""Five steps of every stock family on 2 and 4 ranks, against one process.

    python tests/drills/stock_families.py --output runs/families.json
    python tests/drills/stock_families.py --family llama gpt2

Tiny random models of the families in megamod/models/lm/hosts.py train on two domains with ragged
micro-batches: dense and independent models with ZeRO 1, 2 and 3, DEMix with 1 and 2. One process
without DeepSpeed makes the same steps, dense ones with the stock class itself, its logits and
torch's cross entropy. A DEMix run is also stopped after three steps and resumed. The command
continues where it stopped, prints the largest relative deviation of a weight by family, and ends
with exit code 1 if one is above 1e-6 or if the resumed run is not bitwise equal.
"""

import argparse
import gc
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.tiny_hosts import tiny_stock
from ranks import on_ranks
from train.tiny_runs import (
    DOMAINS,
    PEAK,
    RECIPE,
    WARMUP,
    make_batch,
    reference,
    run_tiny,
)

from megamod.files import write_json
from megamod.models.lm.hosts import HOSTS
from megamod.states.weights import read_weights
from megamod.tables import format_table
from megamod.train.optim import (
    make_adamw,
    make_linear_schedule,
    set_learning_rate,
)

Case = tuple[str, str, int]
"""Family, value of --untie, ZeRO stage."""

TWO = DOMAINS[:2]
STEPS, CUT, CLIP, LIMIT = 5, 3, 0.5, 1e-6
WORLDS = (2, 4)
LAYOUTS = (
    *(("none", stage) for stage in (1, 2, 3)),
    *(("feedforward", stage) for stage in (1, 2)),
    *(("all", stage) for stage in (1, 2, 3)),
)
RESUMED = ("feedforward", 2)
Weights = dict[str, torch.Tensor]


def name_case(case: Case) -> str:
    """Return the name of a case and of its folder."""
    return "-".join(map(str, case))


def train_cases(rank: int, root: Path, cases: list[Case], steps: int) -> None:
    """Train cases on this rank, each in a folder of its name below `root`; collective."""
    gc.freeze()  # ZeRO 3 collects garbage, which takes a second with all these imports
    for family, untie, stage in cases:
        folder = root / name_case((family, untie, stage))
        run_tiny(folder, untie, stage, steps, clip=CLIP, domains=TWO, family=family)


def resume_cases(rank: int, root: Path, cases: list[Case], steps: int) -> None:
    """Train cases as `train_cases`, stopped after `CUT` steps and resumed."""
    train_cases(rank, root, cases, CUT)
    train_cases(rank, root, cases, steps)


def find_weights(root: Path, case: Case, steps: int) -> Path:
    """Return the folder of the weights after so many steps."""
    return root / name_case(case) / "checkpoints" / f"step-{steps}"


def train_stock_class(family: str, steps: int) -> Weights:
    """Return the weights after the steps of the stock class alone, in one process."""
    model = tiny_stock(family, seed=5).train()
    optimizer = make_adamw(list(model.parameters()), **RECIPE)
    schedule = make_linear_schedule(PEAK, WARMUP, 10)
    for step in range(steps):
        batches = [make_batch(domain, step, index) for domain in TWO for index in range(2)]
        items = sum(batch["tokens"] for batch in batches)
        for batch in batches:
            mask = batch["attention_mask"].long()
            logits = model(input_ids=batch["input_ids"], attention_mask=mask).logits
            labels = batch["labels"].flatten()
            loss = functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
            (loss / items).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        set_learning_rate(optimizer, schedule(step))
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def train_in_one_process(family: str, untie: str, steps: int) -> dict[str, Weights]:
    """Return the expected weights by domain of an independent model; "" for one model."""
    if untie == "none":
        return {"": train_stock_class(family, steps)}
    results = reference(untie, steps, 2, CLIP, TWO, family)
    if untie == "all":
        return {domain: weights for domain, (weights, _) in results.items()}
    return {"": results[0]}


def measure_deviation(folder: Path, expected: dict[str, Weights]) -> float:
    """Return the largest deviation of any tensor, relative to its largest entry."""
    deviations = []
    for domain, weights in expected.items():
        saved = read_weights(folder / domain)
        for name, weight in weights.items():
            largest = weight.abs().max().clamp(min=1e-12)
            deviations.append(float((saved[name] - weight).abs().max() / largest))
    return max(deviations)


def run_family(family: str, root: Path) -> dict[str, object]:
    """Return deviations by name of a layout, and whether the resumed run is bitwise equal."""
    deviations: dict[str, float] = {}
    untied = {untie for untie, _ in LAYOUTS}
    expected = {untie: train_in_one_process(family, untie, STEPS) for untie in untied}
    cases = [(family, *layout) for layout in LAYOUTS]
    for world in WORLDS:
        on_ranks(world, train_cases, root / str(world), cases, STEPS)
        for case in cases:
            folder = find_weights(root / str(world), case, STEPS)
            name = f"{world} ranks, {case[1]}, ZeRO {case[2]}"
            deviations[name] = measure_deviation(folder, expected[case[1]])
    case = (family, *RESUMED)
    on_ranks(2, resume_cases, root / "resumed", [case], STEPS)
    whole = read_weights(find_weights(root / "2", case, STEPS))
    resumed = read_weights(find_weights(root / "resumed", case, STEPS))
    equal = all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    return {"deviations": deviations, "resumed_bitwise": equal}


def print_summary(record: dict[str, dict]) -> bool:
    """Print a line for each family; return True if all of them are within the limit."""
    rows = [("family", "dense", "DEMix", "independent", "resumed")]
    passed = True
    for family, results in record.items():
        deviations = results["deviations"]
        largest = [
            max(value for name, value in deviations.items() if f", {untie}," in name)
            for untie in ("none", "feedforward", "all")
        ]
        equal = results["resumed_bitwise"]
        passed &= max(largest) <= LIMIT and equal
        rows.append(
            (family, *(f"{value:.1e}" for value in largest), "equal" if equal else "differs")
        )
    print(format_table(rows, (1, 2, 3)))
    return passed


def main() -> None:
    """Parse the flags, run what has no result yet, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="*", choices=list(HOSTS), default=list(HOSTS))
    parser.add_argument("--output", type=Path, help="JSON file of deviations; continued")
    options = parser.parse_args()
    kept = options.output is not None and options.output.exists()
    record = json.loads(options.output.read_text()) if kept else {}
    for family in options.family:
        if family in record:
            continue
        with tempfile.TemporaryDirectory() as folder:
            record[family] = run_family(family, Path(folder))
        if options.output is not None:
            write_json(options.output, record)
        print(family, flush=True)
    sys.exit(0 if print_summary(record) else 1)


if __name__ == "__main__":
    main()
