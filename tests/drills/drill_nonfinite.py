"""N: losses and gradients that are not finite, and spikes, on any rank, under each policy.

A step that is skipped leaves weights and optimizer as they were, bit for bit, on all ranks. A run
that stops saves them. A run that rolls back goes on as one that never read the data in between.
"""

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from drills.sizes import SEED, SIZE, pick, report
from ranks import on_ranks
from train.tiny_runs import batches_of, masters, run_tiny

from megamod.errors import PolicyStop
from megamod.states.checkpoint_folder import KINDS, StateRecord
from megamod.states.weights import read_weights

CASES = pick(2, 36)  # of each policy on each number of ranks
WORLDS = (1, 2, 4) if SIZE == "nightly" else (2,)
POLICIES = ("skip", "stop", "rollback")
BATCH = 12  # cases of one set of ranks
LAST = 4  # step
SHARINGS = (("none", 0), ("none", 1), ("none", 2), ("none", 3), ("feedforward", 1))
SHARINGS += (("feedforward", 2), ("all", 1))
HUGE = 1e30  # the square of this norm overflows in float32
FAULTS = {
    "loss": (float("nan"), float("inf"), -float("inf")),
    "gradient": (float("nan"), float("inf"), HUGE),
    "spike": (1e3, 1e5),
    "large": (1e6,),  # a gradient that clipping makes small: an ordinary step
}


@dataclass(frozen=True)
class Case:
    """One fault in one run.

    Attributes:
        step: step with the fault, from 1, and `rank` and `micro_batch` (from 0) that have it.
        fault, size: key of `FAULTS`, and the factor of the loss or the value in a gradient.
        parameter: drawn number of the parameter whose gradient is changed.
    """

    untie: str
    stage: int
    policy: str
    step: int
    rank: int
    micro_batch: int
    fault: str
    size: float
    parameter: int


def draw_case(draw: random.Random, policy: str, world: int) -> Case:
    """Draw a case that a policy allows."""
    sharings = [s for s in SHARINGS if s[0] != "all" or (policy == "skip" and world == 4)]
    (untie, stage), fault = draw.choice(sharings), draw.choice(sorted(FAULTS))
    case = Case(
        *(untie, stage, policy),
        # A rollback goes to the checkpoint before that which the step began with.
        step=draw.randint(3 if policy == "rollback" else 2, LAST - 1),
        rank=draw.randrange(world),
        micro_batch=draw.randrange(8 // world),
        fault=fault,
        size=draw.choice(FAULTS[fault]),
        parameter=draw.randrange(1000),
    )
    # ZeRO 3 sums the squares in float64, so that this norm is finite and clipped.
    return replace(case, fault="large") if stage == 3 and case.size == HUGE else case


class Faulty:
    """An objective with one fault on one rank."""

    def __init__(self, objective, case: Case, rank: int, micro_steps: int):
        self.objective, self.count_items = objective, objective.count_items
        self.case, self.active = case, rank == case.rank
        self.left = (case.step - 1) * micro_steps + case.micro_batch

    def compute_loss(self, engine, batch, share):
        case, now = self.case, self.active and self.left == 0
        self.left -= 1
        hook = None
        if now and case.fault in ("gradient", "large"):
            trained = [p for p in engine.module.parameters() if p.requires_grad]
            parameter = trained[case.parameter % len(trained)]
            hook = parameter.register_hook(lambda gradient: self._change(gradient, hook))
        scored = self.objective.compute_loss(engine, batch, share)
        if now and case.fault in ("loss", "spike"):
            size = case.size
            scored = replace(scored, loss=scored.loss * size, total=scored.total * size)
        return scored

    def _change(self, gradient: torch.Tensor, hook) -> torch.Tensor:
        """Change one element of a gradient, once."""
        hook.remove()
        gradient = gradient.clone()
        gradient.view(-1)[self.case.parameter % gradient.numel()] = self.case.size
        return gradient


def read_all(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights, masters, moments and the count of updates in a checkpoint, by name."""
    folder = run / "checkpoints" / f"step-{step}"
    models = [file.parent for file in sorted(folder.rglob("config.json"))]
    tensors = {
        f"{model.relative_to(folder)}/{name}": tensor
        for model in models
        for name, tensor in read_weights(model).items()
    }
    for kind in KINDS:
        tensors |= {f"{kind}/{name}": tensor for name, tensor in masters(folder, kind).items()}
    for file in folder.rglob("state.json"):
        updates = StateRecord.read(file.parent).optimizer_steps
        tensors[f"updates of {file.parent.relative_to(folder)}"] = torch.tensor(updates)
    return tensors


def list_different(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not equal bit for bit."""
    assert before.keys() == after.keys()
    return [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]


def omit_steps(first: int, count: int):
    """From a topology to batches without those of `count` steps from `first` on (from 0)."""

    def batches(topology):
        original = batches_of(topology, 2)
        return lambda step: original(step if step < first else step + count)

    return batches


def follow(batches, step: int, micro_steps: int) -> Iterator[dict[str, object]]:
    """Yield the micro-batches of a step and of all later ones, each step opened anew."""
    while True:
        opened = batches(step)
        for _ in range(micro_steps):
            yield next(opened)
        step += 1


def run_case(rank: int, folder: Path, case: Case, world: int) -> list[str]:
    """Run one case; returns descriptions of what it lost."""
    micro_steps, stopped = 8 // world, False
    options = dict(save_steps=1, nonfinite=case.policy, spike_factor=5.0 * (case.fault == "spike"))
    try:
        _, state, _ = run_tiny(
            *(folder / "run", case.untie, case.stage, LAST),
            wrap_objective=lambda objective: Faulty(objective, case, rank, micro_steps),
            **options,
        )
    except PolicyStop:
        stopped = True
    lost = []

    def expect(condition: bool, text: str) -> None:
        if not condition:
            lost.append(f"rank {rank}: {text}")

    expect(stopped is (case.policy == "stop" and case.fault != "large"), f"stopped: {stopped}")
    if lost:
        return lost
    torch.distributed.barrier()  # rank 0 deletes checkpoints
    if case.fault == "large":
        expect(state.skipped == 0, f"{state.skipped} steps skipped")
        before, after = (read_all(folder / "run", case.step - n) for n in (1, 0))
        expect(len(list_different(before, after)) > len(after) // 2, "nothing was trained")
        finite = all(bool(tensor.isfinite().all()) for tensor in after.values())
        expect(finite, "a checkpoint is not finite")
    elif case.policy == "rollback":
        expect((state.step, state.skipped) == (LAST, 1), f"ended as {state}")
        # The checkpoint of step - 2 is loaded; the data of step - 1 and step are not read again.
        first = case.step - 2

        def without(topology):
            part = omit_steps(first, 2)(topology)
            return lambda step: follow(part, step, micro_steps)

        straight = folder / "straight"
        run_tiny(straight, case.untie, case.stage, LAST, save_steps=LAST, batches=without)
        different = list_different(read_all(straight, LAST), read_all(folder / "run", LAST))
        expect(not different, f"differ from a run without these data: {different[:5]}")
    else:
        before, after = (read_all(folder / "run", case.step - n) for n in (1, 0))
        different = list_different(before, after)
        if case.untie == "all":  # the models of other domains were trained
            expect(0 < len(different) < len(after), f"{len(different)} of {len(after)} differ")
        else:
            expect(not different, f"changed by the skipped step: {different[:5]}")
        if case.policy == "skip":
            expect(state.step == LAST, f"ended at step {state.step}")
            later = list_different(after, read_all(folder / "run", case.step + 1))
            expect(len(later) > len(after) // 2, "nothing was trained afterwards")
    return lost


def run_cases(rank: int, root: Path, cases: list[Case], world: int) -> list[list[str]]:
    logging.disable(logging.CRITICAL)
    return [run_case(rank, root / str(n), case, world) for n, case in enumerate(cases)]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_fault_changes_no_weight(policy, world, tmp_path, record_property):
    draw = random.Random(f"{SEED} {policy} {world}")
    cases, lost = [draw_case(draw, policy, world) for _ in range(CASES)], []
    for start in range(0, CASES, BATCH):
        batch = cases[start : start + BATCH]
        results = on_ranks(world, run_cases, tmp_path / str(start), batch, world, wait=1200)
        for case, texts in zip(batch, zip(*results, strict=True), strict=True):
            lost += [(case, text) for rank_texts in texts for text in rank_texts]
    report(record_property, CASES, len(lost))
    assert lost == []
