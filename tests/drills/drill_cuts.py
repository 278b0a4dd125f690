"""R: runs that are cut at any instant and resumed are the straight ones, bit for bit.

Commands are cut by SIGTERM, which saves and stops. Runs on 1, 2 and 4 ranks die in the midst of any
micro-batch. A run that goes on with another number of ranks, 4 -> 2 -> 1 -> 4 (2 -> 1 in a
push), ends with the weights of a straight run to rounding.
"""

import logging
import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from drills.commands import COMMANDS, list_leftovers, make_workplace, read_tree
from drills.sizes import SEED, SIZE, pick, report
from drills.warm import Command
from ranks import on_ranks
from train.test_resume import Cut, DyingObjective, tensors_of
from train.tiny_runs import run_tiny

from megamod.states.weights import read_weights

CUTS = pick(1, 20)  # of each command, and on each number of ranks
TRAINING = ("dense", "demix", "independent", "encoder", "classifier", "tasks", "adapt", "seeds")
NAMES = TRAINING if SIZE == "nightly" else ("demix",)
WORLDS = (1, 2, 4) if SIZE == "nightly" else (2,)
RESHARDED = pick(1, 10)
LEGS = (4, 2, 1, 4) if SIZE == "nightly" else (2, 1)  # numbers of ranks, one after the other
BATCH = 10  # cases of one set of ranks
LAST = 6  # step
LAYOUTS = (("none", 0), ("none", 1), ("none", 2), ("none", 3))
LAYOUTS += (("feedforward", 1), ("feedforward", 2), ("transformer_output", 2))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", NAMES)
def test_commands_cut_by_a_signal(name, warm, inputs, undisturbed, tmp_path, record_property):
    draw, lost = random.Random(f"{SEED} {name}"), []
    expected, _ = undisturbed(name)
    began = time.monotonic()
    warm.run(Command(COMMANDS[name], str(make_workplace(tmp_path / "timed", inputs))))
    seconds = time.monotonic() - began
    for number in range(CUTS):
        folder, moment = make_workplace(tmp_path / str(number), inputs), draw.uniform(0, seconds)
        pid = warm.start(Command(COMMANDS[name], str(folder)))
        time.sleep(moment)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        outcome = warm.wait(pid)
        # The signal's own number: it came before the run began to listen.
        if outcome.code not in (0, 130, -signal.SIGTERM) or "Traceback" in outcome.text:
            lost.append((moment, outcome.code, outcome.text[-600:]))
        again = warm.run(Command(COMMANDS[name], str(folder)))
        tree, left = read_tree(folder / "out"), list_leftovers(folder)
        # A checkpoint of the step at which it stopped is one more, and may push an older one out.
        folders, usual = ({Path(key).parent for key in files} for files in (tree, expected))
        other = folders ^ usual if folders - usual else set()
        assert all("checkpoints" in folder.parts for folder in other)
        tree, compared = (
            {key: digest for key, digest in files.items() if Path(key).parent not in other}
            for files in (tree, expected)
        )
        different = [key for key in compared | tree if compared.get(key) != tree.get(key)]
        different = [key for key in different if not key.endswith("checkpoints/sound")]
        if again.code != 0 or different or left:
            lost.append((moment, outcome.code, again.code, different, left, again.text[-600:]))
    report(record_property, CUTS, len(lost))
    assert lost == []


@dataclass(frozen=True)
class Case:
    """A run that is cut in some micro-batches of its processes, one after the other."""

    untie: str
    stage: int
    dropout: float
    save_steps: int
    cuts: tuple[int, ...]


def draw_case(draw: random.Random, world: int) -> Case:
    untie, stage = draw.choice(LAYOUTS)
    micro_batches = LAST * 8 // world
    cuts = tuple(draw.randrange(micro_batches) for _ in range(draw.randint(1, 3)))
    return Case(untie, stage, draw.choice((0.0, 0.3)), draw.randint(1, 3), cuts)


def run_case(folder: Path, case: Case) -> list[str]:
    """Run a case straight and cut; returns descriptions of what differs."""
    options = dict(dropout=case.dropout, save_steps=case.save_steps)
    run_tiny(folder / "straight", case.untie, case.stage, LAST, **options)
    for fatal in case.cuts:
        with suppress(Cut):  # a resumed process may end before so many micro-batches
            run_tiny(
                *(folder / "cut", case.untie, case.stage, LAST),
                wrap_objective=lambda objective, n=fatal: DyingObjective(objective, n),
                **options,
            )
    run_tiny(folder / "cut", case.untie, case.stage, LAST, **options)
    straight, cut = (
        tensors_of(folder / name / "checkpoints" / f"step-{LAST}") for name in ("straight", "cut")
    )
    if straight.keys() != cut.keys():
        return [f"other tensors: {sorted(straight.keys() ^ cut.keys())[:5]}"]
    return [name for name, tensor in straight.items() if not torch.equal(tensor, cut[name])][:5]


def run_cases(rank: int, root: Path, cases: list[Case]) -> list[list[str]]:
    logging.disable(logging.CRITICAL)
    return [run_case(root / str(number), case) for number, case in enumerate(cases)]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world", WORLDS)
def test_ranks_that_die_in_any_micro_batch(world, tmp_path, record_property):
    draw = random.Random(f"{SEED} {world}")
    cases, lost = [draw_case(draw, world) for _ in range(CUTS)], []
    for start in range(0, CUTS, BATCH):
        batch = cases[start : start + BATCH]
        results = on_ranks(world, run_cases, tmp_path / str(start), batch, wait=1200)
        lost += [pair for pair in zip(batch, results[0], strict=True) if pair[1]]
    report(record_property, CUTS, len(lost))
    assert lost == []


def run_legs(rank: int, root: Path, legs: list[tuple[str, str, int, int]]) -> None:
    logging.disable(logging.CRITICAL)
    for folder, untie, stage, stop in legs:
        run_tiny(root / folder, untie, stage, stop)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_other_numbers_of_ranks_go_on_alike(tmp_path, record_property):
    draw, lost, legs = random.Random(SEED), [], [[] for _ in LEGS]
    layouts = [draw.choice(LAYOUTS) for _ in range(RESHARDED)]
    for number, (untie, _) in enumerate(layouts):
        stages = [stage for name, stage in LAYOUTS if name == untie]
        stops = sorted(draw.sample(range(1, 8), len(LEGS) - 1))
        for part, stop in enumerate((*stops, 8)):
            legs[part].append((f"went{number}", untie, draw.choice(stages), stop))
        legs[LEGS.index(1)].append((f"straight{number}", untie, stages[-1], 8))
    for world, leg in zip(LEGS, legs, strict=True):
        on_ranks(world, run_legs, tmp_path, leg, wait=1200)
    for number, layout in enumerate(layouts):
        straight, went = (
            read_weights(tmp_path / f"{name}{number}" / "checkpoints" / "step-8")
            for name in ("straight", "went")
        )
        far = [
            name
            for name, tensor in straight.items()
            if (went[name] - tensor).abs().max() > 1e-6 * tensor.abs().max()
        ]
        lost += [(layout, far[:5])] * bool(far or straight.keys() != went.keys())
    report(record_property, RESHARDED, len(lost))
    assert lost == []
